"""The matmuls' plugins in TensorRT's own registry, and what they ask of the launch layer; on a GPU what they compute.

The classes are those of TensorRT's lean runtime, which has no parser and no builder, and needs a GPU only to run
engines. Its descriptors have no format and its expression builder makes no constants, so there a stand-in is given.
"""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gta_edge import plugins
from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins import plugin_base
from gta_edge.plugins.matmul.definition import OPS, Sizes, attributes
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, pack
from gta_edge.plugins.matmul.plugin import MatMulPlugin
from gta_edge.plugins.matmul.plugin_call import Parameters, describe_call
from gta_edge.plugins.matmul.tiling import Variant
from gta_edge.plugins.plugin_base import take_failures
from gta_edge.plugins.plugin_call_base import Built
from gta_edge.plugins.plugin_registry import plugin_class
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.gpu_calls import Memory, on_gpu
from tests.helpers.plugin_values import Fields, bounds, descs, numbers
from tests.helpers.refusals import message

trt = pytest.importorskip("tensorrt_lean_bindings", reason="needs tensorrt-lean-cu13-bindings and -libs")

BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
KINDS = trt.PluginFieldType
HALF, BF16, FLOAT, INT32, INT8 = (getattr(trt.DataType, name) for name in ("HALF", "BF16", "FLOAT", "INT32", "INT8"))
TYPES = {"fp16": HALF, "bf16": BF16}

each_op = pytest.mark.parametrize("bits", OPS)
VARIANTS = [(bits, block, compute) for bits, blocks in BLOCK_SIZES.items() for block in blocks for compute in TYPES]
every_variant = pytest.mark.parametrize(("bits", "block", "compute"), VARIANTS)


def ints(*values: int, dtype: Any = np.int32, kind: Any = KINDS.INT32) -> tuple[Any, Any]:
    """An attribute of several whole numbers, as the parser gives it."""
    return np.array(values, dtype), kind


@pytest.fixture(scope="module")
def creators() -> dict[int, Any]:
    plugins.register(trt)
    return {bits: trt.get_plugin_registry().get_creator(name, "1", "gta") for bits, name in OPS.items()}


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    take_failures()
    yield
    take_failures()


def make(creator: Any, phase: Any = BUILD, *, sizes: Sequence[int] = (48, 16, 7), **attributes: Any) -> Any:
    fields = Fields(**({"block_size": 32, "output_sizes": ints(*sizes)} | attributes))
    return creator.create_plugin("layer", fields.collection, phase)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_they_are_registered_once_beside_the_attention(creators: dict[int, Any]) -> None:
    plugins.register(trt)
    plugins.register(trt)
    found = [each for each in trt.get_plugin_registry().all_creators if each.plugin_namespace == "gta"]
    assert sorted(each.name for each in found) == [
        "BlockwiseInt4MatMul",
        "BlockwiseInt8MatMul",
        "GroupedLatentAttention",
    ]
    for bits, name in OPS.items():
        creator = creators[bits]
        assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (name, "1", "gta")
        for key in ((name, "1", ""), (name, "2", "gta"), (name, "1", "other")):
            assert trt.get_plugin_registry().get_creator(*key) is None


def test_classes_are_made_once_per_module() -> None:
    assert plugin_class(trt, MatMulPlugin) is plugin_class(trt, MatMulPlugin)


# --- attributes ------------------------------------------------------------------------------------------------------


@each_op
def test_the_creator_declares_the_attributes_that_the_parser_shall_pass_on(creators: dict[int, Any], bits: int) -> None:
    names = creators[bits].field_names
    found = {names[place].name: names[place].type for place in range(len(names))}
    assert found == {"block_size": KINDS.INT32, "output_sizes": KINDS.INT32}


@each_op
def test_a_plugin_is_made_from_attributes(creators: dict[int, Any], bits: int) -> None:
    made = make(creators[bits], plugin_namespace="gta", plugin_version="1")
    assert made.parameters == Parameters(bits, 32, (48, 16, 7))
    assert made.built is None
    assert (made.plugin_name, made.plugin_version, made.plugin_namespace) == (OPS[bits], "1", "gta")
    assert made.num_outputs == 3
    assert make(creators[bits], sizes=[5]).num_outputs == 1
    for kind in trt.PluginCapabilityType.__members__.values():
        assert made.get_capability_interface(kind) is made


