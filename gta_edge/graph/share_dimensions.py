"""Read each dimension of a step once, from the graph's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["ShareDimensionsPass"]


class ShareDimensionsPass(ir.passes.InPlacePass):
    """Replace every ``Shape`` by constants and by the shapes of the graph's first inputs that have those dimensions.

    Layers ask their own activations and caches for the batch, the number of tokens and the capacity, which are the
    same for all. Asked of one input each, everything that follows from them alone (positions, mask, the shapes for
    Reshape) is the same expression in every layer, and common subexpressions merge.

    Precondition: equal names of symbolic dimensions mean equal sizes.
    Postcondition: no Shape reads a value whose dimensions are all known by number or by such a name.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the Shape nodes of ``model``."""
        graph = model.graph
        sources: dict[str, tuple[ir.Value, int]] = {}
        for value in graph.inputs:
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    sources.setdefault(size.value, (value, axis))
        modified = False
        for node in list(graph):
            source = node.inputs[0] if node.inputs else None
            if node.op_type != "Shape" or source is None or source.shape is None:
                continue
            if _is_source(node, source, sources):
                continue
            asked = source.shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
            parts = [_part(size, sources, source) for size in asked]
            if not parts or None in parts:
                continue
            made = [part for part in parts if part is not None]
            if len(made) > 1:
                made.append(ir.node("Concat", [part.outputs[0] for part in made], attributes={"axis": 0}))
            graph.insert_before(node, made)
            node.outputs[0].replace_all_uses_with(made[-1].outputs[0])
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_source(node: ir.Node, source: ir.Value, sources: dict[str, tuple[ir.Value, int]]) -> bool:
    """Tell whether this is what others are replaced by: one dimension, read where it is known from."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return end == start + 1 and (source, start) in sources.values()


def _part(size: int | ir.SymbolicDim, sources: dict[str, tuple[ir.Value, int]], asked: ir.Value) -> ir.Node | None:
    """Return a node whose output, int64 [1], is the size; None when nobody else knows it."""
    if isinstance(size, int):
        return ir.node("Constant", [], attributes={"value": ir.tensor(np.array([size], np.int64))})
    if size.value not in sources:
        return None
    value, axis = sources[str(size.value)]
    return ir.node("Shape", [value], attributes={"start": axis, "end": axis + 1})
