"""Leave matmuls with quantised weights to our own plugin, one call for all matrices that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.graph.builder import lazy_initializer
from gta_edge.graph.quantized_matmul import QuantizedMatMul, find_quantized, group_by_input, joint_bias, joint_name
from gta_edge.libraries.optional import optional
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.matmul import definition as op
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, OUTPUTS_MULTIPLE, pack, packed_shapes

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["PackMatMulsPass", "plan_calls"]

_INPUTS_MULTIPLE = 8
"""The kernels read a row of inputs 16 bytes at a time."""


class PackMatMulsPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, DequantizeLinear(codes, scales))`` and a bias behind it by ``BlockwiseInt{4,8}MatMul``.

    Matmuls of one input, bits and block size become one call with several outputs, ``op.MAX_OUTPUTS`` at most; the
    width of every output but the last is a multiple of 16, so that each begins with a tile of its own. A bias is added
    in the call; zeros stand for that of a matmul which has none. Nodes of the op have the attributes by which any of
    TensorRT's parsers finds the plugin, and no function.

    Codes and scales are packed when the model is written, one matrix at a time. The graph is a bundle's own, in float32
    (``ConvertPrecisionPass`` comes after this one and keeps the scales' type), or one in float16.

    What cannot be packed stays as it is, and ``left`` says why: blocks of other sizes than the kernels have (16, or a
    channel in int4), inputs that are no multiple of 8, zero points, scales that are no float16, an input of one axis.

    Attributes:
        calls: nodes that the last run made.
        matmuls: that they took the place of.
        left: for each matrix that is still multiplied by natively, the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.matmuls = 0, 0
        self.left: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack the matmuls of ``model``."""
        graph = model.graph
        calls, self.left = plan_calls(graph)
        packed: dict[str, tuple[ir.Value, ir.Value]] = {}
        for matmuls in calls:
            name = joint_name(matmuls)
            if name not in packed:  # matrices may be used again, with another input
                packed[name] = _Packed(matmuls).initializers(graph, name)
            _replace(graph, matmuls, *packed[name])
        self.calls, self.matmuls = len(calls), sum(map(len, calls))
        if calls:
            graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=bool(calls))

    def ensures(self, model: ir.Model) -> None:
        """Every MatMul behind a DequantizeLinear is named in ``left``."""
        calls, left = plan_calls(model.graph)
        if calls or not left.keys() <= self.left.keys():
            raise ir.passes.PostconditionError("a matmul with quantised weights is neither packed nor named")


def plan_calls(graph: ir.Graph) -> tuple[list[list[QuantizedMatMul]], dict[str, str]]:
    """Return the matmuls that the plugin can take, each list one call, and for every other matrix the reason."""
    found, left = find_quantized(graph)
    reasons = [_reason(matmul) for matmul in found]
    left |= {matmul.name: reason for matmul, reason in zip(found, reasons, strict=True) if reason is not None}
    groups = group_by_input(matmul for matmul, reason in zip(found, reasons, strict=True) if reason is None)
    return [call for matmuls in groups for call in _split(matmuls)], left


def _reason(matmul: QuantizedMatMul) -> str | None:
    """Return why the plugin cannot take a matmul, None where it can."""
    bits, block, inputs, x = matmul.bits, matmul.block_size, matmul.in_features, matmul.input
    if block not in BLOCK_SIZES[bits]:
        found = f"blocks of {block}" if block else "one scale per output channel"
        return f"int{bits} with {found}, expected one of {', '.join(map(str, BLOCK_SIZES[bits]))}"
    if block and inputs % block:
        return f"it has {inputs} inputs, expected a multiple of the block size {block}"
    if matmul.scales.dtype != ir.DataType.FLOAT16:
        return f"its scales are {matmul.scales.dtype}, expected float16: pack before the graph is retyped"
    if inputs % _INPUTS_MULTIPLE:
        return f"it has {inputs} inputs, expected a multiple of {_INPUTS_MULTIPLE}"
    if x.shape is not None and len(x.shape) < 2:
        return f"it is multiplied by a tensor of {len(x.shape)} axes, expected at least two"
    return None


def _split(matmuls: Sequence[QuantizedMatMul]) -> list[list[QuantizedMatMul]]:
    """Distribute matmuls over calls; one of another width than a multiple of 16 can only be the last of its call."""
    whole = [each for each in matmuls if each.out_features % OUTPUTS_MULTIPLE == 0]
    ragged = [each for each in matmuls if each.out_features % OUTPUTS_MULTIPLE]
    calls = [whole[i : i + op.MAX_OUTPUTS] for i in range(0, len(whole), op.MAX_OUTPUTS)]
    room = [call for call in calls if len(call) < op.MAX_OUTPUTS]
    for each in ragged:
        if room:
            room.pop().append(each)
        else:
            calls.append([each])
    return calls


def _replace(graph: ir.Graph, matmuls: Sequence[QuantizedMatMul], weight: ir.Value, scale: ir.Value) -> None:
    """Let one call stand for matmuls."""
    first = matmuls[0]
    biases = [matmul.bias for matmul in matmuls if matmul.bias is not None]
    name = "+".join(str(bias.name) for bias in biases)
    bias = joint_bias(graph, f"{name}.packed", matmuls) if len(matmuls) > 1 else first.bias
    call = ir.node(
        op.OPS[first.bits],
        [first.input, weight, scale] if bias is None else [first.input, weight, scale, bias],
        attributes=op.attributes(first.block_size, [matmul.out_features for matmul in matmuls]),
        domain=DOMAIN,
        num_outputs=len(matmuls),
    )
    graph.insert_before(min(matmuls, key=lambda matmul: matmul.place).node, call)
    for matmul, new in zip(matmuls, call.outputs, strict=True):
        matmul.replace(graph, new)


class _Packed:
    """The packed matrices of one call, made when they are written; codes are packed once for codes and scales."""

    def __init__(self, matmuls: Sequence[QuantizedMatMul]) -> None:
        self.matmuls = matmuls
        self._scale: npt.NDArray[np.float16] | None = None

    def initializers(self, graph: ir.Graph, name: str) -> tuple[ir.Value, ir.Value]:
        """Return the weight, int32, and the scale, float16, added to a graph."""
        first = self.matmuls[0]
        outputs = sum(matmul.out_features for matmul in self.matmuls)
        weight, scale = packed_shapes(first.in_features, outputs, first.bits, first.block_size)
        return (
            lazy_initializer(graph, f"{name}.packed", ir.DataType.INT32, weight, self._weight_tensor),
            lazy_initializer(graph, f"{name}.packed.scale", ir.DataType.FLOAT16, scale, self._scale_tensor),
        )

    def _weight_tensor(self) -> ir.TensorProtocol:
        weights, scales = [], []
        for matmul in self.matmuls:
            stored = matmul.quantized_weight(), matmul.stored_scales.numpy()
            packed = pack(*stored, matmul.bits, matmul.block_size)
            weights.append(packed.weight)
            scales.append(packed.scale)
        self._scale = np.concatenate(scales)
        return ir.tensor(np.concatenate(weights))

    def _scale_tensor(self) -> ir.TensorProtocol:
        if self._scale is None:  # written first, or twice
            self._weight_tensor()
        assert self._scale is not None
        scale, self._scale = self._scale, None
        return ir.tensor(scale)
