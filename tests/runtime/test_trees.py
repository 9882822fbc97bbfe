"""Sessions that hold trees of tokens: each node is its path alone, and what is accepted is as if only that had run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.runtime.backend import Backend
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.registry import BACKENDS as REGISTERED
from gta_edge.runtime.registry import load
from gta_edge.runtime.session import Session
from gta_edge.runtime.token_tree import PREFIX, TokenTree
from gta_edge.runtime.tree_cache import TreeCache
from gta_edge.runtime.tree_rows import TreeRows
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import (
    BACKENDS,
    MODELS,
    POSITIONS,
    VOCAB,
    bundle_of,
    open_session,
    prompt,
    weights_of,
)

TOLERANCE = 1e-4
Start = Callable[..., Session]


@pytest.fixture(params=["gta", "gqa"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Start]:
    started: list[Session] = []

    def begin(**options: Any) -> Session:
        started.append(open_session(backend, model, **{"trees": True, **options}))
        return started[-1]

    yield begin
    for session in started:
        session.close()


one_model = pytest.mark.parametrize("model", ["gta"], indirect=True)
onnxruntime = pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)


def grown(session: Session, tree: TokenTree, parents: list[int], seed: int) -> np.ndarray:
    """Grow nodes with random tokens, run them, and return their logits [N, V]."""
    tree.grow(parents)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (1, len(parents)))
    return session.forward(ids, tree=tree, all_logits=True)[0]


def alone(model: str, text: list[int]) -> np.ndarray:
    """The last token's logits of a text in float64."""
    return ManagedModel(MODELS[model], weights_of(model)).call(text)[-1]


def assert_alone(model: str, session: Session, tree: TokenTree, text: list[int], found: dict[int, np.ndarray]) -> None:
    """Nodes have the logits of the text and their path."""
    for node, logits in found.items():
        expected = alone(model, text + tree.ids(node))
        assert reference.relative_error(logits, expected) <= TOLERANCE, node


# --- each node is its path alone --------------------------------------------------------------------------------------


def test_each_node_is_its_path_alone(start: Start, model: str) -> None:
    """Grown in several calls, with a branch dropped, a path accepted, and what descends from it kept."""
    session, text = start(capacity_step=16), prompt(1, 11)[0].tolist()
    session.forward([text])
    tree = session.tree()
    first = grown(session, tree, [PREFIX, PREFIX, 0, 2, 0, 1], seed=1)
    assert_alone(model, session, tree, text, {3: first[3], 4: first[4], 5: first[5]})
    tree.drop([1])
    second = grown(session, tree, [3, 4, 3, 6], seed=2)
    assert_alone(model, session, tree, text, {8: second[2], 9: second[3], 7: second[1]})
    text += tree.ids(2)
    tree.accept(2)
    assert tree.nodes == [3, 6, 8, 9] and session.length.tolist() == [len(text)]
    third = grown(session, tree, [9, PREFIX, 8], seed=3)
    assert_alone(model, session, tree, text, {10: third[0], 11: third[1], 12: third[2]})
    text += tree.ids(10)
    tree.accept(10)
    tree.close()
    expected = alone(model, [*text, 5])
    assert reference.relative_error(session.forward([[5]])[0], expected) <= TOLERANCE


@one_model
def test_many_nodes_are_run_in_parts(start: Start, model: str) -> None:
    """More than a word has bits, in a chain and in branches: a later part sees what an earlier one wrote."""
    session, text = start(), prompt(1, 5)[0].tolist()
    session.forward([text])
    tree = session.tree()
    parents = [PREFIX, *range(66), *[3] * 4]
    found = grown(session, tree, parents, seed=4)
    assert_alone(model, session, tree, text, {63: found[63], 66: found[66], 70: found[70]})
    last = tree.grow([66, 70])
    assert session.forward([[7, 8]], tree=tree).shape == (1, VOCAB)
    assert tree.ids(last[1])[-1] == 8


@one_model
def test_sequences_of_a_batch_have_trees_of_their_own(start: Start, model: str) -> None:
    session, texts = start(), prompt(3, 9)
    session.forward(texts, lengths=[9, 5, 7])
    held = [row[:n].tolist() for row, n in zip(texts, (9, 5, 7), strict=True)]
    trees = [session.tree(b) for b in range(3)]
    trees[0].grow([PREFIX, 0, 0])
    trees[2].grow([PREFIX])
    ids = np.random.default_rng(5).integers(0, VOCAB, (3, 3))
    found = session.forward(ids, tree=trees, all_logits=True)
    assert_alone(model, session, trees[0], held[0], {1: found[0, 1], 2: found[0, 2]})
    assert_alone(model, session, trees[2], held[2], {0: found[2, 0]})
    assert not found[1].any() and not found[2, 1:].any()
    trees[1].grow([PREFIX, PREFIX])
    trees[0].grow([2])
    last = session.forward(ids[:, :2], tree=trees)
    assert_alone(model, session, trees[0], held[0], {3: last[0]})
    assert_alone(model, session, trees[1], held[1], {1: last[1]})
    assert not last[2].any()
    assert session.rows[0].tolist() == [13, 7, 8] and session.length.tolist() == [9, 5, 7]


