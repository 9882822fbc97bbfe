"""The op on caches in blocks of 4 bits, and of 4 and 2, in torch: against float64, and however tokens come."""

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError
from gta_edge.plugins.attention import torch_blocks
from gta_edge.plugins.attention.torch import UNMANAGED, grouped_latent_attention_
from gta_edge.plugins.attention.torch_blocks import BlockStep
from gta_edge.plugins.torch_cache import Cache
from tests.helpers import reference
from tests.helpers.attention_models import Sizes, arrays
from tests.helpers.block_cases import BLOCK, VALUE_BITS
from tests.helpers.block_reference import Reference

CAPACITY = 128
GTA = Sizes(n_q=4, n_k=2, n_c=1, d_k=16, d_l=64, e=1, capacity=CAPACITY, positions=CAPACITY + 1)
GQA = Sizes(n_q=4, n_k=2, n_c=2, d_k=16, d_l=64, capacity=CAPACITY, positions=CAPACITY + 1, gate=False, decoder=False)
MODELS = {"gta": GTA, "gqa": GQA}
TOLERANCE = 1e-5

every_cache = pytest.mark.parametrize("cache", VALUE_BITS)
every_model = pytest.mark.parametrize("model", MODELS)


def empty(cache: str, sizes: Sizes, batch: int) -> Cache:
    return Cache.of(tuple(torch.from_numpy(each) for each in zeros(cache, sizes, batch)))


def zeros(cache: str, sizes: Sizes, batch: int) -> list[np.ndarray]:
    written = Reference(cache, sizes)
    written.begin(batch)
    return written.arrays(sizes.capacity)


def call(inputs: dict[str, np.ndarray], cache: Cache, past: Sequence[int], sizes: Sizes) -> np.ndarray:
    """One call of the op, which updates the cache; its output [B, T, H]."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    held = {"past_key": cache.key, "past_latent": cache.latent, "past_length": torch.tensor(past)}
    names = ("query", "key", "latent", "gate", *held, "cos", "sin", "value_decoder")
    tensors = (held.get(name, given.get(name)) for name in names)
    output = grouped_latent_attention_(*tensors, *sizes.heads, sizes.scale, *UNMANAGED, *cache.scales, *cache.open)
    return output.numpy()


def tokens_of(inputs: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    new = ("query", "key", "latent", "gate")
    return {name: x[:, start:stop] if name in new else x for name, x in inputs.items()}


def text(sizes: Sizes, batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a whole text. Angles are quarter turns, so that rotated keys have no rounding to differ in."""
    inputs = arrays(replace(sizes, past=(0,) * batch, tokens=tokens, seed=seed))
    quarters = np.random.default_rng(seed).integers(0, 4, inputs["cos"].shape)
    inputs["cos"] = np.array([1, 0, -1, 0], np.float32)[quarters]
    inputs["sin"] = np.array([0, 1, 0, -1], np.float32)[quarters]
    inputs["key"] = inputs["key"] * np.float32(3) + np.float32(1)
    return inputs


def run(
    inputs: dict[str, np.ndarray], cuts: Sequence[int], cache: str, sizes: Sizes
) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """A text in calls that end at ``cuts``; all outputs, and the cache's tensors after it."""
    batch, tokens = inputs["query"].shape[:2]
    held, found, start = empty(cache, sizes, batch), [], 0
    for stop in (*cuts, tokens):
        found.append(call(tokens_of(inputs, start, stop), held, [start] * batch, sizes))
        start = stop
    return np.concatenate(found, axis=1), held.tensors


def same_bits(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True))


# --- against float64 -------------------------------------------------------------------------------------------------


def check_against_float64(cache: str, sizes: Sizes, batch: int, cuts: Sequence[int], tokens: int, seed: int) -> None:
    inputs, exact = text(sizes, batch, tokens, seed), Reference(cache, sizes)
    exact.begin(batch)
    output, tensors = run(inputs, cuts, cache, sizes)
    wanted, start = [], 0
    for stop in (*cuts, tokens):
        wanted.append(exact.attend(tokens_of(inputs, start, stop)))
        start = stop
    assert reference.relative_error(output, np.concatenate(wanted, axis=1)) <= TOLERANCE
    for found, expected in zip(tensors, exact.arrays(sizes.capacity), strict=True):
        assert found.numpy().tobytes() == expected.tobytes()


@settings(max_examples=12, deadline=None)
@given(
    cache=st.sampled_from(sorted(VALUE_BITS)),
    model=st.sampled_from(sorted(MODELS)),
    cuts=st.sets(st.one_of(st.integers(1, 99), st.sampled_from([31, 32, 33, 63, 64, 65, 96])), max_size=4),
    tokens=st.sampled_from([1, 31, 32, 33, 64, 65, 100]),
    seed=st.integers(0, 2**16),
)
def test_it_quantises_and_attends_as_documented(cache: str, model: str, cuts: set[int], tokens: int, seed: int) -> None:
    check_against_float64(cache, MODELS[model], 1, sorted(cut for cut in cuts if cut < tokens), tokens, seed)


