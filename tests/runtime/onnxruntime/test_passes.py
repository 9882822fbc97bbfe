"""Each graph pass for an engine: what it changes, that the meaning stays, and that it says when there is nothing to do.

The meaning is what plain ONNX Runtime computes with none of its own rewriting, or what the formulas in NumPy say.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from gta_edge.errors import BackendError
from gta_edge.graph.io import run_passes
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.model.config import parse_config
from gta_edge.numerics.quantization import pack_nibbles
from gta_edge.plugins.domain import DOMAIN, OPSET
from gta_edge.runtime.onnxruntime.passes.expand_attention import ExpandAttentionPass
from gta_edge.runtime.onnxruntime.passes.fuse_matmuls import FuseMatMulsPass
from gta_edge.runtime.onnxruntime.passes.fuse_norms import FuseNormsPass
from tests.helpers import reference
from tests.helpers.attention_models import Sizes, all_sizes, arrays, assert_cache, expected, model
from tests.helpers.onnx_runs import bundled, one_attention, run, runs, serialise
from tests.helpers.small_models import (
    LAYERS,
    MODELS,
    VOCAB,
)

TOLERANCE = 1e-4  # largest error over the standard deviation of the exact result
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
EXACT, ROUNDED = 1, 4  # levels of accuracy of ONNX Runtime's matmuls with integers

# --- models ----------------------------------------------------------------------------------------------------------

INTEGERS = ["int8", "int8 in blocks", "int4"]


def step(name: str, tokens: int) -> dict[str, np.ndarray]:
    """A step of three rows that already hold 4, 0 and 7 tokens."""
    rng = np.random.default_rng(tokens)
    past, capacity = np.array([4, 0, 7]), 13
    feeds = {
        "input_ids": rng.integers(0, VOCAB, (3, tokens)),
        "past_length": past,
        "logit_positions": np.tile(np.arange(tokens)[::-1], (3, 1)),
    }
    for i in range(LAYERS):
        for cache in parse_config(MODELS[name]).caches:
            shape = 3, cache.heads, capacity, cache.width
            feeds[f"past_{cache.name}.{i}"] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert reference.relative_error(found[name], value) <= tolerance, name


def op_types(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


every_model = pytest.mark.parametrize("name", MODELS)
in_integers = pytest.mark.parametrize("precision", INTEGERS)

# --- what holds of all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, precision) for name in MODELS for precision in ("fp32", "int4")),
        *(("more keys", precision) for precision in ("bf16", "int8", "int8 in blocks")),
        *(("as many", "int8"), ("baseline", "int8 in blocks")),
    ],
)
def test_every_pass_keeps_the_meaning(name: str, precision: str) -> None:
    graph, steps = bundled(name, precision), [step(name, tokens) for tokens in (1, 5)]
    wanted = runs(graph, *steps)
    for change in (
        ExpandAttentionPass(),
        common.InlinePass(),
        ShareDimensionsPass(),
        FuseMatMulsPass(EXACT),
        FuseNormsPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        change(graph)
        for found, exact in zip(runs(graph, *steps), wanted, strict=True):
            assert_same(found, exact)


@pytest.mark.parametrize("change", [ShareDimensionsPass, FuseNormsPass])
@every_model
def test_passes_that_need_no_other_first(name: str, change: type[Any]) -> None:
    """What a bundle that cannot be written to is run with: the op's own function, inlined."""
    graph, feeds = common.InlinePass()(bundled(name)).model, step(name, 3)
    wanted = run(graph, feeds)
    assert change()(graph).modified
    assert_same(run(graph, feeds), wanted)


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (ExpandAttentionPass(), "fp32"),
        (ShareDimensionsPass(), "fp32"),
        (FuseMatMulsPass(EXACT), "int4"),
        (FuseMatMulsPass(EXACT), "int8"),
        (FuseNormsPass(), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_second_run_changes_nothing(change: Any, precision: str) -> None:
    graph = bundled("more keys", precision)
    if isinstance(change, ShareDimensionsPass):
        common.InlinePass()(graph)
    assert change(graph).modified
    before = serialise(graph)
    assert not change(graph).modified
    assert serialise(graph) == before


@pytest.mark.parametrize("change", [ExpandAttentionPass(), ShareDimensionsPass(), FuseMatMulsPass(4), FuseNormsPass()])
def test_nothing_to_do(change: Any) -> None:
    graph = small([helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", 4]}, {"y": ["batch", 4]})
    before = serialise(graph)
    assert not change(graph).modified
    assert serialise(graph) == before


def small(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any] | None],
    tensors: dict[str, np.ndarray | onnx.TensorProto] | None = None,
    shapes: dict[str, list[Any]] | None = None,
    types: dict[str, int] | None = None,
) -> ir.Model:
    """A graph written down by hand; float32 but for the types given."""
    initializers = [
        tensor if isinstance(tensor, onnx.TensorProto) else numpy_helper.from_array(tensor, name)
        for name, tensor in (tensors or {}).items()
    ]

    def values(given: dict[str, Any]) -> list[onnx.ValueInfoProto]:
        kinds = types or {}
        return [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), v) for k, v in given.items()]

    graph = helper.make_graph(
        list(nodes), "small", values(inputs), values(outputs), initializers, value_info=values(shapes or {})
    )
    imports = [helper.make_opsetid("", OPSET)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# --- ExpandAttention -------------------------------------------------------------------------------------------------


@every_model
def test_no_attention_is_left(name: str) -> None:
    graph = bundled(name)
    outputs = [value.name for value in graph.graph.outputs]
    assert ExpandAttentionPass()(graph).modified
    assert not [node for node in graph.graph if node.domain == DOMAIN]
    assert not [key for key in graph.functions if key[0] == DOMAIN]
    assert [value.name for value in graph.graph.outputs] == outputs


@every_model
def test_fewer_nodes_than_the_function_has(name: str) -> None:
    function, written_out = bundled(name), bundled(name)
    ExpandAttentionPass()(written_out)
    counts = []
    for graph in (function, written_out):
        common.InlinePass()(graph)
        counts.append(sum(count for kind, count in op_types(graph).items() if kind != "Constant"))
    assert counts[1] <= counts[0] - 10 * LAYERS


def assert_attends(graph: ir.Model, inputs: dict[str, np.ndarray], sizes: Sizes) -> np.ndarray:
    """The graph gives what the formula gives; returns its output."""
    feeds = {name: value for name, value in inputs.items() if name != "value_decoder"}
    found, exact = run(graph, feeds), expected(inputs, sizes)
    assert reference.relative_error(found["output"], exact[0]) <= 1e-5
    assert_cache(found["present_key"], inputs["past_key"], exact[1], sizes.past, sizes.tokens)
    assert_cache(found["present_latent"], inputs["past_latent"], exact[2], sizes.past, sizes.tokens)
    return found["output"]


@SETTINGS
@given(sizes=all_sizes())
def test_expanded_attention_against_the_formula(sizes: Sizes) -> None:
    inputs = arrays(sizes)
    graph = one_attention(inputs, sizes)
    assert ExpandAttentionPass()(graph).modified
    assert_attends(graph, inputs, sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        *(Sizes(n_q=n_q, n_k=n_k, n_c=n_c) for n_q, n_k, n_c in ((4, 2, 1), (4, 2, 2), (6, 2, 3))),
        Sizes(n_q=4, n_k=2, n_c=2, gate=False, decoder=False),
    ],
    ids=str,
)
def test_what_stands_beyond_the_visible_rows_does_not_matter(sizes: Sizes) -> None:
    clean = replace(sizes, past=(3, 0, 5), capacity=12)
    outputs = []
    for sizes in (clean, replace(clean, garbage=1e30)):
        inputs = arrays(sizes)
        graph = one_attention(inputs, sizes)
        ExpandAttentionPass()(graph)
        outputs.append(assert_attends(graph, inputs, sizes))
    np.testing.assert_array_equal(*outputs)