@each_op
def test_through_tensorrt_it_is_the_same(creators: dict[int, Any], bits: int) -> None:
    """From C++ and back, as the parser calls it."""
    fields = Fields(block_size=64, output_sizes=ints(16, 32))
    made = trt.IPluginCreatorV3One.create_plugin(creators[bits], "layer", fields.collection, BUILD)
    assert made.parameters == Parameters(bits, 64, (16, 32))
    assert trt.IPluginV3.get_capability_interface(made, trt.PluginCapabilityType.RUNTIME) is made


def test_numbers_of_64_bits_are_taken_too(creators: dict[int, Any]) -> None:
    wide = {"block_size": numbers(KINDS.INT64, np.int64, 64), "output_sizes": numbers(KINDS.INT64, np.int64, 16, 8)}
    assert make(creators[4], **wide).parameters == Parameters(4, 64, (16, 8))


@every_variant
def test_what_is_serialised_makes_the_same_plugin(
    creators: dict[int, Any], bits: int, block: int, compute: str
) -> None:
    made = make(creators[bits], sizes=(320, 64, 128, 1280), block_size=block)
    for built in (None, Built(Variant(bits, block, compute), "sm_87", 8)):
        made.built = built
        again = creators[bits].create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
        assert again is not made
        assert (again.parameters, again.built, again.num_outputs) == (made.parameters, built, 4)
        cloned = made.clone()
        assert type(cloned) is type(made)
        assert (cloned.parameters, cloned.built, cloned.num_outputs) == (made.parameters, built, 4)


def test_serialised_fields_outlive_other_work(creators: dict[int, Any]) -> None:
    made = make(creators[4])
    fields = made.get_fields_to_serialize()
    for _ in range(200):
        make(creators[8], sizes=(16, 16)).get_fields_to_serialize()
    gc.collect()
    assert creators[4].create_plugin("layer", fields, RUNTIME).parameters == made.parameters


NONSENSE = "has attributes that make no sense: "


@pytest.mark.parametrize(
    ("bits", "attributes", "text"),
    [
        (
            4,
            {"scale": 1.0},
            "has no attribute scale; expected block_size, output_sizes, plugin_namespace, plugin_version",
        ),
        (4, {"block_size": 32.0}, "has block_size of type FLOAT32; expected INT32 or INT64"),
        (8, {"block_size": ints(32, 32)}, "has 2 values for block_size; expected one"),
        (4, {"output_sizes": "16"}, "has output_sizes of type CHAR; expected INT32 or INT64"),
        (4, {"block_size": 16}, f"{NONSENSE}int4 in blocks of 16; expected one of 32, 64, 128"),
        (4, {"block_size": 0}, f"{NONSENSE}int4 in blocks of 0; expected one of 32, 64, 128"),
        (8, {"block_size": -1}, f"{NONSENSE}int8 in blocks of -1; expected one of 0, 32, 64, 128"),
        (4, {"output_sizes": ints()}, f"{NONSENSE}0 output_sizes; expected 1 to 4"),
        (8, {"output_sizes": ints(16, 16, 16, 16, 16)}, f"{NONSENSE}5 output_sizes; expected 1 to 4"),
        (4, {"output_sizes": ints(0)}, f"{NONSENSE}output_sizes are [0]; expected at least 1 each"),
        (4, {"output_sizes": ints(16, -16)}, f"{NONSENSE}output_sizes are [16, -16]; expected at least 1 each"),
        (
            4,
            {"output_sizes": ints(8, 16)},
            f"{NONSENSE}output_sizes are [8, 16]; expected multiples of 16 but for the last",
        ),
        (8, {"compute": "fp16"}, "in this engine lacks architecture, processors; build the engine again"),
        (
            8,
            {"compute": "fp32", "architecture": "sm_87", "processors": 8},
            "in this engine is damaged (it computes in 'fp32'); build the engine again",
        ),
    ],
)
def test_attributes_that_are_refused(
    creators: dict[int, Any], bits: int, attributes: dict[str, Any], text: str
) -> None:
    expected = f"{OPS[bits]} {text}" + ("; build the model again" if text.startswith(NONSENSE) else "")
    assert message(make, creators[bits], **attributes) == expected
    assert take_failures() == (expected,)


