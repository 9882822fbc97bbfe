"""Let the head of a tied model multiply by the embedding table itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import LOGIT_POSITIONS, LOGITS

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["TieHeadPass"]


class TieHeadPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, Transpose(table))`` by ``Gemm(x, table, transB=1)``.

    A transposed copy of the table would double the largest weight of a small model; Gemm reads it as it lies.

    Precondition: the table feeds a Gather (the embedding) and a Transpose whose only user is the head's MatMul.
    Postcondition: that Transpose is gone; the logits keep their name, type and shape ``[B, M, V]``.
    A model whose head is not tied is left alone.
    """

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the head of ``model``."""
        table = model.graph.initializers[self.table]
        for transpose in [user for user, _ in table.uses() if user.op_type == "Transpose"]:
            ((product, _),) = transpose.outputs[0].uses()
            self._rewrite(model.graph, product, transpose, table)
            return ir.passes.PassResult(model, modified=True)
        return ir.passes.PassResult(model, modified=False)

    @staticmethod
    def _rewrite(graph: ir.Graph, product: ir.Node, transpose: ir.Node, table: ir.Value) -> None:
        x, logits = product.inputs[0], product.outputs[0]
        assert x is not None and table.shape is not None  # the tracer gives both
        vocabulary, hidden = table.shape.numpy()
        positions = next(value for value in graph.inputs if value.name == LOGIT_POSITIONS)

        def constant(*numbers: int) -> ir.Node:
            return ir.node("Constant", [], attributes={"value_ints": list(numbers)})

        rows_shape, width = constant(-1, hidden), constant(vocabulary)
        rows = ir.node("Reshape", [x, rows_shape.outputs[0]])  # [B·M, H]
        scores = ir.node("Gemm", [rows.outputs[0], table], attributes={"transB": 1})  # [B·M, V]
        leading = ir.node("Shape", [positions])
        shape = ir.node("Concat", [leading.outputs[0], width.outputs[0]], attributes={"axis": 0})
        # allowzero: a chunk in the middle of a prompt asks for no logits, M = 0
        result = ir.node("Reshape", [scores.outputs[0], shape.outputs[0]], attributes={"allowzero": 1}, name=LOGITS)
        graph.insert_before(product, [rows_shape, width, rows, scores, leading, shape, result])

        new = result.outputs[0]
        new.shape, new.type = logits.shape, logits.type
        name = logits.name
        logits.name, new.name = f"{name}.replaced", name
        graph.outputs[list(graph.outputs).index(logits)] = new
        graph.remove([product, transpose], safe=True)
