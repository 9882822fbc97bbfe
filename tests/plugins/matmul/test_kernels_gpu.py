"""The matmuls with quantised weights on a GPU, launched on raw addresses, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gta_edge.cuda.gpu import current_gpu
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import Packed, unpack
from gta_edge.plugins.matmul.tiling import Variant
from tests.helpers import matmul_cases as cases
from tests.helpers.gpu_calls import TYPES, Memory, bits, synchronize
from tests.helpers.matmul_cases import matmuls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 100, 512)
SHAPES = sorted(
    {(inputs, sizes) for name in PRESETS for inputs, calls in matmuls(preset(name)).items() for sizes in calls}
)


class Call:
    """One call of the op: its memory on the device, between guards, and what should come out.

    Weights are made in their packed form, of any bits, so that large ones take no time.
    """

    def __init__(self, of: Variant, rows: int, in_features: int, sizes: tuple[int, ...], *, bias: bool = False) -> None:
        self.variant, self.sizes, self.in_features = of, sizes, in_features
        out_features, dtype = sum(sizes), TYPES[of.compute]
        rng = np.random.default_rng(rows * in_features + out_features)
        tiles, spans = -(-out_features // 16), -(-in_features // 128)
        # No padding where K and N are whole tiles, and codes of padding where not: those of zero.
        if in_features % 128 == 0 and out_features % 16 == 0:
            weight = rng.integers(-(2**31), 2**31, (tiles, spans * 16 * of.bits // 32, 32, 4), np.int64)
            blocks = 128 // of.block_size if of.block_size else 1
            scale = rng.uniform(0.01, 0.05, (tiles, spans if of.block_size else 1, 8, blocks, 2))
            packed = Packed(weight.astype(np.int32), scale.astype(np.float16))
        else:
            arrays = cases.make(of, 1, in_features, sizes, seed=rows).arrays
            packed = Packed(arrays["weight"], arrays["scale"])
        self.memory = Memory()
        self.memory.add("x", torch.from_numpy(rng.standard_normal((rows, in_features))).to(dtype))
        self.memory.add("weight", torch.from_numpy(packed.weight))
        self.memory.add("scale", torch.from_numpy(packed.scale))
        if bias:
            self.memory.add("bias", torch.from_numpy(rng.standard_normal(out_features)).to(dtype))
        for i, size in enumerate(sizes):
            self.memory.add_poisoned(f"output_{i}", (rows, size), dtype)
        codes, scales = unpack(packed, in_features, out_features, of.bits, of.block_size)
        repeats = of.block_size or in_features
        matrix = torch.from_numpy(codes).cuda().double()
        matrix *= torch.from_numpy(np.atleast_2d(scales)).cuda().double().repeat_interleave(repeats, 0)
        exact = self["x"].double() @ matrix
        if bias:
            exact += self["bias"].double()
        self.expected = exact.split(list(sizes), dim=1)
        self.kernels = matmul_kernels(of, current_gpu())
        self.before = {name: self.memory.bytes_of(name) for name in ("x", "weight", "scale")}
        synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self.memory.tensors[name]

    @property
    def outputs(self) -> list[Tensor]:
        return [self[f"output_{i}"] for i in range(len(self.sizes))]

    def launch(self, stream: Any = 0) -> None:
        bias = self.memory.tensors.get("bias")
        self.kernels.launch(
            stream,
            x=self["x"].data_ptr(),
            weight=self["weight"].data_ptr(),
            scale=self["scale"].data_ptr(),
            bias=bias.data_ptr() if bias is not None else 0,
            outputs=[output.data_ptr() for output in self.outputs],
            rows=len(self["x"]),
            in_features=self.in_features,
            output_sizes=self.sizes,
        )

    def check(self) -> None:
        self.memory.check_guards()
        for name, before in self.before.items():
            assert torch.equal(self.memory.bytes_of(name), before), f"{name} was written to"
        for i, (found, wanted) in enumerate(zip(self.outputs, self.expected, strict=True)):
            error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
            assert error <= cases.TOLERANCE[self.variant.compute], (i, error)  # NaN is not less


WIDE = (32768,)


@pytest.mark.parametrize("of", cases.VARIANTS.values(), ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_variant(of: Variant, rows: int) -> None:
    shapes = (
        (1280, (320, 64, 128, 1280), False),
        (384, (48, 37), True),
        (128, (5,), False),
        (512, WIDE, False),  # on any GPU several tiles for a block of few rows, and the widest tile for many
    )
    for in_features, sizes, bias in shapes:
        call = Call(of, rows, in_features, sizes, bias=bias)
        if sizes == WIDE and rows == 512:
            assert call.kernels.plan(rows, in_features, sizes).program is call.kernels.programs.many[0]
        call.launch()
        synchronize()
        call.check()


@pytest.mark.parametrize("of", [Variant(4, 32, "fp16"), Variant(8, 0, "bf16")], ids=str)
@pytest.mark.parametrize(("in_features", "sizes"), SHAPES)
def test_every_presets_products(of: Variant, in_features: int, sizes: tuple[int, ...]) -> None:
    for rows in (1, 5, 16, 64):
        call = Call(of, rows, in_features, sizes)
        call.launch()
        synchronize()
        call.check()


@pytest.mark.parametrize("in_features", [8, 136, 1288])
@pytest.mark.parametrize("rows", [1, 12, 40])
def test_inputs_that_are_no_multiple_of_128(in_features: int, rows: int) -> None:
    call = Call(Variant(8, 0, "fp16"), rows, in_features, (16, 21), bias=True)
    call.launch()
    synchronize()
    call.check()


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_a_replayed_graph_follows_x_in_memory(rows: int) -> None:
    call = Call(Variant(4, 32, "bf16"), rows, 1280, (640, 640))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.launch(stream.cuda_stream)
    synchronize()
    assert all(output.isnan().all() for output in call.outputs)  # captured, not run
    for factor in (1, -2):
        call["x"].mul_(factor)
        call.expected = tuple(wanted * factor for wanted in call.expected)
        call.before["x"] = call.memory.bytes_of("x")
        graph.replay()
        synchronize()
        call.check()


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_the_same_call_gives_the_same_bits(rows: int) -> None:
    found = []
    for _ in range(3):
        call = Call(Variant(4, 128, "fp16"), rows, 3584, (1280,))
        call.launch()
        synchronize()
        found.append(bits(call.outputs[0]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