@each_op
@pytest.mark.parametrize("lacks", ["block_size", "output_sizes"])
def test_attributes_that_are_missing(creators: dict[int, Any], bits: int, lacks: str) -> None:
    values = {"block_size": 32, "output_sizes": ints(16)}
    del values[lacks]
    fields = Fields(**values)
    text = f"{OPS[bits]} lacks {lacks}; build the model again"
    assert message(creators[bits].create_plugin, "layer", fields.collection, BUILD) == text


PARSER_SCRIPT = """
import json, sys
import tensorrt_rtx as trt
from gta_edge.plugins.matmul.plugin_call import FIELDS, read_parameters
from gta_edge.plugins.plugin_call_base import read_fields

told = []

class Creator(trt.IPluginCreatorV3One):
    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        self.name, self.plugin_version, self.plugin_namespace = FIELDS[bits].op, "1", "gta"
        names = [*FIELDS[bits].attributes, "plugin_namespace", "plugin_version"]
        self.field_names = trt.PluginFieldCollection([trt.PluginField(name) for name in names])

    def create_plugin(self, name, fields, phase):
        read = read_parameters(self.bits, read_fields(trt, FIELDS[self.bits], fields))
        told.append([read.bits, read.block_size, list(read.output_sizes), phase.name])

log = trt.Logger(trt.Logger.INTERNAL_ERROR)
creators = [Creator(bits) for bits in FIELDS]
for each in creators:
    assert trt.get_plugin_registry().register_creator(each, "gta")
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
parser.parse_from_file(sys.argv[1])
print(json.dumps(told))
"""


@each_op
@pytest.mark.parametrize(("sizes", "bias"), [((48, 16, 7), True), ((5,), False)])
def test_the_parser_gives_the_creator_what_the_plugin_reads(
    tmp_path: Path, bits: int, sizes: tuple[int, ...], bias: bool
) -> None:
    """TensorRT-RTX's parser needs no GPU and finds plugin creators; it cannot go on with a plugin."""
    pytest.importorskip("tensorrt_rtx", reason="the parser of the package tensorrt-rtx is needed")
    of = Sizes(128, sizes, bits, 64)
    stored = [
        numpy_helper.from_array(np.zeros(of.weight_shape, np.int32), "weight"),
        numpy_helper.from_array(np.zeros(of.scale_shape, np.float16), "scale"),
        *[numpy_helper.from_array(np.zeros(of.out_features, np.float16), "bias")] * bias,
    ]
    outputs = [f"y_{place}" for place in range(len(sizes))]
    inputs = ["x", *(tensor.name for tensor in stored)]
    node = helper.make_node(OPS[bits], inputs, outputs, domain="gta", **attributes(64, sizes))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["B", "T", None]) for n in ("x", *outputs)]
    graph = helper.make_graph([node], "matmul", values[:1], values[1:], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("gta", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    command = [sys.executable, "-c", PARSER_SCRIPT, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[bits, 64, list(sizes), "BUILD"]]


# --- types, shapes, formats ------------------------------------------------------------------------------------------


def input_types(compute: Any, bias: bool) -> list[Any]:
    return [compute, INT32, HALF] + [compute] * bias


@each_op
@pytest.mark.parametrize("compute", TYPES.values())
@pytest.mark.parametrize("bias", [False, True])
def test_types_of_the_outputs(creators: dict[int, Any], bits: int, compute: Any, bias: bool) -> None:
    """Scales are fp16 in a bf16 network too."""
    assert make(creators[bits]).get_output_data_types(input_types(compute, bias)) == [compute] * 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: FLOAT}, "x of type fp32 with x of fp32; expected fp16 or bf16"),
        ({1: INT8}, "weight of type int8 with x of bf16; expected int32"),
        ({2: BF16}, "scale of type bf16 with x of bf16; expected fp16"),
        ({3: HALF}, "bias of type fp16 with x of bf16; expected bf16"),
    ],
)
def test_types_that_are_refused(creators: dict[int, Any], changes: dict[int, Any], text: str) -> None:
    types = input_types(BF16, True)
    for place, changed in changes.items():
        types[place] = changed
    assert message(make(creators[4]).get_output_data_types, types) == (
        f"{OPS[4]} has {text}: retype the model, and build a strongly typed network"
    )


