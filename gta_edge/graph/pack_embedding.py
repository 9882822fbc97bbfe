"""The lookup of an embedding that lies in codes: as a bundle has it, and in words of 32 bits as engines take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.formats.weights import PACKED, parameter_name
from gta_edge.graph.builder import Nodes, lazy_initializer
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import pack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["PackEmbeddingPass", "packed_words", "unpacked"]


class PackEmbeddingPass(ir.passes.InPlacePass):
    """Look the rows of a tied int8 table up in words of their own, and not in the columns of the head's matrix.

    A bundle holds that table once, as the head multiplies by it: int8 [H, V]. A row of it is a column there, so a token
    touches as many pages of the file as it is wide; and TensorRT takes quantised constants nowhere but before a
    DequantizeLinear.

    Postcondition: no Gather reads a matrix in int8. ``NAME.packed``, int32 [V, H/4], is read in its place.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the lookup of ``model``, if it is of that form."""
        graph = model.graph
        found = [node for node in graph if node.op_type == "Gather" and _is_matrix(node.inputs[0])]
        for gather in found:
            self._rewrite(graph, gather)
        return ir.passes.PassResult(model, modified=bool(found))

    @staticmethod
    def _rewrite(graph: ir.Graph, gather: ir.Node) -> None:
        matrix, ids = gather.inputs
        ((transpose, _),) = gather.outputs[0].uses()
        ((cast, _),) = transpose.outputs[0].uses()
        assert matrix is not None and matrix.shape is not None and matrix.const_value is not None
        assert [transpose.op_type, cast.op_type] == ["Transpose", "Cast"]
        width, vocabulary = matrix.shape.numpy()
        stored = matrix.const_value

        def data() -> ir.TensorProtocol:
            return ir.tensor(packed_words(stored.numpy().T, 8))

        name = parameter_name(str(matrix.name)) + PACKED
        packed = lazy_initializer(graph, name, ir.DataType.INT32, (vocabulary, width // 4), data)
        rows = Nodes()
        codes = unpacked(rows, rows("Gather", packed, ids, axis=0), 8)
        result = rows("Reshape", codes, rows.constant(0, 0, width))
        result.type, result.shape = cast.outputs[0].type, cast.outputs[0].shape
        graph.insert_before(gather, rows.made)
        cast.outputs[0].replace_all_uses_with(result)
        graph.remove([cast, transpose, gather], safe=True)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.INT8


def packed_words(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """Return codes [V, H], made unsigned by the offset 8 or 128, in words of 32 bits [V, H · bits / 32]."""
    unsigned = np.ascontiguousarray(codes).view(np.uint8) + np.uint8(1 << bits - 1)  # wraps as it should
    packed = pack_nibbles(unsigned) if bits == 4 else unsigned
    return packed.reshape(len(codes), -1).view("<i4")


def unpacked(rows: Nodes, words: ir.Value, bits: int) -> ir.Value:
    """Return float32 codes [B, T, words, codes of a word] of words of 32 bits [B, T, words].

    By arithmetic that every engine has: divisions and remainders of numbers that are not negative, on which all engines
    agree, and so the sign bit apart. (Of bytes TensorRT would make 32-bit integers, each.)
    """
    radix, count = 1 << bits, 32 // bits
    half = radix // 2  # the offset, and what the sign bit adds to the last digit

    def vector(values: list[int]) -> ir.Value:
        return rows("Constant", value=ir.tensor(np.array(values, np.int32)))

    negative = rows("Less", words, rows.scalar(0, np.int32))
    largest = rows.scalar(np.iinfo(np.int32).max, np.int32)
    rest = rows("Add", rows("Add", words, largest), rows.scalar(1, np.int32))  # without the sign bit
    last = rows.constant(-1)
    positive = rows("Unsqueeze", rows("Where", negative, rest, words), last)
    digits = rows("Mod", rows("Div", positive, vector([radix**i for i in range(count)])), rows.scalar(radix, np.int32))
    sign = rows("Unsqueeze", rows("Cast", negative, to=ir.DataType.INT32), last)
    offsets = rows("Sub", rows("Mul", sign, vector([0] * (count - 1) + [half])), rows.scalar(half, np.int32))
    return rows("Cast", rows("Add", digits, offsets), to=ir.DataType.FLOAT)
