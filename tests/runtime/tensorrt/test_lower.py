"""Bundles as they go to TensorRT: typed, of one capacity, with and without the function, in newer and older operators.

The meaning is checked by running what is written: float16 on ONNX Runtime's CPU kernels, bfloat16 in ONNX's reference.
Whether TensorRT takes it is asked of the parser and the builder of TensorRT-RTX, which need no GPU.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from gta_edge.errors import BundleError, CapacityError, EngineError, GtaEdgeError, InputError, OutputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.io import run_passes
from gta_edge.graph.retype import ConvertPrecisionPass
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import TOKEN_INPUTS, cache_tensors, input_shapes, interface_names
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import CACHE_DTYPE, INPUT_FLAGS
from gta_edge.runtime.tensorrt.lower import lower
from gta_edge.runtime.tensorrt.passes.fold_constants import FoldConstantsPass
from gta_edge.runtime.tensorrt.passes.keep_plugin_nodes import KeepPluginNodesPass
from gta_edge.runtime.tensorrt.passes.lower_opset import OPSET, LowerOpsetPass
from gta_edge.runtime.tensorrt.passes.omit_absent_inputs import OmitAbsentInputsPass
from gta_edge.runtime.tensorrt.passes.quantize_cache import QuantizeCachePass
from gta_edge.runtime.tensorrt.passes.set_capacity import SetCapacityPass
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.tensorrt_graphs import (
    BATCH,
    CAPACITY,
    LAYERS,
    TABLE,
    Bundles,
    Exact,
    in_reference,
    logits,
    on_onnxruntime,
)

ROOM = 32
"""Tokens that caches in blocks have room for: one block."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ONNX = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.INT8}
ONNX |= {"fp8": TensorProto.FLOAT8E4M3FN, "fp32": TensorProto.FLOAT}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


# --- running what is written -----------------------------------------------------------------------------------------


every_model = pytest.mark.parametrize("name", TABLE)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
each_parser = pytest.mark.parametrize("newer_ops", [True, False], ids=["newer ops", "older ops"])


@every_model
@every_precision
@each_parser
def test_float16_agrees(
    bundles: Bundles, exact: Exact, tmp_path: Path, name: str, precision: str, newer_ops: bool
) -> None:
    path = function_form(bundles(name, precision), tmp_path, compute="fp16", newer_ops=newer_ops)
    found = logits(on_onnxruntime(path), name, np.float16)
    assert 1e-5 < reference.relative_error(found, exact(name, precision)) <= 2e-2


@every_model
@every_precision
@each_parser
def test_bfloat16_agrees(
    bundles: Bundles, exact: Exact, tmp_path: Path, name: str, precision: str, newer_ops: bool
) -> None:
    path = function_form(bundles(name, precision), tmp_path, compute="bf16", newer_ops=newer_ops)
    found = logits(in_reference(path), name, ml_dtypes.bfloat16)
    assert 1e-4 < reference.relative_error(found, exact(name, precision)) <= 8e-2


@every_model
@each_parser
def test_float32_is_what_the_bundle_computes(
    bundles: Bundles, exact: Exact, tmp_path: Path, name: str, newer_ops: bool
) -> None:
    path = function_form(bundles(name, "int4"), tmp_path, compute="fp32", newer_ops=newer_ops)
    assert reference.relative_error(logits(on_onnxruntime(path), name, np.float32), exact(name, "int4")) <= 1e-4


def function_form(bundle: Bundle, directory: Path, **options: Any) -> Path:
    return lower(bundle, directory, form="function", capacity=CAPACITY, **options)


def plugin_form(bundle: Bundle, directory: Path, **options: Any) -> onnx.ModelProto:
    options = {"capacity": CAPACITY, **options}
    return onnx.load(lower(bundle, directory, form="plugin", **options))


# --- types -----------------------------------------------------------------------------------------------------------


