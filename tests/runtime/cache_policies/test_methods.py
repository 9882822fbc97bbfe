"""Which tokens of a prompt each method keeps, against its definition on the full attention matrix, with plain loops.

The references know nothing of what the op observes, nor of how a policy asks for it.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import CachePolicy, Rows
from tests.helpers.policy_rows import Array, attention, kept, prompt_rows

T, HEADS = 60, 3


def best(count: int, tokens: list[int], score: Callable[[int], float]) -> set[int]:
    """The ``count`` tokens with the largest scores; of equal ones the newer."""
    chosen: set[int] = set()
    while len(chosen) < count:
        top = None
        for token in tokens:
            if token not in chosen and (top is None or score(token) >= score(top)):
                top = token
        if top is None:
            break
        chosen.add(top)
    return chosen


def mass(weights: Array, queries: list[int], row: int, factor: Callable[[int], float] = lambda query: 1.0) -> float:
    total = 0.0
    for query in queries:
        for head in range(HEADS):
            total += factor(query) * weights[query, head, row]
    return total


def window(weights: Array, rows: int, sinks: int) -> set[int]:
    return set(range(sinks)) | set(range(T - rows + sinks, T))


def h2o(weights: Array, rows: int, recent: int) -> set[int]:
    newest = set(range(T - recent, T))
    others = [token for token in range(T) if token not in newest]
    return newest | best(rows - recent, others, lambda token: mass(weights, list(range(T)), token))


def tova(weights: Array, rows: int) -> set[int]:
    return {T - 1} | best(rows - 1, list(range(T - 1)), lambda token: mass(weights, [T - 1], token))


def snapkv(weights: Array, rows: int, observed: int, pooling: int) -> set[int]:
    newest, queries = set(range(T - observed, T)), list(range(T - observed, T))
    others = [token for token in range(T) if token not in newest]

    def pooled(token: int) -> float:
        around = range(token - pooling // 2, token + pooling // 2 + 1)
        return max(mass(weights, queries, other) for other in around if other in others)

    return newest | best(rows - observed, others, pooled)


def corm(weights: Array, window: int) -> set[int]:
    stay = set(range(T - window, T))
    for query in range(T - window, T):
        for head in range(HEADS):
            for row in range(query + 1):
                if weights[query, head, row] >= 1 / (query + 1):
                    stay.add(row)
    return stay


def zsmerge(weights: Array, rows: int, recent: int, decay: float) -> set[int]:
    newest = set(range(T - recent, T))
    others = [token for token in range(T) if token not in newest]

    def score(token: int) -> float:
        return mass(weights, list(range(T)), token, lambda query: decay ** (T - 1 - query))

    return newest | best(rows - recent, others, score)


def pyramid(weights: Array, rows: int, recent: int, sinks: int) -> set[int]:
    always = set(range(sinks)) | set(range(T - recent, T))
    others = [token for token in range(T) if token not in always]

    def ramp(query: int) -> float:
        return 1 + 0.2 * (query - (T - recent)) / (recent - 1)

    def score(token: int) -> float:
        return mass(weights, list(range(T - recent, T)), token, ramp)

    return always | best(rows - len(always), others, score)


CASES = {
    "window": (policy("window", rows=20), lambda w: window(w, 20, 4)),
    "window, no sinks": (policy("window", rows=20, sinks=0), lambda w: window(w, 20, 0)),
    "h2o": (policy("h2o", rows=20), lambda w: h2o(w, 20, 10)),
    "h2o, few recent": (policy("h2o", rows=21, recent=0.1), lambda w: h2o(w, 21, 2)),
    "tova": (policy("tova", rows=20), lambda w: tova(w, 20)),
    "snapkv": (policy("snapkv", rows=20, window=8), lambda w: snapkv(w, 20, 8, 1)),
    "snapkv, pooled": (policy("snapkv", rows=20, window=8, pooling=5), lambda w: snapkv(w, 20, 8, 5)),
    "corm": (policy("corm", window=4, residual_rows=0), lambda w: corm(w, 4)),
    "corm, of one": (policy("corm", window=1, residual_rows=0), lambda w: corm(w, 1)),
    "zsmerge": (policy("zsmerge", rows=21), lambda w: zsmerge(w, 20, 8, 0.98)),
    "zsmerge, fast": (policy("zsmerge", rows=20, decay=0.5, residual_rows=0), lambda w: zsmerge(w, 20, 8, 0.5)),
    "pyramid": (policy("pyramid", rows=20, recent=0.3), lambda w: pyramid(w, 20, 6, 4)),
}
AT_ONCE = {"snapkv", "pyramid"}
"""Whose window of queries lies in one call."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_the_rows_that_stay_are_those_of_the_definition(name: str, seed: int) -> None:
    chosen, definition = CASES[name]
    weights = attention(T, HEADS, seed)
    wanted = definition(weights)
    splits = [[T], [T - 16, 16]] + ([] if chosen.name in AT_ONCE else [[1] * T, [7, 30, 1, 22]])
    assert len(wanted) < T
    for calls in splits:
        rows = prompt_rows(chosen, weights, calls)
        assert kept(rows, chosen.keep(rows)) == wanted


