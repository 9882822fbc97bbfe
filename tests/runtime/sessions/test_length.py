"""What every session holds: lengths, truncated and reset, up to the last position."""

import numpy as np
import pytest

from gta_edge.errors import CapacityError, InputError
from gta_edge.model.kv_cache import cache_bytes
from tests.helpers.sessions import INTEGERS, MODELS, P, assert_same, exact_logits, growing, in_integers_too, prompt

# --- length, truncate, reset -----------------------------------------------------------------------------------------


def test_length_counts_what_was_appended(session):
    np.testing.assert_array_equal(session.length, [0])
    session.forward(prompt(3, 5))
    np.testing.assert_array_equal(session.length, [5, 5, 5])
    session.forward(prompt(3, 4), lengths=[1, 4, 2])
    np.testing.assert_array_equal(session.length, [6, 9, 7])
    assert session.length.dtype == np.int64
    session.truncate([2, 9, 0])
    np.testing.assert_array_equal(session.length, [2, 9, 0])
    session.reset()
    np.testing.assert_array_equal(session.length, [0, 0, 0])


def test_length_is_a_copy(session, model):
    ids = prompt(1, 6)
    session.forward(ids[:, :3])
    session.length[:] = 0
    np.testing.assert_array_equal(session.length, [3])
    assert_same(session.forward(ids[:, 3:])[0], exact_logits(model, ids[0])[-1])


def test_a_length_that_was_taken_does_not_change_later(session):
    session.forward(prompt(1, 3))
    before = session.length
    session.forward(prompt(1, 3))
    session.truncate(1)
    session.reset()
    np.testing.assert_array_equal(before, [3])


@in_integers_too
@pytest.mark.parametrize("keep", [0, 1, 4, 7])
def test_truncated_tokens_were_never_there(session, model, keep):
    ids, others = prompt(2, 7), prompt(2, 5, seed=9)
    session.forward(ids)
    session.truncate(keep)
    found = session.forward(others, all_logits=True)
    for row in range(2):
        tokens = np.concatenate([ids[row, :keep], others[row]])
        assert_same(found[row], exact_logits(model, tokens)[keep:])


@in_integers_too
def test_each_row_is_truncated_to_its_own_length(session, model):
    ids, others = prompt(3, 7), prompt(3, 2, seed=9)
    session.forward(ids)
    keep = np.array([6, 0, 3], np.int32)
    session.truncate(keep)
    keep[:] = 1  # the session's own lengths are not this array
    np.testing.assert_array_equal(session.length, [6, 0, 3])
    found = session.forward(others)
    for row, kept in enumerate([6, 0, 3]):
        assert_same(found[row], exact_logits(model, np.concatenate([ids[row, :kept], others[row]]))[-1])


def test_truncate_takes_lists_and_numpy_numbers(session):
    session.forward(prompt(2, 7))
    for given_length, expected in ((6, [6, 6]), (np.int64(5), [5, 5]), ([4, 3], [4, 3]), ((4, 3), [4, 3])):
        session.truncate(given_length)
        np.testing.assert_array_equal(session.length, expected)


@pytest.mark.parametrize(
    "length",
    [6, [5, 6], -1, [5, -1], 2.0, [2.0, 2.0], True, "2", None, [2], [1, 2, 3], [[1, 2]], [[1], [1, 2]], 10**30],
    ids=repr,
)
def test_a_length_that_makes_no_sense_is_refused_and_changes_nothing(session, model, length):
    ids = prompt(2, 8)
    session.forward(ids[:, :5])
    with pytest.raises(InputError):
        session.truncate(length)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(ids[:, 5:])[1], exact_logits(model, ids[1])[-1])


@in_integers_too
def test_after_a_reset_all_is_as_new(session, model):
    first, second = prompt(2, 12), prompt(2, 5, seed=9)
    session.forward(first)
    session.reset()
    found = session.forward(second, all_logits=True)
    assert_same(found, np.stack([exact_logits(model, row) for row in second]))
    np.testing.assert_array_equal(session.length, [5, 5])


