"""Which rows new tokens of a tree see, and where rows move, against a list of paths; no model and no memory of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import CapacityError, InputError
from gta_edge.model.config import parse_config
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.tree_cache import TreeCache, TreeCall
from gta_edge.runtime.tree_rows import PREFIX, TreeRows, routed
from tests.helpers import reference

P = 40
CONFIG = parse_config(
    reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, max_position_embeddings=P)
)
LAYERS = CONFIG.num_hidden_layers


class Memory:
    """A session of which the cache's rows hold numbers of tokens; steps run by looking at rows."""

    def __init__(self, batch: int = 1, **options: Any) -> None:
        self.cache = TreeCache(CONFIG, capacity_step=8, **options)
        self.rows = np.zeros((LAYERS, batch, 0), np.int64)
        self.tokens = itertools.count(1)
        self.cache.reserve(batch, 1, self.resize)
        self.texts: list[list[int]] = [[] for _ in range(batch)]

    def resize(self, batch: int, capacities: Sequence[int]) -> None:
        with self.cache.replacing(batch, lambda: None):
            grown = np.full((LAYERS, batch, capacities[0]), -1)
            grown[:, :, : self.rows.shape[2]] = self.rows
            self.rows = grown

    def _move(self, moves: Moves) -> None:
        assert not len(moves.folds)
        places = [(layer, b, row) for layer, b, _, row in moves.moves.tolist()]
        sources = {(layer, b, row) for layer, b, row, _ in moves.moves.tolist()}
        assert len(set(places)) == len(places) and not sources & set(places)
        assert moves.moves[:, 0].tolist() == sorted(moves.moves[:, 0].tolist())
        for layer, b, source, target in moves.moves.tolist():
            self.rows[layer, b, target] = self.rows[layer, b, source]

    def _received(self) -> list[Any]:
        raise AssertionError("nothing is observed")

    def _rotate(self, shifts: Any) -> None:
        raise AssertionError("nothing is rotated")

    def _reopen(self, sequence: int, block: int) -> None:
        raise AssertionError("there are no blocks")

    def write(self, ids: np.ndarray, past: np.ndarray, step: ManagedStep) -> list[list[list[int]]]:
        """Append ids [B, T]; return what each sees of its sequence's rows, sorted, the same in all layers."""
        for b, row in enumerate(ids):
            self.rows[:, b, past[b] : past[b] + len(row)] = row
        assert (step.past_length == past).all() and step.past_length.shape == (LAYERS, len(ids))
        return [
            [self.seen(b, t, int(past[b]) + ids.shape[1], step) for t in range(ids.shape[1])] for b in range(len(ids))
        ]

    def seen(self, b: int, t: int, end: int, step: ManagedStep) -> list[int]:
        assert step.branch_start is not None and step.branches is not None
        found = []
        for row in range(end):
            place = row - int(step.branch_start[0, b])
            inside = 0 <= place < step.branches.shape[1] and int(step.branches[b, place]) >> t & 1
            if place < 0 or inside:
                assert len(set(self.rows[:, b, row].tolist())) == 1
                found.append(int(self.rows[0, b, row]))
        return sorted(found)

    def say(self, count: int) -> None:
        """Continue every text by so many tokens, without a tree."""
        cache, batch = self.cache, self.cache.batch
        ids = np.array([[next(self.tokens) for _ in range(count)] for _ in range(batch)])
        (part,) = cache.plan(cache.length, np.full(batch, count), count, 0)
        cache.reserve(batch, int(cache.length.max()) + count, self.resize)
        step = cache.prepare(part, self)
        assert step.causal
        seen = self.write(ids, cache.length, step)
        for b, (text, row) in enumerate(zip(self.texts, ids.tolist(), strict=True)):
            for t in range(count):
                assert seen[b][t] == sorted(text + row[: t + 1])
            text += row
        cache.append(part, self)

    def run(self) -> list[list[int]]:
        """Run what waits; return what every new node sees, by sequence, and its own token, sorted."""
        cache = self.cache
        found: list[list[int]] = []
        with cache.taking_back(self):
            call = TreeCall(cache, 0, lambda first, stop, width: slice(None))
            ids = np.array([[next(self.tokens) for _ in range(int(call.counts.max()))] for _ in range(cache.batch)])
            past = call.past
            for part in call.parts:
                cache.reserve(cache.batch, int(past.max()) + part.width + call.spare, self.resize)
                step = call.prepare(part)
                assert step.positions is not None and not step.causal
                positions = [
                    [tree.nodes[node].position for node in tree.waiting[: int(part.real[b])]]
                    for b, tree in cache.trees.items()
                ]
                assert [
                    row[: len(own)].tolist() for row, own in zip(step.positions, positions, strict=True)
                ] == positions
                seen = self.write(ids[:, part.start : part.stop], past, step)
                for b in range(cache.batch):
                    found += seen[b][: int(part.real[b])]
                    assert all(other == sorted(self.texts[b]) for other in seen[b][int(part.real[b]) :])  # what pads
                past = call.append(part, ids)
        return found