def test_a_decoder_in_another_type() -> None:
    """The tile is folded into the decoder in float32, after the Cast: in float16 it would round."""
    sizes = Sizes()
    inputs = arrays(sizes)
    inputs["value_decoder"] = inputs["value_decoder"].astype(np.float16).astype(np.float32)
    graph = one_attention(inputs, sizes, ["Cast"], np.float16)
    ExpandAttentionPass()(graph)
    assert_attends(graph, inputs, sizes)


def test_a_decoder_that_is_no_stored_tensor() -> None:
    with pytest.raises(BackendError, match="value decoder value_decoder is no stored tensor; export the bundle again"):
        run_passes(ir.from_proto(model(Sizes())), "model.onnx", ExpandAttentionPass())


def test_a_decoder_that_is_computed() -> None:
    """Refused, or computed: what is behind the node must not be taken for the decoder itself."""
    sizes = Sizes()
    inputs = arrays(sizes)
    graph = one_attention(inputs, sizes, ["Neg"])
    inputs["value_decoder"] = -inputs["value_decoder"]
    try:
        run_passes(graph, "model.onnx", ExpandAttentionPass())
    except BackendError:
        return
    assert_attends(graph, inputs, sizes)


# --- ShareDimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [True, False])
@every_model
def test_sizes_are_asked_of_the_inputs_alone(name: str, expand: bool) -> None:
    graph = bundled(name)
    if expand:
        ExpandAttentionPass()(graph)
    common.InlinePass()(graph)
    assert op_types(graph)["Shape"] > LAYERS
    assert ShareDimensionsPass()(graph).modified
    asked = [node for node in graph.graph if node.op_type == "Shape"]
    assert all(node.inputs[0].is_graph_input() for node in asked)
    names = set()
    for node in asked:
        (size,) = node.inputs[0].shape[node.attributes["start"].value : node.attributes["end"].value]
        names.add((size.value, node.inputs[0].name))
    assert len({size for size, _ in names}) == len(names)  # one input for each dimension, whatever the layer
    common.CommonSubexpressionEliminationPass()(graph)
    assert op_types(graph)["Shape"] <= 4  # batch, tokens, capacity, positions


