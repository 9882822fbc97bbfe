"""Multiply by integers with ONNX Runtime's own kernel, and once for all matrices that share an input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.graph.builder import lazy_initializer, take_place
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["FuseMatMulsPass"]

_DOMAIN = "com.microsoft"
_CHANNEL_BLOCKS = (256, 128, 64, 32, 16)  # int8 has a scale per channel, the kernel one per block: the longer the fewer


class FuseMatMulsPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, DequantizeLinear(codes, Cast(scales)))`` and a bias behind it by ``MatMulNBits``.

    ONNX Runtime does the same when it loads a model, one matrix at a time, holding the old and the new form in memory.
    Done here it happens once, and the result is stored. Matmuls of one input become a single one and a Split: its
    outputs lie one after the other, so their codes do too.

    Args:
        accuracy_level: 4 rounds activations to int8, block by block; 1 multiplies in float32.

    Precondition: codes are [in, out], int4 or int8, symmetric, with float16 scales [in / block, out] or [out].
    Postcondition: no DequantizeLinear feeds a MatMul. Codes lie as uint8 [out, in / block, bytes of a block], and
    unsigned: their offset, 8 or 128, is what the kernel takes for zero when it is given none.
    """

    def __init__(self, accuracy_level: int) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the matmuls of ``model``."""
        graph = model.graph
        groups: dict[tuple[ir.Value, ir.DataType, int], list[_MatMul]] = {}
        for node in graph:
            matmul = _matmul(node)
            if matmul is not None:
                groups.setdefault((matmul.input, matmul.dtype, matmul.block), []).append(matmul)
        for matmuls in groups.values():
            self._fuse(graph, matmuls)
        if groups:
            model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(groups))

    def _fuse(self, graph: ir.Graph, matmuls: list[_MatMul]) -> None:
        first = matmuls[0]
        name = "+".join(matmul.name for matmul in matmuls)
        outputs = [matmul.outputs for matmul in matmuls]
        biases = any(matmul.bias is not None for matmul in matmuls)
        inputs = [first.input, *_stored(graph, name, matmuls), None, None]
        inputs += [_bias(graph, name, matmuls)] if biases else []
        attributes = {"K": first.inputs, "N": sum(outputs), "bits": first.bits, "block_size": first.block}
        attributes["accuracy_level"] = self.accuracy_level
        fused = ir.node("MatMulNBits", inputs if biases else inputs[:3], attributes=attributes, domain=_DOMAIN)
        made = [fused]
        if len(matmuls) > 1:
            made.append(_split(graph, fused.outputs[0], name, outputs))
        graph.insert_before(first.node, made)
        for matmul, new in zip(matmuls, made[-1].outputs, strict=True):
            matmul.replace(graph, new)
        if len(matmuls) > 1:
            _undo_concat(graph, made[-1], outputs)


class _MatMul:
    """A matmul with a quantised matrix: ``last`` is the node whose output it is, the bias's Add or the MatMul."""

    def __init__(self, node: ir.Node, dequantize: ir.Node, weight: ir.Value, scales: ir.Value) -> None:
        assert node.inputs[0] is not None and weight.shape is not None and weight.dtype is not None
        self.node, self.input, self.weight, self.scales = node, node.inputs[0], weight, scales
        self.name, self.dtype = str(weight.name), weight.dtype
        self.inputs, self.outputs = weight.shape.numpy()
        self.bits = 4 if weight.dtype == ir.DataType.INT4 else 8
        per_channel = next((size for size in _CHANNEL_BLOCKS if size < 2 * self.inputs), _CHANNEL_BLOCKS[-1])
        self.block = dequantize.attributes.get_int("block_size", 0) or per_channel
        self.last, self.bias = node, None
        for user, index in node.outputs[0].uses():
            other = user.inputs[1 - index] if user.op_type == "Add" else None
            if other is not None and other.is_initializer() and tuple(other.shape or ()) == (self.outputs,):
                self.last, self.bias = user, other

    def replace(self, graph: ir.Graph, new: ir.Value) -> None:
        """Let ``new`` stand for the result."""
        take_place(self.last.outputs[0], new)
        graph.remove([self.last] if self.last is self.node else [self.last, self.node], safe=True)


def _matmul(node: ir.Node) -> _MatMul | None:
    dequantize = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    weight, scales = dequantize.inputs[:2]
    cast = scales.producer() if scales is not None else None
    scales = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else scales
    if weight is None or scales is None or not (weight.is_initializer() and scales.is_initializer()):
        return None
    return _MatMul(node, dequantize, weight, scales)


