"""Leave matmuls with quantised matrices to our own plugin, one call for all matrices that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.graph.builder import lazy_initializer, take_place
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import unpack_nibbles
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.matmul import definition as op
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, OUTPUTS_MULTIPLE, pack, packed_shapes

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["PackMatMulsPass"]

_INPUTS_MULTIPLE = 8
"""The kernels read a row of inputs 16 bytes at a time."""


class PackMatMulsPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, DequantizeLinear(codes, scales))`` and a bias behind it by ``BlockwiseInt{4,8}MatMul``.

    Matmuls of one input, bits and block size become one call with several outputs, ``op.MAX_OUTPUTS`` at most; the
    width of every output but the last is a multiple of 16, so that each begins with a tile of its own. A bias is added
    in the call; zeros stand for that of a matmul which has none.

    Codes and scales are packed when the model is written, one matrix at a time.

    What cannot be packed stays as it is, and ``left`` says why: blocks of other sizes than the kernels have (16, or a
    channel in int4), inputs that are no multiple of 8, zero points, scales that are no float16, an input of one axis.

    Precondition: codes are int4 or int8 [in, out], symmetric, scales [in / block, out] along axis 0 or [out] along
    axis 1, float16, a Cast behind them or not. The graph is a bundle's own, in float32 (``ConvertPrecisionPass`` comes
    after this one and keeps the scales' type), or one in float16.
    Postcondition: every MatMul behind a DequantizeLinear is named in ``left``. Nodes of the op have the attributes by
    which any of TensorRT's parsers finds the plugin, and no function. A graph without such matmuls is not modified.

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
        self.left = {}
        groups: dict[tuple[ir.Value, int, int], list[_MatMul]] = {}
        for place, node in enumerate(graph):
            if not _is_matmul(node):
                continue
            found = _matmul(node, place)
            if isinstance(found, str):
                self.left[_matrix_name(node)] = found
            else:
                groups.setdefault((found.input, found.bits, found.block), []).append(found)
        calls = [call for matmuls in groups.values() for call in _split(matmuls)]
        packed: dict[tuple[str, ...], tuple[ir.Value, ir.Value]] = {}
        for matmuls in calls:
            names = tuple(matmul.name for matmul in matmuls)
            if names not in packed:  # matrices may be used again, with another input
                packed[names] = _Stored(matmuls).initializers(graph)
            _replace(graph, matmuls, *packed[names])
        for matmul in (matmul for matmuls in calls for matmul in matmuls):
            _remove_unused(graph, matmul)
        self.calls, self.matmuls = len(calls), sum(map(len, calls))
        if calls:
            graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=bool(calls))


@dataclass(frozen=True, eq=False)
class _MatMul:
    """A matmul that can be packed: ``last`` is the node whose output it is, the bias's Add or the MatMul."""

    node: ir.Node
    place: int
    last: ir.Node
    dequantize: ir.Node
    input: ir.Value
    weight: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    bits: int
    block: int
    # What is stored now: until it is read, another pass may have given these values another type.
    codes_stored: ir.TensorProtocol
    scales_stored: ir.TensorProtocol
    bias_stored: ir.TensorProtocol | None

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def sizes(self) -> tuple[int, int]:
        """K and N."""
        assert self.weight.shape is not None  # it is an initializer
        inputs, outputs = self.weight.shape.numpy()
        return int(inputs), int(outputs)

    def codes(self) -> npt.NDArray[np.int8]:
        """Return int8 [K, N]."""
        if self.bits == 8:
            return _array(self.codes_stored).astype(np.int8)
        codes = unpack_nibbles(np.frombuffer(self.codes_stored.tobytes(), np.uint8), self.sizes)
        _release(self.codes_stored)
        return codes


# --- what there is ---------------------------------------------------------------------------------------------------


