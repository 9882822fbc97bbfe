"""Sessions whose cache a policy manages, against models in float64 whose rows lie in a list (``managed_model``)."""

from collections.abc import Callable, Iterator
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
from gta_edge.runtime.session import Session
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel, MaskedModel
from tests.helpers.managed_sessions import BACKENDS, MODELS, POSITIONS, open_session, prompt, weights_of

TOLERANCE = 1e-4

POLICIES = {
    "window": {"rows": 20, "sinks": 2},
    "window, merged": {"rows": 20, "sinks": 2, "residual_rows": 2},
    "h2o": {"rows": 20},
    "tova": {"rows": 20},
    "snapkv": {"rows": 20, "window": 6},
    "corm": {"window": 3},
    "zsmerge": {"rows": 20},
    "zsmerge, merged twice": {"rows": 20, "residual_rows": 3},
    "pyramid": {"rows": 20, "sinks": 1},
}
FEW = ["window", "zsmerge, merged twice"]


def make(name: str, **changes: Any) -> Any:
    return policy(name.partition(",")[0], **{"interval": 5, **POLICIES[name], **changes})


@dataclass(frozen=True, kw_only=True)
class Told(Window):
    """A policy that says what it is told to say."""

    keeps: Callable[[int], Any]
    folds: Callable[[int], Any] = field(default=lambda count: None)

    def keep(self, rows: Rows) -> Decision:
        return Decision(self.keeps(len(rows)), self.folds(len(rows)))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Callable[..., Session]]:
    """Start a session of the backend and model at hand."""
    started: list[Session] = []

    def begin(**options: Any) -> Session:
        started.append(open_session(backend, model, **options))
        return started[-1]

    yield begin
    for session in started:
        session.close()


Start = Callable[..., Session]
one_model = pytest.mark.parametrize("model", ["gta"], indirect=True)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert reference.relative_error(found, expected) <= TOLERANCE


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_those_of_the_formula(start: Start, model: str, name: str) -> None:
    """A prompt in chunks, single tokens, a second prompt, and single tokens again."""
    session = start(cache=make(name), chunk_size=24)
    exact = ManagedModel(MODELS[model], weights_of(model), make(name), 24)
    ids, place = prompt(1, 100), 0
    for count in (60, *[1] * 13, 18, 3, *[1] * 6):
        part = ids[:, place : place + count]
        found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
        assert_close(found, expected)
        place += count
        assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]
    assert session.length.tolist() == [place] == [100]
    assert (session.rows < 100).all()


@one_model
def test_rows_are_set_aside_for_residual_rows_where_a_prompt_fills_a_step(start: Start, model: str) -> None:
    """To the last row that a capacity in steps has for it; the first rows are sinks, and lie in the way."""
    cache = make("window, merged")
    session = start(cache=cache, chunk_size=32, capacity_step=32)
    exact, ids = ManagedModel(MODELS[model], weights_of(model), cache, 32), prompt(1, 40)
    for start_, stop in ((0, 32), *((t, t + 1) for t in range(32, 40))):
        part = ids[:, start_:stop]
        assert_close(session.forward(part, all_logits=True)[0], exact.forward(part[0]))
    assert (session.rows < 40).all()


@pytest.mark.parametrize("name", [*POLICIES, "none"])
def test_a_budget_that_is_never_reached_changes_no_bit(start: Start, name: str) -> None:
    cache = None if name == "none" else make(name, rows=100 if "rows" in POLICIES[name] else None, interval=200)
    plain, managed = start(capacity_step=16), start(capacity_step=16, cache=cache)
    ids, lengths = prompt(2, 80), [14, 11]
    found = [each.forward(ids[:, :14], lengths=lengths, all_logits=True) for each in (plain, managed)]
    np.testing.assert_array_equal(*found)
    for t in range(14, 40):
        np.testing.assert_array_equal(*(each.forward(ids[:, t : t + 1]) for each in (plain, managed)))
    np.testing.assert_array_equal(managed.rows, np.broadcast_to([40, 37], (2, 2)))
    np.testing.assert_array_equal(plain.rows, managed.rows)


