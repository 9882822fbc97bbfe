"""Store the matrices that inputs are multiplied by as integers, behind a DequantizeLinear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.weights import SCALE, TRANSPOSED, parameter_name
from gta_edge.graph.builder import lazy_initializer
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import integer_of
from gta_edge.numerics.quantization import pack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["QuantizeWeightsPass"]


class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Replace ``MatMul(x, W)`` by ``MatMul(x, DequantizeLinear(codes, Cast(scales)))``, data attached lazily.

    The form is the standard's own: ONNX Runtime fuses it to one kernel, and TensorRT keeps the codes packed. Codes are
    symmetric, since TensorRT knows no zero points. There is a scale per block along the input dimension, or one per
    output channel: the quantiser says which for each matrix, and how many bits.

    Args:
        quantizer: returns a parameter in codes, when the model is written.

    Precondition: matrices lie transposed, ``NAME.transposed`` [in, out] (``FoldWeightViewsPass``).
    Postcondition: each of them is int4 or int8 under the same name, its float16 scales beside it, called
    ``NAME.transposed.scale`` ([in / block, out], or [out] per channel). Other initializers are left alone.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every such matrix of ``model``."""
        graph = model.graph
        found = [value for name, value in graph.initializers.items() if name.endswith(TRANSPOSED)]
        for weight in found:
            # codes and scales are written one after the other, so that each matrix is quantised once
            graph.register_initializer(graph.initializers.pop(str(weight.name)))
            bits, block = self.quantizer.format_of(parameter_name(str(weight.name)))
            scales = self._quantize(weight, bits, block)
            for node, index in list(weight.uses()):
                _dequantize(graph, node, index, weight, scales, block)
        return ir.passes.PassResult(model, modified=bool(found))

    def _quantize(self, weight: ir.Value, bits: int, block: int | None) -> ir.Value:
        """Give ``weight`` its codes, and return its scales."""
        shape = weight.shape
        assert shape is not None  # the precondition
        inputs, outputs = shape.numpy()
        name, stored = parameter_name(str(weight.name)), str(weight.name)
        dtype = ir.DataType[integer_of(bits).onnx]
        transposed = (inputs // block, outputs) if block else (outputs,)

        def codes() -> ir.TensorProtocol:
            lying: npt.NDArray[np.int8] = np.ascontiguousarray(self.quantizer(name).stored_codes)
            return ir.PackedTensor(pack_nibbles(lying), dtype, shape=shape) if bits == 4 else ir.tensor(lying)

        def scales() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(self.quantizer(name).stored_scales))

        graph = weight.graph
        assert graph is not None  # it is an initializer
        weight.const_value = ir.LazyTensor(codes, dtype=dtype, shape=shape, name=stored)
        weight.dtype = dtype
        return lazy_initializer(graph, stored + SCALE, ir.DataType.FLOAT16, transposed, scales)


def _dequantize(
    graph: ir.Graph, node: ir.Node, index: int, weight: ir.Value, scales: ir.Value, block: int | None
) -> None:
    """Put the two nodes before input ``index`` of ``node``."""
    cast = ir.node("Cast", [scales], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{scales.name}.float32"
    along = {"axis": 0, "block_size": block} if block else {"axis": 1}
    dequantize = ir.node("DequantizeLinear", [weight, cast.outputs[0]], attributes=along)
    dequantize.outputs[0].name = f"{weight.name}.float32"
    for made, shape in ((cast, scales.shape), (dequantize, weight.shape)):
        made.outputs[0].shape, made.outputs[0].dtype = shape, ir.DataType.FLOAT
    graph.insert_before(node, [cast, dequantize])
    node.replace_input_with(index, dequantize.outputs[0])
