"""Give the attention nodes their meaning: a model-local function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.graph.io import add_attention_function
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN, OPSET

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["AttachFunctionsPass"]


class AttachFunctionsPass(ir.passes.InPlacePass):
    """Add the function of every op of ours that is used.

    ``GroupedLatentAttention`` stays one node per layer, its function beside it, for engines with a kernel and
    without.

    Postcondition: every node of domain ``gta`` has its function in the model, and the standard opset is the one the
    functions are written in.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Attach to ``model``."""
        used = {node.op_type for node in model.graph if node.domain == DOMAIN}
        attached = {identifier[1] for identifier in model.functions}
        modified = bool(used - attached) or model.graph.opset_imports[""] != OPSET
        # what torch writes for opset 23 means the same in opset 24
        model.graph.opset_imports[""] = OPSET
        if op.OP in used - attached:
            add_attention_function(model)
        return ir.passes.PassResult(model, modified)
