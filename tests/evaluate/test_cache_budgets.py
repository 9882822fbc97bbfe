"""What cutting a layer costs, and budgets that cost least."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError, InputError
from gta_edge.evaluate.cache_budgets import SHARES, LayerProbe, calibrate, cheapest, cut_windows, measure_costs
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import Rows
from gta_edge.runtime.cache_policies.measured import LayerRows
from gta_edge.runtime.registry import load

# --- which budgets are the cheapest ----------------------------------------------------------------------------------


def cost_of(budget: int, curve: list[float], rows: list[int], most: int) -> float:
    """A layer's cost between the sizes that were measured, straight over the logarithm."""
    points = [*rows, most]
    for (left, a), (right, b) in itertools.pairwise(zip(points, [*curve, 0.0], strict=True)):
        if left <= budget <= right:
            return a + (b - a) * (np.log(budget) - np.log(left)) / (np.log(right) - np.log(left))
    raise AssertionError(budget)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.05, 0.9)), min_size=2, max_size=3),
    st.integers(0, 40),
)
@settings(deadline=None, max_examples=40)
def test_no_other_budgets_cost_less(layers: list[tuple[float, float]], more: int) -> None:
    """All are tried, of curves that fall ever more slowly."""
    rows, most = [2, 6], 20
    costs = [[cost, cost * share * 0.6] for cost, share in layers]
    total = len(layers) * rows[0] + min(more, len(layers) * (most - rows[0]))
    found = cheapest(np.array(costs), rows, most, total)
    assert sum(found) == total and all(rows[0] <= budget <= most for budget in found)
    convex = all((a - b) / np.log(3) * 1 / 6 >= b / np.log(20 / 6) / 6 for a, b in costs)
    possible = itertools.product(range(rows[0], most + 1), repeat=len(layers))
    costs_of = [
        sum(cost_of(budget, curve, rows, most) for budget, curve in zip(budgets, costs, strict=True))
        for budgets in possible
        if sum(budgets) == total
    ]
    own = sum(cost_of(budget, curve, rows, most) for budget, curve in zip(found, costs, strict=True))
    if convex:
        assert own <= min(costs_of) + 1e-9


def test_rows_go_where_they_gain() -> None:
    costs = np.array([[0.03, 0.01, 0.004], [0.001, 0, 0], [0.0, 0.0, 0.0], [0.03, 0.012, 0.005]])
    found = cheapest(costs, [20, 60, 180], 512, 4 * 102)
    assert sum(found) == 408
    assert found[2] == 20 and found[1] < 80 and min(found[0], found[3]) > 120
    assert cheapest(costs, [20, 60, 180], 512, 80) == (20,) * 4
    assert cheapest(costs, [20, 60, 180], 512, 4 * 512) == (512,) * 4


def test_noise_that_looks_like_a_gain_counts_as_nothing() -> None:
    noisy = np.array([[-0.002, 0.001, -0.003], [0.02, 0.005, 0.004]])
    clean = np.array([[0.001, 0.001, 0], [0.02, 0.005, 0.004]])
    assert cheapest(noisy, [20, 60, 180], 512, 204) == cheapest(clean, [20, 60, 180], 512, 204)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_windows_are_spread_over_a_text() -> None:
    ids = np.arange(100)
    assert cut_windows(ids, 3, 10).tolist() == [[*range(s, s + 10)] for s in (0, 45, 90)]
    assert cut_windows(ids, 1, 100).tolist() == [ids.tolist()]
    with pytest.raises(InputError, match="the text has 100 tokens; give one of at least 101"):
        cut_windows(ids, 2, 101)


def test_a_probe_cuts_the_layers_that_it_is_told() -> None:
    rule = policy("window", rows=50, sinks=1)
    probe = LayerProbe(rule=rule)
    rows = Rows(1, None, 40, np.arange(40), None, np.ones(40, np.float32))
    assert probe.budgets(3) is None and probe.keep(rows).keep.all()
    probe.cut[1] = 5
    assert np.flatnonzero(probe.keep(rows).keep).tolist() == [0, 36, 37, 38, 39]
    probe.cut.clear()
    assert probe.keep(rows).keep.all()


