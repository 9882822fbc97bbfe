"""What every session takes and refuses, and that what it refuses changes nothing."""

import itertools

import numpy as np
import pytest
import torch

from gta_edge.errors import BackendError, InputError
from tests.helpers.sessions import VOCAB, assert_same, exact_logits, prompt

# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.astype(np.int32),
        lambda ids: ids.astype(np.uint8),
        lambda ids: ids.tolist(),
        lambda ids: tuple(map(tuple, ids.tolist())),
        lambda ids: np.asfortranarray(ids),
        lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
        lambda ids: np.frombuffer(ids.astype(np.int64).tobytes(), np.int64).reshape(ids.shape),  # read-only
        torch.from_numpy,
    ],
    ids=["int32", "uint8", "lists", "tuples", "by columns", "strided", "read-only", "torch"],
)
def test_integers_of_any_kind_are_taken(start, convert):
    session, other = start(), start()
    for rows, all_logits in itertools.product((1, 2), (True, False)):
        ids = prompt(rows, 5)
        expected = session.forward(ids, all_logits=all_logits)
        np.testing.assert_array_equal(other.forward(convert(ids), all_logits=all_logits), expected)
        session.reset()
        other.reset()


@pytest.mark.parametrize(
    "lengths", [np.array([5, 2], np.int32), np.array([5, 2], np.uint8), (5, 2), torch.tensor([5, 2])]
)
def test_lengths_of_any_kind_are_taken(start, lengths):
    ids = prompt(2, 5)
    session = start()
    np.testing.assert_array_equal(session.forward(ids, lengths=lengths), start().forward(ids, lengths=[5, 2]))
    np.testing.assert_array_equal(session.length, [5, 2])


def test_the_callers_arrays_are_left_alone(session):
    ids, lengths = prompt(2, 5), np.array([5, 2])
    kept = ids.copy()
    session.forward(ids, lengths=lengths)
    session.forward(ids[:, :1])
    np.testing.assert_array_equal(ids, kept)
    np.testing.assert_array_equal(lengths, [5, 2])


def test_logits_that_were_returned_do_not_change_later(session):
    first = session.forward(prompt(2, 5), all_logits=True)
    kept = first.copy()
    session.forward(prompt(2, 5, seed=4), all_logits=True)
    np.testing.assert_array_equal(first, kept)


BAD_IDS = {
    "one row without its batch": [1, 2, 3],
    "one number": 5,
    "three dimensions": [[[1]]],
    "floats": [[1.0, 2.0]] * 2,
    "truth values": [[True, False]] * 2,
    "text": [["a", "b"]] * 2,
    "none": None,
    "rows of different length": [[1, 2], [3]],
    "no tokens": np.zeros((2, 0), np.int64),
    "no rows": np.zeros((0, 2), np.int64),
    "negative": [[1, -1]] * 2,
    "the size of the vocabulary": [[1, 2], [3, VOCAB]],
    "far outside": [[2**62, 1]] * 2,
    "wider than 64 bits": [[10**30, 1]] * 2,
    "as large as unsigned goes": np.full((2, 1), 2**64 - 1, np.uint64),
    "another number of rows": [[1], [2], [3]],
    "a single row": [[1]],
}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_make_no_sense_are_refused_and_change_nothing(session, model, ids):
    before = prompt(2, 8)
    session.forward(before[:, :5])
    with pytest.raises(InputError):
        session.forward(ids)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(before[:, 5:])[1], exact_logits(model, before[1])[-1])


@pytest.mark.parametrize("token", [-1, VOCAB, 2**62])
def test_an_id_outside_the_vocabulary_is_named(session, token):
    with pytest.raises(InputError, match=rf"{token}\b.*{VOCAB - 1}"):
        session.forward([[1, token]])


@pytest.mark.parametrize(
    "lengths",
    [
        *([0, 0], [3, 4], [3, -1], [3, 10**30]),
        *([3.0, 3.0], [True, True], ["3", "3"]),
        *(3, [3], [3, 3, 3], [[3, 3]], [[3], [3, 3]]),
    ],
    ids=repr,
)
def test_lengths_that_make_no_sense_are_refused_and_change_nothing(session, model, lengths):
    ids = prompt(2, 8)
    session.forward(ids[:, :5])
    with pytest.raises(InputError):
        session.forward(ids[:, 5:], lengths=lengths)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(ids[:, 5:])[1], exact_logits(model, ids[1])[-1])


def test_another_number_of_rows_needs_a_reset(session):
    session.forward(prompt(2, 3))
    with pytest.raises(InputError, match=r"3 rows.*holds 2.*reset"):
        session.forward(prompt(3, 1))
    session.truncate([0, 1])  # still one token there
    with pytest.raises(InputError, match="reset"):
        session.forward(prompt(3, 1))
    session.reset()
    assert session.forward(prompt(3, 1)).shape == (3, VOCAB)


def test_whether_tokens_are_replays_of_a_cuda_graph(session, backend):
    """A CPU has no such graphs; what stands in for an engine's driver captures."""
    assert session.cuda_graph is None
    for tokens in (3, 1, 1):
        session.forward(prompt(2, tokens))
    assert session.cuda_graph is (True if backend == "tensorrt" else None)


@pytest.mark.parametrize("by", ["close", "with"])
def test_a_closed_session_runs_no_more(session, by):
    if by == "with":
        with session as entered:
            assert entered is session
            session.forward(prompt(1, 3))
    else:
        session.forward(prompt(1, 3))
        session.close()
        session.close()  # once more does no harm
    with pytest.raises(BackendError, match="closed"):
        session.forward(prompt(1, 1))