X_SHAPE = ["batch", "tokens", 3, "wide"]


@SETTINGS
@given(
    shape=st.permutations([*X_SHAPE, 1]),
    start=st.integers(-6, 5),
    end=st.none() | st.integers(-6, 6),
)
def test_a_shape_is_what_it_was(shape: list[Any], start: int, end: int | None) -> None:
    """Any part of any shape, also where it mixes numbers and names, or is empty."""
    order = [[*X_SHAPE, 1].index(size) for size in shape]
    options = {"start": start} | ({} if end is None else {"end": end})
    nodes = [
        helper.make_node("Unsqueeze", ["x", "last"], ["longer"]),
        helper.make_node("Transpose", ["longer"], ["turned"], perm=order),
        helper.make_node("Shape", ["turned"], ["shape"], **options),
        helper.make_node("Neg", ["shape"], ["y"]),
    ]
    graph = small(
        nodes,
        {"x": X_SHAPE},
        {"y": None},
        {"last": np.array([-1])},
        shapes={"turned": shape},
        types={"y": TensorProto.INT64},
    )
    wanted = run(graph, {"x": normal(2, 5, 3, 7)})
    ShareDimensionsPass()(graph)
    np.testing.assert_array_equal(run(graph, {"x": normal(2, 5, 3, 7)})["y"], wanted["y"])


@pytest.mark.parametrize("shape", [["batch", None], ["batch", "nobody else's"], None], ids=str)
def test_a_size_that_no_input_has_is_still_asked_for(shape: list[Any] | None) -> None:
    nodes = [
        helper.make_node("Compress", ["x", "which"], ["some"], axis=1),
        helper.make_node("Shape", ["some"], ["shape"]),
        helper.make_node("Neg", ["shape"], ["y"]),
    ]
    graph = small(
        nodes,
        {"x": ["batch", "tokens"], "which": ["tokens"]},
        {"y": [2]},
        shapes={} if shape is None else {"some": shape},
        types={"y": TensorProto.INT64, "which": TensorProto.BOOL},
    )
    before = serialise(graph)
    assert not ShareDimensionsPass()(graph).modified
    assert serialise(graph) == before


# --- FuseNorms -------------------------------------------------------------------------------------------------------


@every_model
def test_sums_and_norms_are_one_node(name: str) -> None:
    graph = bundled(name)
    before = op_types(graph)
    assert FuseNormsPass()(graph).modified
    after = op_types(graph)
    # all but the first, before which nothing is added, and the last, which sees some of the positions alone
    assert after["SkipSimplifiedLayerNormalization"] == 2 * LAYERS - 1
    assert after["RMSNormalization"] == before["RMSNormalization"] - (2 * LAYERS - 1) == 2
    assert after["Add"] == before["Add"] - (2 * LAYERS - 1)


