"""Add and normalise in one node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.graph.builder import take_place
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["FuseNormsPass"]

_DOMAIN = "com.microsoft"


class FuseNormsPass(ir.passes.InPlacePass):
    """Replace ``RMSNormalization(Add(x, y))`` by ONNX Runtime's ``SkipSimplifiedLayerNormalization``.

    It returns the sum beside the norm, which the next layer adds to. ONNX Runtime's own fusion knows only the older
    spelling of the norm.

    Precondition: the graph computes in float32, and x and y have the same shape.
    Postcondition: no RMSNormalization over the last axis reads an Add of two activations.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the norms of ``model``."""
        modified = False
        for norm in [node for node in model.graph if node.op_type == "RMSNormalization"]:
            add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
            if add is None or add.op_type != "Add" or norm.attributes.get_int("axis", -1) != -1:
                continue
            x, y = add.inputs
            if x is None or y is None or x.is_initializer() or y.is_initializer() or x.shape != y.shape:
                continue
            _fuse(model.graph, norm, add, [x, y])
            modified = True
        if modified:
            model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node, terms: list[ir.Value]) -> None:
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*terms, norm.inputs[1]],
        attributes={"epsilon": epsilon},
        domain=_DOMAIN,
        num_outputs=4,
    )
    graph.insert_before(add, fused)  # before every user of the sum
    normed, _, _, total = fused.outputs
    for old, new in ((norm.outputs[0], normed), (add.outputs[0], total)):
        take_place(old, new)
    graph.remove([norm, add], safe=True)
