"""The `torch` backend with caches of fewer bits, on the CPU: a text however it comes, and what becomes of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.reference import build_decoder
from gta_edge.accuracy.tolerance import difference
from gta_edge.errors import CapacityError, InputError
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, QUANTIZED_CACHE_TYPES, ROW_CACHE_TYPES
from gta_edge.plugins.attention.torch import UNMANAGED, grouped_latent_attention_
from gta_edge.plugins.torch_cache import quantize_rows
from gta_edge.runtime.block_cache import BlockCache
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.prompt_cache import CacheSize
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import int8_reference, reference
from tests.helpers.attention_models import Sizes, arrays

VOCAB, POSITIONS, LAYERS = 97, 200, 2
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, max_position_embeddings=POSITIONS),
    "gqa": reference.llama_entries(max_position_embeddings=POSITIONS),
}
IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 120))
SAME = 1e-4  # logits that differ by the order of sums alone, over their standard deviation
ROUNDED = 0.1  # where a code may be another for it

every_cache = pytest.mark.parametrize("cache_dtype", QUANTIZED_CACHE_TYPES)
in_blocks = pytest.mark.parametrize("cache_dtype", BLOCK_CACHE_TYPES)


@contextmanager
def opened(cache_dtype: str, model: str = "gta", **options: Any) -> Iterator[TorchSession]:
    decoder = build_decoder(parse_config(MODELS[model]), reference.random_weights(MODELS[model]).items())
    options = {"capacity_step": BLOCK, "chunk_size": 50} | options
    with TorchSession(decoder, cache_dtype=cache_dtype, **options) as session:
        yield session


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return difference(found, expected).max_rel_error


def blocks(session: TorchSession) -> BlockCache:
    assert isinstance(session._cache, BlockCache)
    return session._cache


# --- one text --------------------------------------------------------------------------------------------------------


@every_cache
@pytest.mark.parametrize("model", MODELS)
def test_a_text_at_once_in_pieces_or_in_a_batch(cache_dtype: str, model: str) -> None:
    """Hidden states differ by rounding with the shapes of matmuls, so that a value may get the code beside its own."""
    with opened(cache_dtype, model) as session:
        at_once = session.forward(IDS, all_logits=True)
        assert session.cache_bytes == cache_bytes(session.config, cache_dtype, 128, 3, compute="fp32")
        session.reset()
        cuts = [0, 1, 2, 30, 31, 32, 33, 64, 70, 97, 119, 120]
        pieces = [session.forward(IDS[:, a:b], all_logits=True) for a, b in pairwise(cuts)]
        assert error(np.concatenate(pieces, 1), at_once) <= ROUNDED
        session.reset()
        lengths = np.array([50, 120, 64])
        ragged = session.forward(IDS, lengths=lengths, all_logits=True)
        more = session.forward(IDS[:, 50:55])
        for row, length in enumerate(lengths.tolist()):
            assert error(ragged[row, :length], at_once[row, :length]) <= ROUNDED
            assert not ragged[row, length:].any()
            session.reset()
            alone = session.forward(IDS[row : row + 1, :length])
            assert error(alone[0], at_once[row, length - 1]) <= ROUNDED
            assert error(session.forward(IDS[row : row + 1, 50:55])[0], more[row]) <= ROUNDED


@every_cache
def test_it_is_near_to_the_float32_cache(cache_dtype: str) -> None:
    with opened("fp32") as session:
        exact = session.forward(IDS[:1], all_logits=True)
    with opened(cache_dtype) as session:
        found = session.forward(IDS[:1], all_logits=True)
    allowed = {"int8": 0.05, "fp8": 0.2, "int4": 0.5, "int4v2": 1.5}  # of random weights, and the worst of all logits
    assert allowed[cache_dtype] / 50 < error(found, exact) <= allowed[cache_dtype]


@in_blocks
def test_memory_grows_by_whole_blocks_and_a_text_goes_on(cache_dtype: str) -> None:
    with opened(cache_dtype) as small, opened(cache_dtype, capacity_step=POSITIONS) as large:
        assert large._cache.capacity_for(1) == 224  # what has room for all positions
        sizes = set()
        for start in range(0, 100, 10):
            found = [each.forward(IDS[:1, start : start + 10]) for each in (small, large)]
            assert error(*found) <= SAME
            sizes.add(small.capacity)
        assert sizes == {32, 64, 96, 128}
        before = [tensor.clone() for layer in small._caches for tensor in layer.tensors]
        small.reset()
        small.forward(IDS[:1, :100])
        assert small.capacity == 128
        after = [tensor for layer in small._caches for tensor in layer.tensors]
        assert [a.shape for a in after] == [b.shape for b in before]


@in_blocks
def test_a_sequence_that_takes_no_part_near_the_end_leaves_room_for_others(cache_dtype: str) -> None:
    """What it would be padded with is not written, and so needs no positions."""
    ids = np.random.default_rng(1).integers(0, VOCAB, (3, POSITIONS))
    first, then = np.array([10, POSITIONS - 1, 20]), np.array([40, 1, 35])
    with opened(cache_dtype) as session:
        session.forward(ids, lengths=first)
        found = session.forward(ids[:, :60], lengths=then)  # behind 40, all of it is padding
        assert session.length.tolist() == [50, POSITIONS, 55]
        with pytest.raises(CapacityError, match="row 1 holds 200 tokens and would reach 201"):
            session.forward(ids[:, :1])
        for row, (before, after) in enumerate(zip(first.tolist(), then.tolist(), strict=True)):
            session.reset()
            session.forward(ids[row : row + 1, :before])
            assert error(session.forward(ids[row : row + 1, :after])[0], found[row]) <= ROUNDED


# --- truncate --------------------------------------------------------------------------------------------------------


@in_blocks
@pytest.mark.parametrize(("length", "stays"), [(60, 40), (64, 33), (70, 64), (70, 32), (31, 3)])
def test_what_the_open_block_still_holds_is_taken_back_without_a_trace(
    cache_dtype: str, length: int, stays: int
) -> None:
    with opened(cache_dtype) as session:
        session.forward(IDS[:1, :stays])
        expected = session.forward(IDS[1:2, :30], all_logits=True)
        session.reset()
        session.forward(IDS[:1, :stays])
        session.forward(IDS[:1, stays:length])
        session.truncate(stays)
        np.testing.assert_array_equal(session.forward(IDS[1:2, :30], all_logits=True), expected)


@in_blocks
def test_an_older_block_is_opened_with_what_its_codes_stand_for(cache_dtype: str) -> None:
    with opened(cache_dtype) as session:
        session.forward(IDS[:2, :90])
        session.truncate(np.array([90, 40]))
        assert blocks(session).held_blocks.tolist() == [2, 1]
        for layer in session._caches:
            scale, minimum = layer.scales[1][1, :, 32:64, :1].float(), layer.scales[1][1, :, 32:64, 1:].float()
            off = (layer.open[1][1] - minimum) / scale
            assert (off - off.round()).abs().max() < 1e-3  # what is there is a code's value
        assert session.length.tolist() == [90, 40]
        session.truncate(np.array([90, 35]))  # within it
        again = session.forward(IDS[:2, 35:40], lengths=np.array([0, 5]))
        session.reset()
        fresh = session.forward(IDS[:2, :40])
        assert error(again[1], fresh[1]) <= {"int4": 0.5, "int4v2": 1.5}[cache_dtype]


def test_a_block_opened_after_the_last_was_full() -> None:
    """What the open block holds is not what the length says: 64 tokens of 70 stay, and then 63."""
    with opened("int4") as session:
        session.forward(IDS[:1, :70])
        session.truncate(64)
        assert blocks(session).held_blocks.tolist() == [2]
        session.truncate(63)
        assert blocks(session).held_blocks.tolist() == [1]
        session.truncate(0)
        expected = session.forward(IDS[1:2, :20])
        session.reset()
        np.testing.assert_array_equal(session.forward(IDS[1:2, :20]), expected)


def test_a_block_that_cannot_be_opened_leaves_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("int4") as session:
        session.forward(IDS[:2, :90])

        def fails(sequence: int, block: int) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(session, "_reopen", fails)
        with pytest.raises(RuntimeError, match="broken"):
            session.truncate(np.array([90, 40]))
        assert session.length.tolist() == [0, 0]


@in_blocks
def test_how_many_tokens_a_draft_may_have(cache_dtype: str) -> None:
    with opened(cache_dtype) as session:
        for length, most in ((3, 28), (30, 1), (31, 32), (32, 31), (63, 32)):
            session.reset()
            session.forward(IDS[:1, :length])
            assert session._cache.revocable() == most
            session.forward(IDS[:1, 30 : 31 + most])
            held = [tensor.clone() for layer in session._caches for tensor in layer.tensors[2:]]
            session.truncate(length + 1)
            after = [tensor for layer in session._caches for tensor in layer.tensors[2:]]
            assert all(torch.equal(a, b) for a, b in zip(after, held, strict=True))  # nothing was opened


# --- sequences put aside, and policies -------------------------------------------------------------------------------


@every_cache
def test_a_sequence_is_put_aside_and_taken_back(cache_dtype: str) -> None:
    with opened(cache_dtype) as session, opened(cache_dtype) as other:
        session.forward(IDS[:2, :70])
        saved = session.export_cache(1)
        assert CacheSize.of(session, 70).nbytes == saved.nbytes
        expected = session.forward(IDS[:2, 70:90], all_logits=True)[1]
        other.forward(IDS[:3, :10])
        other.import_cache(saved, 2)
        found = other.forward(IDS[[2, 2, 1], 70:90], lengths=np.array([0, 0, 20]), all_logits=True)[2]
        assert error(found, expected) <= SAME
        # the first 40: of blocks, what codes stand for
        session.truncate(70)
        first, whole = session.export_cache(1, tokens=40), saved
        for each in (first, whole):
            other.import_cache(each, 0, tokens=40)
            after = [opened[0, :, :8] for layer in other._caches for opened in layer.open]
            session.truncate(np.array([70, 40]))
            there = [opened[1, :, :8] for layer in session._caches for opened in layer.open]
            assert all(torch.equal(a, b) for a, b in zip(after, there, strict=True))


@pytest.mark.parametrize("ran", [64, 70])
def test_what_is_reused_of_whole_blocks_is_as_if_no_more_had_been_run(ran: int) -> None:
    """The open block holds the last of 64 tokens, or, where 64 of 70 stay, a later one."""
    with opened("int4") as session:
        session.forward(IDS[:1, :ran])
        session.truncate(64)
        saved, count = session.export_cache(), session.reusable(64, 50)
        assert count > 0
        session.reset()
        session.forward(IDS[:1, :count])
        expected = session.forward(IDS[1:2, :20], all_logits=True)
        session.import_cache(saved, 0)
        for reused in (session.export_cache(0, count), saved):
            session.import_cache(reused, 0, count)
            np.testing.assert_array_equal(session.forward(IDS[1:2, :20], all_logits=True), expected)
            session.import_cache(saved, 0)


@pytest.mark.parametrize("cache_dtype", ROW_CACHE_TYPES)
def test_a_policy_keeps_rows_of_8_bits(cache_dtype: str) -> None:
    window = policy("window", rows=24, interval=8, sinks=2, residual_rows=2)
    with opened(cache_dtype, cache=window) as session, opened("fp32", cache=window) as exact:
        found = [each.forward(IDS[:1], all_logits=True) for each in (session, exact)]
        assert error(*found) <= {"int8": 0.1, "fp8": 0.3}[cache_dtype]
        steps = [np.stack([each.forward(IDS[:1, t : t + 1]) for t in range(40)]) for each in (session, exact)]
        assert error(*steps) <= {"int8": 0.1, "fp8": 0.3}[cache_dtype]
        assert (session.rows == exact.rows).all()
        assert session.cache_bytes < 0.4 * exact.cache_bytes


@in_blocks
def test_blocks_are_not_kept_small_by_a_policy(cache_dtype: str) -> None:
    message = f"^cache policy window moves rows one by one, and a cache of {cache_dtype} is quantised in blocks; take a"
    with pytest.raises(InputError, match=message), opened(cache_dtype, cache=policy("window", rows=24)):
        pass


# --- 8 bits, the op --------------------------------------------------------------------------------------------------


def test_a_cache_of_int8_is_that_of_the_formula() -> None:
    sizes = Sizes(past=(0, 0), tokens=12, capacity=16, positions=20)
    inputs = arrays(sizes)
    cache = [torch.zeros(2, n, 16, d, dtype=torch.int8) for n, d in ((2, 16), (1, 24))]
    scales = [torch.zeros(2, n, 16) for n in (2, 1)]
    past = tuple(int8_reference.Cache.of(np.zeros(each.shape)) for each in cache)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    given |= {"past_key": cache[0], "past_latent": cache[1]}
    output = grouped_latent_attention_(*given.values(), *sizes.heads, sizes.scale, *UNMANAGED, *scales)
    expected = int8_reference.attend(inputs, past, sizes, in_place=False)
    assert reference.relative_error(output.numpy(), expected.output) <= 1e-4
    for codes, scale, wanted in zip(cache, scales, (expected.key, expected.latent), strict=True):
        assert (codes.double().numpy()[:, :, :12] != wanted.codes[:, :, :12]).mean() < 0.01  # ties of two roundings
        np.testing.assert_allclose(scale.numpy()[:, :, :12], wanted.scales[:, :, :12], rtol=1e-5)


def test_rows_of_8_bits_that_are_zeros_or_not_finite() -> None:
    rows = torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [3.0, -1.5]])
    for dtype in (torch.int8, torch.float8_e4m3fn):
        codes, scales = quantize_rows(rows, dtype)
        values = codes.float() * scales[:, None]
        assert not values[0].any()
        assert scales[0] > 0
        assert values[1:3].isnan().all()
        torch.testing.assert_close(values[3], rows[3], rtol=0.07, atol=0)