def check(memory: Memory, paths: dict[int, list[int]], sequence: int = 0) -> None:
    """Every node of the tree is in a row of its own that holds its token, and the text in the rows before."""
    tree = memory.cache.trees[sequence]
    text = memory.texts[sequence]
    assert memory.cache.length[sequence] == tree.start == len(text)
    assert memory.rows[0, sequence, : len(text)].tolist() == text
    assert {number: memory.rows[0, sequence, node.row] for number, node in tree.nodes.items()} == {
        node: path[-1] for node, path in paths.items()
    }
    places = [node.row for node in tree.nodes.values()]
    assert len(set(places)) == len(places) == sum(number != -1 for number in tree.at)
    assert all(tree.nodes[node].position == len(text) + len(path) - 1 for node, path in paths.items())


Draw = Callable[[st.SearchStrategy[Any]], Any]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_growing_accepting_and_dropping_is_what_lists_of_paths_say(data: st.DataObject) -> None:
    memory = Memory()
    memory.say(data.draw(st.integers(1, 4)))
    tree = memory.cache.open(0)
    paths: dict[int, list[int]] = {}  # tokens from the text to each node
    for _ in range(data.draw(st.integers(1, 8))):
        actions = ["grow"] + ["accept", "drop"] * bool(paths) + ["say"] * (not paths)
        action = data.draw(st.sampled_from(actions))
        if action == "grow":
            size = data.draw(st.sampled_from([1, 2, 5, 20, 70]))
            new: list[int] = []
            for _ in range(size):
                shallow = [n for n in [*paths, *new] if tree.nodes[n].position < P - 1]
                if not shallow and len(memory.texts[0]) == P:
                    break
                roots = [PREFIX] if len(memory.texts[0]) < P else []
                new += tree.grow([data.draw(st.sampled_from(roots + shallow[-12:]))])
            if not new:
                continue
            sees = memory.run()
            for node, found in zip(new, sees, strict=True):
                parent = tree.nodes[node].parent
                paths[node] = [*paths.get(parent, []), tree.nodes[node].token]
                assert found == sorted(memory.texts[0] + paths[node])
        elif action == "accept":
            node = data.draw(st.sampled_from(sorted(paths)))
            accepted = paths[node]
            below = tree.below([node])
            memory.cache.accept(0, node, memory)
            memory.texts[0] += accepted
            paths = {n: paths[n][len(accepted) :] for n in below if n != node}
        elif action == "drop":
            nodes = data.draw(st.lists(st.sampled_from(sorted(paths)), min_size=1, max_size=3))
            gone = tree.below(nodes)
            tree.remove(gone)
            paths = {n: path for n, path in paths.items() if n not in gone}
        elif len(memory.texts[0]) + 2 <= P:
            memory.say(2)
        check(memory, paths)
        assert tree.rows <= len(paths) + max(16, len(paths)) + 70