def planted(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Make the op wrong in one place."""
    if fault == "the block before is still read as it was":
        visible = BlockStep.visible

        def later(self: BlockStep) -> torch.Tensor:
            self._inside = self._inside - 1
            return visible(self)

        monkeypatch.setattr(BlockStep, "visible", later)
    elif fault == "halves of bytes are swapped":
        pack = torch_blocks.pack

        def swapped(*arguments: object) -> torch.Tensor:
            packed = pack(*arguments)
            return packed >> 4 | packed << 4

        monkeypatch.setattr(torch_blocks, "pack", swapped)
    elif fault == "codes are rounded down":
        monkeypatch.setattr(torch.Tensor, "round", torch.Tensor.floor)
    else:
        assert fault == "a block is closed a token late"
        close = BlockStep._close

        def late(self: BlockStep, *windows: torch.Tensor) -> None:
            self._present = self._present - 1
            close(self, *windows)
            self._present = self._present + 1

        monkeypatch.setattr(BlockStep, "_close", late)


@pytest.mark.parametrize(
    "fault",
    [
        "the block before is still read as it was",
        "halves of bytes are swapped",
        "codes are rounded down",
        "a block is closed a token late",
    ],
)
def test_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_float64("int4", GTA, 1, [30, 40], 64, 0)
    planted(monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_against_float64("int4", GTA, 1, [30, 40], 64, 0)


# --- the rule --------------------------------------------------------------------------------------------------------


@every_cache
@every_model
def test_at_once_in_chunks_token_by_token_or_in_a_batch_it_is_the_same(cache: str, model: str) -> None:
    """Every bit that is stored. Outputs are sums in an order that goes by the matmuls' shapes: those to rounding."""
    sizes, tokens = MODELS[model], 100
    inputs = text(sizes, 3, tokens)
    at_once, stored = run(inputs, (), cache, sizes)
    for cuts in ((7, 33, 64, 90), (32, 64, 96), range(1, tokens)):
        output, tensors = run(inputs, tuple(cuts), cache, sizes)
        assert same_bits(tensors, stored)
        np.testing.assert_allclose(output, at_once, rtol=1e-5, atol=1e-5)
    for b in range(3):
        alone, tensors = run({n: x if n in SHARED else x[b : b + 1] for n, x in inputs.items()}, (), cache, sizes)
        assert same_bits(tensors, [tensor[b : b + 1] for tensor in stored])
        np.testing.assert_allclose(alone[0], at_once[b], rtol=1e-5, atol=1e-5)


SHARED = ("cos", "sin", "value_decoder")


@every_cache
def test_sequences_of_different_lengths_and_one_without_new_tokens(cache: str) -> None:
    """In one call: a row that is told to be full stays as it is, bit for bit."""
    inputs = text(GTA, 3, 60)
    held = empty(cache, GTA, 3)
    lengths = [17, 32, 60]
    for b, length in enumerate(lengths):  # each by itself
        part = Cache.of(tuple(tensor[b : b + 1] for tensor in held.tensors))
        row = {name: x if name in SHARED else x[b : b + 1] for name, x in inputs.items()}
        call(tokens_of(row, 0, length), part, [0], GTA)
    before = [tensor.clone() for tensor in held.tensors]
    call(tokens_of(inputs, 0, 40), held, [17, 32, CAPACITY], GTA)
    assert same_bits([tensor[2] for tensor in held.tensors], [tensor[2] for tensor in before])
    for b in (0, 1):
        row = {name: x if name in SHARED else x[b : b + 1] for name, x in inputs.items()}
        alone = empty(cache, GTA, 1)
        call(tokens_of(row, 0, lengths[b]), alone, [0], GTA)
        call(tokens_of(row, 0, 40), alone, [lengths[b]], GTA)
        assert same_bits([tensor[b : b + 1] for tensor in held.tensors], alone.tensors)


# --- values at the edge ----------------------------------------------------------------------------------------------


@every_cache
def test_groups_of_equal_values_and_of_zeros_are_finite(cache: str) -> None:
    inputs = text(GTA, 1, 40)
    inputs["latent"][:, :8] = 0
    inputs["latent"][:, 8:16] = np.float32(0.1)
    inputs["key"][:] = np.float32(-2.75)
    inputs["cos"][:], inputs["sin"][:] = 1, 0
    check = Reference(cache, GTA)
    check.begin(1)
    output, tensors = run(inputs, (), cache, GTA)
    assert reference.relative_error(output, check.attend(inputs)) <= TOLERANCE
    key_scale, latent_scale = tensors[2].numpy(), tensors[3].numpy()
    assert (key_scale[0, :, 0, 0] == np.float16(2.0**-24)).all()
    assert (key_scale[0, :, 0, 1] == np.float16(-2.75)).all()
    assert np.isfinite(latent_scale).all()


@every_cache
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_what_is_not_finite_never_becomes_a_number(cache: str, value: float) -> None:
    """A value reads as NaN, and so does its group: of keys a channel of 32 tokens, of latents a token."""
    for name in ("key", "latent"):
        inputs = text(GTA, 2, 70)
        inputs[name][0, 5, 3] = value
        output, tensors = run(inputs, (), cache, GTA)
        assert np.isnan(output[0, 32:]).any(-1).all()  # who reads the first block
        assert np.isfinite(output[1]).all()
        scales, half = tensors[2 if name == "key" else 3][0, 0].float().numpy(), GTA.d_k // 2
        if name == "key":  # and the channel that RoPE turns with it
            assert np.isnan(scales[0, 0, [3, 3 + half]]).any()
            assert np.isfinite(np.delete(scales[:2], [3, 3 + half], -1)).all()
        else:
            assert np.isnan(scales[5]).all()
            assert np.isfinite(np.delete(scales[:64], 5, 0)).all()


def test_a_dequantised_value_is_off_by_half_a_step() -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((500, 40)).astype(np.float32)) * 3
    for bits in (2, 4):
        codes, scales, minima = torch_blocks.quantize_groups(values, bits, -1)
        errors = (codes * scales.float() + minima.float() - values).abs()
        # and by what rounding scale and minimum to float16 moves the ends of the range
        assert (errors <= scales.float() * (0.5 + 2.0**-11 * 2**bits) + minima.float().abs() * 2.0**-11).all()


