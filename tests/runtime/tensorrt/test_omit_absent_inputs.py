"""Attention nodes without a gate or a value decoder, as TensorRT gets them."""

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gta_edge.graph.io import run_passes
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import cache_tensors
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import CACHE_DTYPE, read_parameters
from gta_edge.plugins.domain import OPSET
from gta_edge.runtime.tensorrt.passes.omit_absent_inputs import OmitAbsentInputsPass
from gta_edge.runtime.tensorrt.passes.quantize_cache import QuantizeCachePass
from tests.helpers import reference

HEADS, KEYS, WIDTH, POSITIONS, ROOM = 4, 2, 16, 8, 32
HIDDEN = HEADS * WIDTH
SHAPES: dict[str, list[Any]] = {
    "query": ["b", "t", HEADS * WIDTH],
    "key": ["b", "t", KEYS * WIDTH],
    "latent": ["b", "t", KEYS * WIDTH],
    "gate": ["b", "t", HIDDEN],
    "past_key": ["b", KEYS, ROOM, WIDTH],
    "past_latent": ["b", KEYS, ROOM, WIDTH],
    "past_length": ["b"],
    "cos": [POSITIONS, WIDTH // 2],
    "sin": [POSITIONS, WIDTH // 2],
    "value_decoder": [HEADS, WIDTH, WIDTH],
}
PAST, PRESENT = ("past_key", "past_latent"), ("present_key", "present_latent")
CONFIG = parse_config(
    reference.gta_entries(
        heads=HEADS, n_q=HEADS, n_k=KEYS, n_c=KEYS, d_k=WIDTH, d_l=WIDTH, e=1, num_hidden_layers=1, vocab_size=8
    )
)


def in_graph(name: str) -> str:
    """What the graph calls a value of the op: caches are a layer's."""
    return f"{name}.0" if name in (*PAST, *PRESENT) else name


def attention(*absent: str, cut: bool = False) -> ir.Model:
    """A graph of one node; ``cut`` leaves an absent last input off."""
    names = ["" if name in absent else name for name in op.MODEL_INPUTS]
    attributes = op.attributes(HEADS, KEYS, KEYS, WIDTH**-0.5)
    inputs, made = [list(map(in_graph, each)) for each in (names[: 9 if cut else 10], op.MODEL_OUTPUTS)]
    node = helper.make_node(op.OP, inputs, made, domain="gta", **attributes)
    kinds = {name: TensorProto.INT64 if name == "past_length" else TensorProto.FLOAT16 for name in names if name}
    outputs = {"output": (TensorProto.FLOAT16, ["b", "t", HIDDEN])}
    outputs |= {new: (TensorProto.FLOAT16, SHAPES[old]) for new, old in zip(PRESENT, PAST, strict=True)}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(in_graph(name), kind, SHAPES[name]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(in_graph(name), *known) for name, known in outputs.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("gta", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports))


def lowered(model: ir.Model, *passes: Any) -> onnx.NodeProto:
    run_passes(model, "model.onnx", *passes)
    (node,) = ir.to_proto(model).graph.node
    return node


def parameters_of(node: onnx.NodeProto) -> Any:
    """What the plugin is made of: of the node's attributes, those that its creator declares."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    values = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    return read_parameters({name: value for name, value in values.items() if not name.startswith("plugin_")})


@pytest.mark.parametrize("cache", [None, "int8", "int4"])
@pytest.mark.parametrize("absent", [(), ("gate",), ("value_decoder",), ("gate", "value_decoder")], ids=str)
@pytest.mark.parametrize("cut", [False, True])
def test_the_plugins_inputs_have_no_gaps(absent: tuple[str, ...], cache: str | None, cut: bool) -> None:
    if cut and "value_decoder" not in absent:
        return
    quantize = [QuantizeCachePass(cache, cache_tensors(CONFIG, cache))] if cache else []
    node = lowered(attention(*absent, cut=cut), *quantize, OmitAbsentInputsPass())
    found = [name.removesuffix(".0") for name in node.input]
    beside = [*op.SCALE_INPUTS, *op.OPEN_INPUTS][: {None: 0, "int8": 2, "int4": 4}[cache]]
    assert found == [name for name in op.MODEL_INPUTS if name not in absent] + beside
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    added = {CACHE_DTYPE: cache} if cache else {}
    assert attributes.keys() == {*op.ATTRIBUTES, *added, *(f"has_{name}" for name in absent)}
    assert all(attributes[f"has_{name}"] == 0 for name in absent)

    parameters = parameters_of(node)  # the plugin's own names for its inputs, in its order
    assert found == list(parameters.inputs)
    assert [name.removesuffix(".0") for name in node.output] == list(parameters.outputs)
    assert (parameters.has_gate, parameters.has_value_decoder) == ("gate" not in absent, "value_decoder" not in absent)


@pytest.mark.parametrize("absent", [(), ("gate", "value_decoder")], ids=str)
def test_a_second_time_it_changes_nothing(absent: tuple[str, ...]) -> None:
    model = attention(*absent)
    assert OmitAbsentInputsPass()(model).modified is bool(absent)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not OmitAbsentInputsPass()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
