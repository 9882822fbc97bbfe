"""The attention nodes of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["attention_nodes", "node_features"]


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return every ``GroupedLatentAttention`` of a graph, in order: one for each layer."""
    return [node for node in graph if (node.domain, node.op_type) == (DOMAIN, op.OP)]


def node_features(node: ir.Node) -> op.Features:
    """Return which inputs of a managed cache an attention node has.

    Raises:
        ValueError: they do not go together.
    """
    shapes = {
        name: [size if isinstance(size, int) else None for size in value.shape or ()]
        for name, value in op.given_inputs(node.inputs).items()
        if name in op.FEATURE_INPUTS
    }
    return op.given_features(shapes, node.attributes.get_string(op.OBSERVE, ""))