def test_rows_of_dropped_nodes_are_used_again() -> None:
    """Branches end one after the other, as answers do; what is in use follows what is there."""
    memory = Memory()
    memory.say(3)
    tree = memory.cache.open(0)
    leaves = tree.grow([PREFIX] * 32)
    memory.run()
    most = 0
    while leaves:
        leaves = tree.grow(leaves)
        memory.run()
        tree.remove(tree.below([tree.path(leaves.pop(0))[0]]))
        most = max(most, tree.rows)
        assert tree.rows <= len(tree.nodes) + max(16, len(tree.nodes) // 4) + 33
    assert tree.rows == 0 and most < 32 * 17


@settings(max_examples=200, deadline=None, derandomize=True)
@given(order=st.permutations(range(9)), count=st.integers(1, 9), spare=st.integers(1, 4))
def test_rows_change_places_by_copies_of_which_none_is_overwritten_too_soon(
    order: list[int], count: int, spare: int
) -> None:
    pairs = list(zip(order[:count], range(count), strict=True))
    rows = list(range(9 + spare))
    sets = routed(pairs, range(9, 9 + spare))
    for copies in sets:
        sources, targets = {source for source, _ in copies}, [target for _, target in copies]
        assert copies and len(set(targets)) == len(targets) and not sources & set(targets)
        assert not any(source == target for source, target in copies)
        before = list(rows)
        for source, target in copies:
            rows[target] = before[source]
    assert rows[:count] == order[:count]
    assert len(sets) <= (2 if spare >= count else 2 * count)  # with room for all, two


def test_a_path_that_was_grown_first_moves_nothing() -> None:
    memory = Memory()
    memory.say(2)
    tree = memory.cache.open(0)
    (a,) = tree.grow([PREFIX])
    (b,) = tree.grow([a])
    tree.grow([PREFIX, a])
    memory.run()
    memory._move = None  # which is not called
    memory.cache.accept(0, b, memory)
    assert memory.cache.length.tolist() == [4] and memory.cache.in_use.tolist() == [4]


def test_several_sequences_have_trees_of_their_own() -> None:
    memory = Memory(batch=3)
    memory.say(2)
    trees = [memory.cache.open(b) for b in range(3)]
    trees[0].grow([PREFIX, PREFIX])
    trees[2].grow([PREFIX])
    seen = memory.run()
    texts = memory.texts
    tokens = [[node.token for node in tree.nodes.values()] for tree in trees]
    assert seen == [sorted([*texts[b], token]) for b in (0, 2) for token in tokens[b]]
    trees[1].grow([PREFIX])
    memory.run()
    memory.cache.accept(0, 1, memory)
    texts[0] += [tokens[0][1]]
    check(memory, {})
    check(memory, {0: [trees[1].nodes[0].token]}, 1)
    check(memory, {0: tokens[2]}, 2)
    assert memory.cache.length.tolist() == [3, 2, 2] and memory.cache.in_use.tolist() == [3, 3, 3]


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_rows_may_be_more_than_positions() -> None:
    memory = Memory()
    memory.say(P - 1)
    tree = memory.cache.open(0)
    tree.grow([PREFIX] * (3 * P))
    assert all(found[:-1] == memory.texts[0] for found in memory.run())
    assert memory.cache.in_use.tolist() == [4 * P - 1] and memory.cache.capacity >= 4 * P
    node = next(iter(tree.nodes))
    tree.grow([node])
    with pytest.raises(
        CapacityError, match=f"sequence 0 holds {P - 1} tokens and its tree would reach {P + 1}; the model"
    ):
        memory.run()
    assert not tree.waiting and len(tree.nodes) == 3 * P


def test_rows_have_a_bound_too() -> None:
    memory = Memory(max_rows=20)
    memory.say(4)
    memory.cache.open(0).grow([PREFIX] * 16)
    with pytest.raises(CapacityError, match="would take 21 rows, and there can be 20; drop nodes"):
        memory.run()
    memory.cache.trees[0].grow([PREFIX] * 15)
    memory.run()


def test_without_trees_the_capacity_is_that_of_other_caches() -> None:
    cache = TreeCache(CONFIG, capacity_step=16)
    assert [cache.capacity_for(tokens) for tokens in (1, 16, 17, 33, P)] == [16, 16, 32, P, P]
    assert cache.capacity_for(P + 1) == 48


def test_a_text_with_a_tree_is_not_continued_beside_it() -> None:
    memory = Memory()
    memory.say(2)
    tree = memory.cache.open(0)
    memory.say(1)  # it has no nodes
    (node,) = tree.grow([PREFIX])
    assert tree.nodes[node].position == 3
    with pytest.raises(InputError, match="sequence 0 has a tree with nodes, and the tokens are none of it; give tree="):
        memory.say(1)
    with pytest.raises(
        InputError, match=r"sequence 0 has a tree with nodes; accept a path of it, or close\(\) it, first"
    ):
        memory.cache.open(0)
    for sequence in (1, "0", True):
        with pytest.raises(InputError, match=f"there is no sequence {sequence!r}: the cache holds 1; expected 0 to 0"):
            memory.cache.open(sequence)
    tree.remove([node])
    assert memory.cache.open(0) is not tree


def test_words_are_those_of_paths() -> None:
    """The bits themselves, once by hand: two branches of one root, and a second root."""
    rows = TreeRows(5)
    a, b = rows.grow([PREFIX, PREFIX])
    c, d = rows.grow([a, a])
    assert rows.words([a, b, c, d]).tolist() == [0b1101, 0b0010, 0b0100, 0b1000]
    rows.ran([a, b, c, d], [1, 2, 3, 4])
    (e,) = rows.grow([d])
    assert rows.words([e]).tolist() == [1, 0, 0, 1, 1]
    rows.back_to(4)
    assert e not in rows.nodes and rows.path(d) == [a, d]
    last = rows.grow([PREFIX] * 64)
    assert rows.words(last)[-1] == -(2**63)
