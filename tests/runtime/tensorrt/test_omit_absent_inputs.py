"""Attention nodes without a gate or a value decoder, as TensorRT gets them."""

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gta_edge.graph.io import run_passes
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import QUANTISED_CACHE, read_parameters
from gta_edge.plugins.domain import OPSET
from gta_edge.runtime.tensorrt.passes.omit_absent_inputs import OmitAbsentInputsPass
from gta_edge.runtime.tensorrt.passes.quantize_cache import QuantizeCachePass

HEADS, KEYS, WIDTH, POSITIONS = 4, 2, 16, 8
HIDDEN = HEADS * WIDTH
SHAPES: dict[str, list[Any]] = {
    "query": ["b", "t", HEADS * WIDTH],
    "key": ["b", "t", KEYS * WIDTH],
    "latent": ["b", "t", KEYS * WIDTH],
    "gate": ["b", "t", HIDDEN],
    "past_key": ["b", KEYS, "s", WIDTH],
    "past_latent": ["b", KEYS, "s", WIDTH],
    "past_length": ["b"],
    "cos": [POSITIONS, WIDTH // 2],
    "sin": [POSITIONS, WIDTH // 2],
    "value_decoder": [HEADS, WIDTH, WIDTH],
}
PAST, PRESENT = ("past_key", "past_latent"), ("present_key", "present_latent")


def attention(*absent: str, cut: bool = False) -> ir.Model:
    """A graph of one node; ``cut`` leaves an absent last input off."""
    names = ["" if name in absent else name for name in op.MODEL_INPUTS]
    attributes = op.attributes(HEADS, KEYS, KEYS, WIDTH**-0.5)
    node = helper.make_node(op.OP, names[: 9 if cut else 10], list(op.MODEL_OUTPUTS), domain="gta", **attributes)
    kinds = {name: TensorProto.INT64 if name == "past_length" else TensorProto.FLOAT16 for name in names if name}
    outputs = {"output": (TensorProto.FLOAT16, ["b", "t", HIDDEN])}
    outputs |= {new: (TensorProto.FLOAT16, SHAPES[old]) for new, old in zip(PRESENT, PAST, strict=True)}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, kind, SHAPES[name]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, *known) for name, known in outputs.items()],
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
    return read_parameters({name: value for name, value in values.items() if not name.startswith("plugin_")})


@pytest.mark.parametrize("cache", [None, "int8", "fp8"])
@pytest.mark.parametrize("absent", [(), ("gate",), ("value_decoder",), ("gate", "value_decoder")], ids=str)
@pytest.mark.parametrize("cut", [False, True])
def test_the_plugins_inputs_have_no_gaps(absent: tuple[str, ...], cache: str | None, cut: bool) -> None:
    if cut and "value_decoder" not in absent:
        return
    passes = [QuantizeCachePass(cache), OmitAbsentInputsPass()] if cache else [OmitAbsentInputsPass()]
    node = lowered(attention(*absent, cut=cut), *passes)
    scales = ["past_key_scale", "past_latent_scale"] if cache else []
    assert list(node.input) == [name for name in op.MODEL_INPUTS if name not in absent] + scales
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    added = {QUANTISED_CACHE: 1} if cache else {}
    assert attributes.keys() == {*op.ATTRIBUTES, *added, *(f"has_{name}" for name in absent)}
    assert all(attributes[f"has_{name}"] == 0 for name in absent)

    parameters = parameters_of(node)  # the plugin's own names for its inputs, in its order
    assert [name.rstrip(".") for name in node.input] == list(parameters.inputs)
    assert (parameters.has_gate, parameters.has_value_decoder) == ("gate" not in absent, "value_decoder" not in absent)


@pytest.mark.parametrize("absent", [(), ("gate", "value_decoder")], ids=str)
def test_a_second_time_it_changes_nothing(absent: tuple[str, ...]) -> None:
    model = attention(*absent)
    assert OmitAbsentInputsPass()(model).modified is bool(absent)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not OmitAbsentInputsPass()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
