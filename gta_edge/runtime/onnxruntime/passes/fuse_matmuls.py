"""Multiply by quantised weights with ONNX Runtime's own kernel, and once for all matrices that share an input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.graph.builder import lazy_initializer, take_place
from gta_edge.graph.quantized_matmul import QuantizedMatMul, find_quantized, group_by_input, joint_bias, joint_name
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import activation_block, pack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["FuseMatMulsPass"]

_DOMAIN = "com.microsoft"


class FuseMatMulsPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, DequantizeLinear(codes, Cast(scales)))`` and a bias behind it by ``MatMulNBits``.

    ONNX Runtime does the same when it loads a model, one matrix at a time, holding the old and the new form in memory.
    Done here it happens once, and the result is stored. Matmuls of one input become a single one and a Split: its
    outputs lie one after the other, so their weights do too. Weights are uint8 [out, in / block, bytes of a block], and
    unsigned: their offset, 8 or 128, is what the kernel takes for zero when it is given none.

    Args:
        accuracy_level: 4 rounds activations to int8, block by block; 1 multiplies in float32.
    """

    def __init__(self, accuracy_level: int) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the matmuls of ``model``."""
        groups = group_by_input(find_quantized(model.graph)[0])
        for matmuls in groups:
            self._fuse(model.graph, matmuls)
        if groups:
            model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(groups))

    def ensures(self, model: ir.Model) -> None:
        """No MatMul reads stored weights through a DequantizeLinear."""
        left = [matmul.name for matmul in find_quantized(model.graph)[0]]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is still dequantised")

    def _fuse(self, graph: ir.Graph, matmuls: list[QuantizedMatMul]) -> None:
        first, name = matmuls[0], joint_name(matmuls)
        outputs = [matmul.out_features for matmul in matmuls]
        inputs: list[ir.Value | None] = [first.input, *_stored(graph, name, matmuls)]
        bias = joint_bias(graph, f"{name}.bias", matmuls)
        if bias is not None:
            inputs += [None, None, bias]
        attributes = {"K": first.in_features, "N": sum(outputs), "bits": first.bits, "block_size": _block(first)}
        attributes["accuracy_level"] = self.accuracy_level
        fused = ir.node("MatMulNBits", inputs, attributes=attributes, domain=_DOMAIN)
        made = [fused]
        if len(matmuls) > 1:
            made.append(_split(graph, fused.outputs[0], name, outputs))
        graph.insert_before(first.node, made)
        for matmul, new in zip(matmuls, made[-1].outputs, strict=True):
            matmul.replace(graph, new)
        if len(matmuls) > 1:
            _undo_concat(graph, made[-1], outputs)


def _block(matmul: QuantizedMatMul) -> int:
    """Return the inputs that share a scale in the kernel."""
    return activation_block(matmul.in_features, matmul.block_size)


def _stored(graph: ir.Graph, name: str, matmuls: list[QuantizedMatMul]) -> Iterable[ir.Value]:
    """Return the weights, uint8 [N, K / block, bytes], and the scales, float32 [N, K / block], of all matmuls."""
    first, block = matmuls[0], _block(matmuls[0])
    blocks = -(-first.in_features // block)
    rows = sum(matmul.out_features for matmul in matmuls)

    def codes() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([_repacked(matmul, blocks, block) for matmul in matmuls]))

    def scales() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([_scales(matmul, blocks) for matmul in matmuls]))

    width = block * first.bits // 8
    yield lazy_initializer(graph, f"{name}.codes", ir.DataType.UINT8, (rows, blocks, width), codes)
    yield lazy_initializer(graph, f"{name}.scales", ir.DataType.FLOAT, (rows, blocks), scales)


def _repacked(matmul: QuantizedMatMul, blocks: int, block: int) -> npt.NDArray[np.uint8]:
    """Return unsigned weights [out, blocks, bytes of a block]."""
    unsigned = np.full((matmul.out_features, blocks * block), 1 << matmul.bits - 1, np.uint8)
    inside = unsigned[:, : matmul.in_features]
    np.add(matmul.quantized_weight().T, inside, out=inside, casting="unsafe")
    return (pack_nibbles(unsigned) if matmul.bits == 4 else unsigned).reshape(matmul.out_features, blocks, -1)


def _scales(matmul: QuantizedMatMul, blocks: int) -> npt.NDArray[np.float32]:
    stored = matmul.stored_scales.numpy().astype(np.float32)
    rows = stored.T if stored.ndim == 2 else np.repeat(stored[:, None], blocks, axis=1)
    return np.ascontiguousarray(rows)


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
        parts = [*split.outputs[:first], concat.outputs[0], *split.outputs[last:]]
        graph.insert_before(split, new)
        for old, value in zip(parts, new.outputs, strict=True):
            take_place(old, value)
        graph.remove([concat, split], safe=True)
        return


def _split(graph: ir.Graph, value: ir.Value | None, name: str, sizes: list[int]) -> ir.Node:
    lengths = lazy_initializer(
        graph, f"{name}.sizes", ir.DataType.INT64, (len(sizes),), lambda: ir.tensor(np.array(sizes, np.int64))
    )
    return ir.node("Split", [value, lengths], attributes={"axis": -1}, num_outputs=len(sizes))
