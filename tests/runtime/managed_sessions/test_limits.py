"""Sessions that a policy manages: memory, what can be taken back, what fails in the middle, what is refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gta_edge.errors import CapacityError, InputError
from gta_edge.runtime.cache_moves import Moves
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import Decision, Rows
from gta_edge.runtime.cache_policies.measured import LayerRows
from gta_edge.runtime.cache_policies.window import Window
from tests.helpers import reference
from tests.helpers.managed_model import MaskedModel
from tests.helpers.managed_sessions import (
    FEW,
    MODELS,
    POSITIONS,
    Start,
    make,
    prompt,
    weights_of,
)

TOLERANCE = 1e-4
one_model = pytest.mark.parametrize("model", ["gta"], indirect=True)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert reference.relative_error(found, expected) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Told(Window):
    """A policy that says what it is told to say."""

    keeps: Callable[[int], Any]
    folds: Callable[[int], Any] = field(default=lambda count: None)

    def keep(self, rows: Rows) -> Decision:
        return Decision(self.keeps(len(rows)), self.folds(len(rows)))


# --- bounds, truncate, reset -----------------------------------------------------------------------------------------


def test_memory_is_that_of_the_rows_that_stay(start: Start) -> None:
    full = start(chunk_size=16)
    full.forward(prompt(1, POSITIONS))
    for cache in (make("window"), make("h2o"), make("zsmerge, merged twice")):
        session = start(cache=cache, chunk_size=16)
        session.forward(prompt(1, 10))
        held = session.cache_bytes
        session.forward(prompt(1, 140))
        for _ in range(10):
            session.forward(prompt(1, 1))
        assert session.cache_bytes == held <= 0.35 * full.cache_bytes
        assert session.rows.max() <= 20 + 5 <= session.capacity


def test_layers_have_memory_for_their_own_budgets(start: Start) -> None:
    rule = policy("window", rows=40, sinks=0, interval=8)
    sizes = []
    for rows in ((40, 40), (40, 8)):
        session = start(cache=LayerRows(rule=rule, layer_rows=rows), chunk_size=8)
        session.forward(prompt(1, 9))
        sizes.append(session.cache_bytes)
    assert sizes[1] <= 0.75 * sizes[0]


@one_model
def test_the_last_position_is_the_end_without_rotation(start: Start) -> None:
    session = start(cache=make("window"))
    session.forward(prompt(1, POSITIONS))
    with pytest.raises(
        CapacityError, match=rf"^row 0 holds {POSITIONS} tokens and would reach {POSITIONS + 1} [^\n]*$"
    ):
        session.forward(prompt(1, 1))
    assert session.length.tolist() == [POSITIONS]
    assert session.rows.max() <= 25


@one_model
@pytest.mark.parametrize("name", FEW)
def test_what_a_short_call_appended_can_be_taken_back(start: Start, name: str) -> None:
    cache, ids = make(name), prompt(1, 60)
    session, other = start(cache=cache), start(cache=cache)
    for each in (session, other):
        each.forward(ids[:, :40])
        for t in range(40, 44):
            each.forward(ids[:, t : t + 1])
    session.forward(prompt(1, 7, seed=5))  # passes the interval, and nothing is evicted before the next call
    session.truncate(44)
    np.testing.assert_array_equal(session.rows, other.rows)
    if name == "window":  # the others have observed what was taken back
        for t in range(44, 60):
            assert_close(session.forward(ids[:, t : t + 1]), other.forward(ids[:, t : t + 1]))


@one_model
def test_rows_that_were_kept_can_be_taken_back_wherever_they_lie(start: Start, model: str) -> None:
    """After an eviction rows lie in any order; those of the tokens that go are found."""
    session, ids = start(cache=policy("window", rows=20, sinks=0, interval=5)), prompt(1, 60)
    session.forward(ids[:, :40])
    session.truncate(32)  # of 20 to 39, 20 to 31 are left
    assert (session.length.tolist(), session.rows[:, 0].tolist()) == ([32], [12, 12])
    first_seen = {**dict.fromkeys(range(40), 0), **dict.fromkeys(range(32, 60), 20)}
    exact = MaskedModel(MODELS[model], weights_of(model), lambda layer, query: range(first_seen[query], query + 1))
    expected = exact.call(ids[0, :39])
    assert_close(session.forward(ids[:, 32:39], all_logits=True)[0], expected[32:])


@one_model
def test_tokens_that_were_evicted_cannot_be_gone_back_to(start: Start) -> None:
    session = start(cache=make("window"))
    ids = prompt(2, 60)
    session.forward(ids, lengths=[60, 12])
    message = (
        r"^cannot truncate row 0 to 42 tokens: the policy has dropped some of them, up to number 42; truncate to more "
        r"tokens than that or to 0, or run the text again$"
    )
    for wanted in (42, 1):
        with pytest.raises(InputError, match=message.replace("to 42 tok", f"to {wanted} tok")):
            session.truncate([wanted, 3])
    assert session.length.tolist() == [60, 12]
    session.truncate([43, 3])
    assert session.length.tolist() == [43, 3]
    session.truncate([0, 3])
    assert (session.length.tolist(), session.rows.tolist()) == ([0, 3], [[0, 3], [0, 3]])
    other = start(cache=make("window"))
    found = session.forward(ids[:, :30], lengths=[30, 1])
    assert_close(found[0], other.forward(ids[:1, :30])[0])


@one_model
def test_a_residual_row_is_not_cut_in_two(start: Start) -> None:
    """Tokens 2, 3, 5 and 9 are one row: taking back 9 would take back the others with it."""
    folded = np.array([2, 3, 5, 9])
    session = start(
        cache=Told(
            rows=20,
            sinks=0,
            residual_rows=1,
            keeps=lambda n: ~np.isin(np.arange(n), folded),
            folds=lambda n: np.zeros(n, np.int64),
        )
    )
    session.forward(prompt(1, 23))
    assert session.rows[:, 0].tolist() == [20, 20]
    for wanted in (6, 9, 10):
        with pytest.raises(InputError, match=f"^cannot truncate row 0 to {wanted} tokens: the policy has dropped some"):
            session.truncate(wanted)
    session.truncate(11)  # 0, 1, 4, 6, 7, 8, 10 and the residual row
    assert session.rows[:, 0].tolist() == [8, 8]


@one_model
def test_a_residual_row_of_one_token_is_one(start: Start) -> None:
    """What it has received is of the row that lay there, so that a policy must not weigh it like an ordinary one."""
    told: list[list[bool]] = []

    @dataclass(frozen=True, kw_only=True)
    class Listening(Window):
        def keep(self, rows: Rows) -> Decision:
            told.append(rows.residual.tolist())
            return super().keep(rows)

    session = start(cache=Listening(rows=6, sinks=0, residual_rows=2, interval=1))
    for _ in range(9):
        session.forward(prompt(1, 1))
    assert session._cache._counts[0, 0].tolist() == [3, 1]  # of the last eviction, before the ninth token
    assert [sum(each) for each in told[:4]] == [0, 0, 2, 2]  # of two layers


@one_model
def test_a_claim_ends_with_a_truncation_that_fails(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session, ids = start(cache=policy("window", rows=20, sinks=10, interval=5)), prompt(1, 60)
    claim = session.claim()
    claim.forward(ids[:, :40])
    with pytest.raises(InputError, match="cannot truncate"):
        claim.truncate(20)
    for t in range(40, 47):  # nothing has changed; then rows move into holes
        claim.forward(ids[:, t : t + 1])

    def fail(moves: Moves) -> None:
        raise CapacityError("no memory", "close other programs")

    monkeypatch.setattr(session, "_move", fail)
    with pytest.raises(CapacityError):
        claim.truncate(42)
    assert session.length.tolist() == [0]
    with pytest.raises(InputError, match=r"a truncate\(\) that failed"):
        claim.forward(ids[:, 40:41])


@one_model
@pytest.mark.parametrize("name", FEW)
def test_after_a_reset_it_is_as_new(start: Start, name: str) -> None:
    session, ids = start(cache=make(name)), prompt(1, 70)
    before = session.forward(ids)
    held = session.cache_bytes
    session.reset()
    assert (session.length.tolist(), session.rows.tolist()) == ([0], [[0], [0]])
    np.testing.assert_array_equal(session.forward(ids), before)
    session.truncate(0)
    np.testing.assert_array_equal(session.forward(ids), before)
    session.reset()
    session.forward(prompt(3, 30))
    assert session.rows.shape == (2, 3)
    assert 2.9 * held <= session.cache_bytes <= 3 * held
    session.reset()
    np.testing.assert_array_equal(session.forward(ids), before)


# --- failures --------------------------------------------------------------------------------------------------------


@one_model
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1])
def test_what_fails_while_rows_move_leaves_an_empty_session(
    start: Start, backend: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    session, ids = start(cache=make("window, merged")), prompt(1, 60)
    before = session.forward(ids)
    session.reset()
    move, calls = session._move, []

    def fail(moves: Moves) -> None:
        calls.append(moves)
        if len(calls) > after:
            raise error
        move(moves)

    monkeypatch.setattr(session, "_move", fail)
    with pytest.raises(type(error)):
        session.forward(ids)
    monkeypatch.undo()
    assert (session.length.tolist(), session.rows.tolist()) == ([0], [[0], [0]])
    np.testing.assert_array_equal(session.forward(ids), before)


@one_model
def test_no_memory_to_move_rows_is_said_in_one_line(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(cache=make("window"))

    def no_memory(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("gta_edge.runtime.torch.managed.move", no_memory)
    monkeypatch.setattr("gta_edge.runtime.onnxruntime.cache_rows.CacheRows.move", no_memory)
    with pytest.raises(CapacityError, match=r"^[^\n]*to move rows of the cache, which was emptied; give [^\n]*$"):
        session.forward(prompt(1, 60))
    assert session.length.tolist() == [0]


@one_model
@pytest.mark.parametrize("error", [CapacityError("full", "give less"), KeyboardInterrupt()], ids=repr)
def test_a_step_that_fails_leaves_what_was_there(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    session, other, ids = start(cache=make("window")), start(cache=make("window")), prompt(1, 60)
    for each in (session, other):
        each.forward(ids[:, :50])

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(session, "_run", fail)
    with pytest.raises(type(error)):
        session.forward(ids[:, 50:51])
    monkeypatch.undo()
    assert session.length.tolist() == [50]
    for t in range(50, 60):
        assert_close(session.forward(ids[:, t : t + 1]), other.forward(ids[:, t : t + 1]))


# --- options that make no sense --------------------------------------------------------------------------------------


@one_model
@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (
            lambda: policy("window", rows=POSITIONS + 1),
            rf"keeps {POSITIONS + 1} rows, and the model has {POSITIONS} posi",
        ),
        (lambda: LayerRows(rule=make("h2o"), layer_rows=(20,) * 3), "there are rows for 3 layers, and the model has 2"),
        (lambda: policy("corm", rotate=True), "cache policy corm cannot rotate"),
        (lambda: policy("window", rows=140, rotate=True), r"rows, interval and a chunk \(460 together\) have to fit"),
    ],
    ids=["rows", "layers", "observes positions", "no room to rotate"],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(start: Start, cache: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        start(cache=cache())
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@one_model
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keeps": lambda n: np.ones(n - 1, bool)}, r"layer 0: keep is bool of shape \[39\], and there are 40 rows"),
        ({"keeps": np.ones}, "keep is float64"),
        ({"keeps": lambda n: np.arange(n) < 21}, "it keeps 21 rows of a budget of 20"),
        ({"keeps": lambda n: np.zeros(n, bool), "folds": np.ones}, r"residual is float64 of shape \[40\]"),
        (
            {"keeps": lambda n: np.arange(n) < 9, "folds": lambda n: np.full(n, 2), "residual_rows": 2},
            "it folds into residual row 2, and has 2 of 40 rows",
        ),
        (
            {"keeps": lambda n: np.zeros(n, bool), "folds": lambda n: np.full(n, 1), "residual_rows": 2},
            "it folds into residual row 1, and 1 rows stay",
        ),
        (
            {"keeps": lambda n: np.arange(n) < 20, "folds": lambda n: np.full(n, 0), "residual_rows": 1},
            "it keeps 21 rows of a budget of 20",
        ),
    ],
    ids=["shape", "type", "budget", "type of residual", "residual rows", "no place", "budget with residual rows"],
)
def test_a_decision_that_makes_no_sense_changes_nothing(start: Start, options: dict[str, Any], message: str) -> None:
    session, ids = start(cache=Told(rows=20, sinks=0, **options)), prompt(1, 40)
    with pytest.raises(InputError, match=rf"^cache policy window, [^\n]*{message}[^\n]*; mend its keep\(\)$"):
        session.forward(ids)
    assert session.rows[:, 0].tolist() == [40, 40]
    session.reset()
    assert np.isfinite(session.forward(ids[:, :10])).all()
