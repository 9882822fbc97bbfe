"""Matmuls left to the plugin: what the graph looks like, and that its meaning is the same.

The meaning is what ONNX Runtime computes of the ops' own functions, with none of its own rewriting, before and after.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.retype import ConvertPrecisionPass
from gta_edge.numerics.quantization import pack_nibbles
from gta_edge.plugins.matmul import definition as op
from gta_edge.plugins.matmul.packing import packed_shapes
from gta_edge.runtime.tensorrt.matmul_choice import MatMulCall, calls_of
from gta_edge.runtime.tensorrt.passes.pack_matmuls import PackMatMulsPass
from gta_edge.runtime.tensorrt.passes.set_capacity import SetCapacityPass
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.packed_matmuls import attach_functions, run
from tests.helpers.tensorrt_graphs import CAPACITY, LAYERS, TABLE, Bundles, Exact, in_reference, logits, on_onnxruntime

FLOAT32_NOISE = 1e-5
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)


# --- graphs made here ------------------------------------------------------------------------------------------------


class Maker:
    """Graphs of matmuls as a bundle has them, their matrices random."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.outputs: list[Any] = []

    def matmul(
        self,
        x: str,
        name: str,
        shape: tuple[int, int],
        bits: int = 4,
        block: int = 32,
        bias: bool = False,
        *,
        cast: bool = True,
        zero_point: bool = False,
        scale_type: Any = np.float16,
        swapped: bool = False,
        rank: int = 3,
    ) -> None:
        k, n = shape
        low, high = (-8, 8) if bits == 4 else (-127, 128)
        codes = self.rng.integers(low, high, shape).astype(np.int8)
        if bits == 4:
            content = pack_nibbles(codes).tobytes()
            self.stored.append(helper.make_tensor(f"{name}.transposed", TensorProto.INT4, shape, content, raw=True))
        else:
            self.stored.append(numpy_helper.from_array(codes, f"{name}.transposed"))
        scales = self.rng.uniform(0.01, 0.02, (k // block, n) if block else (n,)).astype(scale_type)
        self.stored.append(numpy_helper.from_array(scales, f"{name}.transposed.scale"))
        source = f"{name}.transposed.scale"
        if cast:
            self.nodes.append(helper.make_node("Cast", [source], [f"{name}.scale"], to=TensorProto.FLOAT))
            source = f"{name}.scale"
        inputs = [f"{name}.transposed", source]
        if zero_point:
            zeros = np.zeros(scales.shape, np.int8)
            kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
            self.stored.append(
                helper.make_tensor(
                    f"{name}.zero",
                    kind,
                    scales.shape,
                    (pack_nibbles(zeros) if bits == 4 else zeros).tobytes(),
                    raw=True,
                )
            )
            inputs.append(f"{name}.zero")
        along = {"axis": 0, "block_size": block} if block else {"axis": 1}
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.matrix"], **along))
        self.nodes.append(helper.make_node("MatMul", [x, f"{name}.matrix"], [f"{name}.y" if bias else name]))
        if bias:
            self.stored.append(numpy_helper.from_array(self.rng.standard_normal(n).astype(np.float32), f"{name}.bias"))
            operands = [f"{name}.y", f"{name}.bias"]
            self.nodes.append(helper.make_node("Add", operands[::-1] if swapped else operands, [name]))
        dims = ["B", "T", n] if rank == 3 else ["T", n][-rank:]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))

    def model(self, *inputs: tuple[str, Sequence[Any]]) -> ir.Model:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs]
        graph = helper.make_graph(self.nodes, "matmuls", values, self.outputs, self.stored)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        onnx.checker.check_model(made, full_check=True)
        return ir.from_proto(made)


def copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def counts(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in op.OPS.values()]