def inferred(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value of a model, its functions inlined, as the standard infers them."""
    model = onnx.inliner.inline_local_functions(model)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@every_model
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_types_at_every_place(bundles: Bundles, tmp_path: Path, name: str, precision: str, compute: str) -> None:
    model = onnx.load(function_form(bundles(name, precision), tmp_path, compute=compute))
    onnx.checker.check_model(model, full_check=True)
    types, own = inferred(model), ONNX[compute]
    nodes = list(onnx.inliner.inline_local_functions(model).graph.node)

    def inputs(op_type: str) -> list[int]:
        return [types[name] for node in nodes if node.op_type == op_type for name in node.input]

    assert types["logits"] == TensorProto.FLOAT
    caches = [value.name for value in (*model.graph.input, *model.graph.output) if value.name[:4] in ("past", "pres")]
    assert {types[name] for name in caches if name != "past_length"} == {own}
    assert len(inputs("Softmax")) == LAYERS and set(inputs("Softmax")) == {TensorProto.FLOAT}
    assert set(inputs("RMSNormalization")) == {own}
    assert {helper.get_node_attr_value(n, "stash_type") for n in nodes if n.op_type == "RMSNormalization"} == {1}
    for op_type in ("MatMul", "Sigmoid"):
        assert set(inputs(op_type)) == {own}
    assert set(inputs("RotaryEmbedding")) == {own, TensorProto.INT64}
    assert {tensor.data_type for tensor in model.graph.initializer} & FLOATS == {own}  # tables, scales, norms, all
    sums = [node for node in nodes if node.op_type == "Add" and types[node.output[0]] in FLOATS]
    assert {types[node.output[0]] for node in sums} == {own}  # the residual stream
    casts = {(types[node.input[0]], types[node.output[0]]) for node in nodes if node.op_type == "Cast"}
    assert not casts & {(own, own), (TensorProto.FLOAT, own)}


@every_model
def test_codes_stay_codes_and_nothing_else_is_float32(bundles: Bundles, tmp_path: Path, name: str) -> None:
    bundle = bundles(name, "int4")
    function_form(bundle, tmp_path, compute="fp16")
    before, after = (onnx.load(path) for path in (bundle.model_path, tmp_path / "model.onnx"))
    kinds = (TensorProto.INT4, TensorProto.INT8)
    codes = {tensor.name: tensor for tensor in before.graph.initializer if tensor.data_type in kinds}
    codes = {key: tensor for key, tensor in codes.items() if not key.endswith(".columns")}  # looked up in words
    kept = {tensor.name: tensor for tensor in after.graph.initializer if tensor.data_type in kinds}
    assert kept.keys() == codes.keys()
    assert {tensor.data_type for tensor in kept.values()} == {*kinds}  # the head is in int8
    assert all(kept[key].raw_data == codes[key].raw_data for key in codes)
    dequantize = [node for node in after.graph.node if node.op_type == "DequantizeLinear"]
    stored = {tensor.name for tensor in after.graph.initializer}
    assert len(dequantize) == len(codes)
    assert all({*node.input} <= stored for node in dequantize)  # no Cast of scales, which older parsers refuse


def test_a_value_beyond_float16_is_named(bundles: Bundles, tmp_path: Path) -> None:
    entries = TABLE["gqa, tied"]
    weights = reference.random_weights(entries)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    write_checkpoint(tmp_path / "checkpoint", entries, weights)
    bundle = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="bf16", verify=False).bundle
    function_form(bundle, tmp_path / "bf16", compute="bf16")
    with pytest.raises(EngineError, match=r"up_proj.* up to 9\.994e\+05, beyond float16's 65504; .*bf16$"):
        function_form(bundle, tmp_path / "fp16", compute="fp16")


# --- the plugin's form -----------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("cache", [None, "bf16", "int8", "fp8", "int4", "int4v2"])
@each_parser
def test_the_plugins_nodes(bundles: Bundles, tmp_path: Path, name: str, cache: str | None, newer_ops: bool) -> None:
    room = ROOM if cache in BLOCK_CACHE_TYPES else CAPACITY
    options: dict[str, Any] = {"compute": "bf16", "cache_dtype": cache, "newer_ops": newer_ops, "capacity": room}
    model = plugin_form(bundles(name, "int8"), tmp_path, **options)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    nodes = [node for node in model.graph.node if node.domain == "gta"]
    assert [node.op_type for node in nodes] == ["GroupedLatentAttention"] * LAYERS
    kinds = ["past_key", "past_latent" if "gta" in name else "past_value"]
    in_blocks, absent = cache in BLOCK_CACHE_TYPES, [] if "gta" in name else list(INPUT_FLAGS.values())
    scaled = in_blocks or cache in ("int8", "fp8")
    for i, node in enumerate(nodes):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert set(attributes) == {*op.ATTRIBUTES, *([CACHE_DTYPE] if scaled else []), *absent}
        assert all(attributes[flag] == 0 for flag in absent)
        assert attributes.get(CACHE_DTYPE, b"") == (str(cache).encode() if scaled else b"")
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"gta", b"1")
        past = [f"{kind}.{i}" for kind in kinds]
        beside = [f"{kind}_scale.{i}" for kind in kinds] if scaled else []
        beside += [f"{kind}_open.{i}" for kind in kinds] if in_blocks else []
        inputs = len(op.MODEL_INPUTS) - len(absent)
        assert all(node.input) and len(node.input) == inputs + len(beside)
        first = 3 if absent else 4  # there is no gate before the caches
        assert list(node.input[first : first + 2]) == past and list(node.input[inputs:]) == beside
        assert list(node.output[1:]) == [name.replace("past", "present") for name in (*past, *beside)]
    config = parse_config(TABLE[name])
    found = {value.name: tuple(shape_and_type(value)[0]) for value in model.graph.input}
    assert list(found) == list(input_shapes(config, cache or "bf16", batch=1, tokens=1, positions=1, capacity=room))
    assert [found[key] for key in TOKEN_INPUTS] == [("batch", "tokens"), ("batch",), ("batch", "positions")]
    assert [value.name for value in model.graph.output] == interface_names(config, cache or "bf16")[1]
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    for i in range(LAYERS):
        for tensor, spec in zip(("key", kinds[1].partition("_")[2]), config.caches, strict=True):
            expected = stored(tensor, spec.heads, spec.width, cache or "bf16")
            for side, (part, shape_and_kind) in itertools.product(("past", "present"), expected.items()):
                assert shape_and_type(values[f"{side}_{tensor}{part}.{i}"]) == shape_and_kind
            assert (f"past_{tensor}_scale.{i}" in values) == scaled
            assert (f"past_{tensor}_open.{i}" in values) == in_blocks
    assert values["logits"].type.tensor_type.elem_type == TensorProto.FLOAT


def stored(tensor: str, heads: int, width: int, cache: str) -> dict[str, tuple[list[Any], int]]:
    """Shapes and types of what a layer's keys, or values, are stored in."""
    if cache not in BLOCK_CACHE_TYPES:
        found = {"": (["batch", heads, CAPACITY, width], ONNX[cache])}
        scales = {"_scale": (["batch", heads, CAPACITY], TensorProto.FLOAT)}
        return found | (scales if cache in ("int8", "fp8") else {})
    half = TensorProto.FLOAT16
    opened = {"_open": (["batch", heads, 32, width], TensorProto.BFLOAT16)}
    if tensor == "key":
        codes = ["batch", heads, 1, width, 16], TensorProto.INT8
        return opened | {"": codes, "_scale": (["batch", heads, 1, 2, width], half)}
    codes = ["batch", heads, ROOM, width // (2 if cache == "int4" else 4)], TensorProto.INT8
    return opened | {"": codes, "_scale": (["batch", heads, ROOM, 2], half)}


def shape_and_type(value: onnx.ValueInfoProto) -> tuple[list[Any], int]:
    tensor = value.type.tensor_type
    return [size.dim_param or size.dim_value for size in tensor.shape.dim], tensor.elem_type


@every_model
@every_precision
def test_older_parsers_get_operators_that_they_know(
    bundles: Bundles, tmp_path: Path, name: str, precision: str
) -> None:
    model = plugin_form(bundles(name, precision), tmp_path / "model", compute="fp16", newer_ops=False)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    assert versions == {"": 21 if precision == "int4" else 20, "gta": 1}
    assert model.ir_version <= 10
    for node in model.graph.node:
        if node.domain == "":
            schema = onnx.defs.get_schema(node.op_type, versions[""])
            assert schema.since_version <= versions[""] and not schema.deprecated
            assert {attribute.name for attribute in node.attribute} <= set(schema.attributes)
    onnx.checker.check_model(model, full_check=True)
    constants = {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    for op_type, index in (("Slice", 3), ("ReduceMean", 1), ("Unsqueeze", 1), ("Squeeze", 1)):
        axes = [node.input[index] for node in model.graph.node if node.op_type == op_type and len(node.input) > index]
        assert {*axes} <= constants  # computed ones are refused
    newer = plugin_form(bundles(name, precision), tmp_path / "newer", compute="fp16")
    assert {opset.domain: opset.version for opset in newer.opset_import}[""] == 24
    assert "RMSNormalization" in {node.op_type for node in newer.graph.node}


# --- the operators that are written out ------------------------------------------------------------------------------


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    initializers: dict[str, np.ndarray] | None = None,
    opset: int = 24,
) -> ir.Model:
    infos = [[helper.make_tensor_value_info(key, *info) for key, info in part.items()] for part in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, key) for key, array in (initializers or {}).items()]
    graph = helper.make_graph(nodes, "graph", *infos, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("gta", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=11))


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    common.NameFixPass()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return result


def written_out(model: ir.Model, op_type: str) -> ir.Model:
    assert LowerOpsetPass()(model).modified
    assert op_type not in {node.op_type for node in model.graph}
    assert model.graph.opset_imports[""] == OPSET
    return model


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 1e-6), ("fp16", 2e-3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_a_norm_sums_in_float32(compute: str, tolerance: float, size: float) -> None:
    """Squares of 3e4 are beyond float16, and so is the sum of a thousand of any."""
    dtype, rng = NUMPY[compute], np.random.default_rng(0)
    x = (size * rng.uniform(-1, 1, (2, 3, 1000))).astype(dtype)
    weight = (1 + 0.2 * rng.standard_normal(1000)).astype(dtype)
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-5, axis=-1, stash_type=1)
    info = {"y": (ONNX[compute], ["b", "t", 1000])}
    model = graph_of([node], {"x": (ONNX[compute], ["b", "t", 1000])}, info, {"w": weight})
    found = run(written_out(model, "RMSNormalization"), x=x)
    wanted = [
        [reference.rms_norm(token, weight.astype(np.float64), 1e-5) for token in row] for row in x.astype(np.float64)
    ]
    assert found.dtype == dtype
    assert reference.relative_error(found, np.array(wanted)) <= tolerance


