"""Store the embedding table as integers that an ordinary Gather looks up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.export.quantizer import Quantizer
from gta_edge.nodes import Nodes, lazy_initializer, take_place
from gta_edge.optional import optional
from gta_edge.quantization import pack_nibbles
from gta_edge.weights import PACKED, SCALE, TRANSPOSED

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["QuantizeEmbeddingPass"]


class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Look up codes and scales of the tokens' rows, and dequantise those alone.

    ``Gather(DequantizeLinear(table))`` would dequantise the whole table at every step, and TensorRT takes quantised
    constants nowhere but before a DequantizeLinear. So the codes lie in bytes, as plain unsigned numbers, and
    arithmetic that every engine has gets them out: ``low = byte mod 16``, ``high = byte div 16``, minus the offset 8.
    An int8 code is its byte minus 128.

    Args:
        table: name of the embedding table [V, H].
        quantizer: returns the table in codes, when the model is written.

    Precondition: one Gather of axis 0 reads the table (a tied head reads it as ``NAME.transposed``).
    Postcondition: ``NAME.packed``, uint8 [V, H/2] (int4) or [V, H] (int8), takes its place. Its scales are those of
    ``NAME.transposed`` where the head is tied, and lie under the same name where it is not: float16 [H / block, V],
    or [V] per channel.
    """

    def __init__(self, table: str, quantizer: Quantizer) -> None:
        super().__init__()
        self.table = table
        self.quantizer = quantizer

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
        block = self.quantizer.block_size
        codes = rows("Gather", packed, ids, axis=0)  # [B, T, H] or [B, T, H/2]
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

    def _unpack(self, rows: Nodes, codes: ir.Value, blocks: int) -> ir.Value:
        """Return float32 codes [B, T, blocks, block]."""
        # integers of 32 bits: TensorRT has no arithmetic on bytes
        codes = rows("Cast", codes, to=ir.DataType.INT32)
        if self.quantizer.bits == 4:
            sixteen, last = rows.scalar(16, np.int32), rows.constant(-1)
            halves = [rows("Unsqueeze", rows(op, codes, sixteen), last) for op in ("Mod", "Div")]
            codes = rows("Concat", *halves, axis=-1)  # [B, T, H/2, 2]
        codes = rows("Sub", codes, rows.scalar(_OFFSET[self.quantizer.bits], np.int32))
        codes = rows("Cast", codes, to=ir.DataType.FLOAT)
        return rows("Reshape", codes, rows.constant(0, 0, blocks, -1))

    def _packed(self, graph: ir.Graph, vocabulary: int, width: int) -> ir.Value:
        offset = _OFFSET[self.quantizer.bits]

        def data() -> ir.TensorProtocol:
            codes = self.quantizer(self.table).codes.view(np.uint8) + np.uint8(offset)  # wraps as it should
            return ir.tensor(pack_nibbles(codes).reshape(vocabulary, -1) if self.quantizer.bits == 4 else codes)

        columns = width // 2 if self.quantizer.bits == 4 else width
        return lazy_initializer(graph, self.table + PACKED, ir.DataType.UINT8, [vocabulary, columns], data)

    def _scales(self, graph: ir.Graph, vocabulary: int, width: int) -> ir.Value:
        name = self.table + TRANSPOSED + SCALE
        if name in graph.initializers:
            return graph.initializers[name]
        block = self.quantizer.block_size
        shape = [width // block, vocabulary] if block else [vocabulary]

        def data() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(self.quantizer(self.table).scales.T.reshape(shape)))

        return lazy_initializer(graph, name, ir.DataType.FLOAT16, shape, data)


_OFFSET = {4: 8, 8: 128}