@pytest.mark.parametrize("empty", ["reset", "truncate"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_empty_session_takes_another_number_of_rows(session, model, rows, empty):
    session.forward(prompt(3, 12))
    if empty == "reset":
        session.reset()
    else:
        session.truncate(0)
    ids = prompt(rows, 6, seed=9)
    found = session.forward(ids, lengths=[6, 3, 1, 2, 4][:rows])
    for row, length in enumerate([6, 3, 1, 2, 4][:rows]):
        assert_same(found[row], exact_logits(model, ids[row, :length])[-1])
    np.testing.assert_array_equal(session.length, [6, 3, 1, 2, 4][:rows])


# --- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "model"),
    [
        *((backend, model) for backend in ("torch", "onnxruntime", "onnxruntime-cuda") for model in MODELS),
        *((backend, model) for backend in ("onnxruntime", "onnxruntime-cuda") for model in INTEGERS),
    ],
    indirect=True,
)
@pytest.mark.parametrize("step", [1, 4, 5, 100])
def test_the_cache_grows_in_steps_and_keeps_its_content(start, model, step):
    session = start(capacity_step=step)
    ids = prompt(2, P)
    exact = np.stack([exact_logits(model, row) for row in ids])
    before = 0
    for t in range(P):
        assert_same(session.forward(ids[:, t : t + 1]), exact[:, t])
        assert max(before, t + 1) <= session.capacity <= P
        assert session.capacity % step == 0 or session.capacity == P
        assert session.capacity < t + 1 + step
        assert session.cache_bytes == cache_bytes(session.config, "fp32", session.capacity, batch=2)
        before = session.capacity


@growing
def test_memory_is_kept_for_the_next_prompt(start):
    session = start(capacity_step=4)
    session.forward(prompt(1, 10))
    grown = session.cache_bytes
    session.reset()
    session.forward(prompt(1, 2))
    assert session.cache_bytes == grown


@in_integers_too
@pytest.mark.parametrize("chunk_size", [5, 512])
def test_every_position_can_be_used(start, model, chunk_size):
    session = start(chunk_size=chunk_size)
    ids = prompt(2, P)
    assert session.max_length == P
    assert_same(session.forward(ids), np.stack([exact_logits(model, row)[-1] for row in ids]))
    assert session.capacity == P
    with pytest.raises(CapacityError):
        session.forward(ids[:, :1])
    session.truncate(P - 1)
    assert_same(session.forward(ids[:, -1:]), np.stack([exact_logits(model, row)[-1] for row in ids]))


@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("chunk_size", [2, 512])
def test_too_many_tokens_are_refused_before_any_is_appended(start, model, chunk_size, all_logits):
    session = start(chunk_size=chunk_size, capacity_step=4)
    ids = prompt(2, P + 1)
    session.forward(ids[:, : P - 3])
    capacity = session.capacity
    with pytest.raises(CapacityError, match=str(P)):
        session.forward(ids[:, P - 3 :], all_logits=all_logits)
    np.testing.assert_array_equal(session.length, [P - 3, P - 3])
    assert session.capacity == capacity
    assert_same(session.forward(ids[:, P - 3 : P])[0], exact_logits(model, ids[0, :P])[-1])


def test_padding_counts_towards_the_positions(session, model):
    ids = prompt(2, P)
    session.forward(ids[:, : P - 3], lengths=[P - 3, 2])
    with pytest.raises(CapacityError, match="padding"):
        session.forward(ids[:, :4], lengths=[1, 4])  # one real token of row 0 would fit, its padding would not
    np.testing.assert_array_equal(session.length, [P - 3, 2])
    found = session.forward(ids[:, P - 3 :], lengths=[1, 3])  # here it just does
    assert_same(found[0], exact_logits(model, ids[0, : P - 2])[-1])
    assert_same(found[1], exact_logits(model, np.concatenate([ids[1, :2], ids[1, P - 3 :]]))[-1])


def test_the_row_that_is_too_long_is_named(session):
    session.forward(prompt(3, P), lengths=[2, P, 5])
    with pytest.raises(CapacityError, match=f"row 1 holds {P} tokens"):
        session.forward(prompt(3, 1))


def test_a_prompt_longer_than_all_positions_is_refused_on_a_new_session(session, model):
    with pytest.raises(CapacityError):
        session.forward(prompt(1, P + 1))
    np.testing.assert_array_equal(session.length, [0])
    ids = prompt(1, P)
    assert_same(session.forward(ids)[0], exact_logits(model, ids[0])[-1])
