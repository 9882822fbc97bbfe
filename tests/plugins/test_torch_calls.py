"""What is kept of a call by its tensors' shapes and types: each call is launched as it would be alone."""

from __future__ import annotations

import random
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gta_edge.errors import BackendError
from gta_edge.plugins.attention import torch as attention
from gta_edge.plugins.attention.definition import Features, Sizes
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.elementwise.kernels import ElementwiseKernels
from gta_edge.plugins.elementwise.launches import add_norm_launch, silu_launch
from gta_edge.plugins.matmul import definition as matmul_definition
from gta_edge.plugins.matmul import torch as matmul
from tests.helpers.fake_cuda import ORIN, STREAM, FakeCuda
from tests.helpers.host_memory import pretend_gpu

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Noted:
    """In the place of kernels: what they would be compiled for and launched with; computes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        pretend_gpu(monkeypatch, module)
        monkeypatch.setattr(module, name, self._of)
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def _of(self, variant: Any, gpu: Any) -> Noted:
        self._variant = variant
        return self

    def workspace_bytes(self, batch: int, tokens: int, capacity: int) -> int:
        return 16

    def launch(self, stream: int, *buffers: Any, **numbers: Any) -> None:
        self.buffers = buffers
        addresses = {"x", "weight", "scale", "bias", "outputs"} if not buffers else set()
        self.calls.append((self._variant, {n: value for n, value in numbers.items() if n not in addresses}))


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of the attention op, and what it ought to launch."""

    compute: str = "fp16"
    batch: int = 2
    tokens: int = 3
    capacity: int = 64
    positions: int = 128
    heads: tuple[int, int, int] = (4, 2, 2)
    key_dim: int = 16
    latent_dim: int = 32
    gate: bool = True
    decoder: bool = True
    features: Features = Features()  # noqa: RUF009  # it is frozen
    branch_rows: int = 0
    cache: str | None = None

    @property
    def variant(self) -> Variant:
        hidden = self.heads[0] * self.latent_dim
        sizes = Sizes(*self.heads, self.key_dim, self.latent_dim, hidden, self.gate, self.decoder)
        return Variant(sizes, self.compute, self.cache or self.compute, self.features)

    @property
    def numbers(self) -> dict[str, Any]:
        names = ("batch", "tokens", "capacity", "positions", "branch_rows")
        return {name: getattr(self, name) for name in names} | {"scale": 0.25}

    def arguments(self) -> list[Any]:
        def of(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=TYPES[self.compute])

        b, t, s, (n_q, n_k, n_c) = self.batch, self.tokens, self.capacity, self.heads
        d_k, d_l, f = self.key_dim, self.latent_dim, self.features
        inputs: list[Any] = [
            *(of(b, t, n_q * d_k), of(b, t, n_k * d_k), of(b, t, n_c * d_l)),
            of(b, t, n_q * d_l) if self.gate else None,
            *(of(b, n_k, s, d_k), of(b, n_c, s, d_l), torch.zeros(b, dtype=torch.int64)),
            *(of(self.positions, d_k // 2), of(self.positions, d_k // 2)),
            of(n_q, d_l, d_l) if self.decoder else None,
            *(*self.heads, 0.25),
            torch.zeros(b, t, dtype=torch.int64) if f.has_positions else None,
            torch.zeros(b, f.bias_rows) if f.bias_rows else None,
            torch.zeros(b, dtype=torch.int64) if f.has_branches else None,
            torch.zeros(b, self.branch_rows, dtype=torch.int64) if f.has_branches else None,
            *((torch.zeros(b, s), torch.zeros(b, t), torch.ones(b), f.observe) if f.observe else ()),
        ]
        if self.cache is not None:
            inputs += attention.UNMANAGED[len(inputs) - attention._FEATURES_AT :]
            inputs[4:6], stored = self.quantised()
            return [*inputs, *stored]
        while inputs[-1] is None:  # as torch leaves them off
            inputs.pop()
        return inputs

    def quantised(self) -> tuple[list[Tensor], list[Tensor]]:
        """The codes of both caches, and what is beside them."""
        b, s, (_, n_k, n_c), d_k, d_l = self.batch, self.capacity, self.heads, self.key_dim, self.latent_dim
        if self.cache in ("int8", "fp8"):
            kind = torch.int8 if self.cache == "int8" else torch.float8_e4m3fn
            codes = [torch.zeros(b, n_k, s, d_k, dtype=kind), torch.zeros(b, n_c, s, d_l, dtype=kind)]
            return codes, [torch.zeros(b, n_k, s), torch.zeros(b, n_c, s)]
        width = d_l // (2 if self.cache == "int4" else 4)
        codes = [torch.zeros(b, n_k, s // 32, d_k, 16), torch.zeros(b, n_c, s, width)]
        scales = [torch.zeros(b, n_k, s // 32, 2, d_k), torch.zeros(b, n_c, s, 2)]
        opened = [torch.zeros(b, n, 32, d, dtype=TYPES[self.compute]) for n, d in ((n_k, d_k), (n_c, d_l))]
        return [each.to(torch.uint8) for each in codes], [*(each.half() for each in scales), *opened]


CALLS = [
    Call(),
    Call(compute="bf16"),
    Call(batch=3),
    Call(tokens=40),
    Call(capacity=128),
    Call(positions=64),
    Call(heads=(4, 2, 1)),
    Call(heads=(8, 2, 2), key_dim=32, latent_dim=16),
    Call(key_dim=32),
    Call(latent_dim=64),
    Call(gate=False),
    Call(decoder=False),
    Call(gate=False, decoder=False),
    *(
        Call(features=features, branch_rows=9 if features.has_branches else 0)
        for features in (
            Features(None, 2),
            Features(None, 4),
            Features(None, 0, True),
            Features(None, 2, True),
            Features(None, 0, True, True),
            Features("mass"),
            Features("last"),
            Features("last", 2, True),
        )
    ),
    Call(features=Features(None, 0, True, True), branch_rows=10),
    *(Call(cache=cache, compute=compute) for cache in ("int8", "fp8") for compute in TYPES),
    *(Call(cache=cache, latent_dim=64, tokens=tokens) for cache in ("int4", "int4v2") for tokens in (1, 40)),
    Call(cache="int8", features=Features("mass", 2, True)),
]


def attend(call: Call) -> None:
    attention._latent_attention_on_gpu(*call.arguments())


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Noted:
    attention._kernel_call.cache_clear()
    return Noted(monkeypatch, attention, "attention_kernels")


@pytest.mark.parametrize("seed", range(3))
def test_calls_of_attention_are_launched_as_they_are(seed, attended):
    order = CALLS * 2
    random.Random(seed).shuffle(order)
    for call in order:
        attend(call)
    assert attended.calls == [(call.variant, call.numbers) for call in order]


@pytest.mark.parametrize("good_first", [False, True])
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (-1, "", "past_received is given without observe"),
        (15, torch.zeros(2, 65), "row_bias has 65 rows|bias_rows is 65"),
        (19, None, "without the others of past_received"),
        (10, 3, "num_query_heads 3 is not a multiple of num_key_heads"),
    ],
)
def test_a_refused_call_is_refused_each_time_and_no_other(place, value, message, good_first, attended):
    call = Call(features=Features("mass", 2, True))
    bad = call.arguments()
    bad[place] = value
    for good in (good_first, not good_first, True, False):
        if good:
            attend(call)
            continue
        with pytest.raises((BackendError, ValueError), match=message):
            attention._latent_attention_on_gpu(*bad)
    assert attended.calls == [(call.variant, call.numbers)] * 2


@pytest.mark.parametrize("name", ["past_key", "past_latent", "past_received"])
def test_caches_that_are_views_are_left_to_torch_beside_whole_ones(name, attended):
    call = Call(features=Features("mass", 0, True))
    arguments = call.arguments()
    place = {"past_key": 4, "past_latent": 5, "past_received": 18}[name]
    arguments[place] = torch.cat([arguments[place]] * 2, -1)[..., ::2]
    for launches in range(1, 4):
        attend(call)
        attention._latent_attention_on_gpu(*arguments)
        assert len(attended.calls) == launches


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_kernels_get_the_scales_and_the_open_blocks(cache, attended):
    arguments = Call(cache=cache).arguments()
    attention._latent_attention_on_gpu(*arguments)
    (buffers,) = attended.buffers
    names = ("key_scale", "latent_scale", "key_open", "latent_open")
    there = [x.data_ptr() for x in arguments[attention._STORED_AT :]]
    assert [getattr(buffers, name) for name in names] == [*there, 0, 0][:4]
    assert (buffers.key_cache, buffers.latent_cache) == (arguments[4].data_ptr(), arguments[5].data_ptr())


def test_scales_of_rows_may_begin_at_any_float(attended):
    """As those of a part of a batch do, of a capacity that is no multiple of 4."""
    arguments = Call(cache="int8", capacity=61, heads=(4, 1, 1)).arguments()
    arguments[4:7], beside = [x[1:] for x in arguments[4:7]], arguments[attention._STORED_AT :]
    arguments = [x[1:] if i in (0, 1, 2, 3) else x for i, x in enumerate(arguments)]
    arguments[attention._STORED_AT :] = [x[1:] for x in beside]
    attention._latent_attention_on_gpu(*arguments)
    (buffers,) = attended.buffers
    assert buffers.latent_scale == beside[1].data_ptr() + 61 * 4


@pytest.mark.parametrize(("place", "dtype"), [(1, torch.bfloat16), (6, torch.int32), (9, torch.float32)])
def test_an_input_of_another_type_is_no_call_of_the_kernels(place, dtype, attended):
    attend(Call())
    arguments = Call().arguments()
    arguments[place] = arguments[place].to(dtype)
    with suppress(RuntimeError):  # torch's own operations may not take it either
        attention._latent_attention_on_gpu(*arguments)
    assert len(attended.calls) == 1


def test_nothing_of_a_call_is_kept_alive(attended):
    arguments = Call(features=Features("mass", 2, True)).arguments()
    tensors = [weakref.ref(x) for x in arguments if isinstance(x, Tensor)]
    attention._latent_attention_on_gpu(*arguments)
    del arguments
    assert not any(tensor() is not None for tensor in tensors)


# --- matmul ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A call of the matmul op."""

    compute: str = "fp16"
    lead: tuple[int, ...] = (2, 3)
    in_features: int = 256
    outputs: tuple[int, ...] = (32, 16)
    bits: int = 4
    block_size: int = 32
    bias: bool = False

    @property
    def numbers(self) -> dict[str, Any]:
        return {"rows": int(np.prod(self.lead)), "in_features": self.in_features, "output_sizes": self.outputs}

    def arguments(self) -> list[Any]:
        dtype = TYPES[self.compute]
        sizes = matmul_definition.Sizes(self.in_features, self.outputs, self.bits, self.block_size)
        return [
            torch.zeros(*self.lead, self.in_features, dtype=dtype),
            torch.zeros(sizes.weight_shape, dtype=torch.int32),
            torch.zeros(sizes.scale_shape, dtype=torch.float16),
            torch.zeros(sum(self.outputs), dtype=dtype) if self.bias else None,
            *(self.bits, self.block_size, list(self.outputs)),
        ]


PRODUCTS = [
    Product(),
    Product(compute="bf16"),
    Product(lead=(6,)),
    Product(lead=(40,)),
    Product(in_features=384),
    Product(outputs=(16, 32)),
    Product(outputs=(48,)),
    Product(bits=8),
    Product(block_size=64),
    Product(bits=8, block_size=0),
    Product(bias=True),
]


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Noted:
    matmul._checked_sizes.cache_clear()
    return Noted(monkeypatch, matmul, "matmul_kernels")


@pytest.mark.parametrize("seed", range(3))
def test_products_are_launched_as_they_are(seed, multiplied):
    order = PRODUCTS * 2
    random.Random(seed).shuffle(order)
    for call in order:
        results = matmul._on_gpu(*call.arguments())
        assert [tuple(each.shape) for each in results] == [(*call.lead, size) for size in call.outputs]
        assert {each.dtype for each in results} == {TYPES[call.compute]}
    found = [(of.bits, of.block_size, of.compute, numbers) for of, numbers in multiplied.calls]
    assert found == [(each.bits, each.block_size, each.compute, each.numbers) for each in order]


@pytest.mark.parametrize(
    ("place", "wrong"), [(1, torch.int64), (2, torch.float32), (3, torch.float32), (4, 8), (5, 64), (6, [32, 16, 16])]
)
def test_a_product_whose_arguments_do_not_fit_is_refused_beside_a_right_one(place, wrong, multiplied):
    call = Product(bias=True)
    bad = call.arguments()
    bad[place] = bad[place].to(wrong) if place < 4 else wrong
    for _ in range(2):
        matmul._on_gpu(*call.arguments())
        with pytest.raises(ValueError, match=r"(weight|scale|bias) is .*; expected"):
            matmul._on_gpu(*bad)
    assert len(multiplied.calls) == 2


# --- between matmuls -------------------------------------------------------------------------------------------------


def test_what_stands_between_matmuls_is_launched_as_it_is(monkeypatch):
    cuda = FakeCuda().install(monkeypatch)
    kernels = ElementwiseKernels("fp16", ORIN)
    norms = [(3, 64, 1e-5), (4, 64, 1e-5), (3, 128, 1e-5), (3, 64, 1e-6)]
    order: list[Any] = [*norms, 512, 1024, 3 * 64] * 2
    random.Random(0).shuffle(order)
    expected: list[Any] = []
    for call in order:
        if isinstance(call, tuple):
            rows, width, epsilon = call
            addresses = {"x": 16, "addend": 32, "weight": 48, "sum": 64, "normed": 80}
            kernels.add_norm(STREAM, **addresses, rows=rows, width=width, epsilon=epsilon)
            made, numbers = add_norm_launch(rows, width), (np.int32(width), np.float32(epsilon))
        else:
            addresses = {"gate": 16, "up": 32, "output": 48}
            kernels.silu_multiply(STREAM, **addresses, values=call)
            made, numbers = silu_launch(call), (np.int32(call // 8),)
        name = "gta_add_norm" if isinstance(call, tuple) else "gta_silu_multiply"
        config = (made.grid, made.threads, made.shared_bytes)
        expected.append((STREAM, config, name, (*addresses.values(), *numbers)))
    assert cuda.launches == expected
    assert all(type(number) in (int, np.int32, np.float32) for *_, numbers in cuda.launches for number in numbers)