def inputs_for(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    symbols = {"B": 2, "T": 3}
    return {
        str(value.name): rng.standard_normal(
            [size if isinstance(size, int) else symbols[str(size)] for size in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }


def packed(model: ir.Model) -> PackMatMulsPass:
    """Pack in place; what remains is a valid model that computes the same."""
    before, feeds = run(copy(model), inputs_for(model)), inputs_for(model)
    done = PackMatMulsPass()
    modified = done(model).modified
    assert modified == (done.calls > 0)
    onnx.checker.check_model(ir.to_proto(model))
    after = run(copy(model), feeds)
    assert after.keys() == before.keys()
    for name, expected in before.items():
        assert after[name].shape == expected.shape
        assert np.abs(after[name] - expected).max() <= FLOAT32_NOISE * np.abs(expected).max(), name
    return done


X = ("x", ["B", "T", 128])


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (4, 128), (8, 0), (8, 32), (8, 64), (8, 128)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 16, 37])
def test_every_block_size(bits: int, block: int, bias: bool, outputs: int) -> None:
    made = Maker()
    made.matmul("x", "a", (128, outputs), bits, block, bias)
    model = made.model(X)
    done = packed(model)
    assert (done.calls, done.matmuls, done.left) == (1, 1, {})
    (call,) = calls(model)
    assert counts(model) == {op.OPS[bits]: 1}
    assert {name: call.attributes[name].value for name in call.attributes} == {
        "block_size": block,
        "output_sizes": (outputs,),
        "plugin_namespace": "gta",
        "plugin_version": "1",
    }
    assert model.graph.opset_imports["gta"] == 1
    weight, scale = packed_shapes(128, outputs, bits, block)
    found = {str(value.name): (value.dtype, tuple(value.shape or ())) for value in model.graph.initializers.values()}
    expected: dict[str, Any] = {
        "a.transposed.packed": (ir.DataType.INT32, weight),
        "a.transposed.packed.scale": (ir.DataType.FLOAT16, scale),
    }
    if bias:
        expected["a.bias"] = (ir.DataType.FLOAT, (outputs,))
    assert found == expected  # and nothing of what was


def test_int4_takes_as_many_bytes_as_before() -> None:
    made = Maker()
    made.matmul("x", "a", (256, 320))
    made.matmul("x", "b", (256, 64))
    model = made.model(("x", ["B", "T", 256]))

    def size() -> int:
        return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)

    before = size()
    packed(model)
    assert size() == before == 256 * 384 // 2 + 8 * 384 * 2


def test_products_of_one_input_are_one_call() -> None:
    made = Maker()
    for name, outputs, bias in (("q", 48, True), ("k", 16, False), ("v", 32, True)):
        made.matmul("x", name, (128, outputs), bias=bias, swapped=name == "v")
    model = made.model(X)
    assert packed(model).calls == 1
    (call,) = calls(model)
    assert call.attributes["output_sizes"].as_ints() == (48, 16, 32)
    assert [value.name for value in call.outputs] == ["q", "k", "v"]
    bias = call.inputs[3].const_value.numpy()
    assert (bias[48:64] == 0).all() and (bias[:48] != 0).all() and (bias[64:] != 0).all()


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 8, 16, 24, 32, 48]), st.booleans(), st.sampled_from([(4, 32), (4, 64), (8, 0)])),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 2),
)
@SETTINGS
def test_any_number_of_products_of_any_width(matmuls: list[tuple[int, bool, tuple[int, int]]], sources: int) -> None:
    made = Maker()
    for place, (outputs, bias, (bits, block)) in enumerate(matmuls):
        made.matmul(f"x{place % sources}", f"y{place}", (64, outputs), bits, block, bias)
    model = made.model(*((f"x{source}", ["B", "T", 64]) for source in range(sources)))
    done = packed(model)
    assert (done.matmuls, done.left) == (len(matmuls), {})
    kinds = collections.Counter((place % sources, kind) for place, (_, _, kind) in enumerate(matmuls))
    for call in calls(model):
        sizes = call.attributes["output_sizes"].as_ints()
        assert 1 <= len(sizes) <= 4
        assert not any(size % 16 for size in sizes[:-1])
    expected = 0
    for key, number in kinds.items():
        ragged = sum(
            outputs % 16 > 0 for place, (outputs, _, kind) in enumerate(matmuls) if (place % sources, kind) == key
        )
        calls_of_whole, rest = divmod(number - ragged, 4)
        expected += calls_of_whole + max(rest > 0, ragged)  # one of the ragged ones finds room behind the rest
    assert done.calls == expected


def test_a_matrix_that_is_used_twice_is_stored_once() -> None:
    made = Maker()
    made.matmul("x", "a", (128, 32))
    made.nodes.append(helper.make_node("MatMul", ["z", "a.matrix"], ["b"]))
    made.outputs.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["B", "T", 32]))
    model = made.model(X, ("z", ["B", "T", 128]))
    assert packed(model).calls == 2
    assert len(model.graph.initializers) == 2