def norm_of_a_sum(**changes: Any) -> ir.Model:
    """norm(x + y) and x + y; ``other`` is a shape for y, ``stored`` makes y an initializer."""
    y, axis, epsilon = changes.get("other", ["batch", "tokens", 16]), changes.get("axis", -1), changes.get("epsilon")
    options = {"axis": axis} | ({} if epsilon is None else {"epsilon": epsilon})
    tensors = {"scale": 1 + normal(*((16,) if axis == -1 else (3, 16)))}
    inputs = {"x": ["batch", "tokens", 16], "y": y}
    if changes.get("stored"):
        tensors["y"] = normal(16)
        del inputs["y"]
    nodes = [
        helper.make_node("Neg", ["x"], ["z"]),
        helper.make_node("Add", ["x" if changes.get("first", True) else "z", "y"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["also"]),
        helper.make_node("RMSNormalization", ["sum", "scale"], ["norm"], **options),
    ]
    whole = ["batch", "tokens", 16]
    return small(nodes, inputs, {"norm": whole, "sum": whole, "also": whole}, tensors)


@pytest.mark.parametrize("epsilon", [None, 1e-6, 0.5])
def test_the_sum_stays_and_epsilon_is_the_same(epsilon: float | None) -> None:
    graph, feeds = norm_of_a_sum(epsilon=epsilon), {"x": normal(2, 3, 16), "y": normal(2, 3, 16, seed=1)}
    assert FuseNormsPass()(graph).modified
    assert op_types(graph) == Counter(["Neg", "SkipSimplifiedLayerNormalization", "Relu"])
    found = run(graph, feeds)
    assert list(found) == ["norm", "sum", "also"]
    total = reference.double(feeds["x"]) + feeds["y"]
    scale = 1 + normal(16)
    exact = np.apply_along_axis(reference.rms_norm, -1, total, scale, 1e-5 if epsilon is None else epsilon)
    assert_same(found, {"norm": exact.astype(np.float32), "sum": total.astype(np.float32), "also": found["also"]}, 1e-5)
    np.testing.assert_array_equal(found["also"], np.maximum(found["sum"], 0))


@pytest.mark.parametrize(
    "change", [{"other": [16]}, {"other": ["batch", 1, 16]}, {"stored": True}, {"axis": 1}], ids=str
)
def test_other_norms_and_sums_are_left_alone(change: dict[str, Any]) -> None:
    graph = norm_of_a_sum(**change)
    before = serialise(graph)
    assert not FuseNormsPass()(graph).modified
    assert serialise(graph) == before


def test_two_norms_of_one_sum() -> None:
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "a"], ["first"]),
        helper.make_node("RMSNormalization", ["sum", "b"], ["second"]),
    ]
    shape = ["batch", 16]
    graph = small(
        nodes, {"x": shape, "y": shape}, {"first": shape, "second": shape}, {"a": normal(16), "b": normal(16, seed=5)}
    )
    feeds = {"x": normal(3, 16), "y": normal(3, 16, seed=1)}
    wanted = run(graph, feeds)
    assert FuseNormsPass()(graph).modified
    assert_same(run(graph, feeds), wanted, 1e-5)


# --- FuseMatMuls -----------------------------------------------------------------------------------------------------


@in_integers
@every_model
def test_products_that_share_an_input_are_one(name: str, precision: str) -> None:
    graph = bundled(name, precision)
    ExpandAttentionPass()(graph)
    ShareDimensionsPass()(graph)  # or the parts are asked for their sizes
    before = op_types(graph)
    assert FuseMatMulsPass(ROUNDED)(graph).modified
    fused = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    assert len(fused) == 4 * LAYERS + 1  # query, key, latent and gate; what mixes heads; gate and up; down; the head
    for node in fused:
        assert node.attributes["accuracy_level"].value == ROUNDED
        head = node.inputs[1].name.startswith(("model.embed_tokens.", "lm_head."))
        assert node.attributes["bits"].value == (4 if precision == "int4" and not head else 8)
    after = op_types(graph)
    assert before["MatMul"] - after["MatMul"] == before["DequantizeLinear"]
    for node in graph.graph:
        if node.op_type == "MatMul":
            assert node.inputs[1].producer() is None or node.inputs[1].producer().op_type != "DequantizeLinear"
    # query and key, which are rotated together, are never taken apart
    assert before["Concat"] - after["Concat"] == LAYERS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_with_floating_point_numbers_are_left_alone(precision: str) -> None:
    graph = bundled("more keys", precision)
    before = serialise(graph)
    assert not FuseMatMulsPass(EXACT)(graph).modified
    assert serialise(graph) == before