def test_a_rotation() -> None:
    rng = np.random.default_rng(0)
    cos, sin = (table.astype(np.float32) for table in reference.rope_tables(8, 20))
    x, positions = rng.standard_normal((2, 3, 24)).astype(np.float32), np.array([[4, 5, 6], [0, 1, 19]])
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "positions"], ["y"], num_heads=3)
    inputs = {"x": (TensorProto.FLOAT, ["b", "t", 24]), "positions": (TensorProto.INT64, ["b", "t"])}
    model = graph_of([node], inputs, {"y": (TensorProto.FLOAT, ["b", "t", 24])}, {"cos": cos, "sin": sin})
    found = run(written_out(model, "RotaryEmbedding"), x=x, positions=positions).reshape(2, 3, 3, 8)
    for b, t, h in np.ndindex(2, 3, 3):
        at = positions[b, t]
        np.testing.assert_allclose(
            found[b, t, h], reference.rotate(x[b, t].reshape(3, 8)[h], cos[at], sin[at]), atol=1e-6
        )


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_append(tokens: int) -> None:
    """The last row's tokens pass the capacity: what has no place is dropped."""
    rng = np.random.default_rng(0)
    past, new = (rng.standard_normal((3, 2, n, 5)).astype(np.float32) for n in (9, tokens))
    starts = np.array([0, 5, 8])
    node = helper.make_node("TensorScatter", ["past", "new", "starts"], ["y"], axis=-2)
    shapes = {"past": ["b", 2, "s", 5], "new": ["b", 2, "t", 5]}
    inputs = {key: (TensorProto.FLOAT, shape) for key, shape in shapes.items()} | {"starts": (TensorProto.INT64, ["b"])}
    model = graph_of([node], inputs, {"y": (TensorProto.FLOAT, ["b", 2, "s", 5])})
    found = run(written_out(model, "TensorScatter"), past=past, new=new, starts=starts)
    wanted = past.copy()
    for b, start in enumerate(starts):
        wanted[b, :, start : start + tokens] = new[b, :, : 9 - start]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=1), "normalises from axis 1"),
        (helper.make_node("RotaryEmbedding", ["x", "w", "w"], ["y"]), "rotates in a way"),
        (helper.make_node("TensorScatter", ["x", "x"], ["y"]), "writes a cache in a way"),
        (helper.make_node("Swish", ["x"], ["y"]), "Swish y has no form in opset 21"),
        (helper.make_node("Unknown", ["x"], ["y"]), "Unknown is no operator of opset 24"),
        (helper.make_node("If", ["x"], ["y"]), "If y are not known"),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_what_is_not_written_out(node: onnx.NodeProto, message: str) -> None:
    info = (TensorProto.FLOAT, ["b", "t", 6])
    model = graph_of([node], {"x": info}, {"y": info}, {"w": np.ones((6, 3), np.float32)})
    with pytest.raises(EngineError) as caught:
        run_passes(model, "model.onnx", LowerOpsetPass())
    assert_one_line(caught.value, EngineError, message)