def test_rows_of_such_a_cache_are_not_managed() -> None:
    inputs = text(GTA, 1, 2)
    cache = empty("int4", GTA, 1)
    tensors = [torch.from_numpy(inputs[n]) if n in inputs else None for n in ("query", "key", "latent", "gate")]
    tensors += [cache.key, cache.latent, torch.tensor([0])]
    tensors += [torch.from_numpy(inputs[name]) for name in ("cos", "sin", "value_decoder")]
    managed = (torch.zeros(1, 2, dtype=torch.int64), *UNMANAGED[1:])
    with pytest.raises(BackendError, match="positions is given with a cache in blocks"):
        grouped_latent_attention_(*tensors, *GTA.heads, GTA.scale, *managed, *cache.scales, *cache.open)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-2), (ml_dtypes.bfloat16, 6e-2)])
def test_it_computes_in_16_bits_too(dtype: type, tolerance: float) -> None:
    """What is stored follows from the values as they are then; outputs are rounded, and what codes are read as."""
    inputs = {name: x.astype(dtype) for name, x in text(GQA, 1, 70).items() if x.dtype == np.float32}
    exact, cache = Reference("int4", GQA, dtype), empty("int4", GQA, 1)
    exact.begin(1)
    cache = cache._replace(open=tuple(x.to(torch_dtype(dtype)) for x in cache.open))
    given = {name: torch.from_numpy(x.astype(np.float32)).to(torch_dtype(dtype)) for name, x in inputs.items()}
    tensors = [given["query"], given["key"], given["latent"], None, cache.key, cache.latent, torch.tensor([0])]
    tensors += [given["cos"], given["sin"], None]
    output = grouped_latent_attention_(*tensors, *GQA.heads, GQA.scale, *UNMANAGED, *cache.scales, *cache.open)
    assert output.dtype == torch_dtype(dtype)
    assert reference.relative_error(output.float().numpy(), exact.attend(inputs)) <= tolerance
    for found, expected in zip(cache.tensors, exact.arrays(CAPACITY), strict=True):
        assert found.view(torch.uint8).numpy().tobytes() == expected.tobytes()


def torch_dtype(dtype: type) -> torch.dtype:
    return torch.float16 if dtype is np.float16 else torch.bfloat16


@every_cache
def test_torch_knows_what_the_op_writes(cache: str) -> None:
    inputs, held = text(GTA, 2, 3), empty(cache, GTA, 2)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors = [given[name] for name in ("query", "key", "latent", "gate")]
    tensors += [held.key, held.latent, torch.tensor([30, 5]), given["cos"], given["sin"], given["value_decoder"]]
    arguments = (*tensors, *GTA.heads, GTA.scale, *UNMANAGED, *held.scales, *held.open)
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention_.default, arguments)


def test_blocks_are_of_32_tokens() -> None:
    assert BLOCK == torch_blocks.BLOCK