def test_what_is_kept_depends_on_the_weights() -> None:
    """What the definitions agree with is no accident: another prompt keeps other rows."""
    for name, (_, definition) in CASES.items():
        if not name.startswith("window"):
            assert definition(attention(T, HEADS, 0)) != definition(attention(T, HEADS, 1))


@pytest.mark.parametrize(("name", "window"), [("snapkv", 16), ("pyramid", 10)])
def test_queries_of_short_calls_count_by_their_age(name: str, window: int) -> None:
    """Their mean age, and the sum of their weights, are those of the window."""
    chosen = policy(name, rows=20, window=16) if name == "snapkv" else policy(name, rows=50, recent=0.2)
    ages = np.arange(2000)
    weight, decay = chosen.weights(np.zeros((2, 1), np.int64), np.ones((2, 1), np.int64))
    assert weight.tolist() == [[1], [1]] and decay.shape == (2,)
    fading = decay[0].astype(float) ** ages
    assert np.average(ages, weights=fading) == pytest.approx((window - 1) / 2, rel=1e-5)
    several, after = chosen.weights(np.zeros((1, 5), np.int64), np.ones((1, 5), np.int64))
    np.testing.assert_allclose(several[0], fading[4::-1], rtol=1e-6)
    np.testing.assert_allclose(after, fading[5], rtol=1e-6)


@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_a_call_of_a_window_forgets_what_was_before(name: str) -> None:
    """One of as many tokens, too."""
    window = 5 if name == "snapkv" else 1
    chosen = policy(name, rows=20, **({"window": 5} if name == "snapkv" else {}))
    for tokens in (window, window + 1):
        weights, decay = chosen.weights(np.zeros((1, tokens), np.int64), np.ones((1, tokens), np.int64))
        assert weights[0].tolist() == [0.0] * (tokens - window) + [1.0] * window and decay.tolist() == [0]


def test_rows_share_no_score_with_the_window_that_stays_anyway() -> None:
    """Nor does a row beside it get the score of one of its."""
    received = np.array([1, 3, 1, 2, 0, 0, 9, 9], np.float32)
    rows = Rows(0, 5, 8, np.arange(8), received, np.ones(8, np.float32))
    stay = kept(rows, policy("snapkv", rows=5, window=2, pooling=3).keep(rows))
    assert stay == {0, 1, 2, 6, 7}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 7, 16, 40])
