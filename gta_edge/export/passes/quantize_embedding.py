"""Store the embedding table as integers that an ordinary Gather looks up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.weights import PACKED, SCALE, TRANSPOSED
from gta_edge.graph.builder import Nodes, lazy_initializer, take_place
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import pack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["QuantizeEmbeddingPass"]


class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Look up codes and scales of the tokens' rows, and dequantise those alone.

    ``Gather(DequantizeLinear(table))`` would dequantise the whole table at every step, and TensorRT takes quantised
    constants nowhere but before a DequantizeLinear. So the codes, made unsigned by the offset 8 or 128, lie in words of
    32 bits, eight or four to a word, and arithmetic that every engine has gets them out: divisions and remainders of
    numbers that are not negative, on which all engines agree, and so the sign bit apart. (Of bytes TensorRT would make
    32-bit integers, each.)

    Args:
        table: name of the embedding table [V, H].
        quantizer: returns the table in codes, when the model is written.

    Precondition: one Gather of axis 0 reads the table (a tied head reads it as ``NAME.transposed``).
    Postcondition: ``NAME.packed``, int32 [V, H/8] (int4) or [V, H/4] (int8), takes its place. Its scales are those of
    ``NAME.transposed`` where the head is tied, and lie under the same name where it is not: float16 [H / block, V],
    or [V] per channel.
    """

    def __init__(self, table: str, quantizer: Quantizer) -> None:
        super().__init__()
        self.table = table
        self.quantizer = quantizer
        self.bits, self.block = quantizer.format_of(table)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the lookup of ``model``."""
        graph = model.graph
        table = graph.initializers[self.table]
        ((gather, _),) = table.uses()
        ids, embedded = gather.inputs[1], gather.outputs[0]
        rows = Nodes()
        assert ids is not None and table.shape is not None  # a Gather has both
        vocabulary, width = table.shape.numpy()

        for name in (self.table + TRANSPOSED, self.table + TRANSPOSED + SCALE):
            if name in graph.initializers:  # a tied head's: written next to the table, which is quantised once then
                graph.register_initializer(graph.initializers.pop(name))
        scales = self._scales(graph, vocabulary, width)
        packed = self._packed(graph, vocabulary, width)
        block = self.block
        codes = rows("Gather", packed, ids, axis=0)  # [B, T, H/8] or [B, T, H/4]
        codes = self._unpack(rows, codes, width // (block or width))  # [B, T, blocks, block]
        factor = rows("Gather", scales, ids, axis=1 if block else 0)  # [blocks, B, T] or [B, T]
        factor = rows("Cast", factor, to=ir.DataType.FLOAT)
        if block:
            factor = rows("Transpose", factor, perm=[1, 2, 0])
        factor = rows("Unsqueeze", factor, rows.constant(-1 if block else 2, *(() if block else (3,))))
        values = rows("Mul", codes, factor)
        result = rows("Reshape", values, rows.constant(0, 0, width))

        graph.insert_before(gather, rows.made)
        take_place(embedded, result)
        graph.remove(gather, safe=True)
        del graph.initializers[self.table]
        return ir.passes.PassResult(model, modified=True)

    def _unpack(self, rows: Nodes, words: ir.Value, blocks: int) -> ir.Value:
        """Return float32 codes [B, T, blocks, block]."""
        radix, count = 1 << self.bits, 32 // self.bits
        half = radix // 2  # the offset, and what the sign bit adds to the last digit

        def vector(values: list[int]) -> ir.Value:
            return rows("Constant", value=ir.tensor(np.array(values, np.int32)))

        negative = rows("Less", words, rows.scalar(0, np.int32))
        largest = rows.scalar(np.iinfo(np.int32).max, np.int32)
        rest = rows("Add", rows("Add", words, largest), rows.scalar(1, np.int32))  # without the sign bit
        last = rows.constant(-1)
        positive = rows("Unsqueeze", rows("Where", negative, rest, words), last)
        digits = rows(
            "Mod", rows("Div", positive, vector([radix**i for i in range(count)])), rows.scalar(radix, np.int32)
        )
        sign = rows("Unsqueeze", rows("Cast", negative, to=ir.DataType.INT32), last)
        offsets = rows("Sub", rows("Mul", sign, vector([0] * (count - 1) + [half])), rows.scalar(half, np.int32))
        codes = rows("Cast", rows("Add", digits, offsets), to=ir.DataType.FLOAT)  # [B, T, words, count]
        return rows("Reshape", codes, rows.constant(0, 0, blocks, -1))

    def _packed(self, graph: ir.Graph, vocabulary: int, width: int) -> ir.Value:
        bits = self.bits

        def data() -> ir.TensorProtocol:
            codes = self.quantizer(self.table).codes.view(np.uint8) + np.uint8(1 << bits - 1)  # wraps as it should
            packed = pack_nibbles(codes) if bits == 4 else codes
            return ir.tensor(packed.reshape(vocabulary, -1).view("<i4"))

        shape = [vocabulary, width * bits // 32]
        return lazy_initializer(graph, self.table + PACKED, ir.DataType.INT32, shape, data)

    def _scales(self, graph: ir.Graph, vocabulary: int, width: int) -> ir.Value:
        name = self.table + TRANSPOSED + SCALE
        if name in graph.initializers:
            return graph.initializers[name]
        block = self.block
        shape = [width // block, vocabulary] if block else [vocabulary]

        def data() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(self.quantizer(self.table).stored_scales))

        return lazy_initializer(graph, name, ir.DataType.FLOAT16, shape, data)
