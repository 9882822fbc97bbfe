"""``gta::BlockwiseInt4MatMul`` and ``gta::BlockwiseInt8MatMul`` as TensorRT plugins: between descriptors and kernels.

A node has a bias or not; a plugin sees that by the number of its inputs, when TensorRT first shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, ClassVar

from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.matmul.definition import INPUTS, OPS
from gta_edge.plugins.matmul.kernels import MatMulKernels, matmul_kernels
from gta_edge.plugins.matmul.plugin_call import (
    FIELDS,
    Built,
    Call,
    Parameters,
    allowed_types,
    check_types,
    describe_call,
    field_values,
    largest_workspace_bytes,
    read_built,
    read_parameters,
    variant,
)
from gta_edge.plugins.matmul.tiling import matmul_programs, plan_matmul
from gta_edge.plugins.plugin_base import Creator, Plugin, gpu_here, plugin_class, reported, type_name
from gta_edge.plugins.plugin_fields import Value

__all__ = ["Int4MatMulCreator", "Int8MatMulCreator", "plugin_classes"]

_BIAS = INPUTS.index("bias")


class _MatMulPlugin(Plugin):
    """Matmuls of one input with one quantised matrix or several.

    Args:
        parameters: the op and the node's attributes.
        built: what a build settled, once there was one.
    """

    version, domain = VERSION, DOMAIN
    parameters: Parameters
    built: Built | None

    def __init__(self, parameters: Parameters, built: Built | None = None) -> None:
        super().__init__(parameters, built)
        self._ready: tuple[Call, MatMulKernels] | None = None

    def _number_of_outputs(self) -> int:
        return len(self.parameters.output_sizes)

    def _field_values(self, built: Built | None) -> dict[str, Value]:
        return field_values(self.parameters, built)

    def _allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> Sequence[str]:
        return allowed_types(place, types, num_inputs) if place < num_inputs + self.num_outputs else ()

    def _load_kernels(self, gpu: Gpu) -> None:
        if self.built is not None:
            self._kernels(self.built.compute, gpu)

    # -- build

    @reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types, all that of x.

        Raises:
            BackendError: there are no kernels for this combination of types.
        """
        check_types(self.parameters, [type_name(each) for each in input_types])
        return [input_types[0]] * self.num_outputs

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """Return the outputs' shapes: x's own expressions, and the output's width behind them.

        Raises:
            BackendError: the number of inputs is none that the op has.
        """
        if not _BIAS <= len(inputs) <= len(INPUTS):
            raise BackendError(f"{self.op} has {len(inputs)} inputs", f"expected {_BIAS} or {len(INPUTS)}")
        leading = [inputs[0][axis] for axis in range(len(inputs[0]) - 1)]
        return [self.trt.DimsExprs([*leading, expr_builder.constant(n)]) for n in self.parameters.output_sizes]

    @reported
    def configure_plugin(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Take the types and the sizes for which an engine is built.

        Raises:
            BackendError: the kernels do not take them, or there is no GPU that can run the kernels.
        """
        call, gpu = self._largest_call(in_), gpu_here()
        programs = matmul_programs(variant(self.parameters, call.compute), gpu.architecture)
        plan_matmul(programs, gpu.processors, call.rows, call.in_features, self.parameters.output_sizes)
        self.built, self._gpu = Built(call.compute, gpu.architecture, gpu.processors), gpu

    @reported
    def get_workspace_size(self, in_: Sequence[Any], out: Sequence[Any]) -> int:
        """Return the bytes that suffice for all sizes up to the profile's largest.

        Raises:
            BackendError: as ``configure_plugin``.
        """
        call = self._largest_call(in_)
        kernels = self._kernels(call.compute, self._own_gpu())
        return largest_workspace_bytes(kernels, call.rows, call.in_features, self.parameters.output_sizes)

    # -- runtime

    @reported
    def on_shape_change(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Check the shapes, and have the kernels ready for them.

        Raises:
            BackendError: the kernels do not take them.
        """
        call, kernels = self._ready = self._prepare(in_)
        kernels.plan(call.rows, call.in_features, self.parameters.output_sizes)

    @reported
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue one call of the op on a stream: nothing is allocated, nothing waited for.

        Args:
            input_desc: types and shapes of the inputs.
            output_desc: of the outputs.
            inputs: device addresses.
            outputs: device addresses.
            workspace: device address of ``get_workspace_size`` bytes.
            stream: handle of a CUDA stream.

        Raises:
            BackendError: the kernels do not take these sizes or addresses, or a launch failed.
        """
        call, kernels = self._ready_for(input_desc)
        kernels.launch(
            stream,
            x=inputs[0],
            weight=inputs[1],
            scale=inputs[2],
            bias=inputs[_BIAS] if len(inputs) > _BIAS else 0,
            outputs=outputs,
            workspace=workspace,
            rows=call.rows,
            in_features=call.in_features,
            output_sizes=self.parameters.output_sizes,
        )

    # -- within

    def _largest_call(self, in_: Iterable[Any]) -> Call:
        """Return the largest call of a profile."""
        bounds = list(in_)
        types = tuple(type_name(each.desc.type) for each in bounds)
        return describe_call(self.parameters, types, tuple(tuple(each.max) for each in bounds))

    def _ready_for(self, descs: Sequence[Any]) -> tuple[Call, MatMulKernels]:
        """Return what ``on_shape_change`` made ready, unless x's leading sizes are others now."""
        if self._ready is not None:
            dims = descs[0].dims  # all descriptors' would take longer to read
            if all(dims[axis] == size for axis, size in enumerate(self._ready[0].leading)):
                return self._ready
        return self._prepare(descs)

    def _prepare(self, descs: Iterable[Any]) -> tuple[Call, MatMulKernels]:
        types, shapes = zip(*((type_name(each.type), tuple(each.dims)) for each in descs), strict=True)
        call = describe_call(self.parameters, types, shapes)
        return call, self._kernels(call.compute, self._own_gpu())

    def _kernels(self, compute: str, gpu: Gpu) -> MatMulKernels:
        return matmul_kernels(variant(self.parameters, compute), gpu)


class _Int4MatMulPlugin(_MatMulPlugin):
    op = OPS[4]


class _Int8MatMulPlugin(_MatMulPlugin):
    op = OPS[8]


class _MatMulCreator(Creator):
    """Makes plugins for matmuls."""

    version, domain = VERSION, DOMAIN
    bits: ClassVar[int]

    def _create(self, values: dict[str, Any], building: bool) -> Any:
        parameters = read_parameters(self.bits, values)
        return plugin_classes(self.trt)[self.bits](parameters, read_built(parameters, values))


class Int4MatMulCreator(_MatMulCreator):
    """Makes plugins for matmuls with int4 matrices."""

    bits, op, fields = 4, OPS[4], FIELDS[4]


class Int8MatMulCreator(_MatMulCreator):
    """Makes plugins for matmuls with int8 matrices."""

    bits, op, fields = 8, OPS[8], FIELDS[8]


@cache
def plugin_classes(trt: Any) -> dict[int, Any]:
    """Return the plugins' classes over a TensorRT module by the width of a code in bits, made at the first call.

    Args:
        trt: the module.
    """
    return {4: plugin_class(trt, _Int4MatMulPlugin), 8: plugin_class(trt, _Int8MatMulPlugin)}