def _stored(graph: ir.Graph, name: str, matmuls: list[_MatMul]) -> Iterable[ir.Value]:
    """Return the codes, uint8 [N, K / block, bytes], and the scales, float32 [N, K / block], of all matmuls."""
    first = matmuls[0]
    blocks = -(-first.inputs // first.block)
    rows = sum(matmul.outputs for matmul in matmuls)

    def codes() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([_codes(matmul, blocks) for matmul in matmuls]))

    def scales() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([_scales(matmul, blocks) for matmul in matmuls]))

    width = first.block * first.bits // 8
    yield lazy_initializer(graph, f"{name}.codes", ir.DataType.UINT8, (rows, blocks, width), codes)
    yield lazy_initializer(graph, f"{name}.scales", ir.DataType.FLOAT, (rows, blocks), scales)


def _codes(matmul: _MatMul, blocks: int) -> npt.NDArray[np.uint8]:
    """Return unsigned codes [out, blocks, bytes of a block]."""
    shape = matmul.inputs, matmul.outputs
    data = np.frombuffer(_tensor(matmul.weight).tobytes(), np.uint8)
    codes = unpack_nibbles(data, shape) if matmul.bits == 4 else data.view(np.int8).reshape(shape)
    _release(matmul.weight)
    unsigned = np.full((matmul.outputs, blocks * matmul.block), 1 << matmul.bits - 1, np.uint8)
    np.add(codes.T, unsigned[:, : matmul.inputs], out=unsigned[:, : matmul.inputs], casting="unsafe")
    return (pack_nibbles(unsigned) if matmul.bits == 4 else unsigned).reshape(matmul.outputs, blocks, -1)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None  # the precondition
    return value.const_value


def _release(value: ir.Value) -> None:
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()  # mapped pages count as memory in use


def _scales(matmul: _MatMul, blocks: int) -> npt.NDArray[np.float32]:
    stored = _tensor(matmul.scales).numpy().astype(np.float32)
    rows = stored.T if stored.ndim == 2 else np.repeat(stored[:, None], blocks, axis=1)
    return np.ascontiguousarray(rows)


def _bias(graph: ir.Graph, name: str, matmuls: list[_MatMul]) -> ir.Value:
    """Return the biases one after the other, zeros where a matmul has none."""
    parts = [matmul.bias for matmul in matmuls]
    sizes = [matmul.outputs for matmul in matmuls]

    def data() -> ir.TensorProtocol:
        return ir.tensor(
            np.concatenate(
                [
                    np.zeros(n, np.float32) if bias is None else _tensor(bias).numpy()
                    for bias, n in zip(parts, sizes, strict=True)
                ]
            )
        )

    return lazy_initializer(graph, f"{name}.bias", ir.DataType.FLOAT, (sum(sizes),), data)


def _undo_concat(graph: ir.Graph, split: ir.Node, sizes: list[int]) -> None:
    """Leave together what is put together again, one after the other, right behind ``split``."""
    for concat in {user for value in split.outputs for user, _ in value.uses() if user.op_type == "Concat"}:
        indices = [list(split.outputs).index(v) for v in concat.inputs if v is not None and v.producer() is split]
        first, last = indices[0], indices[-1] + 1
        own = all(len(split.outputs[i].uses()) == 1 for i in indices)
        if not own or len(indices) != len(concat.inputs) or indices != list(range(first, last)):
            continue
        merged = [*sizes[:first], sum(sizes[first:last]), *sizes[last:]]
        new = _split(graph, split.inputs[0], f"{split.outputs[first].name}+", merged)
        kept = [*split.outputs[:first], concat.outputs[0], *split.outputs[last:]]
        graph.insert_before(split, new)
        for old, value in zip(kept, new.outputs, strict=True):
            take_place(old, value)
        graph.remove([concat, split], safe=True)
        return


def _split(graph: ir.Graph, value: ir.Value | None, name: str, sizes: list[int]) -> ir.Node:
    lengths = lazy_initializer(
        graph, f"{name}.sizes", ir.DataType.INT64, (len(sizes),), lambda: ir.tensor(np.array(sizes, np.int64))
    )
    return ir.node("Split", [value, lengths], attributes={"axis": -1}, num_outputs=len(sizes))