def assert_one_line(error: BaseException | None, kind: type[GtaEdgeError], message: str) -> None:
    assert type(error) is kind
    assert message in str(error) and "\n" not in str(error)


# --- passes that find nothing to do, or what they do not expect ------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_second_run_changes_nothing(bundles: Bundles, cache: str | None) -> None:
    model = ir.load(bundles("gta, tied", "int4").model_path)
    passes: list[Any] = [KeepPluginNodesPass(), ConvertPrecisionPass("fp16"), SetCapacityPass(CAPACITY, BATCH)]
    passes += [LowerOpsetPass(), FoldConstantsPass()]
    if cache:
        passes.insert(3, quantize("gta, tied", cache))
    assert not OmitAbsentInputsPass()(model).modified  # a GTA model's nodes lack nothing
    assert [change(model).modified for change in passes] == [True] * len(passes)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert [change(model).modified for change in passes] == [False] * len(passes)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def quantize(name: str, cache: str) -> QuantizeCachePass:
    return QuantizeCachePass(cache, cache_tensors(parse_config(TABLE[name]), cache))


def test_float32_is_no_change(bundles: Bundles) -> None:
    model = ir.load(bundles("gta, tied", "fp16").model_path)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not ConvertPrecisionPass("fp32")(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def foreign(nodes: list[onnx.NodeProto], **changes: Any) -> ir.Model:
    inputs = {"x": (TensorProto.FLOAT, ["b", 6]), "past_x": (TensorProto.FLOAT, ["b", 1, "s", 6])} | changes
    outputs = {nodes[-1].output[0]: (TensorProto.FLOAT, ["b", 6])}
    return graph_of(nodes, inputs, outputs, {"w": np.ones(6, np.float32)})


RELU = helper.make_node("Relu", ["x"], ["y"])


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (
            lambda: ConvertPrecisionPass("fp16"),
            foreign([RELU], z=(TensorProto.BFLOAT16, [1])),
            "inputs are bfloat16 and float",
        ),
        (
            lambda: ConvertPrecisionPass("fp16"),
            foreign(
                [
                    helper.make_node("Cast", ["x"], ["wide"], to=1),
                    helper.make_node("Add", ["wide", "x"], ["y"]),
                ]
            ),
            "Add y mixes float32 (wide) and float16",
        ),
        (
            lambda: ConvertPrecisionPass("fp16"),
            foreign([helper.make_node("Other", ["x"], ["y"], domain="gta")]),
            "Other is no",
        ),
        (
            lambda: KeepPluginNodesPass(),
            foreign([helper.make_node("Other", ["x"], ["y"], domain="gta")]),
            "no plugin implements gta::Other",
        ),
        (lambda: quantize("gta, tied", "int8"), foreign([RELU]), "the graph has no GroupedLatentAttention"),
        (
            lambda: SetCapacityPass(5),
            foreign([RELU], past_x=(TensorProto.FLOAT, ["b", 1, 4, 6])),
            "past_x is [b,1,4,6], fixed already; expected 5 at axis 2",
        ),
        (
            lambda: SetCapacityPass(5),
            foreign([RELU], past_x=(TensorProto.FLOAT, ["b", 1, None, 6])),
            "axis 2 of past_x has no name",
        ),
        (lambda: SetCapacityPass(5), graph_of([RELU], {"x": (1, [2])}, {"y": (1, [2])}), "no inputs past_*"),
    ],
)
def test_graphs_that_are_not_ours(change: Callable[[], Any], model: ir.Model, message: str) -> None:
    with pytest.raises(EngineError) as caught:
        run_passes(model, "model.onnx", change())
    assert_one_line(caught.value, EngineError, message)


