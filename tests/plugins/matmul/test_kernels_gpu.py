"""The matmuls with quantised weights on a GPU, launched on raw addresses, against float64."""

from __future__ import annotations

import pytest
import torch

from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.matmul.tiling import Variant
from tests.helpers import matmul_cases as cases
from tests.helpers.gpu_calls import bits, synchronize
from tests.helpers.gpu_matmul_calls import Call
from tests.helpers.matmul_cases import matmuls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 100, 512)
SHAPES = sorted(
    {(inputs, sizes) for name in PRESETS for inputs, calls in matmuls(preset(name)).items() for sizes in calls}
)


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
        call.run().check()


@pytest.mark.parametrize("of", [Variant(4, 32, "fp16"), Variant(8, 0, "bf16")], ids=str)
@pytest.mark.parametrize(("in_features", "sizes"), SHAPES)
def test_every_presets_products(of: Variant, in_features: int, sizes: tuple[int, ...]) -> None:
    for rows in (1, 5, 16, 64):
        call = Call(of, rows, in_features, sizes)
        call.run().check()


@pytest.mark.parametrize("in_features", [8, 136, 1288])
@pytest.mark.parametrize("rows", [1, 12, 40])
def test_inputs_that_are_no_multiple_of_128(in_features: int, rows: int) -> None:
    call = Call(Variant(8, 0, "fp16"), rows, in_features, (16, 21), bias=True)
    call.run().check()


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
        call.run()
        found.append(bits(call.outputs[0]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
