"""Leave no gaps among the inputs of a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import INPUT_FLAGS
from gta_edge.plugins.domain import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["OmitAbsentInputsPass"]


class OmitAbsentInputsPass(ir.passes.InPlacePass):
    """Say by attributes which optional inputs a ``GroupedLatentAttention`` lacks, and close the gaps that they leave.

    The parser would hand TensorRT a null tensor for an empty input; and a plugin says what its outputs are like before
    it sees its inputs. Without a gate the node has the attribute ``has_gate = 0``, without a value decoder
    ``has_value_decoder = 0``.

    The last of the passes: others find the op's inputs by their places in its definition. Nodes that have such an
    attribute already stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the attention nodes of ``model``."""
        modified = False
        for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, op.OP)]:
            modified |= self._close(node)
        return ir.passes.PassResult(model, modified)

    def _close(self, node: ir.Node) -> bool:
        places = {name: op.MODEL_INPUTS.index(name) for name in INPUT_FLAGS}
        absent = [name for name, at in places.items() if at >= len(node.inputs) or node.inputs[at] is None]
        if not absent or any(flag in node.attributes for flag in INPUT_FLAGS.values()):
            return False
        gaps = {places[name] for name in absent}
        given = [value for place, value in enumerate(node.inputs) if place not in gaps]
        node.resize_inputs(len(given))
        for place, value in enumerate(given):
            node.replace_input_with(place, value)
        for name in absent:
            node.attributes[INPUT_FLAGS[name]] = ir.AttrInt64(INPUT_FLAGS[name], 0)
        return True