@pytest.mark.parametrize("rows", [[1, 1], [13, 13], [9, 30], [30, 9]])
def test_a_window_is_a_mask_in_each_layer(start: Start, model: str, rows: list[int]) -> None:
    """Evicted before every token: a query sees itself and as many before it as its layer has rows."""
    rule = policy("window", rows=max(rows), sinks=0, interval=1)
    session = start(cache=LayerRows(rule=rule, layer_rows=tuple(rows)))

    def seen(layer: int, query: int) -> range:
        return range(max(0, query - rows[layer]), query + 1)

    exact, ids = MaskedModel(MODELS[model], weights_of(model), seen), prompt(1, 45)
    expected = exact.call(ids[0])
    found = [session.forward(ids[:, t : t + 1])[0] for t in range(45)]
    assert_close(np.stack(found), expected)
    assert session.rows[:, 0].tolist() == [count + 1 for count in rows]


@pytest.mark.parametrize("name", ["h2o", "zsmerge, merged twice", "window", "corm"])
def test_a_prompt_at_once_is_as_token_by_token(start: Start, name: str) -> None:
    """Where eviction comes after as many tokens, what rows received by then is the same."""
    cache = make(name, interval=40)
    at_once, single = start(cache=cache, chunk_size=40), start(cache=cache)
    ids = prompt(1, 60)
    at_once.forward(ids[:, :40])
    for t in range(40):
        single.forward(ids[:, t : t + 1])
    for t in range(40, 60):
        assert_close(*(each.forward(ids[:, t : t + 1]) for each in (at_once, single)))
    np.testing.assert_array_equal(at_once.rows, single.rows)


@pytest.mark.parametrize("name", ["window, merged", "h2o", "snapkv", "corm", "zsmerge"])
def test_rows_of_different_length_evict_as_if_alone(start: Start, name: str) -> None:
    cache, ids = make(name), prompt(3, 70)
    session, alone = start(cache=cache, chunk_size=24), [start(cache=cache, chunk_size=24) for _ in range(3)]
    place = np.zeros(3, int)
    for lengths in ([50, 3, 30], *[[1, 1, 1]] * 7, [2, 17, 1], *[[1, 1, 1]] * 6):
        width = max(lengths)
        given = np.zeros((3, width), int)
        for b, length in enumerate(lengths):
            given[b, :length] = ids[b, place[b] : place[b] + length]
        found = session.forward(given, lengths=lengths)
        expected = [alone[b].forward(given[b : b + 1, :length])[0] for b, length in enumerate(lengths)]
        assert_close(found, np.stack(expected))
        place += lengths
    np.testing.assert_array_equal(session.rows, np.concatenate([each.rows for each in alone], axis=1))


@one_model
@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
@pytest.mark.parametrize("name", FEW)
def test_backends_decide_alike(start: Start, name: str) -> None:
    session, other = start(cache=make(name)), open_session("torch", "gta", cache=make(name))
    ids = prompt(1, 70)
    for each in (session, other):
        each.forward(ids[:, :50])
        for t in range(50, 70):
            each.forward(ids[:, t : t + 1])
        each._cache._note()
    for layer, count in enumerate(session.rows[:, 0]):
        held = [each._cache._times[layer, 0, :count].tolist() for each in (session, other)]
        assert held[0] == held[1]


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
@pytest.mark.parametrize("name", ["window", "window, merged"])
def test_a_cache_of_int8_moves_its_scales_too(start: Start, model: str, name: str) -> None:
    cache = make(name, rotate=True)
    session, exact = start(cache=cache, cache_dtype="int8", chunk_size=24), start(cache=cache, chunk_size=24)
    ids = prompt(1, 300)
    found, expected = [], []
    for part in (ids[:, :60], *(ids[:, t : t + 1] for t in range(60, 100)), ids[:, 100:]):
        for logits, each in ((found, session), (expected, exact)):
            logits.append(each.forward(part, all_logits=True)[0])
    # as without a policy; a row in another's place, or beside another's scale, is off by 1 and more
    assert reference.relative_error(np.concatenate(found), np.concatenate(expected)) < 0.3
    np.testing.assert_array_equal(session.rows, exact.rows)


