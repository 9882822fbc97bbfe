"""Use only operators that older parsers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.errors import EngineError
from gta_edge.graph.builder import Nodes, static_size, take_place
from gta_edge.graph.types import Types, fits, title, value_types
from gta_edge.libraries.optional import optional
from gta_edge.plugins.domain import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["NEWEST_OPSET", "OPSET", "LowerOpsetPass", "written_rotation"]

OPSET = 20
"""What TensorRT 10.0 to 10.13 support in whole (their parser's docs/operators.md)."""

NEWEST_OPSET = 21
"""They take it too, for int4 and scales per block: their DequantizeLinear reads both off the tensors."""

_IR_VERSION = 10  # of ONNX 1.16, which those parsers are built with


class LowerOpsetPass(ir.passes.InPlacePass):
    """Replace RMSNormalization, RotaryEmbedding and TensorScatter by operators of opset 20, and lower the opset.

    The norm's sums are float32, its result is cast back before the weight, as the standard has it. Written out,
    TensorScatter is no update in place: the cache is copied at every step, with indices as large as the cache. In the
    plugin form there is none, and no RotaryEmbedding.

    Norms are over the last axis; rotation is of whole heads, in halves, of [B, T, heads · width]; scattering is linear
    along axis -2 of [B, heads, S, width]. Afterwards every standard operator has its form in the opset that the model
    imports, 20, or 21 where weights are int4 or have a scale per block, and the IR version is at most 10.

    Raises:
        EngineError: the model has functions, or an operator has no form in those opsets or another one than these.
    """

    def requires(self, model: ir.Model) -> None:
        """There are no functions (``KeepPluginNodesPass``, or inlined)."""
        if model.functions:
            raise EngineError("the model has functions, which older parsers do not read", "remove or inline them first")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write out the newer operators of ``model``."""
        graph = model.graph
        types = value_types(graph)
        for node in list(graph):
            write = _WRITERS.get(node.op_type) if node.domain == "" else None
            if write is not None:
                nodes = Nodes()
                result = write(nodes, node, types)
                graph.insert_before(node, nodes.made)
                take_place(node.outputs[0], result)
                graph.remove(node, safe=True)
        before = graph.opset_imports.get("", 0), model.ir_version
        if before[0] > OPSET:
            graph.opset_imports[""] = model.opset_imports[""] = _lowest(graph, before[0])
        model.ir_version = min(model.ir_version, _IR_VERSION)
        return ir.passes.PassResult(model, modified=before != (graph.opset_imports.get("", 0), model.ir_version))


def _lowest(graph: ir.Graph, current: int) -> int:
    """Return the lowest opset that has every operator in its form."""
    types = value_types(graph)
    nodes = [node for node in graph if node.domain != DOMAIN]
    for version in range(OPSET, min(NEWEST_OPSET, current) + 1):
        missing = next((node for node in nodes if not fits(node, types, version)), None)
        if missing is None:
            return version
    assert missing is not None  # the last version's
    raise EngineError(
        f"{title(missing)} has no form in opset {NEWEST_OPSET}, and TensorRT before 10.15 knows none newer",
        "use a newer TensorRT, or export the bundle again",
    )


def _norm(nodes: Nodes, node: ir.Node, types: Types) -> ir.Value:
    x, weight = node.inputs[:2]
    assert x is not None
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and (x.shape is None or axis != len(x.shape) - 1):
        raise EngineError(f"{title(node)} normalises from axis {axis} on, expected the last alone", "export it again")
    dtype, wide = types[x], ir.DataType.FLOAT
    values = x if dtype == wide else nodes("Cast", x, to=wide)
    squares = nodes("ReduceMean", nodes("Mul", values, values), nodes.constant(-1), keepdims=1)
    epsilon = nodes.scalar(node.attributes.get_float("epsilon", 1e-5), np.float32)
    normed = nodes("Div", values, nodes("Sqrt", nodes("Add", squares, epsilon)))
    return nodes("Mul", normed if dtype == wide else nodes("Cast", normed, to=dtype), weight)


def written_rotation(nodes: Nodes, node: ir.Node, types: Types) -> ir.Value:
    """Return what a ``RotaryEmbedding`` of whole heads, in halves, gives, by operators of opset 20.

    Raises:
        EngineError: it rotates otherwise.
    """
    x, cos, sin, positions = (*node.inputs, None)[:4]
    heads = node.attributes.get_int("num_heads", 0)
    partial = node.attributes.get_int("rotary_embedding_dim", 0) or node.attributes.get_int("interleaved", 0)
    if cos is None or cos.shape is None or positions is None or not heads or partial:
        raise EngineError(f"{title(node)} rotates in a way that is not written out", "export the bundle again")
    half = static_size(cos, 1)  # of [P, d/2]
    cos, sin = (nodes("Unsqueeze", nodes("Gather", t, positions, axis=0), nodes.constant(2)) for t in (cos, sin))
    first = nodes("Reshape", x, nodes.constant(0, 0, heads, 2 * half))
    first = nodes("Split", first, nodes.constant(half, half), axis=-1, outputs=2)  # [B, T, heads, d/2]
    second = nodes.outputs[1]
    turned = (
        nodes("Sub", nodes("Mul", first, cos), nodes("Mul", second, sin)),
        nodes("Add", nodes("Mul", first, sin), nodes("Mul", second, cos)),
    )
    return nodes("Reshape", nodes("Concat", *turned, axis=-1), nodes.constant(0, 0, heads * 2 * half))


def _scatter(nodes: Nodes, node: ir.Node, types: Types) -> ir.Value:
    past, update, starts = (*node.inputs, None)[:3]
    along = past is not None and past.shape is not None and len(past.shape) == 4
    if not along or node.attributes.get_int("axis", -2) not in (-2, 2) or starts is None:
        raise EngineError(f"{title(node)} writes a cache in a way that is not written out", "export the bundle again")
    if node.attributes.get_string("mode", "linear") != "linear":
        raise EngineError(f"{title(node)} writes a circular cache, expected a linear one", "export the bundle again")
    zero, one = (nodes.scalar(number, np.int64) for number in (0, 1))
    capacity = nodes("Squeeze", nodes("Shape", past, start=2, end=3))
    tokens = nodes("Squeeze", nodes("Shape", update, start=2, end=3))
    rows = nodes("Range", zero, capacity, one)
    token = nodes("Sub", rows, nodes("Unsqueeze", starts, nodes.constant(1)))  # [B, S]: which token a row gets
    written = nodes("And", nodes("GreaterOrEqual", token, zero), nodes("Less", token, tokens))
    source = nodes("Min", nodes("Max", token, zero), nodes("Sub", tokens, one))
    written, source = (nodes("Unsqueeze", value, nodes.constant(1, 3)) for value in (written, source))
    source = nodes("Expand", source, nodes("Shape", past))  # [B, heads, S, width]
    return nodes("Where", written, nodes("GatherElements", update, source, axis=2), past)


_WRITERS: dict[str, Callable[[Nodes, ir.Node, Types], ir.Value]] = {
    "RMSNormalization": _norm,
    "RotaryEmbedding": written_rotation,
    "TensorScatter": _scatter,
}
