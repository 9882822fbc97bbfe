"""Say what a managed cache takes in operators that ONNX Runtime's CUDA provider has in opset 24."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.errors import BundleError
from gta_edge.graph.builder import Nodes, take_place
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort-gpu")

__all__ = ["SpellForCudaPass"]


class SpellForCudaPass(ir.passes.InPlacePass):
    """Replace Pad and ReduceMax, of which the provider has kernels of older opsets alone.

    Biases of rows [B, R] are followed by zeros. Where the largest of something is asked for in "last", a sum gives it:
    a query found a row important if the number of its heads that did is not 0; and since a step's positions ascend, the
    last query that did is the one behind which nobody did.

    Precondition: functions are inlined.
    Postcondition: there is neither.

    Raises:
        BundleError: one of them stands elsewhere.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model``."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Pad" and node.graph is not None:
                _follow_with_zeros(model.graph, node)
            elif node.op_type == "ReduceMax" and node.graph is not None:
                _sum(model.graph, node)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """There is neither."""
        if any(node.op_type in ("Pad", "ReduceMax") for node in model.graph):
            raise ir.passes.PostconditionError("a Pad or a ReduceMax is left")


def _follow_with_zeros(graph: ir.Graph, node: ir.Node) -> None:
    """Replace Pad (row_bias, Concat (0, 0, 0, rows)) by zeros behind it."""
    bias, pads = node.inputs[0], node.inputs[1]
    makes_pads = None if pads is None else pads.producer()
    if makes_pads is None or makes_pads.op_type != "Concat" or len(makes_pads.inputs) != 4:
        raise _elsewhere(node)
    nodes = Nodes()
    shape = nodes("Concat", nodes("Shape", bias, start=0, end=1), makes_pads.inputs[3], axis=0)
    zeros = nodes("Expand", nodes.scalar(0, np.float32), shape)
    _replace(graph, node, nodes, nodes("Concat", bias, zeros, axis=1))


def _sum(graph: ir.Graph, node: ir.Node) -> None:
    """Replace what "last" takes from weights [B, n_q, T, S] on, up to the newest mark [B, S]."""
    chain = [node]
    for op_type in ("Mul", "GreaterOrEqual", "Where", "ReduceMax"):
        users = [use.node for use in chain[-1].outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != op_type:
            raise _elsewhere(node)
        chain.append(users[0])
    largest, product, comparison, marks, newest = chain
    column = next(value for value in product.inputs if value is not largest.outputs[0])  # [B, T, 1]
    threshold, position = comparison.inputs[1], marks.inputs[1]  # 1; float32 [B, T, 1]
    nodes = Nodes()
    axis, one = nodes.constant(1), nodes.scalar(1, np.float32)
    importance = nodes("Mul", nodes("Unsqueeze", column, axis), largest.inputs[0])
    found = nodes("Cast", nodes("GreaterOrEqual", importance, threshold), to=ir.DataType.FLOAT)
    heads = nodes("ReduceSum", found, axis, keepdims=0)  # [B, T, S]
    important = nodes("Cast", nodes("GreaterOrEqual", heads, one), to=ir.DataType.FLOAT)
    from_here = nodes("CumSum", important, nodes.scalar(1, np.int64), reverse=1)  # queries from this on
    last = nodes("Mul", important, nodes("Cast", nodes("LessOrEqual", from_here, one), to=ir.DataType.FLOAT))
    mark = nodes("Mul", last, nodes("Add", position, one))
    total = nodes("ReduceSum", mark, axis, keepdims=0)
    _replace(graph, newest, nodes, nodes("Add", total, nodes.scalar(-1, np.float32)))
    for each in reversed(chain[:-1]):
        graph.remove(each, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, nodes: Nodes, result: ir.Value) -> None:
    graph.insert_before(node, nodes.made)
    take_place(node.outputs[0], result)
    graph.remove(node, safe=True)


def _elsewhere(node: ir.Node) -> BundleError:
    return BundleError(f"a {node.op_type} is not where export writes one", "export the bundle again")