@onnxruntime
@one_model
def test_a_cache_of_int8_holds_trees_too(start: Start, model: str) -> None:
    """In few rows, which are dequantised, and in many, which are read as they are."""
    session, alike, text = start(cache_dtype="int8"), start(cache_dtype="int8", trees=False), prompt(1, 100)
    for each in (session, alike):
        each.forward(text)
    tree = session.tree()
    found = dict(enumerate(grown(session, tree, [PREFIX, PREFIX, 0, 1], seed=6)))
    grown(session, tree, [PREFIX] * 600, seed=7)
    found[604] = grown(session, tree, [3, 2], seed=8)[0]
    for node, bound in ((2, 1e-4), (3, 1e-4), (604, 2e-2)):
        expected = alike.forward([tree.ids(node)], all_logits=True)[0, -1]
        alike.truncate(100)
        assert reference.relative_error(found[node], expected) <= bound, node
    tree.accept(604)
    assert session.length.tolist() == [103] and session.rows[0].tolist() == [103]


# --- what stays -------------------------------------------------------------------------------------------------------


def test_without_a_tree_it_is_a_session_as_any(start: Start) -> None:
    """Bit for bit: prompts of more and of fewer tokens than a word has bits, in chunks, in rows of different length."""
    plain, session = start(trees=False, capacity_step=32), start(capacity_step=32)
    ids = prompt(2, 140)
    for start_, stop, lengths in ((0, 90, [90, 70]), (90, 130, [40, 13]), (130, 131, None), (131, 134, [1, 3])):
        found = [each.forward(ids[:, start_:stop], lengths=lengths, all_logits=True) for each in (plain, session)]
        np.testing.assert_array_equal(*found)
    for each in (plain, session):
        each.truncate(50)
    np.testing.assert_array_equal(*(each.forward(ids[:, 60:61]) for each in (plain, session)))
    assert session.rows.tolist() == plain.rows.tolist()


def test_an_accepted_path_is_as_if_only_it_had_run(start: Start) -> None:
    """Bit for bit, where it was run in calls of the same width: the guesses beside it are gone without a trace."""
    session, plain, ids = start(), start(trees=False), prompt(1, 60)
    for each in (session, plain):
        each.forward(ids[:, :40])
    tree = session.tree()
    tree.grow([PREFIX, 0, 1, 1])  # a guess of three, and another of its last
    found = session.forward([[1, 2, 3, 4]], tree=tree, all_logits=True)
    wanted = plain.forward([[1, 2, 3, 4]], all_logits=True)
    np.testing.assert_array_equal(found[:, :3], wanted[:, :3])
    tree.accept(1)
    tree.close()
    plain.truncate(42)
    for t in range(3):
        np.testing.assert_array_equal(*(each.forward(ids[:, 40 + t : 41 + t]) for each in (session, plain)))


def rows_of(session: Session, count: int) -> dict[str, np.ndarray]:
    return session._read_row(0, count)


def test_rows_are_moved_as_they_are(start: Start) -> None:
    """Of a path that lies scattered and not in order, into place."""
    session, ids = start(capacity_step=64), prompt(1, 12)
    session.forward(ids)
    tree = session.tree()
    grown(session, tree, [PREFIX] * 20, seed=7)
    tree.drop(range(17))
    grown(session, tree, [18, 19, 18], seed=8)  # closes up before: 17 to 19 come to rows 12 to 14
    grown(session, tree, [21, 20], seed=9)
    path = tree.path(23)
    rows = [tree._rows.nodes[node].row for node in path]
    before = rows_of(session, int(session.rows.max()))
    tree.accept(23)
    after = rows_of(session, 15)
    for name, array in after.items():
        for place, row in enumerate([*range(12), *rows]):
            np.testing.assert_array_equal(array[:, :, place], before[name][:, :, row], err_msg=name)
    assert rows != list(range(12, 15)) and len(tree) == 0


def test_dropped_branches_leave_nothing_behind(start: Start) -> None:
    session, fresh, ids = start(), start(), prompt(1, 30)
    session.forward(ids[:, :20])
    tree = session.tree()
    for step in range(4):
        grown(session, tree, [PREFIX] * 30, seed=step)
        tree.drop(tree.nodes[:25])
    tree.prune(tree.leaves)
    assert len(tree) == 0 and tree.rows == 0
    fresh.forward(ids[:, :20])
    for t in range(20, 30):
        np.testing.assert_array_equal(*(each.forward(ids[:, t : t + 1]) for each in (session, fresh)))


