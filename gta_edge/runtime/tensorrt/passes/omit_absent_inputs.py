"""Leave no gaps among the inputs of a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.graph.attention import attention_nodes, node_features
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import BIAS_ROWS, FEATURE_FLAGS, INPUT_FLAGS

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["OmitAbsentInputsPass"]


class OmitAbsentInputsPass(ir.passes.InPlacePass):
    """Say by attributes which optional inputs a ``GroupedLatentAttention`` lacks, and close the gaps that they leave.

    The parser would hand TensorRT a null tensor for an empty input; and a plugin says what its outputs are like before
    it sees its inputs. Without a gate the node has the attribute ``has_gate = 0``, without a value decoder
    ``has_value_decoder = 0``. Inputs of a managed cache are the exception and not the rule, so it is said where they
    are there: ``has_positions``, ``has_branches``, ``bias_rows``; the attribute ``observe`` says it of the others.

    The last of the passes: others find the op's inputs by their places in its definition. Nodes that have such an
    attribute already stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the attention nodes of ``model``."""
        modified = False
        for node in attention_nodes(model.graph):
            modified |= self._close(node)
        return ir.passes.PassResult(model, modified)

    def _close(self, node: ir.Node) -> bool:
        given = op.given_inputs(node.inputs)
        flags = {flag: 0 for name, flag in INPUT_FLAGS.items() if name not in given}
        flags |= {flag: 1 for name, flag in FEATURE_FLAGS.items() if name in given}
        if "row_bias" in given:
            flags[BIAS_ROWS] = node_features(node).bias_rows
        known = {*INPUT_FLAGS.values(), *FEATURE_FLAGS.values(), BIAS_ROWS}
        kept = [value for value in node.inputs if value is not None]
        if known & set(node.attributes) or (not flags and len(kept) == len(node.inputs)):
            return False
        node.resize_inputs(len(kept))
        for place, value in enumerate(kept):
            node.replace_input_with(place, value)
        for flag, number in flags.items():
            node.attributes[flag] = ir.AttrInt64(flag, number)
        return True