@one_model
@pytest.mark.parametrize("name", ["h2o", "snapkv", "corm", "zsmerge", "pyramid"])
def test_the_last_tokens_of_a_chunk_observe_for_all_of_it(start: Start, model: str, name: str) -> None:
    """As on a GPU: what was received before fades by the whole chunk, and a batch's sequences evict as if alone."""
    own = {"snapkv": {"window": 20}, "corm": {"residual_rows": 0}, "zsmerge": {"residual_rows": 0}}
    cache = make(name, **own.get(name, {}))
    session, ids, lengths = start(cache=cache, chunk_size=40, observed_tokens=16), prompt(3, 110), [100, 5, 67]
    exact = [ManagedModel(MODELS[model], weights_of(model), cache, 40, observed=16) for _ in lengths]
    found = session.forward(ids[:, :100], lengths=lengths)
    expected = [each.forward(row[:count])[-1] for each, row, count in zip(exact, ids, lengths, strict=True)]
    assert_close(found, np.stack(expected))
    for layer, received in enumerate(session._received()):
        for b, each in enumerate(exact):
            held = [row.received for row in each.layers[layer]]
            np.testing.assert_allclose(
                np.sort(received[b, : len(held)]), np.sort(held), rtol=1e-3, atol=1e-5, err_msg=f"{layer}, {b}"
            )
    for t in range(100, 110):
        expected = [each.forward(row[t : t + 1])[0] for each, row in zip(exact, ids, strict=True)]
        assert_close(session.forward(ids[:, t : t + 1]), np.stack(expected))


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


# --- past the last position ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_a_window_goes_on_past_the_last_position(start: Start, model: str, batch: int) -> None:
    """Its positions move together, so it is the same window of a model with more of them."""
    cache = policy("window", rows=20, sinks=0, interval=5, rotate=True)
    session = start(cache=cache, chunk_size=24)
    ids = prompt(batch, 420)
    found = (
        session.forward(ids[:, :200], all_logits=True),
        *(session.forward(ids[:, t : t + 1]) for t in range(200, 420)),
    )
    entries = MODELS[model] | {"max_position_embeddings": 500}
    assert session.length.tolist() == [420] * batch
    assert session.rows.max() <= 25
    for b in range(batch):
        exact = ManagedModel(entries, weights_of(model), cache, 24)
        assert_close(found[0][b], exact.forward(ids[b, :200]))
        expected = [exact.forward(ids[b, t : t + 1])[0] for t in range(200, 420)]
        assert_close(np.stack([each[b] for each in found[1:]]), np.stack(expected))


@one_model
def test_sinks_come_closer_as_positions_are_renumbered(start: Start) -> None:
    session = start(cache=policy("window", rows=20, sinks=2, interval=5, rotate=True), chunk_size=24)
    for _ in range(5):
        session.forward(prompt(1, 100))
    state = session._cache
    count = int(session.rows[0, 0])
    times = state._times[0, 0, :count]
    assert sorted(times)[:3] == [0, 1, 500 - 18]
    assert state._positions[0, 0, :count].max() < POSITIONS
    assert np.isfinite(session.forward(prompt(1, 1))).all()


@one_model
@pytest.mark.parametrize("name", ["zsmerge", "h2o"])
def test_scattered_rows_go_on_too(start: Start, name: str) -> None:
    session = start(cache=make(name, rotate=True), chunk_size=24)
    for _ in range(4):
        assert np.isfinite(session.forward(prompt(2, 100), lengths=[100, 61])).all()
    assert session.length.tolist() == [400, 244]
    assert session.rows.max() <= 25


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