def test_an_add_that_is_no_bias_stays() -> None:
    made = Maker()
    made.matmul("x", "a", (128, 128))
    made.nodes.append(helper.make_node("Add", ["a", "x"], ["residual"]))
    made.matmul("x", "c", (128, 16), bias=True)
    made.nodes.append(helper.make_node("Neg", ["c.y"], ["also"]))  # what the bias is added to has another use
    for name, outputs in (("residual", 128), ("also", 16)):
        made.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "T", outputs]))
    model = made.model(X)
    assert packed(model).calls == 1
    assert counts(model) == {"BlockwiseInt4MatMul": 1, "Add": 2, "Neg": 1}


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((128, 16), {"block": 16}, "int4 with blocks of 16, expected one of 32, 64, 128"),
        ((128, 16), {"bits": 8, "block": 16}, "int8 with blocks of 16, expected one of 0, 32, 64, 128"),
        ((128, 16), {"block": 0}, "int4 with one scale per output channel, expected one of 32, 64, 128"),
        ((132, 16), {"bits": 8, "block": 0}, "it has 132 inputs, expected a multiple of 8"),
        ((128, 16), {"zero_point": True, "cast": False, "scale_type": np.float32}, "it has zero points"),
        ((128, 16), {"cast": False, "scale_type": np.float32}, "its scales are FLOAT, expected float16: pack before"),
    ],
)
def test_what_cannot_be_packed_is_left_and_named(shape: tuple[int, int], options: dict[str, Any], reason: str) -> None:
    made = Maker()
    made.matmul("x", "a", shape, **options)
    made.matmul("x", "b", (shape[0], 16), 8, 0 if shape[0] % 8 == 0 else 4)
    model = made.model(("x", ["B", "T", shape[0]]))
    done = packed(model)
    assert list(done.left) == (["a.transposed"] if shape[0] % 8 == 0 else ["a.transposed", "b.transposed"])
    assert done.left["a.transposed"].startswith(reason)
    assert counts(model)["MatMul"] == len(done.left)
    assert "a.transposed" in model.graph.initializers


def test_an_input_of_one_axis_is_left() -> None:
    made = Maker()
    made.matmul("x", "a", (128, 16), rank=1)
    done = packed(made.model(("x", [128])))
    assert done.left == {"a.transposed": "it is multiplied by a tensor of 1 axes, expected at least two"}


def test_a_graph_without_such_products_is_not_modified() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    weight = numpy_helper.from_array(np.ones((128, 4), np.float32), "w")
    made = Maker()
    made.nodes, made.stored = nodes, [weight]
    made.outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", "T", 4])]
    model = made.model(X)
    before = ir.to_proto(model).SerializeToString()
    done = PackMatMulsPass()
    assert not done(model).modified
    assert (done.calls, done.matmuls, done.left) == (0, 0, {})
    assert ir.to_proto(model).SerializeToString() == before


def test_a_second_run_changes_nothing() -> None:
    made = Maker()
    made.matmul("x", "a", (128, 16))
    model = made.model(X)
    packed(model)
    again = PackMatMulsPass()
    assert not again(model).modified
    assert again.calls == 0


def test_codes_that_are_computed_are_left() -> None:
    made = Maker()
    made.nodes += [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["matrix"], axis=1),
        helper.make_node("MatMul", ["x", "matrix"], ["y"]),
    ]
    made.stored = [numpy_helper.from_array(np.ones(16, np.float16), "scale")]
    codes = helper.make_tensor_value_info("codes", TensorProto.INT8, [128, 16])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["T", 128])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["T", 16])
    graph = helper.make_graph(made.nodes, "computed", [x, codes], [y], made.stored)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))
    done = PackMatMulsPass()
    assert not done(model).modified
    assert done.left == {"codes": "it is computed, expected codes and scales that are stored"}


# --- models ----------------------------------------------------------------------------------------------------------


def lowered(bundle: Bundle, path: Path, compute: str, pack: bool) -> PackMatMulsPass:
    """Write a bundle's model as it would be for an engine, but with all functions, so that it runs anywhere.

    In bfloat16 they are inlined: ONNX's reference does not tell functions of one name apart.
    """
    done = PackMatMulsPass()
    passes: list[ir.passes.PassBase] = [done] * pack
    passes += [
        ConvertPrecisionPass(compute),
        SetCapacityPass(CAPACITY),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    ]
    model = ir.load(bundle.model_path)
    ir.passes.Sequential(*passes)(model)
    attach_functions(model)
    if compute == "bf16":
        common.InlinePass()(model)
    path.parent.mkdir(parents=True)
    ir.save(model, path, external_data="weights")
    return done


every_model = pytest.mark.parametrize("name", TABLE)
each_precision = pytest.mark.parametrize("precision", ["int4", "int8"])


@every_model
@each_precision
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_models_compute_the_same(bundles: Bundles, tmp_path: Path, name: str, precision: str, compute: str) -> None:
    before, after = tmp_path / "before" / "model.onnx", tmp_path / "after" / "model.onnx"
    assert lowered(bundles(name, precision), before, compute, pack=False).calls == 0
    assert lowered(bundles(name, precision), after, compute, pack=True).calls == 4 * LAYERS + 1
    onnx.checker.check_model(after, full_check=True)
    run_it, dtype = (on_onnxruntime, np.float16) if compute == "fp16" else (in_reference, ml_dtypes.bfloat16)
    found, expected = (logits(run_it(path), name, dtype) for path in (after, before))
    assert reference.relative_error(found, expected) <= (2e-2 if compute == "fp16" else 8e-2)


