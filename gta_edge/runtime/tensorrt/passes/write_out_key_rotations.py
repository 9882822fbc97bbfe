"""Let TensorRT-RTX build an engine whose layers write their caches at rows of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.graph.builder import Nodes, take_place
from gta_edge.graph.types import value_types
from gta_edge.libraries.optional import optional
from gta_edge.runtime.tensorrt.passes.lower_opset import written_rotation

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["WriteOutKeyRotationsPass"]

_BETWEEN = ("Reshape", "Transpose")


class WriteOutKeyRotationsPass(ir.passes.InPlacePass):
    """Replace the ``RotaryEmbedding`` of what a ``TensorScatter`` writes, keys, by products and sums.

    TensorRT-RTX 1.7.1 merges the rotations of a layer's query and key into one kernel. Where from the third layer on
    keys are written at rows that are not those of other layers, as in a managed cache, it then ends with "Myelin …
    check_use_before_def": the kernel reads what is made behind it. It merges rotations of one form alone; so the key's
    gets another one than the query's. Either as operators or both written out fail alike, and so do all other ways to
    take a layer's length out of ``past_length``, or lengths that are inputs each.

    Postcondition: no ``TensorScatter`` writes the output of a ``RotaryEmbedding``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model``."""
        graph, types = model.graph, value_types(model.graph)
        found = _key_rotations(graph)
        for node in found:
            nodes = Nodes()
            result = written_rotation(nodes, node, types)
            graph.insert_before(node, nodes.made)
            take_place(node.outputs[0], result)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No cache is written by such an operator."""
        if _key_rotations(model.graph):
            raise ir.passes.PostconditionError("a key is rotated by RotaryEmbedding")


def _key_rotations(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that rotate what is written to a cache."""
    found = []
    for node in graph:
        if node.op_type != "TensorScatter":
            continue
        made_by = node.inputs[1].producer() if node.inputs[1] is not None else None
        while made_by is not None and made_by.op_type in _BETWEEN and made_by.inputs[0] is not None:
            made_by = made_by.inputs[0].producer()
        if made_by is not None and made_by.op_type == "RotaryEmbedding":
            found.append(made_by)
    return found
