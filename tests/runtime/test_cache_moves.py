"""From a policy's decisions to moves of rows, against rows that lie in a list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.runtime.cache_moves import Moves, by_layer, lay_out, merged


@st.composite
def decisions(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """``keep``, ``into``, positions, counts and which rows are residual rows, as a session could have them."""
    count, most = draw(st.integers(1, 24)), draw(st.integers(0, 4))
    keep = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    into = np.array(draw(st.lists(st.integers(-1, most - 1), min_size=count, max_size=count)))
    positions = np.array(draw(st.permutations(range(count))))
    counts, residual = np.ones(count, np.float32), np.zeros(count, bool)
    for row in range(min(most, count)):
        residual[row] = draw(st.booleans())
        counts[row] = draw(st.integers(1, 9)) if residual[row] else 1
    begun = {int(i) for i in into[~keep] if i >= 0}
    stay = int(keep.sum()) + sum(not (i < count and keep[i] and residual[i]) for i in begun)
    if max(begun, default=-1) >= min(stay, count):
        into[:] = -1
    return keep, into, positions, counts, residual


def expected_rows(
    keep: np.ndarray, into: np.ndarray, counts: np.ndarray, residual: np.ndarray, values: np.ndarray
) -> tuple[list[tuple[float, float]], dict[int, tuple[float, float]]]:
    """Values and counts of the rows that stay as they are, sorted, and of residual rows that others are folded into."""
    folded: dict[int, tuple[float, float]] = {}
    for index in sorted({int(i) for i in into[~keep] if i >= 0}):
        members = [row for row in range(len(keep)) if not keep[row] and into[row] == index]
        if keep[index] and residual[index]:
            members.append(index)
        total = sum(counts[row] for row in members)
        folded[index] = sum(counts[row] * values[row] for row in members) / total, total
    plain = [row for row in range(len(keep)) if keep[row] and not (row in folded and residual[row])]
    return sorted((values[row], counts[row]) for row in plain), folded


@settings(max_examples=500, deadline=None, derandomize=True)
@given(decision=decisions())
def test_rows_end_up_as_the_decision_says(decision: tuple[np.ndarray, ...]) -> None:
    keep, into, positions, counts, residual = decision
    generator = np.random.default_rng(1)
    values = generator.standard_normal(len(keep))
    plain, folded = expected_rows(keep, into, counts, residual, values)
    layout = lay_out(keep, into, positions, counts, residual)
    stay = len(plain) + len(folded)
    assert len(layout.origin) == len(layout.counts) == len(layout.residual) == stay

    memory = np.concatenate([values, np.full(8, np.nan)])
    for source, target in layout.relocated:
        assert target >= len(keep)
        memory[target] = memory[source]
    targets = set(layout.folds[:, 1].tolist())
    assert targets == set(folded)
    before = np.nan_to_num(memory)
    for target in targets:
        own = layout.folds[:, 1] == target
        sources, weights = layout.folds[own, 0], layout.fold_weights[own]
        assert target in sources
        assert not (targets - {target}) & {int(s) for s, w in zip(sources, weights, strict=True) if w > 0}
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        memory[target] = (weights * before[sources]).sum()
    assert len({*layout.moves[:, 1]}) == len(layout.moves)
    assert not {*layout.moves[:, 0]} & {*layout.moves[:, 1]}  # in any order it is the same
    for source, target in layout.moves:
        memory[target] = memory[source]

    for index, (value, count) in folded.items():
        np.testing.assert_allclose(memory[index], value, rtol=1e-5)
        assert layout.counts[index] == count
        assert layout.residual[index]
        members = [row for row in range(len(keep)) if not keep[row] and into[row] == index]
        members += [index] * bool(keep[index] and residual[index])
        assert positions[layout.origin[index]] == max(positions[row] for row in members)
    others = [row for row in range(stay) if row not in folded]
    assert sorted((memory[row], layout.counts[row]) for row in others) == plain
    np.testing.assert_array_equal(values[layout.origin[others]], memory[others])


def test_only_as_many_rows_move_as_leave_holes() -> None:
    keep = np.array([True, False, True, False, True, True, False, True])
    layout = lay_out(keep, None, np.arange(8), np.ones(8, np.float32), np.zeros(8, bool))
    assert layout.moves.tolist() == [[5, 1], [7, 3]]
    assert layout.origin.tolist() == [0, 5, 2, 7, 4]
    assert not len(layout.folds)
    assert not len(layout.relocated)


def test_what_stands_where_a_residual_row_begins_is_moved_away_first() -> None:
    keep = np.array([True, False, False, True])
    layout = lay_out(keep, np.array([0, 0, 0, 0]), np.arange(4), np.ones(4, np.float32), np.zeros(4, bool))
    relocating, rest = merged([(3, 1, layout)])
    assert relocating.moves.tolist() == [[3, 1, 0, 4]]
    assert rest.folds.tolist() == [[3, 1, 1, 0], [3, 1, 2, 0], [3, 1, 0, 0]]
    assert rest.fold_weights.tolist() == [0.5, 0.5, 0]
    assert rest.moves.tolist() == [[3, 1, 3, 1], [3, 1, 4, 2]] or rest.moves.tolist() == [[3, 1, 4, 1], [3, 1, 3, 2]]


def test_moves_of_all_layers_are_one() -> None:
    keep = np.array([False, True])
    layout = lay_out(keep, None, np.arange(2), np.ones(2, np.float32), np.zeros(2, bool))
    (moves,) = merged([(0, 0, layout), (0, 2, layout), (5, 1, layout)])
    assert moves.moves.tolist() == [[0, 0, 1, 0], [0, 2, 1, 0], [5, 1, 1, 0]]
    assert moves.moves.dtype == np.int32
    assert list(by_layer(moves.moves)) == [(0, slice(0, 2)), (5, slice(2, 3))]
    assert merged([]) == []
    assert not Moves(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.int32), np.zeros(0, np.float32))