@every_model
@each_precision
def test_packed_models_are_as_near_to_the_exact_result_as_others(
    bundles: Bundles, exact: Exact, tmp_path: Path, name: str, precision: str
) -> None:
    paths = [tmp_path / str(pack) / "model.onnx" for pack in (False, True)]
    errors = []
    for path in paths:
        lowered(bundles(name, precision), path, "fp16", pack=path is paths[1])
        found = logits(on_onnxruntime(path), name, np.float16)
        errors.append(reference.relative_error(found, exact(name, precision)))
    assert errors[1] <= 2 * errors[0]  # the largest of a few hundred roundings


@every_model
@each_precision
def test_what_a_packed_model_consists_of(bundles: Bundles, tmp_path: Path, name: str, precision: str) -> None:
    bundle = bundles(name, precision)
    done, model = PackMatMulsPass(), ir.load(bundle.model_path)
    cleaning = common.RemoveUnusedNodesPass()
    ir.passes.Sequential(done, ConvertPrecisionPass("bf16"), cleaning)(model)
    model = ir.to_proto(model)
    gta = name.startswith("gta")
    assert done.left == {}
    assert done.matmuls == (8 if gta else 7) * LAYERS + 1
    op_types = collections.Counter(node.op_type for node in model.graph.node)
    calls = {op.OPS[4]: 4 * LAYERS, op.OPS[8]: 1} if precision == "int4" else {op.OPS[8]: 4 * LAYERS + 1}
    assert {name: op_types[name] for name in op.OPS.values() if op_types[name]} == calls  # the head is in int8
    assert "DequantizeLinear" not in op_types
    inputs = {name for node in model.graph.node if node.op_type in op.OPS.values() for name in node.input}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    types = collections.Counter(stored[name].data_type for name in inputs & stored.keys())
    assert types[TensorProto.INT32] == types[TensorProto.FLOAT16] == 4 * LAYERS + 1  # scales too, in a bf16 graph
    assert types[TensorProto.BFLOAT16] == LAYERS * gta  # the biases of q, k, latent and gate, in one
    assert types.total() == 2 * (4 * LAYERS + 1) + LAYERS * gta


def test_blocks_of_16_leave_the_model_as_it_is(tmp_path: Path) -> None:
    entries = TABLE["gqa, tied"]
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    bundle = export_model(
        tmp_path / "checkpoint", tmp_path / "bundle", precision="int4", block_size=16, verify=False
    ).bundle
    done = lowered(bundle, tmp_path / "model" / "model.onnx", "fp16", pack=True)
    assert (done.calls, len(done.left)) == (1, 7 * LAYERS)  # the head is in int8
    assert set(done.left.values()) == {"int4 with blocks of 16, expected one of 32, 64, 128"}


def test_the_products_of_a_model(bundles: Bundles) -> None:
    found = calls_of(ir.load(bundles("gta, tied", "int4").model_path))
    head = MatMulCall(8, 0, 64, (61,), False, head=True)
    assert sorted(found.values()) == [1] + [LAYERS] * 4
    assert found[head] == 1
    assert found[MatMulCall(4, 32, 64, (64, 32, 64, 8), True)] == LAYERS
    assert head.rows("prefill", 512) == 1
    assert {each.rows("prefill", 512) for each in found if each != head} == {512}
    assert {each.rows("decode", 512) for each in found} == {1}
    baseline = calls_of(ir.load(bundles("gqa, untied", "int8").model_path))
    assert {each.bits for each in baseline} == {8} and {each.block_size for each in baseline} == {0}


def test_the_matmuls_of_a_model_whose_values_have_no_shapes(bundles: Bundles) -> None:
    """The stored weights tell every size."""
    path = bundles("gqa, tied", "int4").model_path
    model, plain = ir.load(path), ir.load(path)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    assert calls_of(model) == calls_of(plain)
    assert len(calls_of(plain)) == 5


def test_a_matrix_that_is_used_twice_and_packed_once() -> None:
    """With an input of one axis it is left, with another it is packed."""
    made = Maker()
    made.matmul("x", "a", (128, 16))
    made.nodes.append(helper.make_node("MatMul", ["v", "a.matrix"], ["b"]))
    made.outputs.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [16]))
    model = made.model(X, ("v", [128]))
    done = packed(model)
    assert (done.calls, done.matmuls) == (1, 1)
    assert done.left == {"a.transposed": "it is multiplied by a tensor of 1 axes, expected at least two"}
    assert counts(model)["DequantizeLinear"] == 1


def test_nothing_is_changed_where_matmuls_are_counted(bundles: Bundles) -> None:
    model = ir.load(bundles("gta, tied", "int4").model_path)
    before = ir.to_proto(model).SerializeToString()
    calls_of(model)
    assert ir.to_proto(model).SerializeToString() == before