class Matrix:
    """Random codes [in, out] with float16 scales of very different size for each matrix of a graph, and maybe a bias.

    Every code there is occurs, also those that no export writes.
    """

    def __init__(self, number: int, inputs: int, outputs: int, bits: int, block: int | None, bias: bool = False):
        rng = np.random.default_rng([number, inputs, outputs])
        self.name, self.bits, self.block = f"m{number}", bits, block
        self.codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (inputs, outputs)).astype(np.int8)
        shape = (inputs // block, outputs) if block else (outputs,)
        self.scales = (rng.uniform(0.5, 2, shape) * 10.0**-number).astype(np.float16)
        self.bias = (rng.standard_normal(outputs) * 100 * 10.0**-number).astype(np.float32) if bias else None

    @property
    def values(self) -> np.ndarray:
        """What the codes mean, float64 [in, out]."""
        scales = np.repeat(self.scales, self.block, axis=0) if self.block else self.scales
        return self.codes.astype(np.float64) * scales.astype(np.float64)

    def matmul(self, x: np.ndarray) -> np.ndarray:
        return reference.double(x) @ self.values + (0 if self.bias is None else self.bias)

    @property
    def tensors(self) -> dict[str, np.ndarray | onnx.TensorProto]:
        kind = TensorProto.INT4 if self.bits == 4 else TensorProto.INT8
        raw = (pack_nibbles(self.codes) if self.bits == 4 else self.codes).tobytes()
        name = self.name
        found = {name: helper.make_tensor(name, kind, self.codes.shape, raw, raw=True), f"{name}.scale": self.scales}
        return found if self.bias is None else found | {f"{name}.added": self.bias}

    def nodes(self, x: str) -> list[onnx.NodeProto]:
        """The nodes that multiply x by the matrix, to a value called ``y`` and its number."""
        along = {"axis": 0, "block_size": self.block} if self.block else {"axis": 1}
        name, result = self.name, self.name.replace("m", "y")
        matmul = result if self.bias is None else f"{name}.matmul"
        made = [
            helper.make_node("Cast", [f"{name}.scale"], [f"{name}.factor"], to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", [name, f"{name}.factor"], [f"{name}.values"], **along),
            helper.make_node("MatMul", [x, f"{name}.values"], [matmul]),
        ]
        if self.bias is not None:  # on either side
            terms = [matmul, f"{name}.added"]
            made.append(helper.make_node("Add", terms if len(self.bias) % 2 else terms[::-1], [result]))
        return made


def matmuls(matrices: Sequence[Matrix], *more: onnx.NodeProto, outputs: dict[str, list[Any]] | None = None) -> ir.Model:
    """A graph that multiplies x by all of them, and returns the matmuls, or other outputs."""
    inputs = len(matrices[0].codes)
    nodes = [node for matrix in matrices for node in matrix.nodes("x")]
    tensors = {name: tensor for matrix in matrices for name, tensor in matrix.tensors.items()}
    ends = {matrix.name.replace("m", "y"): ["batch", matrix.codes.shape[1]] for matrix in matrices}
    return small([*nodes, *more], {"x": ["batch", inputs]}, outputs or ends, tensors, shapes=ends if outputs else None)


@st.composite
def matrices_of_one_input(draw: Any) -> list[Matrix]:
    bits, block = draw(st.sampled_from([(4, 16), (4, 32), (4, 64), (4, 128), (8, None), (8, None), (8, 16), (8, 32)]))
    inputs = block * draw(st.integers(1, 4)) if block else draw(st.integers(1, 300))
    count = draw(st.integers(1, 4))
    return [Matrix(i, inputs, draw(st.integers(1, 20)), bits, block, draw(st.booleans())) for i in range(count)]


@SETTINGS
@given(matrices=matrices_of_one_input())
def test_products_are_those_of_the_formula_each_at_its_place(matrices: list[Matrix]) -> None:
    graph = matmuls(matrices)
    assert FuseMatMulsPass(EXACT)(graph).modified
    common.RemoveUnusedNodesPass()(graph)
    assert op_types(graph) == Counter(["MatMulNBits"] if len(matrices) == 1 else ["MatMulNBits", "Split"])
    x = normal(3, len(matrices[0].codes))
    found = run(graph, {"x": x})
    assert list(found) == [matrix.name.replace("m", "y") for matrix in matrices]
    for matrix, value in zip(matrices, found.values(), strict=True):
        exact = matrix.matmul(x)
        size = np.abs(x).astype(np.float64) @ np.abs(matrix.values)  # a sum may come out near zero
        assert (np.abs(value - exact) <= 1e-5 * (size.max() + np.abs(exact).max())).all(), matrix.name


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 15, 16, 17, 24, 80, 100, 257])
def test_whole_channels_of_any_length(inputs: int) -> None:
    """The kernel knows blocks of 16 and longer, a power of two: what is missing in the last one must not count."""
    matrices = [Matrix(0, inputs, 5, 8, None, bias=True), Matrix(1, inputs, 3, 8, None)]
    graph = matmuls(matrices)
    FuseMatMulsPass(EXACT)(graph)
    x = normal(4, inputs)
    for matrix, value in zip(matrices, run(graph, {"x": x}).values(), strict=True):
        assert reference.relative_error(value, matrix.matmul(x)) <= 1e-5


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 128), (8, None), (8, 64)])
def test_codes_lie_as_the_kernel_reads_them(bits: int, block: int | None) -> None:
    """Unsigned, a row of blocks for each output: read back here by the kernel's own definition."""
    matrices = [Matrix(i, 384, 6 + i, bits, block) for i in range(3)]
    graph = matmuls(matrices)
    FuseMatMulsPass(ROUNDED)(graph)
    (node,) = (node for node in graph.graph if node.op_type == "MatMulNBits")
    size = node.attributes["block_size"].value
    codes, scales = (node.inputs[i].const_value.numpy() for i in (1, 2))
    assert (node.attributes["K"].value, node.attributes["N"].value) == (384, 21)
    assert codes.dtype == np.uint8
    assert codes.shape == (21, 384 // size, size * bits // 8) if not 384 % size else codes.shape[:1] == (21,)
    assert scales.dtype == np.float32
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    unsigned = codes.reshape(21, scales.shape[1], size).astype(np.float64)
    meant = ((unsigned - (1 << bits - 1)) * scales[:, :, None]).reshape(21, -1)
    np.testing.assert_array_equal(meant[:, :384], np.concatenate([matrix.values for matrix in matrices], axis=1).T)
    np.testing.assert_array_equal(meant[:, 384:], 0)


def test_rounded_activations_are_near_and_not_the_same() -> None:
    matrices = [Matrix(i, 256, 8, 4, 32) for i in range(2)]
    x = normal(3, 256)
    results = []
    for level in (EXACT, ROUNDED):
        graph = matmuls(matrices)
        FuseMatMulsPass(level)(graph)
        results.append(run(graph, {"x": x}))
    for name, exact in results[0].items():
        assert 1e-5 < reference.relative_error(results[1][name], exact) < 0.05


def test_products_of_different_inputs_or_kinds_stay_apart() -> None:
    matrices = [Matrix(0, 32, 4, 4, 16), Matrix(1, 32, 4, 4, 32), Matrix(2, 32, 4, 8, None), Matrix(3, 32, 4, 4, 16)]
    other = Matrix(4, 32, 4, 4, 16)
    nodes = [node for matrix in matrices for node in matrix.nodes("x")] + other.nodes("z")
    tensors = {name: tensor for matrix in (*matrices, other) for name, tensor in matrix.tensors.items()}
    outputs = {f"y{i}": ["batch", 4] for i in range(5)}
    graph = small(nodes, {"x": ["batch", 32], "z": ["batch", 32]}, outputs, tensors)
    assert FuseMatMulsPass(EXACT)(graph).modified
    assert op_types(graph)["MatMulNBits"] == 4
    x, z = normal(3, 32), normal(3, 32, seed=1)
    for (name, value), matrix in zip(run(graph, {"x": x, "z": z}).items(), (*matrices, other), strict=True):
        assert reference.relative_error(value, matrix.matmul(z if matrix is other else x)) <= 1e-5, name


@pytest.mark.parametrize("output", [True, False])
def test_a_matmul_that_is_used_without_its_bias_too(output: bool) -> None:
    matrix = Matrix(0, 32, 5, 8, None, bias=True)
    nodes, outputs = matrix.nodes("x"), {"y0": ["batch", 5], "m0.matmul": ["batch", 5]}
    if not output:
        nodes.append(helper.make_node("Neg", ["m0.matmul"], ["negative"]))
        outputs = {"y0": ["batch", 5], "negative": ["batch", 5]}
    graph = small(nodes, {"x": ["batch", 32]}, outputs, matrix.tensors)
    assert FuseMatMulsPass(EXACT)(graph).modified
    x = normal(3, 32)
    found = list(run(graph, {"x": x}).values())
    assert reference.relative_error(found[0], matrix.matmul(x)) <= 1e-5
    plain = matrix.matmul(x) - np.asarray(matrix.bias, np.float64)
    assert reference.relative_error(found[1] if output else -found[1], plain) <= 1e-5


def test_weights_with_zero_points_are_left_alone() -> None:
    matrix = Matrix(0, 32, 5, 8, None)
    nodes = matrix.nodes("x")
    nodes[1].input.append("zero")
    tensors = matrix.tensors | {"zero": np.arange(5, dtype=np.int8)}
    graph = small(nodes, {"x": ["batch", 32]}, {"y0": ["batch", 5]}, tensors)
    before = serialise(graph)
    assert not FuseMatMulsPass(EXACT)(graph).modified
    assert serialise(graph) == before


@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 5)], ids=str)
def test_what_is_added_and_is_no_bias(shape: tuple[int, ...]) -> None:
    matrix, added = Matrix(0, 32, 5, 4, 16), normal(*shape)
    nodes = [*matrix.nodes("x"), helper.make_node("Add", ["y0", "added"], ["sum"])]
    graph = small(nodes, {"x": ["batch", 32]}, {"sum": ["batch", 5]}, matrix.tensors | {"added": added})
    assert FuseMatMulsPass(EXACT)(graph).modified
    assert op_types(graph)["Add"] == 1
    x = normal(5 if shape == (5, 1) else 3, 32)
    assert reference.relative_error(run(graph, {"x": x})["sum"], matrix.matmul(x) + added) <= 1e-5


