"""Store the embedding table as integers that an ordinary Gather looks up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.weights import PACKED, SCALE, TRANSPOSED
from gta_edge.graph.builder import Nodes, lazy_initializer, take_place
from gta_edge.graph.pack_embedding import packed_words, unpacked
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["QuantizeEmbeddingPass"]


class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Look up codes and scales of the tokens' rows, and dequantise those alone.

    ``Gather(DequantizeLinear(table))`` would dequantise the whole table at every step. A tied table in int8 lies once,
    as the head's matrix, and a token's row is a column of it. ONNX has no Gather of int4 that engines know, and an
    untied table is no matrix, so those lie in words of 32 bits, eight or four codes to a word (``unpacked``).

    Args:
        table: name of the embedding table [V, H].
        quantizer: returns the table in codes, when the model is written.

    Precondition: one Gather of axis 0 reads the table (a tied head reads it as ``NAME.transposed``).
    Postcondition: it reads ``NAME.transposed``, int8 [H, V], along axis 1, or ``NAME.packed``, int32 [V, H/8] (int4)
    or [V, H/4] (int8), along axis 0. The scales are those of ``NAME.transposed`` where the head is tied, and lie under
    the same name where it is not: float16 [H / block, V], or [V] per channel.
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
        block = self.block
        codes = self._codes(rows, graph, ids, vocabulary, width)
        codes = rows("Reshape", codes, rows.constant(0, 0, width // (block or width), -1))  # [B, T, blocks, block]
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

    def _codes(self, rows: Nodes, graph: ir.Graph, ids: ir.Value, vocabulary: int, width: int) -> ir.Value:
        """Return float32 codes [B, T, H], or [B, T, words, codes of a word]."""
        matrix = graph.initializers.get(self.table + TRANSPOSED)
        if matrix is not None and self.bits == 8:
            columns = rows("Transpose", rows("Gather", matrix, ids, axis=1), perm=[1, 2, 0])
            return rows("Cast", columns, to=ir.DataType.FLOAT)

        def data() -> ir.TensorProtocol:
            return ir.tensor(packed_words(self.quantizer(self.table).codes, self.bits))

        shape = [vocabulary, width * self.bits // 32]
        packed = lazy_initializer(graph, self.table + PACKED, ir.DataType.INT32, shape, data)
        return unpacked(rows, rows("Gather", packed, ids, axis=0), self.bits)

    def _scales(self, graph: ir.Graph, vocabulary: int, width: int) -> ir.Value:
        name = self.table + TRANSPOSED + SCALE
        if name in graph.initializers:
            return graph.initializers[name]
        shape = [width // self.block, vocabulary] if self.block else [vocabulary]

        def data() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(self.quantizer(self.table).stored_scales))

        return lazy_initializer(graph, name, ir.DataType.FLOAT16, shape, data)