@one_model
def test_a_saved_cache_is_that_of_the_text(start: Start) -> None:
    session, other, ids = start(), start(trees=False), prompt(1, 20)
    session.forward(ids)
    grown(session, session.tree(), [PREFIX, PREFIX], seed=1)
    saved = session.export_cache()
    assert saved.length == 20
    other.forward(ids[:, :1])
    other.import_cache(saved)
    session.reset()
    session.forward(ids[:, :1])
    tree = session.tree()
    grown(session, tree, [PREFIX], seed=1)
    session.import_cache(saved)
    assert tree.closed
    np.testing.assert_array_equal(*(each.forward([[3]]) for each in (session, other)))


# --- faults are seen --------------------------------------------------------------------------------------------------


def wrong_bit(words: Callable[..., Any]) -> Callable[..., Any]:
    def changed(rows: TreeRows, new: list[int]) -> np.ndarray:
        found: np.ndarray = words(rows, new)
        found[0] ^= 1 << (len(new) - 1)
        return found

    return changed


def a_row_early(step: Callable[..., Any]) -> Callable[..., Any]:
    def changed(cache: TreeCache, rows: Any, starts: np.ndarray, *rest: Any, **options: Any) -> Any:
        return step(cache, rows, starts - (not options), *rest, **options)

    return changed


def a_position_on(step: Callable[..., Any]) -> Callable[..., Any]:
    def changed(cache: TreeCache, rows: Any, starts: Any, positions: np.ndarray, *rest: Any, **options: Any) -> Any:
        return step(cache, rows, starts, positions + (not options), *rest, **options)

    return changed


def unmoved(routed: Callable[..., Any]) -> Callable[..., Any]:
    return lambda pairs, free: []


FAULTS = {
    "a wrong bit": ("gta_edge.runtime.tree_rows.TreeRows.words", wrong_bit),
    "a tail that starts a row early": ("gta_edge.runtime.tree_cache.TreeCache._step", a_row_early),
    "positions that are one on": ("gta_edge.runtime.tree_cache.TreeCache._step", a_position_on),
    "rows that do not move": ("gta_edge.runtime.tree_cache.routed", unmoved),
}


