"""``gta::BlockwiseInt4MatMul``, ``gta::BlockwiseInt8MatMul`` as TensorRT plugins: from descriptors to ``kernels.py``.

A node has a bias or not; a plugin sees that by the number of its inputs, when TensorRT first shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from gta_edge.cuda.gpu import Gpu
from gta_edge.plugins.matmul.kernels import MatMulKernels, matmul_kernels
from gta_edge.plugins.matmul.launches import plan_matmul, programs_for
from gta_edge.plugins.matmul.plugin_call import FIELDS, Call, Parameters, describe_call, read_parameters
from gta_edge.plugins.matmul.tiling import Variant
from gta_edge.plugins.plugin_base import Plugin, Run
from gta_edge.plugins.plugin_registry import OpPlugin

__all__ = ["MATMUL_PLUGINS", "MatMulPlugin"]


class MatMulPlugin(Plugin[Parameters, Call, MatMulKernels]):
    """Matmuls of one input with one quantised matrix or several."""

    def _describe(self, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], exact: bool) -> Call:
        return describe_call(self.parameters, types, shapes)

    def _output_shapes(self, inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        leading = [inputs[0][axis] for axis in range(len(inputs[0]) - 1)]
        return [self.trt.DimsExprs([*leading, expr_builder.constant(n)]) for n in self.parameters.output_sizes]

    def _check_largest(self, call: Call, gpu: Gpu) -> None:
        plan_matmul(programs_for(call.variant, gpu.architecture), gpu.processors, *call.sizes)

    def _kernels(self, variant: Variant, gpu: Gpu) -> MatMulKernels:
        return matmul_kernels(variant, gpu)

    def _fits(self, call: Call, descs: Sequence[Any]) -> bool:
        dims = descs[0].dims
        return all(dims[axis] == size for axis, size in enumerate(call.leading))

    def _launch(self, call: Call, kernels: MatMulKernels, run: Run) -> None:
        x, weight, scale, *bias = run.inputs
        kernels.launch(
            run.stream,
            x=x,
            weight=weight,
            scale=scale,
            bias=bias[0] if bias else 0,
            outputs=run.outputs,
            rows=call.rows,
            in_features=call.in_features,
            output_sizes=call.output_sizes,
        )


MATMUL_PLUGINS = tuple(OpPlugin(FIELDS[bits], partial(read_parameters, bits), MatMulPlugin) for bits in FIELDS)