def test_passes_in_the_wrong_order(bundles: Bundles) -> None:
    model = ir.load(bundles("gta, tied", "fp16").model_path)
    for change, message in (
        (quantize("gta, tied", "fp8"), "the model keeps its functions"),
        (LowerOpsetPass(), "the model has functions"),
    ):
        with pytest.raises(EngineError) as caught:
            run_passes(model, "model.onnx", change)
        assert_one_line(caught.value, EngineError, message)
    with pytest.raises(EngineError) as caught:
        run_passes(model, "model.onnx", KeepPluginNodesPass(), quantize("gta, tied", "int4"))
    assert_one_line(caught.value, EngineError, "has caches of the capacity capacity; expected a number: set it first")
    ConvertPrecisionPass("fp16")(model)
    with pytest.raises(EngineError) as caught:
        run_passes(model, "model.onnx", ConvertPrecisionPass("bf16"))
    assert_one_line(caught.value, EngineError, "the graph's inputs are float16, expected float32")


def test_constants_take_the_type_of_what_they_meet() -> None:
    """One constant, beside an activation and beside what the graph wants in float32: one of each type."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "two"], ["more"]),
        helper.make_node("Cast", ["more"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "two"], ["y"]),
    ]
    model = foreign(nodes)
    assert ConvertPrecisionPass("fp16")(model).modified
    x = np.arange(12, dtype=np.float16).reshape(2, 6)
    found = run(model, x=x, past_x=np.zeros((2, 1, 1, 6), np.float16))
    np.testing.assert_array_equal(found, 2 * (2 * x.astype(np.float32) + 2))


INTEGERS = (
    ("Cast", [[[1, 2]]], {"to": TensorProto.INT64}, 2),
    ("Reshape", [[1, 2, 3, 4], [-1, 2]], {}, 2),
    ("Reshape", [5, [-1]], {}, 1),
    ("Squeeze", [[[7]]], {}, 0),
    ("Squeeze", [[[7, 8]], [0]], {}, 1),
    ("Unsqueeze", [[7, 8], [0, -1]], {}, 3),
    ("Concat", [[1], [2, 3]], {"axis": 0}, 1),
)


@pytest.mark.parametrize(("op_type", "arrays", "attributes", "rank"), INTEGERS)
def test_integers_that_are_known(op_type: str, arrays: list[Any], attributes: dict[str, Any], rank: int) -> None:
    def model() -> ir.Model:
        names = [f"c{i}" for i in range(len(arrays))]
        tensors = [numpy_helper.from_array(np.array(array, np.int64)) for array in arrays]
        constants = [helper.make_node("Constant", [], [n], value=t) for n, t in zip(names, tensors, strict=True)]
        nodes = [*constants, helper.make_node(op_type, names, ["y"], **attributes)]
        nodes.append(helper.make_node("Mul", ["y", "x"], ["z"]))
        return graph_of(nodes, {"x": (TensorProto.INT64, [])}, {"z": (TensorProto.INT64, [None] * rank)})

    folded = model()
    assert FoldConstantsPass()(folded).modified
    assert {node.op_type for node in folded.graph} == {"Constant", "Mul"}
    two = np.array(2)
    found, wanted = run(folded, x=two), run(model(), x=two)
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["c", "c"], ["y"]),  # by a shape that holds a zero
        helper.make_node("Concat", ["c", "x"], ["y"], axis=0),
        helper.make_node("Add", ["c", "c"], ["y"]),
    ],
    ids=lambda node: node.op_type,
)
def test_what_is_not_folded(node: onnx.NodeProto) -> None:
    constant = helper.make_node("Constant", [], ["c"], value_ints=[0])
    model = graph_of([constant, node], {"x": (TensorProto.INT64, [2])}, {"y": (TensorProto.INT64, None)})
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not FoldConstantsPass()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_result_needs_nothing_of_the_bundle(bundles: Bundles, tmp_path: Path) -> None:
    bundle, seen = bundles("gta, untied", "int4"), []
    before = {path.name: path.read_bytes() for path in bundle.directory.iterdir()}
    path = lower(
        bundle,
        tmp_path / "model",
        compute="bf16",
        cache_dtype="fp8",
        capacity=CAPACITY,
        batch=3,
        newer_ops=False,
        progress=lambda *event: seen.append(event),
    )
    assert path == tmp_path / "model" / "model.onnx"
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "model.onnx.data", "lowered.json"}
    assert {path.name: path.read_bytes() for path in bundle.directory.iterdir()} == before
    model = onnx.load(path, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    assert seen == [("writing weights", i + 1, len(outside)) for i in range(len(outside))]
    record = json.loads((path.parent / "lowered.json").read_text())
    written = ("model.onnx", "model.onnx.data")
    assert record | {"gta_edge": ""} == {
        "format": "gta-edge-model",
        "files": {name: {"bytes": (path.parent / name).stat().st_size} for name in written},
        "form": "plugin",
        "compute": "bf16",
        "cache_dtype": "fp8",
        "capacity": CAPACITY,
        "batch": 3,
        "newer_ops": False,
        "matmul": "native",
        "packed": 0,
        "not_packed": {},
        "gta_edge": "",
        "made_from": {name: bundle.manifest["files"][name]["sha256"] for name in ("model.onnx", "model.onnx.data")},
    }
    dynamic = {
        size.dim_param
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)
        for size in value.type.tensor_type.shape.dim
    }
    assert {"tokens", "positions"} <= dynamic and not {"batch", "capacity"} & dynamic


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("gta, tied", {"form": "other"}, InputError, "the form is 'other'; expected plugin or function"),
        ("gta, tied", {"compute": "fp32"}, InputError, "the plugin form computes in fp16, bf16, not in 'fp32'"),
        ("gta, tied", {"compute": "int8"}, InputError, "not in 'int8'"),
        ("gta, tied", {"cache_dtype": "bf16"}, InputError, "has no cache of 'bf16'; expected fp16 or int8 or fp8"),
        ("gta, tied", {"cache_dtype": "int8", "form": "function"}, InputError, "no cache of 'int8'; expected fp16"),
        ("gqa, tied", {"cache_dtype": "fp8", "form": "function"}, InputError, "LlamaForCausalLM in fp16 has no cache"),
        ("gta, tied", {"capacity": 25}, CapacityError, "the capacity is 25 tokens; expected 1 to 24"),
        ("gta, tied", {"capacity": 0}, CapacityError, "the capacity is 0 tokens"),
        ("gta, tied", {"batch": 0}, InputError, "the batch is 0"),
    ],
)
def test_options_that_do_not_go_together(
    bundles: Bundles, tmp_path: Path, name: str, options: dict[str, Any], kind: type[GtaEdgeError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        lower(bundles(name, "fp16"), tmp_path / "model", **{"compute": "fp16", "capacity": 4} | options)
    assert_one_line(caught.value, kind, message)
    assert not (tmp_path / "model").exists()


def damaged(model: onnx.ModelProto, what: str) -> None:
    graph = model.graph
    if what == "an operator":
        graph.node[0].op_type = "Strange"
    elif what == "a plugin that there is none of":
        next(node for node in graph.node if node.domain == "gta").op_type = "Strange"
    elif what == "a file elsewhere":
        tensor = next(t for t in graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../elsewhere"
    elif what == "a cache without a name":
        graph.input[3].type.tensor_type.shape.dim[2].ClearField("dim_param")
    elif what == "an attention with fewer inputs":
        del next(node for node in graph.node if node.domain == "gta").input[3:]
    elif what == "no standard opset":
        del model.opset_import[:]


@pytest.mark.parametrize("newer_ops", [True, False])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an operator", "a node 'Strange', which no bundle has"),
        ("a plugin that there is none of", "a node 'gta::Strange', which no bundle has"),
        ("a file elsewhere", "lies outside the bundle"),
        ("a cache without a name", "its input past_key.0 is"),
        ("an attention with fewer inputs", "a GroupedLatentAttention has 3 inputs"),
        ("no standard opset", "its opsets are"),
    ],
)
def test_bundles_that_were_tampered_with(
    copied_bundle: Path, tmp_path: Path, what: str, message: str, newer_ops: bool
) -> None:
    bundle = Bundle.open(copied_bundle)
    model = onnx.load(bundle.model_path, load_external_data=False)
    damaged(model, what)
    bundle.model_path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        plugin_form(bundle, tmp_path / "model", compute="fp16", newer_ops=newer_ops)
    assert_one_line(caught.value, BundleError, message)


def test_a_file_that_is_no_model(copied_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    bundle.model_path.write_bytes(b"no model")
    with pytest.raises(BundleError, match=r"model\.onnx: is no graph that gta-edge writes \(.*\); export the bundle"):
        plugin_form(bundle, tmp_path / "model", compute="fp16")


def test_places_that_cannot_be_written(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("gta, tied", "fp16")
    with pytest.raises(OutputError, match="holds a model already"):
        plugin_form(bundle, bundle.directory, compute="fp16")
    with pytest.raises(OutputError, match=r"cannot be written \(No such file or directory\)"):
        plugin_form(bundle, tmp_path / "no" / "model", compute="fp16")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        plugin_form(bundle, tmp_path / "file", compute="fp16")


# --- TensorRT's parser and builder; test_rtx.py has the models of the presets' sizes --------------------------------


@pytest.mark.parametrize("name", ["gta, untied", "gqa, tied"])
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_the_parser_takes_what_is_written_out(bundles: Bundles, tmp_path: Path, name: str, compute: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the parser and the builder of the package tensorrt-rtx are needed")
    from gta_edge.libraries.tensorrt import load
    from gta_edge.runtime.tensorrt.build import profile_shapes
    from gta_edge.runtime.tensorrt.builder import Target, build_plan
    from gta_edge.runtime.tensorrt.engine import EngineSpec

    bundle = bundles(name, "int4")
    spec = EngineSpec("tensorrt-rtx", compute, compute, max_length=CAPACITY, max_batch=BATCH, chunk_size=CAPACITY)
    path = function_form(bundle, tmp_path, compute=compute, newer_ops=False)
    target = Target(load("tensorrt-rtx"), ("8.6",), None)
    assert build_plan(path, spec, profile_shapes(bundle, spec), target).nbytes > 0
