"""Logits of sessions that a policy manages, against models in float64 whose rows lie in a list (``managed_model``)."""

import numpy as np
import pytest

from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.measured import LayerRows
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel, MaskedModel
from tests.helpers.managed_sessions import (
    FEW,
    MODELS,
    POLICIES,
    POSITIONS,
    Start,
    make,
    open_session,
    prompt,
    weights_of,
)

TOLERANCE = 1e-4
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
    for lengths in ([50, 3, 30], *[[1, 1, 1]] * 7, [2, 17, 1], *[[1, 1, 1]] * 4, [2, 30, 2], [1, 1, 1]):
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
    for widths in ([1, 1, 1],) * 4 + ([2, 1, 3], [1, 1, 1], [2, 2, 2]):  # some of which lengths cut in parts
        width = max(widths)
        found = session.forward(ids[:, 100 : 100 + width], lengths=widths)
        expected = [each.forward(row[100 : 100 + n])[-1] for each, row, n in zip(exact, ids, widths, strict=True)]
        assert_close(found, np.stack(expected))
        for b, each in enumerate(exact):
            assert session.rows[:, b].tolist() == [len(rows) for rows in each.layers]


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
    """Each sequence is renumbered as if it were alone, whatever pads it, and into whatever parts a call is cut."""
    session, *alone = (start(cache=make(name, rotate=True), chunk_size=24, observed_tokens=16) for _ in range(3))
    ids = prompt(2, 100)
    for lengths in ([100, 70], [100, 70], [100, 5], [5, 16]):
        found = session.forward(ids[:, : max(lengths)], lengths=lengths)
        expected = [each.forward(row[None, :count])[0] for each, row, count in zip(alone, ids, lengths, strict=True)]
        assert_close(found, np.stack(expected))
    assert session.length.tolist() == [305, 161]
    assert session.rows.max() <= 20 + 21