@one_model
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(start: Start, model: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, changed = FAULTS[fault]
    module, _, name = target.rpartition(".")
    owner: Any = TreeRows if "TreeRows" in module else TreeCache
    if name == "routed":
        monkeypatch.setattr(target, changed(None))
    else:
        monkeypatch.setattr(owner, name, changed(getattr(owner, name)))
    with pytest.raises(AssertionError):
        test_each_node_is_its_path_alone(start, model)


# --- what is refused --------------------------------------------------------------------------------------------------


@one_model
def test_a_tree_ends_with_what_it_is_of(start: Start) -> None:
    session = start()
    message = "the tree is closed: the session was truncated, reset or claimed, or another tree opened; open another"
    for end in (lambda: session.truncate(3), session.reset, session.claim):
        session.forward([[1, 2, 3, 4]])
        tree = session.tree()
        grown(session, tree, [PREFIX], seed=1)
        end()
        assert tree.closed and session.rows.tolist() == [session.length.tolist()] * 2
        for call, given in ((tree.grow, [PREFIX]), (tree.accept, 0), (tree.drop, [0]), (tree.prune, [0])):
            with pytest.raises(InputError, match=message):
                call(given)
        with pytest.raises(InputError, match=message):
            session.forward([[1]], tree=tree)
        tree.close()
        session.reset()


@one_model
def test_a_tree_is_its_claims(start: Start) -> None:
    session = start()
    claim = session.claim()
    claim.forward([[1, 2, 3]])
    tree = claim.tree()
    (a,) = tree.grow([PREFIX])
    claim.forward([[4]], tree=tree)
    tree.accept(a)
    claim.forward([[5]])
    (b,) = tree.grow([PREFIX])
    claim.forward([[6]], tree=tree)
    session.claim()
    with pytest.raises(InputError, match="the session is no longer as it was left"):
        tree.accept(b)
    with pytest.raises(InputError, match="the session is no longer as it was left"):
        claim.tree()


@one_model
def test_what_does_not_run_is_taken_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start()
    session.forward(prompt(1, 10))
    tree = session.tree()
    grown(session, tree, [PREFIX, 0], seed=1)
    for ids, text in (
        ([[1, 2]], "ids are 2 tokens wide and the trees have 1 new nodes; grow"),
        ([[VOCAB]], "outside the vocabulary"),
        ([[1], [1]], "ids have 2 rows and the cache holds 1"),
    ):
        tree.grow([1])
        with pytest.raises(InputError, match=text):
            session.forward(ids, tree=tree)
        assert tree.nodes == [0, 1] and tree.new == 0
    tree.grow([1, 0])
    with pytest.raises(InputError, match="lengths do not go with a tree"):
        session.forward([[1, 2]], lengths=[2], tree=tree)
    calls = []
    run = session._run

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise BackendError("it failed", "try again")
        return run(*arguments)

    monkeypatch.setattr(session, "_run", failing)
    tree.grow([1] * 70)  # in two parts, of which one has run
    with pytest.raises(BackendError, match="it failed"):
        session.forward(np.ones((1, 70), np.int64), tree=tree)
    assert tree.nodes == [0, 1] and session.rows[0].tolist() == [12]
    monkeypatch.undo()
    grown(session, tree, [1], seed=2)


@one_model
@onnxruntime
def test_what_makes_no_sense_is_refused_in_a_line(start: Start, model: str) -> None:
    plain, session = start(trees=False), start()
    assert session.trees and not plain.trees
    for call in (plain.tree, plain.claim().tree):
        with pytest.raises(InputError, match="loaded without trees of tokens; load the bundle with trees=True"):
            call()
    session.claim(batch=2)  # with nothing in it
    trees = [session.tree(sequence) for sequence in range(2)]
    trees[0].grow([PREFIX])
    with pytest.raises(InputError, match="ids have 1 rows and the cache holds 2; expected a row and a tree for each"):
        session.forward([[1]], tree=trees[0])
    session.reset()
    session.forward([[1, 2]])
    tree = session.tree()
    with pytest.raises(InputError, match="loaded without trees of tokens"):
        plain.forward([[1]], tree=tree)
    with pytest.raises(InputError, match="the tree is of another session"):
        start().forward([[1]], tree=tree)
    for parents in ([0], [PREFIX, 1.5], [True], ["a"], [float(PREFIX)], np.array([[PREFIX, PREFIX]])):
        with pytest.raises(InputError, match="is no node of the tree; expected the number of one that is there"):
            tree.grow(parents)
    for change in (tree.grow, tree.drop, tree.prune):
        with pytest.raises(InputError, match="nodes of the tree are 5; expected a list of their numbers"):
            change(5)
    (a,) = tree.grow([PREFIX])
    for call in (lambda: tree.accept(a), lambda: tree.ids(a)):
        with pytest.raises(InputError, match=r"1 nodes of the tree have not run; run them with forward\(\), or drop"):
            call()
    session.forward([[3]], tree=tree)
    (b,) = tree.grow([a])
    tree.drop([b])
    with pytest.raises(InputError, match="there are trees of sequences"):
        session.forward([[1]], tree=[tree, tree])
    for given in ("tree", 3, [None], {}):
        with pytest.raises(
            InputError, match=r"tree is .*; expected what the session's tree\(\) returned, or a list of"
        ):
            session.forward([[1]], tree=given)
    with pytest.raises(InputError, match="there are trees of sequences"):
        session.forward([[1]], tree=[])
    tree.grow([a])
    session.forward([[3]], tree=tree)
    with pytest.raises(InputError, match=f"node {a} of the tree is no leaf"):
        tree.prune([a])
    with pytest.raises(InputError, match="has a tree with nodes"):
        session.forward([[1]])
    with pytest.raises(InputError, match="has a tree with nodes"):
        session.tree()
    deep = [a]
    for _ in range(POSITIONS - 3):
        deep += tree.grow(deep[-1:])
    deep += tree.grow(deep[-1:])
    with pytest.raises(CapacityError, match=f"sequence 0 holds 2 tokens and its tree would reach {POSITIONS + 1}; the"):
        session.forward(np.ones((1, tree.new), np.int64), tree=tree)
    session.close()
    for call in (session.tree, lambda: tree.accept(a)):
        with pytest.raises(BackendError, match="the session is closed; load the bundle again"):
            call()


def test_a_policy_and_trees_are_refused() -> None:
    model = "gta"
    with pytest.raises(InputError, match="trees of tokens do not go with cache policy window, which would drop rows"):
        load(bundle_of(model), "onnxruntime", trees=True, cache=policy("window", rows=32))
    with pytest.raises(InputError, match="trees of tokens move rows one by one, and a cache of int4 is quantised in"):
        load(bundle_of(model), "torch", trees=True, cache_dtype="int4")
    with load(bundle_of(model), "onnxruntime", trees=True) as session:
        assert session.trees
    without: list[Backend] = [each for each in REGISTERED.values() if not each.has_trees]
    assert without
    for each in without:
        with pytest.raises(BackendError, match=f"{each.name} cannot hold trees of tokens; leave trees out, or take"):
            each.open(None, trees=True)  # type: ignore[arg-type]  # the bundle is not looked at