def _is_matmul(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return False
    dequantize = node.inputs[1].producer()
    return dequantize is not None and (dequantize.domain, dequantize.op_type) == ("", "DequantizeLinear")


def _matmul(node: ir.Node, place: int) -> _MatMul | str:
    """Return what can be packed, or why it cannot."""
    x, matrix = node.inputs
    assert x is not None and matrix is not None  # it is a MatMul
    dequantize = matrix.producer()
    assert dequantize is not None  # _is_matmul
    weight, scales, *zero_points = dequantize.inputs
    cast = scales.producer() if scales is not None else None
    scales = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else scales
    if weight is None or scales is None or not (weight.is_initializer() and scales.is_initializer()):
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
    if block not in BLOCK_SIZES[bits]:
        found = f"blocks of {block}" if block else "one scale per output channel"
        return f"int{bits} with {found}, expected one of {', '.join(map(str, BLOCK_SIZES[bits]))}"
    if block and inputs % block:
        return f"it has {inputs} inputs, expected a multiple of the block size {block}"
    if scales.dtype != ir.DataType.FLOAT16:
        return f"its scales are {scales.dtype}, expected float16: pack before the graph is retyped"
    if inputs % _INPUTS_MULTIPLE:
        return f"it has {inputs} inputs, expected a multiple of {_INPUTS_MULTIPLE}"
    if x.shape is not None and len(x.shape) < 2:
        return f"it is multiplied by a tensor of {len(x.shape)} axes, expected at least two"
    last, bias = _bias(node, outputs)
    stored = _tensor(weight), _tensor(scales), None if bias is None else _tensor(bias)
    return _MatMul(node, place, last, dequantize, x, weight, scales, bias, bits, block, *stored)


def _bias(node: ir.Node, outputs: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the node that adds a bias, if it is all that the matmul is for, and the bias."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and not node.outputs[0].is_graph_output():
        user, index = uses[0]
        other = user.inputs[1 - index] if (user.domain, user.op_type) == ("", "Add") else None
        if other is not None and other.is_initializer() and tuple(other.shape or ()) == (outputs,):
            return user, other
    return node, None


def _matrix_name(node: ir.Node) -> str:
    """Return the name of the matrix that a MatMul multiplies by."""
    matrix = node.inputs[1]
    producer = matrix.producer() if matrix is not None else None
    weight = producer.inputs[0] if producer is not None else None
    return str(weight.name if weight is not None else node.name)


# --- calls -----------------------------------------------------------------------------------------------------------


def _split(matmuls: Sequence[_MatMul]) -> list[list[_MatMul]]:
    """Distribute matmuls over calls; one of another width than a multiple of 16 can only be the last of its call."""
    whole = [each for each in matmuls if each.sizes[1] % OUTPUTS_MULTIPLE == 0]
    ragged = [each for each in matmuls if each.sizes[1] % OUTPUTS_MULTIPLE]
    calls = [whole[i : i + op.MAX_OUTPUTS] for i in range(0, len(whole), op.MAX_OUTPUTS)]
    room = [call for call in calls if len(call) < op.MAX_OUTPUTS]
    for each in ragged:
        if room:
            room.pop().append(each)
        else:
            calls.append([each])
    return calls


def _replace(graph: ir.Graph, matmuls: Sequence[_MatMul], weight: ir.Value, scale: ir.Value) -> None:
    """Let one call stand for matmuls."""
    first = matmuls[0]
    inputs = [first.input, weight, scale]
    if any(matmul.bias is not None for matmul in matmuls):
        inputs.append(_biases(graph, matmuls))
    sizes = [matmul.sizes[1] for matmul in matmuls]
    call = ir.node(
        op.OPS[first.bits],
        inputs,
        attributes=op.attributes(first.block, sizes),
        domain=DOMAIN,
        num_outputs=len(matmuls),
    )
    graph.insert_before(min(matmuls, key=lambda matmul: matmul.place).node, call)
    for matmul, new in zip(matmuls, call.outputs, strict=True):
        take_place(matmul.last.outputs[0], new)
        graph.remove([matmul.last] if matmul.last is matmul.node else [matmul.last, matmul.node], safe=True)


def _remove_unused(graph: ir.Graph, matmul: _MatMul) -> None:
    """Remove what stored and dequantised a matrix, where nothing else uses it."""
    values = [matmul.weight, matmul.scales, *([matmul.bias] if matmul.bias is not None else [])]
    node: ir.Node | None = matmul.dequantize
    while node is not None and node.graph is graph and not node.outputs[0].uses():
        before = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        graph.remove(node, safe=True)  # the DequantizeLinear, then the Cast of its scales
        node = before
    for value in values:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)


# --- data ------------------------------------------------------------------------------------------------------------


class _Stored:
    """The packed matrices of one call, made when they are written; codes are packed once for codes and scales."""

    def __init__(self, matmuls: Sequence[_MatMul]) -> None:
        self.matmuls = matmuls
        self._scale: npt.NDArray[np.float16] | None = None

    def initializers(self, graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
        """Return the weight, int32, and the scale, float16, added to a graph."""
        first, name = self.matmuls[0], "+".join(matmul.name for matmul in self.matmuls)
        outputs = sum(matmul.sizes[1] for matmul in self.matmuls)
        weight, scale = packed_shapes(first.sizes[0], outputs, first.bits, first.block)
        return (
            lazy_initializer(graph, f"{name}.packed", ir.DataType.INT32, weight, self._weight_tensor),
            lazy_initializer(graph, f"{name}.packed.scale", ir.DataType.FLOAT16, scale, self._scale_tensor),
        )

    def _weight_tensor(self) -> ir.TensorProtocol:
        weights, scales = [], []
        for matmul in self.matmuls:
            packed = pack(matmul.codes(), _array(matmul.scales_stored), matmul.bits, matmul.block)
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


def _biases(graph: ir.Graph, matmuls: Sequence[_MatMul]) -> ir.Value:
    """Return the biases one after the other, zeros where a matmul has none; they have the type of the input."""
    biases = [matmul.bias for matmul in matmuls if matmul.bias is not None]
    dtype = biases[0].dtype
    assert dtype is not None  # an initializer's
    if len(matmuls) == 1:
        return biases[0]

    def data() -> ir.TensorProtocol:
        arrays = [
            np.zeros(matmul.sizes[1], dtype.numpy()) if matmul.bias_stored is None else _array(matmul.bias_stored)
            for matmul in matmuls
        ]
        return ir.tensor(np.concatenate(arrays), dtype=dtype)

    name = "+".join(str(bias.name) for bias in biases)
    return lazy_initializer(graph, f"{name}.packed", dtype, (sum(matmul.sizes[1] for matmul in matmuls),), data)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None  # an initializer
    return value.const_value


def _array(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """Return a copy of what is stored."""
    array = np.array(tensor.numpy())
    _release(tensor)
    return array


def _release(tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # mapped pages count as memory in use