def test_a_ragged_batch_counts_as_each_sequence_alone(name: str, tokens: int) -> None:
    """Padding counts nothing, and a sequence that has ended forgets nothing."""
    chosen, _ = CASES[name]
    counts = [tokens, tokens // 2, 0]
    positions = np.tile(np.arange(tokens), (3, 1)) + np.array([[0], [90], [7]])
    visible = np.where(np.arange(tokens) < np.array(counts)[:, None], positions + 1, 0)
    weights, decay = chosen.weights(positions, visible)
    assert weights.dtype == decay.dtype == np.float32 and decay[2] == 1
    for row, count in enumerate(counts):
        alone, after = chosen.weights(positions[row : row + 1, :count], visible[row : row + 1, :count])
        assert weights[row].tolist() == [*alone[0], *[0.0] * (tokens - count)]
        assert decay[row] == after[0]


def test_corm_takes_a_bound() -> None:
    """Nothing goes while there is room; where more are important than there is room for, the newest findings stay."""
    weights = attention(T, HEADS, 5)
    important = corm(weights, 4)
    for bound in (T, len(important) + 1, len(important) - 3, 6, 1):
        chosen = policy("corm", window=4, rows=bound, residual_rows=0)
        rows = prompt_rows(chosen, weights, [T])
        stay = kept(rows, chosen.keep(rows))
        if bound == T:
            assert stay == set(range(T))
            continue
        assert stay <= important and len(stay) == min(bound, len(important)) and T - 1 in stay
        assert rows.received is not None
        last = {int(position): float(value) for position, value in zip(rows.positions, rows.received, strict=True)}
        older = [last[token] for token in stay if token < T - 4]
        assert max((last[token] for token in important - stay if token < T - 4), default=-1) <= min(older, default=T)


@pytest.mark.parametrize("count", range(2, 12))
def test_corm_has_a_place_for_every_residual_row(count: int) -> None:
    """Where few rows stay, no index of one is beyond them."""
    cache = policy("corm", window=1, residual_rows=8)
    positions = np.arange(count)
    rows = Rows(
        layer=0,
        budget=None,
        length=count,
        positions=positions,
        received=np.full(count, -1, np.float32),
        counts=np.ones(count, np.float32),
    )
    decision = cache.keep(rows)
    assert decision.residual is not None
    used = np.unique(decision.residual[~decision.keep])
    assert used.min() >= 0
    assert used.max() < decision.keep.sum() + len(used)


def test_the_share_of_a_query_is_of_the_rows_that_it_sees() -> None:
    """Not of the tokens before it: after an eviction there are fewer rows."""
    weight, decay = policy("corm").weights(np.array([[100, 101]]), np.array([[31, 32]]))
    assert weight.tolist() == [[31, 32]] and decay.tolist() == [1]


def test_residual_rows_take_part_in_no_ranking() -> None:
    """Whatever they received, and however new what was folded into them last is."""
    for name in ("window", "h2o", "tova", "snapkv", "corm", "zsmerge", "pyramid"):
        options = {"sinks": 0} if name in ("window", "pyramid") else {}
        chosen = policy(name, rows=4, residual_rows=1, **options)
        received = None if chosen.observe is None else np.array([50, 9, 8, 7, 6, 5, 4, 3, 2], np.float32)
        counts = np.array([30, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)
        rows = Rows(0, 4, 40, np.array([38, 31, 32, 33, 34, 35, 36, 37, 39]), received, counts)
        decision = chosen.keep(rows)
        assert decision.keep[0] and decision.keep[-1] and decision.keep.sum() == 4
        assert decision.residual is not None and set(decision.residual[~decision.keep].tolist()) == {0}


# --- the pyramid -----------------------------------------------------------------------------------------------------


def schedule(kind: str, layers: int, shrink: float) -> list[float]:
    """Rows of each layer over those of the first, as the paper hands tokens from layer to layer."""
    rows, left = [], 1.0
    for layer in range(layers):
        rows.append(left)
        if kind == "cosine":
            left *= (1 - shrink) * (math.cos(math.pi * layer / layers) + 1) / 2 + shrink
        elif kind == "linear":
            left *= 1 - (1 - shrink) * layer / layers
        else:
            left *= shrink
    return rows


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("layers", "shrink"), [(1, 0.9), (5, 0.5), (32, 0.9), (54, 0.0)])
def test_deeper_layers_have_fewer_rows(kind: str, layers: int, shrink: float) -> None:
    chosen: CachePolicy = policy("pyramid", rows=100, schedule=kind, shrink=shrink)
    budgets = chosen.budgets(layers)
    assert budgets is not None and budgets.sum() == 100 * layers and (np.diff(budgets) <= 0).all()
    wanted = np.array(schedule(kind, layers, shrink))
    if (wanted * 100 / wanted.mean() >= 5).all():
        np.testing.assert_allclose(budgets, wanted * 100 / wanted.mean(), atol=1)
    assert budgets.min() >= 5  # four sinks and the newest token