@pytest.mark.parametrize(
    ("order", "undone"),
    [([0, 1], True), ([1, 2], True), ([0, 1, 2], True), ([1, 0], False), ([0, 2], False), ([0, 1, 1], False)],
    ids=str,
)
@pytest.mark.parametrize("also", [False, True])
def test_what_is_put_together_again_is_not_taken_apart(order: list[int], undone: bool, also: bool) -> None:
    """Only where it is in order and together, and nothing else asks for a part of it."""
    matrices = [Matrix(i, 32, 4 + i, 4, 16, bias=i == 1) for i in range(3)]
    outputs: dict[str, Any] = {"whole": ["batch", None]}
    if also:
        outputs[f"y{order[0]}"] = ["batch", None]
    outputs |= {f"y{i}": ["batch", None] for i in range(3) if i not in order}
    concat = helper.make_node("Concat", [f"y{i}" for i in order], ["whole"], axis=-1)
    relu = helper.make_node("Relu", [f"y{order[0]}"], ["positive"])
    if also:
        outputs["positive"] = ["batch", None]
    graph = matmuls(matrices, concat, *([relu] if also else []), outputs=outputs)
    assert FuseMatMulsPass(EXACT)(graph).modified
    assert op_types(graph)["Concat"] == (0 if undone and not also else 1)
    x = normal(3, 32)
    found = run(graph, {"x": x})
    assert list(found) == list(outputs)
    exact = [matrix.matmul(x) for matrix in matrices]
    # by columns, since the matrices are of very different size
    whole = np.concatenate([exact[i] for i in order], axis=1)
    assert found["whole"].shape == whole.shape
    assert (np.abs(found["whole"] - whole) <= 1e-5 * np.abs(whole).max(axis=0)).all()
    for name, value in found.items():
        if name.startswith("y"):
            assert reference.relative_error(value, exact[int(name[1:])]) <= 1e-5
    if also:
        assert reference.relative_error(found["positive"], np.maximum(exact[order[0]], 0)) <= 1e-5
