"""What every session computes, whatever its backend: of prompts in parts, of rows of different length, of integers."""

import numpy as np
import pytest

from gta_edge.errors import InputError
from tests.helpers import reference
from tests.helpers.sessions import (
    INTEGERS,
    TOLERANCE,
    VOCAB,
    assert_same,
    exact_logits,
    growing,
    in_integers_too,
    prompt,
)

# --- logits ----------------------------------------------------------------------------------------------------------


@in_integers_too
def test_logits_are_those_of_the_formula(session, model):
    ids = prompt(2, 9)
    found = session.forward(ids, all_logits=True)
    assert found.shape == (2, 9, VOCAB)
    assert_same(found, np.stack([exact_logits(model, row) for row in ids]))


def test_logits_of_the_last_position_or_of_all(start):
    ids = prompt(2, 9)
    last, every = start().forward(ids), start().forward(ids, all_logits=True)
    assert last.shape == (2, VOCAB)
    assert_same(last, every[:, -1])


@in_integers_too
def test_token_by_token(session, model):
    ids = prompt(2, 12)
    found = [session.forward(ids[:, t : t + 1]) for t in range(12)]
    assert_same(np.stack(found, axis=1), np.stack([exact_logits(model, row) for row in ids]))


@in_integers_too
@pytest.mark.parametrize("cut", range(1, 9))
def test_a_prompt_may_be_cut_anywhere(session, model, cut):
    ids = prompt(2, 9)
    found = np.concatenate(
        [session.forward(ids[:, :cut], all_logits=True), session.forward(ids[:, cut:], all_logits=True)], axis=1
    )
    assert_same(found, np.stack([exact_logits(model, row) for row in ids]))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8, 9, 10, 100])
def test_the_size_of_a_chunk_does_not_matter(start, chunk_size):
    ids, lengths = prompt(3, 9), [9, 4, 1]
    chunked, whole = start(chunk_size=chunk_size), start()
    for all_logits in (True, False):
        expected = whole.forward(ids, lengths=lengths, all_logits=all_logits)
        assert_same(chunked.forward(ids, lengths=lengths, all_logits=all_logits), expected)
        np.testing.assert_array_equal(chunked.length, lengths)
        following = prompt(3, 2, seed=8)
        assert_same(chunked.forward(following), whole.forward(following))
        chunked.reset()
        whole.reset()


@pytest.mark.parametrize("value", [0, -1])
def test_a_chunk_below_one_is_refused_by_name(start, value):
    with pytest.raises(InputError, match="chunk_size"):
        start(chunk_size=value)


@growing
@pytest.mark.parametrize("value", [0, -1])
def test_steps_below_one_are_refused_by_name(start, value):
    with pytest.raises(InputError, match="capacity_step"):
        start(capacity_step=value)


# --- rows of different length ----------------------------------------------------------------------------------------


@in_integers_too
@pytest.mark.parametrize("chunk_size", [3, 512])
def test_rows_of_different_length_are_as_each_alone(start, model, chunk_size):
    session = start(chunk_size=chunk_size)
    ids, lengths = prompt(4, 9), np.array([9, 1, 5, 3])
    last = session.forward(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_same(last[row], exact_logits(model, ids[row, :length])[-1])
    np.testing.assert_array_equal(session.length, lengths)
    # and on, every row from where it ended
    more, new = prompt(4, 4, seed=4), np.array([2, 4, 1, 3])
    every = session.forward(more, lengths=new, all_logits=True)
    for row in range(4):
        tokens = np.concatenate([ids[row, : lengths[row]], more[row, : new[row]]])
        assert_same(every[row, : new[row]], exact_logits(model, tokens)[lengths[row] :])
    np.testing.assert_array_equal(session.length, lengths + new)


@in_integers_too
def test_padded_positions_are_zero(session):
    found = session.forward(prompt(2, 6), lengths=[6, 2], all_logits=True)
    assert found.shape == (2, 6, VOCAB)
    assert not found[1, 2:].any()
    assert found[0].any(axis=1).all()
    assert found[1, :2].any(axis=1).all()


@pytest.mark.parametrize("chunk_size", [3, 512])
def test_what_the_padding_is_does_not_matter(start, chunk_size):
    one = prompt(2, 8)
    other = one.copy()
    other[1, 2:] = (other[1, 2:] + 7) % VOCAB
    first, second = start(chunk_size=chunk_size), start(chunk_size=chunk_size)
    np.testing.assert_array_equal(first.forward(one, lengths=[8, 2]), second.forward(other, lengths=[8, 2]))
    following = prompt(2, 3, seed=4)
    np.testing.assert_array_equal(first.forward(following, all_logits=True), second.forward(following, all_logits=True))


def test_lengths_of_full_width_are_no_lengths(start):
    ids = prompt(2, 5)
    np.testing.assert_array_equal(start().forward(ids, lengths=[5, 5]), start().forward(ids))


# --- activations rounded to int8 -------------------------------------------------------------------------------------

ROUNDED = 0.5  # the same tolerance where matmuls with integers round activations


@pytest.mark.parametrize(("backend", "model"), [("onnxruntime", model) for model in INTEGERS], indirect=True)
def test_rounded_activations_are_near(start, model):
    ids = prompt(3, 9)
    exact = np.stack([exact_logits(model, row) for row in ids])
    session = start(exact=False)
    at_once = session.forward(ids, all_logits=True)
    assert TOLERANCE < reference.relative_error(at_once, exact) <= ROUNDED
    session.reset()
    by_token = np.stack([session.forward(ids[:, t : t + 1]) for t in range(9)], axis=1)
    assert reference.relative_error(by_token, exact) <= ROUNDED


@pytest.mark.parametrize(("backend", "model"), [("onnxruntime", model) for model in INTEGERS], indirect=True)
def test_rounding_does_not_depend_on_the_other_tokens(start, model):
    """A token's activations are rounded by themselves: not with those of other rows, or of padding."""
    ids, lengths = prompt(3, 9), [9, 1, 5]
    together = start(exact=False).forward(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = start(exact=False, chunk_size=4).forward(ids[row : row + 1, :length])
        assert reference.relative_error(alone[0], together[row]) <= 0.02
    changed = np.where(np.arange(9) < np.array(lengths)[:, None], ids, (ids + 7) % VOCAB)
    np.testing.assert_array_equal(start(exact=False).forward(changed, lengths=lengths), together)
