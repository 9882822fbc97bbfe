"""The attention's kernels on a GPU: memory with guards, and one call with what it ought to compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gta_edge.cuda.gpu import current_gpu
from gta_edge.numerics.dtypes import CACHE_TYPES, COMPUTE_TYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import AttentionKernels, Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant

DEVICE = "cuda"


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs kernels. Not the whole module: the formula is checked everywhere."""
    import pytest  # which those who only make calls do without

    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(skip(test))


TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}
"""Of the output, row by row of the batch: largest error over the largest magnitude."""
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of a number that is rounded to this type."""
FLOAT32_NOISE = 1e-5
"""Allowance for sums and products in float32, of numbers of magnitude 1."""


def sizes_of(n_q: int, n_k: int, n_c: int, d_k: int, d_l: int, e: int) -> Sizes:
    return Sizes(n_q, n_k, n_c, d_k, d_l, n_q * d_l * e)


VARIANTS = [
    (compute, cache) for compute, cache in product(COMPUTE_TYPES, CACHE_TYPES) if cache in (compute, "int8", "fp8")
]
GTA_1B = sizes_of(5, 1, 1, 64, 128, 2)
GQA = Sizes(9, 3, 3, 64, 64, 576, has_gate=False, has_value_decoder=False)

GUARD_BYTES = 512
GUARD = 0xA5

LIVE: weakref.WeakSet[Memory] = weakref.WeakSet()
"""All memory that there is."""


class Memory:
    """Named tensors, each between two guards in an allocation of its own."""

    def __init__(self) -> None:
        LIVE.add(self)
        self._whole: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Copy a tensor to the device, as contiguous memory between guards."""
        size = values.numel() * values.element_size()
        whole = torch.full((GUARD_BYTES + size + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=DEVICE)
        view = whole[GUARD_BYTES : GUARD_BYTES + size].view(values.dtype).view(values.shape)
        view.copy_(values)
        self._whole[name], self.tensors[name] = whole, view

    def add_poisoned(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Add memory whose every byte is 0xFF, which is NaN in all floating types here."""
        self.add(name, torch.full((*shape, dtype.itemsize), 0xFF, dtype=torch.uint8).view(dtype).view(shape))

    def bytes_of(self, name: str) -> Tensor:
        return self._whole[name].clone()

    def check_guards(self) -> None:
        for name, whole in self._whole.items():
            before, after = whole[:GUARD_BYTES], whole[-GUARD_BYTES:]
            assert (before == GUARD).all(), f"memory before {name} was written to"
            assert (after == GUARD).all(), f"memory after {name} was written to"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, n·d] as float64 [B, n, T, d]."""
    return x.double().unflatten(2, (heads, -1)).transpose(1, 2)


def rotated(x: Tensor, past: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [B, n, T, d] by the angles of its positions, which follow on ``past`` tokens."""
    return rotated_at(x, past[:, None] + torch.arange(x.shape[2], device=x.device), cos, sin)


def rotated_at(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [B, n, T, d] by the angles of ``positions`` [B, T]; outside the tables they are of no interest."""
    positions = positions.clamp(0, len(cos) - 1)
    c, s = cos.double()[positions][:, None], sin.double()[positions][:, None]  # [B, 1, T, d/2]
    first, second = x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]
    return torch.cat((first * c - second * s, second * c + first * s), dim=3)


def with_new_rows(cache: Tensor, new: Tensor, past: list[int]) -> Tensor:
    """A copy of ``cache`` [B, n, S, d] with ``new`` [B, n, T, d] written from each row's ``past`` on, and zeros after.

    What would lie beyond S is dropped.
    """
    result = torch.zeros_like(cache)
    for row, length in enumerate(past):
        count = min(new.shape[2], cache.shape[2] - length)
        result[row, :, :length] = cache[row, :, :length]
        result[row, :, length : length + count] = new[row, :, :count]
    return result


def exact_output(
    query: Tensor,
    gate: Tensor | None,
    key: Tensor,
    latent: Tensor,
    past: Tensor,
    decoder: Tensor | None,
    scale: float,
    *,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    observer: Callable[[Tensor], None] = lambda weights: None,
) -> Tensor:
    """The output [B, T, H] for a rotated query [B, n_q, T, d_k] and caches that hold the new rows; all float64.

    ``hidden`` [B, T, S] are the rows that a query does not see, if not those of later tokens; ``bias`` [B, 1, R] is
    added to the scores of the first rows; ``observer`` is given each head's weights [B, T, S].
    """
    n_q, tokens = query.shape[1:3]
    if hidden is None:
        positions = past[:, None] + torch.arange(tokens, device=query.device)  # [B, T]
        hidden = torch.arange(key.shape[2], device=query.device) > positions[:, :, None]
    heads = []
    for q in range(n_q):  # one by one: scores of a head in float64 fit small GPUs too
        keys, latents = key[:, q * key.shape[1] // n_q], latent[:, q * latent.shape[1] // n_q]
        scores = scale * query[:, q] @ keys.mT  # [B, T, S]
        if bias is not None:
            scores[:, :, : bias.shape[2]] += bias
        weights = scores.masked_fill(hidden, -torch.inf).softmax(2).masked_fill(hidden, 0)  # of no row, zeros
        observer(weights)
        mix = weights @ latents  # [B, T, d_l]
        if decoder is not None:
            mix = mix.repeat(1, 1, decoder.shape[2] // mix.shape[2]) + mix @ decoder[q]
        heads.append(mix)
    output = torch.cat(heads, dim=2)
    return output if gate is None else output * torch.sigmoid(gate.double())


INPUTS = {"query", "key", "latent", "gate", "past_length", "cos", "sin", "value_decoder"}


class Call:
    """One call of the op: its memory on the device, random inputs, and what should come out.

    Args:
        variant: sizes and types.
        past: tokens in the cache, per row; anything outside 0 to ``capacity`` counts as the nearest of them.
        tokens: T.
        capacity: S.
        seed: of the random numbers.
    """

    def __init__(self, variant: Variant, past: tuple[int, ...], tokens: int, capacity: int, *, seed: int = 0) -> None:
        self.variant, self.tokens, self.capacity = variant, tokens, capacity
        self.past = [min(max(length, 0), capacity) for length in past]
        self.scale = variant.sizes.key_dim**-0.5
        self.memory = Memory()
        self._random = torch.Generator(DEVICE).manual_seed(seed)
        sizes, dtype, batch = variant.sizes, TYPES[variant.compute], len(past)
        n_q, n_k, n_c = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
        add = self.memory.add
        add("query", self._normal(batch, tokens, n_q * sizes.key_dim).to(dtype))
        add("key", self._normal(batch, tokens, n_k * sizes.key_dim).to(dtype))
        add("latent", self._normal(batch, tokens, n_c * sizes.latent_dim).to(dtype))
        if sizes.has_gate:
            add("gate", (2 * self._normal(batch, tokens, sizes.hidden_size)).to(dtype))
        add("past_length", torch.tensor(past, dtype=torch.int64))
        angles = torch.arange(capacity, dtype=torch.float64, device=DEVICE)[:, None] / 1e4 ** (
            torch.arange(0, sizes.key_dim, 2, dtype=torch.float64, device=DEVICE) / sizes.key_dim
        )
        add("cos", angles.cos().to(dtype))
        add("sin", angles.sin().to(dtype))
        if sizes.has_value_decoder:
            decoder = self._normal(n_q, sizes.latent_dim, sizes.hidden_size // n_q) / sizes.latent_dim**0.5
            add("value_decoder", decoder.to(dtype))
        self._add_cache("key", n_k, sizes.key_dim)
        self._add_cache("latent", n_c, sizes.latent_dim)
        self.memory.add_poisoned("output", (batch, tokens, sizes.hidden_size), dtype)
        self.kernels = kernels_of(variant)
        self.workspace_bytes = self.kernels.workspace_bytes(batch, tokens, capacity)
        self.memory.add_poisoned("workspace", (self.workspace_bytes,), torch.uint8)
        self.before = {name: self.memory.bytes_of(name) for name in self.memory.tensors}
        synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self.memory.tensors[name]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, device=DEVICE)

    def _add_cache(self, name: str, heads: int, width: int) -> None:
        """Add a cache [B, n, S, d] of random values; rows that hold no token yet are 0xFF, scales too."""
        shape = (len(self.past), heads, self.capacity, width)
        values = self._normal(*shape)
        unused = torch.arange(self.capacity, device=DEVICE) >= torch.tensor(self.past, device=DEVICE)[:, None]  # [B, S]
        if not self.variant.quantised:
            values = values.to(TYPES[self.variant.compute])
        else:
            largest = LARGEST[self.variant.cache]
            codes = (values * largest / 4).clamp(-largest, largest)
            values = (codes.round() if self.variant.cache == "int8" else codes).to(CODES[self.variant.cache])
            scales = (0.5 + torch.rand(shape[:3], generator=self._random, device=DEVICE)) * 4 / largest
            scales.view(torch.int32).masked_fill_(unused[:, None], -1)
            self.memory.add(f"{name}_scale", scales)
        raw = values.view(torch.uint8)  # [B, n, S, bytes of a row]
        raw.masked_fill_(unused[:, None, :, None], 0xFF)
        self.memory.add(f"{name}_cache", values)

    @property
    def batch(self) -> int:
        return len(self.past)

    def buffers(self) -> Buffers:
        tensors = self.memory.tensors
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        addresses["workspace"] = addresses["workspace"] if self.workspace_bytes else 0
        return Buffers(**dict.fromkeys(("key_scale", "latent_scale", "gate", "value_decoder"), 0) | addresses)

    def launch(self, stream: Any = 0) -> None:
        sizes = {"batch": self.batch, "tokens": self.tokens, "capacity": self.capacity, "positions": self.capacity}
        self.kernels.launch(stream, self.buffers(), **sizes, scale=self.scale)

    def run(self) -> Call:
        self.launch()
        synchronize()
        return self

    def set_past(self, past: tuple[int, ...]) -> None:
        """Change the lengths in device memory; the cache must hold that many tokens."""
        self.past = list(past)
        self["past_length"].copy_(torch.tensor(past))

    def stored(self, name: str) -> Tensor:
        """A cache as it is in memory now, float64 [B, n, S, d]; rows without a token may be NaN."""
        values = self[f"{name}_cache"]
        if not self.variant.quantised:
            return values.double()
        return values.float().double() * self[f"{name}_scale"].double()[..., None]  # no type of 8 bits becomes a double

    def new_rows(self) -> dict[str, Tensor]:
        """What has to be appended, unrounded: float64 [B, n, T, d] by cache."""
        key = split_heads(self["key"], self.variant.sizes.num_key_heads)
        past = torch.tensor(self.past, device=DEVICE)
        return {
            "key": rotated(key, past, self["cos"], self["sin"]),
            "latent": split_heads(self["latent"], self.variant.sizes.num_latent_heads),
        }

    def check(self) -> None:
        """Compare all memory with what it was and what it should be."""
        self.memory.check_guards()
        for name in INPUTS & self.before.keys():
            assert torch.equal(self.memory.bytes_of(name), self.before[name]), f"{name} was written to"
        for name, new in self.new_rows().items():
            self.check_old_rows(name)
            self.check_new_rows(name, new)
        errors = self.output_errors()
        assert max(errors) <= TOLERANCE[self.variant.compute], errors

    def check_old_rows(self, name: str) -> None:
        """Every row of a cache that holds no new token must be what it was, bit for bit."""
        for part in [f"{name}_cache"] + [f"{name}_scale"] * self.variant.quantised:
            size = self[part].numel() * self[part].element_size()
            before, after = (
                whole[GUARD_BYTES : GUARD_BYTES + size].view(*self[part].shape[:3], -1)  # [B, n, S, bytes of a row]
                for whole in (self.before[part], self.memory.bytes_of(part))
            )
            for row, length in enumerate(self.past):
                end = min(length + self.tokens, self.capacity)
                assert torch.equal(after[row, :, :length], before[row, :, :length]), f"{part}: old rows of {row}"
                assert torch.equal(after[row, :, end:], before[row, :, end:]), f"{part}: free rows of {row}"

    def check_new_rows(self, name: str, new: Tensor) -> None:
        """New rows must be the exact ones, rounded: to the compute type, or to a code times a scale."""
        stored = self.stored(name)
        for row, length in enumerate(self.past):
            count = min(self.tokens, self.capacity - length)
            found, exact = stored[row, :, length : length + count], new[row, :, :count]
            if not self.variant.quantised:
                rounded = name == "key"  # a latent is only copied
                allowed = rounded * (exact.abs() * ROUNDING[self.variant.compute] + FLOAT32_NOISE)
            else:
                scales = self[f"{name}_scale"][row, :, length : length + count].double()[..., None]
                largest = exact.abs().amax(2, keepdim=True)
                torch.testing.assert_close(scales, largest / LARGEST[self.variant.cache], rtol=1e-4, atol=0)
                allowed = scales / 2 if self.variant.cache == "int8" else exact.abs() * 2**-4 + scales * 2**-10
                allowed = allowed * 1.01  # a code at a tie may go either way in float32
            assert ((found - exact).abs() <= allowed).all(), f"{name}: new rows of {row}"

    def output_errors(self) -> list[float]:
        """Per row of the batch the largest error over the largest magnitude, of tokens that fit the cache.

        A quantised cache is taken as it is stored.
        """
        past, present = torch.tensor(self.past, device=DEVICE), {}
        for name, new in self.new_rows().items():
            stored = self.stored(name)
            if self.variant.quantised:
                taken = [stored[row, :, length : length + self.tokens] for row, length in enumerate(self.past)]
                new = new.clone()
                for row, part in enumerate(taken):
                    new[row, :, : part.shape[1]] = part
            present[name] = with_new_rows(stored, new, self.past)
        query = rotated(split_heads(self["query"], self.variant.sizes.num_query_heads), past, self["cos"], self["sin"])
        query = query.to(TYPES[self.variant.compute]).double()  # as the op's function has it
        gate, decoder = (self.memory.tensors.get(name) for name in ("gate", "value_decoder"))
        decoder = None if decoder is None else decoder.double()
        expected = exact_output(query, gate, present["key"], present["latent"], past, decoder, self.scale)
        errors = []
        for row, length in enumerate(self.past):
            count = min(self.tokens, self.capacity - length)
            if count:
                found, wanted = self["output"][row, :count].double(), expected[row, :count]
                error = (found - wanted).abs().max() / wanted.abs().max()
                errors.append(float("inf") if error.isnan() else error.item())
            else:
                errors.append(0.0)
        return errors


def kernels_of(variant: Variant) -> AttentionKernels:
    return attention_kernels(variant, current_gpu())


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
