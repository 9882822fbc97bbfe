"""What is made of measured times and of answers: percentiles, ratios, who is right, and how fast a step can be."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS
from gta_edge.evaluate.bench import run
from gta_edge.evaluate.bench.agreement import Answers, agreement, bound, choose_reference, is_exact
from gta_edge.evaluate.bench.case import Case
from gta_edge.evaluate.bench.floor import floor_ms, step_weight_bytes
from gta_edge.evaluate.bench.statistics import percentile, relative, settled, spread, summarise
from gta_edge.evaluate.bench.targets import Target
from gta_edge.formats.bundle import Bundle
from tests.helpers.tiny import TINY

POSITIVE = st.floats(1e-3, 1e6)


# --- statistics ----------------------------------------------------------------------------------------------------


@given(st.lists(POSITIVE, min_size=1, max_size=40), st.floats(0.001, 1))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    # share * n in floating point may pass a whole number by a rounding error: one value is then the other's neighbour
    needed = share * len(values)
    assert sum(v <= found for v in values) >= needed - 1e-9
    below = [v for v in values if v < found]
    assert len(below) < needed + 1e-9


def test_percentiles_of_known_values() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.01) == 7.0


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_no_percentile(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="expected one value"):
        percentile(values, share)


@given(st.lists(POSITIVE, min_size=2, max_size=20), st.floats(1e-2, 1e2))
def test_spread_has_no_unit(values: list[float], factor: float) -> None:
    found = spread(values)
    assert found is not None
    assert found >= 0
    assert (found == 0) == (len(set(values)) == 1)
    assert spread([factor * v for v in values]) == pytest.approx(found, rel=1e-9, abs=1e-9)


def test_spread_of_known_values() -> None:
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert spread([10.0]) is None


@given(st.lists(st.lists(POSITIVE, min_size=1, max_size=10), min_size=1, max_size=5), st.integers(1, 8))
def test_a_summary_is_over_all_rounds(steps: list[list[float]], batch: int) -> None:
    rounds = [{"ttft_ms": 10.0 * (i + 1), "steps_ms": part} for i, part in enumerate(steps)]
    found = summarise(rounds, 50, batch)
    every = sorted(itertools.chain(*steps))
    tpot = found["tpot_ms"]
    assert every[0] <= tpot["p50"] <= tpot["p90"] <= tpot["p99"] <= every[-1]
    assert found["decode_tokens_per_s"] == pytest.approx(batch * 1000 / tpot["p50"])
    assert found["ttft_ms"] == pytest.approx(np.median([r["ttft_ms"] for r in rounds]))
    assert found["prefill_tokens_per_s"] == pytest.approx(batch * 50 * 1000 / found["ttft_ms"])
    assert (found["rounds"], found["steps"]) == (len(steps), len(every))
    assert (found["spread"]["tpot"] is None) == (len(steps) == 1)
    assert found["per_round"]["ttft_ms"] == [r["ttft_ms"] for r in rounds]
    assert found["per_round"]["tpot_ms"] == [percentile(part, 0.5) for part in steps]


@pytest.mark.parametrize(
    ("values", "is_settled"),
    [
        ([10.0], False),  # nothing says how far apart repeats would lie
        ([10.0, 10.0], True),
        ([10.0, 10.5, 9.5], True),  # 0.5 / sqrt(3) of 10 is 2.9%
        ([10.0, 10.6, 9.4], False),  # 3.5%
        ([10.0, 10.6, 9.4, 10.6, 9.4], True),  # as far apart, but more of them
    ],
)
def test_repeats_settle_when_they_agree_or_are_many(values: list[float], is_settled: bool) -> None:
    assert settled(values) is is_settled
    assert settled([100 * value for value in values]) is is_settled


@given(st.lists(POSITIVE, min_size=1, max_size=9), st.floats(0.1, 10), st.data())
def test_a_ratio_within_rounds_does_not_see_what_slows_both_sides(
    values: list[float], times: float, data: st.DataObject
) -> None:
    slower = data.draw(st.lists(st.floats(1, 5), min_size=len(values), max_size=len(values)))
    mine = [value * slow for value, slow in zip(values, slower, strict=True)]
    other = [value * slow / times for value, slow in zip(values, slower, strict=True)]
    found = relative(mine, other)
    assert found is not None
    assert found == pytest.approx(dict.fromkeys(("median", "low", "high"), times))
    assert relative(mine, []) is None


@pytest.mark.parametrize(
    ("rounds", "spent", "enough"),
    [
        ([[10.0, 10.1, 10.0], [50.0, 50.0, 51.0]], (2.0, 9.0), True),
        ([[10.0, 13.0, 10.0], [50.0, 50.0, 51.0]], (2.0, 9.0), False),  # the first has not settled
        ([[10.0, 10.1, 10.0], [50.0, 50.0, 51.0]], (0.2, 0.9), False),  # short: more of them cost nothing
        ([[10.0, 13.0, 10.0], [50.0, 50.0, 51.0]], (20.0, 40.0), True),  # patience ends
    ],
)
def test_when_there_are_rounds_enough(
    tiny_bundle: Path, rounds: list[list[float]], spent: tuple[float, float], enough: bool
) -> None:
    opened = Bundle.open(tiny_bundle)
    cases = [Case("it", opened, Target("torch"), {}, tiny_bundle) for _ in rounds]
    for case, medians in zip(cases, rounds, strict=True):
        case.rounds = {8: [{"ttft_ms": 100.0, "steps_ms": [median]} for median in medians]}
    by_entrant = {id(case): seconds for case, seconds in zip(cases, spent, strict=True)}
    assert run._is_enough(cases, 8, by_entrant) is enough


# --- who is right --------------------------------------------------------------------------------------------------


def answers(logits: Any, backend: str = "onnxruntime", compute: str = "fp32", **options: bool) -> Answers:
    return Answers(np.asarray(logits, np.float32), backend, compute, **options)


def random_logits(seed: int, shape: tuple[int, ...] = (5, 2, 40)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(st.integers(0, 2**32), st.sampled_from(sorted(COMPUTE_BOUNDS)), st.floats(0.01, 100))
@settings(max_examples=50)
def test_answers_agree_within_the_bound_of_their_type(seed: int, compute: str, scale: float) -> None:
    right = scale * random_logits(seed)
    allowed = COMPUTE_BOUNDS[compute]
    sorted_logits = np.sort(right, axis=-1)
    assume((sorted_logits[..., -1] - sorted_logits[..., -2]).min() > 3 * allowed * right.std())  # no near ties
    for factor, agrees in ((0.5, True), (2.5, False)):
        moved = right.copy()
        moved[0, 1, 7] += factor * allowed * right[:, 1].std()
        found = agreement(answers(moved, compute=compute), answers(right, "torch"))
        assert found["agrees"] is agrees
        assert found["max_rel_error"] == pytest.approx(factor * allowed, rel=0.05)
        assert found["bound"] == allowed


def test_what_follows_another_choice_is_not_compared() -> None:
    right = random_logits(1)
    other = right.copy()
    first, second = np.argsort(right[2, 0])[:-3:-1]
    other[2, 0, second] = right[2, 0, second] = right[2, 0, first]  # a tie, which both may decide as they like
    other[2, 0, second] += 1e-6
    right[2, 0, first] += 1e-6
    other[3:, 0] = random_logits(2)[3:, 0]
    found = agreement(answers(other), answers(right))
    assert found["agrees"]
    assert (found["same_tokens"], found["compared_tokens"]) == (2 + 5, 10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    right, bad = random_logits(1), random_logits(1)
    bad[0, 0, 0] = value
    assert not agreement(answers(bad, compute="bf16"), answers(right))["agrees"]
    assert not agreement(answers(bad), answers(bad))["agrees"]
    assert choose_reference({"bad": answers(bad, "torch"), "right": answers(right)}) == "right"


def test_the_most_exact_is_the_reference() -> None:
    logits = random_logits(0)
    given_ = {
        "rounded": answers(logits, rounds=True),
        "gpu": answers(logits, "tensorrt", "bf16"),
        "cache": answers(logits, "tensorrt", "fp16", quantised_cache=True),
        "ort": answers(logits),
        "torch": answers(logits, "torch"),
    }
    order = []
    while given_:
        order.append(choose_reference(given_))
        del given_[order[-1]]
    assert order == ["torch", "ort", "gpu", "cache", "rounded"]


def test_a_reference_that_rounds_widens_the_bound() -> None:
    half, brain = (answers(random_logits(0), compute=c) for c in ("fp16", "bf16"))
    assert not is_exact(half)
    assert agreement(brain, half)["bound"] == pytest.approx(bound(half) + bound(brain))


# --- what a step reads ---------------------------------------------------------------------------------------------


def test_the_floor() -> None:
    assert floor_ms(6e9, 4e9, 20e9) == 500


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_step_reads_every_weight_once(tiny_bundle: Path, backend: str) -> None:
    opened = {"backend": backend, "compute": "fp32", "holds_codes": backend != "torch", "chunk_size": 256}
    found = step_weight_bytes(Bundle.open(tiny_bundle), opened, 1)
    shapes = TINY.parameter_shapes()
    every = 4 * sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    # of an embedding that is not the head's matrix too, a step reads a row
    unread = 0 if TINY.tie_word_embeddings else 4 * TINY.vocab_size * TINY.hidden_size
    assert every - unread <= found <= every - unread + 4 * TINY.hidden_size