@pytest.mark.parametrize("number", [2, 5])
def test_a_wrong_number_of_inputs(creators: dict[int, Any], number: int) -> None:
    made = make(creators[8])
    text = f"{OPS[8]} has {number} inputs; expected x, weight, scale, and perhaps bias"
    assert message(made.get_output_data_types, [HALF] * number) == text
    assert message(made.get_output_shapes, [trt.DimsExprs(3)] * number, [], None) == text


@pytest.mark.parametrize("rank", [2, 3, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_are_those_of_x_but_for_the_width(creators: dict[int, Any], rank: int, bias: bool) -> None:
    """The very expressions; the binding's own class holds none that could be told apart without a builder."""
    made = make(creators[4])
    builder = SimpleNamespace(constant=lambda number: ("constant", number))
    made.trt = SimpleNamespace(DimsExprs=list)
    x = [object() for _ in range(rank)]
    found = made.get_output_shapes([x, *[None] * (2 + bias)], [], builder)
    assert found == [[*x[:-1], ("constant", size)] for size in (48, 16, 7)]
    assert all(each is whole for shape in found for each, whole in zip(shape[:-1], x, strict=False))


def test_the_bindings_take_such_shapes(creators: dict[int, Any]) -> None:
    asked: list[int] = []
    builder = SimpleNamespace(constant=asked.append)  # returns None, which to C++ is an expression that is not there
    found = make(creators[4]).get_output_shapes([trt.DimsExprs(3)] * 3, [], builder)
    assert [type(each) for each in found] == [trt.DimsExprs] * 3
    assert [len(each) for each in found] == [3] * 3
    assert asked == [48, 16, 7]


class Format(Enum):
    LINEAR = 0
    CHW32 = 5


@each_op
@pytest.mark.parametrize("bias", [False, True])
def test_every_combination_of_types_and_formats(
    creators: dict[int, Any], monkeypatch: pytest.MonkeyPatch, bits: int, bias: bool
) -> None:
    """Each tensor of each good combination, with every other type and format in its place."""
    monkeypatch.setattr(trt, "TensorFormat", Format, raising=False)
    made = make(creators[bits])
    inputs = 3 + bias
    good = [[*input_types(compute, bias), compute, compute, compute] for compute in (HALF, BF16)]
    accepted = {tuple(types[: place + 1]) for types in good for place in range(len(types))}
    for types in good:
        for place, other, format_ in itertools.product(range(len(types)), trt.DataType.__members__.values(), Format):
            in_out = [SimpleNamespace(desc=SimpleNamespace(type=each, format=Format.LINEAR)) for each in types]
            in_out[place] = SimpleNamespace(desc=SimpleNamespace(type=other, format=format_))
            expected = (*types[:place], other) in accepted and format_ is Format.LINEAR
            assert made.supports_format_combination(place, in_out, inputs) is expected, (place, other, format_)
            assert made.supports_format_combination(place, in_out, 2) is False
            assert made.supports_format_combination(place, in_out, 5) is False


# --- sizes -----------------------------------------------------------------------------------------------------------


def shapes(
    *x: int, bits: int = 4, block: int = 32, sizes: Sequence[int] = (48, 16, 7), bias: bool = False
) -> list[tuple[int, ...]]:
    of = Sizes(x[-1], tuple(sizes), bits, block)
    return [x, of.weight_shape, of.scale_shape] + [(of.out_features,)] * bias


NAMES = ("fp16", "int32", "fp16", "fp16")


@pytest.mark.parametrize(
    ("place", "shape", "text"),
    [
        (0, (256,), "x of shape [256]; expected at least two axes, of at least 1 each"),
        (0, (2, 0, 256), "x of shape [2, 0, 256]; expected at least two axes, of at least 1 each"),
        (
            0,
            (2, 3, 250),
            "x of shape [2, 3, 250], which does not fit its attributes: in_features 250 is not a multiple of "
            "block_size 32",
        ),
        (0, (2, 3, 384), "weight of shape [5, 4, 32, 4]; expected [5, 6, 32, 4]"),
        (1, (5, 4, 128), "weight of shape [5, 4, 128]; expected [5, 4, 32, 4]"),
        (2, (5, 2, 8, 2, 2), "scale of shape [5, 2, 8, 2, 2]; expected [5, 2, 8, 4, 2]"),
        (3, (72,), "bias of shape [72]; expected [71]"),
    ],
)
def test_shapes_that_are_refused(place: int, shape: tuple[int, ...], text: str) -> None:
    parameters, good = Parameters(4, 32, (48, 16, 7)), shapes(2, 3, 256, bias=True)
    call = describe_call(parameters, NAMES, tuple(good))
    assert (call.variant, call.sizes) == (Variant(4, 32, "fp16"), (6, 256, (48, 16, 7)))
    assert describe_call(parameters, NAMES[:3], tuple(good[:3])) == call
    good[place] = shape
    assert message(describe_call, parameters, NAMES, tuple(good)) == f"{OPS[4]} has {text}"


def profile(x: tuple[int, ...], compute: str = "fp16", *, bias: bool = False, **of: Any) -> list[Any]:
    least = (*(1 for _ in x[:-1]), x[-1])
    return bounds(input_types(TYPES[compute], bias), shapes(*least, bias=bias, **of), shapes(*x, bias=bias, **of))


# --- on a GPU that is not there --------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    for each in (current_gpu, matmul_kernels):
        each.cache_clear()
    fake = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuCtxGetDevice", lambda: (0, 0), raising=False)
    yield fake
    for each in (current_gpu, matmul_kernels):
        each.cache_clear()


@every_variant
def test_a_build_settles_the_type_and_the_gpu(
    creators: dict[int, Any], cuda: FakeCuda, bits: int, block: int, compute: str
) -> None:
    made = make(creators[bits], block_size=block)
    bound = profile((4, 512, 256), compute, bits=bits, block=block)
    made.configure_plugin(bound, [])
    assert made.built == Built(Variant(bits, block, compute), "sm_87", 8)
    assert made.get_workspace_size(bound, []) == 0
    cloned = made.clone()
    again = creators[bits].create_plugin("layer", cloned.get_fields_to_serialize(), RUNTIME)
    assert again.built == made.built


def test_inputs_that_are_no_multiple_of_8(creators: dict[int, Any], cuda: FakeCuda) -> None:
    made = make(creators[8], block_size=0)
    text = message(made.configure_plugin, profile((1, 1, 132), bits=8, block=0), [])
    assert "in_features is 132; expected a multiple of 8" in text


def test_a_build_without_a_gpu_says_so(creators: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if current_gpu.cache_info().currsize or torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(plugin_base, "_current_device", lambda: 0)
    assert "there is no NVIDIA driver" in message(make(creators[4]).configure_plugin, profile((1, 1, 256)), [])


class Engine:
    """Calls a plugin as an execution context does."""

    def __init__(self, plugin: Any, x: tuple[int, ...], compute: str = "fp16", bias: bool = False) -> None:
        self.plugin, self.compute, self.bias = plugin.attach_to_context(None), compute, bias
        self.inputs = [0x1000, 0x2000, 0x3000] + [0x4000] * bias
        self.outputs = [0x10000 * (place + 1) for place in range(plugin.num_outputs)]
        self.describe(x)
        self.plugin.on_shape_change(self.descs, [])

    def describe(self, x: tuple[int, ...]) -> None:
        parameters = self.plugin.parameters
        of = {"bits": parameters.bits, "block": parameters.block_size, "sizes": parameters.output_sizes}
        self.descs = descs(input_types(TYPES[self.compute], self.bias), shapes(*x, bias=self.bias, **of))

    def enqueue(self, stream: int = 7) -> None:
        self.plugin.enqueue(self.descs, [], self.inputs, self.outputs, 0xC000, stream)


def passed(launch: tuple[Any, ...]) -> tuple[list[int], list[int]]:
    """Addresses, and numbers."""
    arguments = launch[3]
    addresses = [value for value in arguments if type(value) is int]
    return addresses, [value.item() for value in arguments if type(value) is not int]


@each_op
@pytest.mark.parametrize("bias", [False, True])
def test_a_call_is_launched_on_its_addresses(creators: dict[int, Any], cuda: FakeCuda, bits: int, bias: bool) -> None:
    Engine(make(creators[bits]), (2, 3, 256), bias=bias).enqueue()
    (launch,) = cuda.launches
    addresses, sizes = passed(launch)
    assert launch[0].handle == 7
    assert addresses[:4] == [0x1000, 0x2000, 0x3000, 0x4000 * bias]
    assert addresses[4:7] == [0x10000, 0x20000, 0x30000]
    assert sizes == [6, 256, 48, 16, 7, 0]


def test_one_engine_goes_from_prefill_to_decode_and_nothing_is_loaded_anew(
    creators: dict[int, Any], cuda: FakeCuda
) -> None:
    made = make(creators[4])
    first, second = Engine(made, (1, 100, 256)), Engine(made, (1, 1, 256))
    loaded = len(cuda.loaded)
    for engine in (first, second, first):
        engine.enqueue()
    assert [passed(each)[1][0] for each in cuda.launches] == [100, 1, 100]
    assert cuda.launches[0][2] != cuda.launches[1][2]
    assert len(cuda.loaded) == loaded


def test_sizes_that_were_not_announced_are_taken(creators: dict[int, Any], cuda: FakeCuda) -> None:
    engine = Engine(make(creators[4]), (1, 1, 256))
    for x, rows in (((1, 40, 256), 40), ((3, 5, 256), 15), ((1, 1, 256), 1)):
        engine.describe(x)
        engine.enqueue()
        assert passed(cuda.launches[-1])[1][0] == rows


def test_shapes_are_checked_before_anything_is_launched(creators: dict[int, Any], cuda: FakeCuda) -> None:
    engine = Engine(make(creators[4]), (2, 3, 256))
    engine.descs[1].dims = trt.Dims((5, 4, 32, 3))
    text = f"{OPS[4]} has weight of shape [5, 4, 32, 3]; expected [5, 4, 32, 4]"
    assert message(engine.plugin.on_shape_change, engine.descs, []) == text
    assert cuda.launches == []


def test_kernels_are_loaded_before_the_first_call(creators: dict[int, Any], cuda: FakeCuda) -> None:
    """So that the first call may be in the capture of a graph."""
    built = make(creators[8])
    built.built = Built(Variant(8, 32, "bf16"), "sm_87", 8)
    restored = creators[8].create_plugin("layer", built.get_fields_to_serialize(), RUNTIME)
    assert cuda.loaded == []
    restored.attach_to_context(None)
    loaded = list(cuda.loaded)
    assert loaded
    Engine(restored, (1, 1, 256), "bf16").enqueue()
    assert cuda.loaded == loaded


def test_an_engine_of_another_architecture(creators: dict[int, Any], cuda: FakeCuda) -> None:
    made = make(creators[4])
    made.built = Built(Variant(4, 32, "fp16"), "sm_89", 8)
    assert message(made.attach_to_context, None) == (
        "this engine was built on a GPU of sm_89, Fake is sm_87; build the engine again on this machine"
    )


@pytest.mark.parametrize(("built_on", "planned_for"), [(4, 4), (8, 8), (100, 8)])
def test_launches_are_planned_for_no_more_processors_than_the_build(
    creators: dict[int, Any], cuda: FakeCuda, built_on: int, planned_for: int
) -> None:
    made = make(creators[4], sizes=[32064])
    made.built = Built(Variant(4, 32, "fp16"), "sm_87", built_on)
    Engine(made, (1, 1, 1280)).enqueue()
    kernels = matmul_kernels(Variant(4, 32, "fp16"), replace(current_gpu(), processors=planned_for))
    kernels.launch(
        7,
        x=0x1000,
        weight=0x2000,
        scale=0x3000,
        outputs=[0x10000],
        rows=1,
        in_features=1280,
        output_sizes=(32064,),
    )
    assert cuda.launches[0][1:] == cuda.launches[1][1:]


# --- on a GPU --------------------------------------------------------------------------------------------------------

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


class PluginCall:
    """A call of a matmul through a plugin, on memory between guards, and what it should give in float64."""

    def __init__(
        self,
        creators: dict[int, Any],
        bits: int,
        block: int,
        compute: str,
        x: tuple[int, ...],
        sizes: tuple[int, ...],
        bias: bool,
    ) -> None:
        rng = np.random.default_rng(3)
        k, n = x[-1], sum(sizes)
        low, high = (-8, 8) if bits == 4 else (-127, 128)
        codes = rng.integers(low, high, (k, n)).astype(np.int8)
        scales = (rng.uniform(0.5, 1.5, (k // block, n) if block else n) / high / k**0.5).astype(np.float16)
        self.memory, dtype = Memory(), TORCH_TYPES[compute]
        values = {"x": torch.from_numpy(rng.standard_normal(x)).to(dtype)}
        packed = pack(codes, scales, bits, block)
        values |= {"weight": torch.from_numpy(packed.weight), "scale": torch.from_numpy(packed.scale)}
        if bias:
            values["bias"] = torch.from_numpy(rng.standard_normal(n)).to(dtype)
        for name, tensor in values.items():
            self.memory.add(name, tensor)
        self.results = [f"y_{place}" for place in range(len(sizes))]
        for name, size in zip(self.results, sizes, strict=True):
            self.memory.add_poisoned(name, (*x[:-1], size), dtype)
        each = np.repeat(scales.astype(np.float64), block, axis=0) if block else scales.astype(np.float64)
        matrix = codes * each
        self.expected = values["x"].double().numpy() @ matrix
        self.magnitude = np.abs(values["x"].double().numpy()) @ np.abs(matrix)
        if bias:
            self.expected = self.expected + values["bias"].double().numpy()
            self.magnitude = self.magnitude + np.abs(values["bias"].double().numpy())
        self.sizes, self.compute, self.inputs = sizes, compute, list(values)
        made = make(creators[bits], sizes=sizes, block_size=block)
        types = input_types(TYPES[compute], bias)
        of = shapes(*x, bits=bits, block=block, sizes=sizes, bias=bias)
        bound = bounds(types, of, of)
        made.configure_plugin(bound, [])
        assert made.get_workspace_size(bound, []) == 0
        restored = creators[bits].create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
        self.plugin, self.descs = restored.attach_to_context(None), descs(types, of)
        self.plugin.on_shape_change(self.descs, [])

    def launch(self, stream: int = 0) -> None:
        tensors = self.memory.tensors
        inputs, outputs = ([tensors[name].data_ptr() for name in part] for part in (self.inputs, self.results))
        self.plugin.enqueue(self.descs, [], inputs, outputs, 0, stream)

    def check(self) -> None:
        torch.cuda.synchronize()
        self.memory.check_guards()
        found = np.concatenate([self.memory.tensors[name].double().cpu().numpy() for name in self.results], axis=-1)
        # one rounding of the result, one of each weight where many rows are multiplied, and float32's of the sum
        bound = ROUNDING[self.compute] * (np.abs(self.expected) + self.magnitude) + 1e-5 * self.magnitude
        assert (np.abs(found - self.expected) <= bound).all()


GTA_SHAPES = pytest.mark.parametrize(
    ("k", "sizes", "bias"), [(1280, (320, 64, 128, 1280), True), (1280, (3584, 3584), False), (3584, (1280,), False)]
)


@on_gpu
@every_variant
@GTA_SHAPES
@pytest.mark.parametrize("leading", [(1, 1), (3, 5), (1, 512)])
def test_on_a_gpu_it_is_exact(
    creators: dict[int, Any],
    bits: int,
    block: int,
    compute: str,
    k: int,
    sizes: tuple[int, ...],
    bias: bool,
    leading: tuple[int, ...],
) -> None:
    call = PluginCall(creators, bits, block, compute, (*leading, k), sizes, bias)
    call.launch()
    call.check()


@on_gpu
@every_variant
@pytest.mark.parametrize("leading", [(1, 1), (1, 100)])
def test_on_a_gpu_its_first_call_can_be_captured_and_replayed(
    creators: dict[int, Any], bits: int, block: int, compute: str, leading: tuple[int, ...]
) -> None:
    call = PluginCall(creators, bits, block, compute, (*leading, 1280), (48, 7), True)
    before = [call.memory.bytes_of(name) for name in call.results]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.launch(stream.cuda_stream)
    torch.cuda.synchronize()
    assert all(
        torch.equal(call.memory.bytes_of(name), each) for name, each in zip(call.results, before, strict=True)
    )  # captured, not run
    for _ in range(2):
        graph.replay()
        call.check()


@on_gpu
def test_on_a_gpu_two_contexts_interleave_on_two_streams(creators: dict[int, Any]) -> None:
    calls = [
        PluginCall(creators, 4, 32, "fp16", (1, 1, 1280), (3584, 3584), False),
        PluginCall(creators, 8, 0, "bf16", (2, 64, 3584), (1280,), True),
    ]
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        for call, stream in zip(calls, streams, strict=True):
            call.launch(stream.cuda_stream)
    for call in calls:
        call.check()
