"""Matmuls with quantised weights in a bundle's graph: found, grouped by input, and replaced by a backend's own op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.graph.builder import lazy_initializer, take_place
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import unpack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["QuantizedMatMul", "find_quantized", "group_by_input", "joint_bias", "joint_name"]


@dataclass(frozen=True, eq=False)
class QuantizedMatMul:
    """``MatMul(x, DequantizeLinear(weight, scales))``, and the Add of a bias if that is all that it is for.

    Attributes:
        node: the MatMul.
        place: of it among the graph's nodes.
        last: the node whose output is the result: the bias's Add, or the MatMul.
        dequantize: the DequantizeLinear.
        input: x [..., K].
        weight: int4 or int8 [K, N], symmetric.
        scales: [K / block_size, N], or [N]; as they are stored, before any Cast.
        bias: [N].
        bits: of a quantised weight.
        block_size: inputs that share a scale; 0 is one scale per output channel.
        stored_weight: data of the weight now: until it is read, another pass may have given the value another type.
        stored_scales: likewise.
        stored_bias: likewise.
    """

    node: ir.Node
    place: int
    last: ir.Node
    dequantize: ir.Node
    input: ir.Value
    weight: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    bits: int
    block_size: int
    stored_weight: ir.TensorProtocol
    stored_scales: ir.TensorProtocol
    stored_bias: ir.TensorProtocol | None

    @property
    def name(self) -> str:
        """The weight's."""
        return str(self.weight.name)

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.stored_weight.shape.numpy()[0])

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.stored_weight.shape.numpy()[1])

    def quantized_weight(self) -> npt.NDArray[np.int8]:
        """Return int8 [K, N], read from where it is stored."""
        shape = self.in_features, self.out_features
        if self.bits == 8:
            return self.stored_weight.numpy().reshape(shape)
        return unpack_nibbles(np.frombuffer(self.stored_weight.tobytes(), np.uint8), shape)

    def replace(self, graph: ir.Graph, new: ir.Value) -> None:
        """Let ``new`` stand for the result, and remove what nothing uses any more, initializers included."""
        take_place(self.last.outputs[0], new)
        graph.remove([self.last] if self.last is self.node else [self.last, self.node], safe=True)
        node: ir.Node | None = self.dequantize
        while node is not None and node.graph is graph and not node.outputs[0].uses():
            before = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
            graph.remove(node, safe=True)  # the DequantizeLinear, then the Cast of its scales
            node = before
        for value in (self.weight, self.scales, self.bias):
            if value is not None and not value.uses() and not value.is_graph_output():
                graph.initializers.pop(str(value.name), None)


def find_quantized(graph: ir.Graph) -> tuple[list[QuantizedMatMul], dict[str, str]]:
    """Return the matmuls with quantised weights in the graph's order, and why others are not of the form, by weight."""
    found: list[QuantizedMatMul] = []
    others: dict[str, str] = {}
    for place, node in enumerate(graph):
        matrix = node.inputs[1] if (node.domain, node.op_type) == ("", "MatMul") else None
        dequantize = None if matrix is None else matrix.producer()
        if dequantize is None or (dequantize.domain, dequantize.op_type) != ("", "DequantizeLinear"):
            continue
        matmul = _quantized(node, place, dequantize)
        if isinstance(matmul, str):
            weight = dequantize.inputs[0]
            others[str(weight.name if weight is not None else node.name)] = matmul
        else:
            found.append(matmul)
    return found, others


def group_by_input(matmuls: Iterable[QuantizedMatMul]) -> list[list[QuantizedMatMul]]:
    """Return those together that have one input, and weights of the same bits and block size."""
    groups: dict[tuple[ir.Value, int, int], list[QuantizedMatMul]] = {}
    for matmul in matmuls:
        groups.setdefault((matmul.input, matmul.bits, matmul.block_size), []).append(matmul)
    return list(groups.values())


def joint_name(matmuls: Sequence[QuantizedMatMul]) -> str:
    """Return what the weights of several matmuls are called where they are one."""
    return "+".join(matmul.name for matmul in matmuls)


def joint_bias(graph: ir.Graph, name: str, matmuls: Sequence[QuantizedMatMul]) -> ir.Value | None:
    """Add the biases, one after the other, and zeros where a matmul has none; None where none has one.

    They have the type of the input, and are read when the model is written.
    """
    dtype = next((matmul.stored_bias.dtype for matmul in matmuls if matmul.stored_bias is not None), None)
    if dtype is None:
        return None

    def data() -> ir.TensorProtocol:
        zeros = (np.zeros(matmul.out_features, dtype.numpy()) for matmul in matmuls)
        parts = [
            nothing if matmul.stored_bias is None else matmul.stored_bias.numpy()
            for matmul, nothing in zip(matmuls, zeros, strict=True)
        ]
        return ir.tensor(np.concatenate(parts), dtype=dtype)

    return lazy_initializer(graph, name, dtype, (sum(matmul.out_features for matmul in matmuls),), data)


def _quantized(node: ir.Node, place: int, dequantize: ir.Node) -> QuantizedMatMul | str:
    """Return the matmul, or why it is none of the form that export writes."""
    x = node.inputs[0]
    assert x is not None  # a MatMul has one
    weight, scales, *zero_points = dequantize.inputs
    cast = scales.producer() if scales is not None else None
    scales = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else scales
    stored_weight, stored_scales = _stored(weight), _stored(scales)
    if weight is None or scales is None or stored_weight is None or stored_scales is None:
        return "it is computed, expected codes and scales that are stored"
    bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}.get(weight.dtype or ir.DataType.UNDEFINED)
    if bits is None or weight.shape is None or len(weight.shape) != 2:
        return f"it is {weight.dtype} {weight.shape}, expected int4 or int8 of two axes"
    if any(value is not None for value in zero_points):
        return "it has zero points, expected symmetric codes"
    block, axis = dequantize.attributes.get_int("block_size", 0), dequantize.attributes.get_int("axis", 1)
    inputs, outputs = (int(size) for size in weight.shape.numpy())
    shape = (-(-inputs // block), outputs) if block else (outputs,)
    if axis not in ((0, -2) if block else (1, -1)) or scales.shape is None or tuple(scales.shape) != shape:
        return f"its scales are {scales.shape} along axis {axis}, expected {list(shape)}"
    last, bias = _bias(node, outputs)
    stored = stored_weight, stored_scales, _stored(bias)
    return QuantizedMatMul(node, place, last, dequantize, x, weight, scales, bias, bits, block, *stored)


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return an initializer's data."""
    return value.const_value if value is not None and value.is_initializer() else None


def _bias(node: ir.Node, outputs: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the node that adds a bias, if it is all that the matmul is for, and the bias."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and not node.outputs[0].is_graph_output():
        user, index = uses[0]
        other = user.inputs[1 - index] if (user.domain, user.op_type) == ("", "Add") else None
        if other is not None and _stored(other) is not None and tuple(other.shape or ()) == (outputs,):
            return user, other
    return node, None