def test_costs_are_those_of_sessions_with_these_budgets(tiny_bundle: Path) -> None:
    """Each measured with a session of its own, whose policy has rows for every layer."""
    rng = np.random.default_rng(0)
    windows, prompt = rng.integers(0, 250, (2, 48)), 32
    rule = policy("zsmerge", rows=8)
    probe = LayerProbe(rule=rule)
    done: list[tuple[int, int]] = []
    with load(tiny_bundle, "torch", cache=probe, chunk_size=prompt) as session:
        costs = measure_costs(session, probe, windows, prompt, [4, 9], progress=lambda _, *n: done.append(n))
    assert costs.shape == (2, 2) and done[0] == (0, 5) and done[-1] == (5, 5)
    assert np.abs(costs).max() > 1e-5

    def loss(layer_rows: tuple[int, int]) -> float:
        cache = LayerRows(rule=rule, layer_rows=layer_rows)
        with load(tiny_bundle, "torch", cache=cache, chunk_size=prompt) as session:
            session.forward(windows[:, :prompt])
            logits = session.forward(windows[:, prompt:-1], all_logits=True).astype(np.float64)
        normaliser = np.log(np.exp(logits).sum(-1))
        targets = windows[:, prompt + 1 :]
        return float((normaliser - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean())

    base = loss((prompt, prompt))
    wanted = [[loss((count, prompt)) - base for count in (4, 9)], [loss((prompt, count)) - base for count in (4, 9)]]
    np.testing.assert_allclose(costs, wanted, atol=2e-6)


def test_budgets_of_a_bundle(tiny_bundle: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    found = calibrate(Bundle.open(tiny_bundle), text, rule="window", share=0.3, windows=1, tokens=96, backend="torch")
    assert sum(found.rows) == 2 * round(0.3 * 64) and min(found.rows) >= 5
    assert found.measured["rows"] == [max(5, round(share * 64)) for share in SHARES]
    assert found.measured["prompt"] == 64 and np.shape(found.measured["costs"]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.01}, "share is 0.01; give one from 0.04 to 1"),
        ({"share": 1.0}, "share is 1; give one from 0.04 to 1"),
        ({"windows": 0}, "windows is 0; give from 1 to 256"),
        ({"windows": 10**18}, "give from 1 to 256"),
        ({"tokens": 90}, "a window has 90 tokens; give from 96 to the model's 128 positions"),
        ({"rule": "lru"}, "no cache policy is called 'lru'; there are window"),
        ({"rule": "measured"}, "rule is 'measured'"),
        ({"tokens": 10**6}, "a window has 1000000 tokens; give from 96 to the model's 128 positions"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tiny_bundle: Path, options: dict[str, object], said: str) -> None:
    text = "some text " * 200
    with pytest.raises(InputError, match=said) as error:
        calibrate(Bundle.open(tiny_bundle), text, backend="torch", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("tensorrt", r"tensorrt evicts as its engine was built for; take one of .*torch"),
        ("tpu", "no backend is called"),
    ],
)
def test_a_backend_that_cannot_be_told_is_refused(tiny_bundle: Path, backend: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        calibrate(Bundle.open(tiny_bundle), "some text " * 200, backend=backend)


def test_a_backend_is_found(tiny_bundle: Path) -> None:
    found = calibrate(Bundle.open(tiny_bundle), "some text " * 200, rule="window", windows=1, tokens=96)
    assert found.measured["backend"] in ("onnxruntime", "torch")


def test_a_text_that_is_too_short_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"the text has \d+ tokens; give one of at least 128"):
        calibrate(Bundle.open(tiny_bundle), "a word", backend="torch")
