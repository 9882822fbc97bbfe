"""Multiply by stacked matrices once for all rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.graph.builder import Nodes, take_place
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import INPUT_IDS

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort-gpu")

__all__ = ["MultiplyByHeadPass"]


class MultiplyByHeadPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x [B, n, T, k], w [n, k, m])`` by a matmul of [n, B·T, k] and w, and Transposes around it.

    The stack is shared by the rows of the batch, so each of its matrices is read once and not once per row. And
    ONNX Runtime's CUDA provider lists the matrices of such a broadcast matmul in memory of the host, which it fills
    in each run and then gives back; a CUDA graph would read that place again in every replay, whatever lies there.

    Precondition: w is an initializer, and the graph has the input ``input_ids`` [B, T].
    Postcondition: no MatMul broadcasts a stack of stored matrices.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite such matmuls of ``model``."""
        graph = model.graph
        ids = next((value for value in graph.inputs if value.name == INPUT_IDS), None)
        modified = False
        for node in [node for node in graph if node.op_type == "MatMul"] if ids is not None else []:
            x, w = node.inputs
            if x is None or w is None or not w.is_initializer() or w.shape is None or len(w.shape) != 3:
                continue
            n, k, m = (int(size) for size in w.shape.numpy())
            nodes = Nodes()
            rows = nodes("Reshape", nodes("Transpose", x, perm=[1, 0, 2, 3]), nodes.constant(n, -1, k))
            matmul = nodes("MatMul", rows, w)  # [n, B·T, m]
            tokens = nodes("Shape", ids, start=1, end=2)
            shape = nodes("Concat", nodes.constant(n, -1), tokens, nodes.constant(m), axis=0)
            result = nodes("Transpose", nodes("Reshape", matmul, shape), perm=[1, 0, 2, 3])
            graph.insert_before(node, nodes.made)
            take_place(node.outputs[0], result)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
