"""Store weights in the view in which the graph uses them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gta_edge.formats.weights import TRANSPOSED
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["FoldWeightViewsPass"]


class FoldWeightViewsPass(ir.passes.InPlacePass):
    """Replace Transpose and Reshape of an initializer by an initializer that lies that way.

    Only names and shapes change here; data is attached later (``StoreWeightsPass``), so nothing is read or copied.

    Precondition: every Transpose of an initializer swaps the axes of a matrix.
    Postcondition: no initializer feeds a Transpose or a Reshape. A transposed one is called ``NAME.transposed``; a
    reshaped one keeps its name, being the same memory.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every such node of ``model``."""
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs else None
            if node.op_type not in ("Transpose", "Reshape") or source is None or not source.is_initializer():
                continue
            stored = self._transposed(source) if node.op_type == "Transpose" else self._reshaped(source, node)
            if stored.name not in model.graph.initializers:
                model.graph.register_initializer(stored)
            node.outputs[0].replace_all_uses_with(model.graph.initializers[str(stored.name)])
            model.graph.remove(node, safe=True)
            modified = True
        for name, value in list(model.graph.initializers.items()):
            if not value.uses():
                del model.graph.initializers[name]
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _transposed(source: ir.Value) -> ir.Value:
        assert source.shape is not None and len(source.shape) == 2  # the precondition
        shape = ir.Shape(reversed(tuple(source.shape)))
        return _initializer(f"{source.name}{TRANSPOSED}", shape)

    @staticmethod
    def _reshaped(source: ir.Value, node: ir.Node) -> ir.Value:
        shape = node.outputs[0].shape
        assert source.shape is not None and shape is not None  # the tracer gives both
        assert math.prod(source.shape.numpy()) == math.prod(shape.numpy())
        graph = source.graph
        assert graph is not None
        name = str(source.name)
        source.name = f"{name}.viewed"  # free the name for the view; this one goes when its last use goes
        return _initializer(name, shape)


def _initializer(name: str, shape: ir.Shape) -> ir.Value:
    def missing() -> ir.TensorProtocol:
        raise RuntimeError(f"{name} has no data yet")

    data = ir.LazyTensor(missing, dtype=ir.DataType.FLOAT, shape=shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=data)
