"""``gta::GroupedLatentAttention`` as a TensorRT plugin: between TensorRT's descriptors and ``launch.py``.

Past and present caches are meant to be one memory: whoever runs the engine binds both to one address. That is not
declared to TensorRT unless the node's attribute ``declare_alias`` asks for it, which needs the preview feature
``ALIASED_PLUGIN_IO_10_03``. Where the addresses differ, as when the builder times the plugin, the past is copied to the
present first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError
from gta_edge.plugins.attention.definition import INPUTS, OP
from gta_edge.plugins.attention.kernels import AttentionKernels, Buffers, attention_kernels
from gta_edge.plugins.attention.launches import programs
from gta_edge.plugins.attention.plugin_call import (
    DECLARE_ALIAS,
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
)
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.plugin_base import (
    Creator,
    Plugin,
    cuda_driver,
    gpu_here,
    plugin_class,
    reported,
    type_name,
)
from gta_edge.plugins.plugin_fields import Value

__all__ = ["AttentionCreator", "Classes", "plugin_classes"]


def _copy(destination: int, source: int, size: int, stream: int) -> None:
    """Queue a copy in the GPU's memory, ``size`` in bytes."""
    (status,) = cuda_driver().cuMemcpyDtoDAsync(destination, source, size, stream)
    if int(status):
        raise BackendError(
            f"the past cache could not be copied to the present one ({getattr(status, 'name', status)})",
            "bind both to one address, then nothing is copied",
        )


class _AttentionPlugin(Plugin):
    """The attention.

    Args:
        parameters: the node's attributes.
        built: what a build settled, once there was one.
    """

    op, version, domain = OP, VERSION, DOMAIN
    parameters: Parameters
    built: Built | None

    def __init__(self, parameters: Parameters, built: Built | None = None) -> None:
        super().__init__(parameters, built)
        self._ready: tuple[Call, AttentionKernels] | None = None

    def _number_of_outputs(self) -> int:
        return len(self.parameters.outputs)

    def _field_values(self, built: Built | None) -> dict[str, Value]:
        return field_values(self.parameters, built)

    def _allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> Sequence[str]:
        return allowed_types(self.parameters, place, types) if num_inputs == len(self.parameters.inputs) else ()

    def _load_kernels(self, gpu: Gpu) -> None:
        if self.built is not None:
            attention_kernels(self.built.variant, gpu)

    # -- build

    @reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types: the query's, and those of the past caches.

        Raises:
            BackendError: there are no kernels for this combination of types.
        """
        check_types(self.parameters, [type_name(each) for each in input_types])
        return [input_types[0], *(input_types[past] for past, _ in self.parameters.caches)]

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """Return the outputs' shapes: the gate's, and those of the past caches, whatever these are."""
        if len(inputs) != len(self.parameters.inputs):
            raise BackendError(f"{OP} has {len(inputs)} inputs", f"expected {len(self.parameters.inputs)}")
        return [inputs[INPUTS.index("gate")], *(inputs[past] for past, _ in self.parameters.caches)]

    @reported
    def configure_plugin(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Take the types and the sizes for which an engine is built.

        Raises:
            BackendError: the kernels do not take them, or there is no GPU that can run the kernels.
        """
        call = self._largest_call(in_)
        gpu = gpu_here()
        programs(call.variant, gpu.architecture)
        self.built, self._gpu = Built(call.variant, gpu.architecture, gpu.processors), gpu

    @reported
    def get_workspace_size(self, in_: Sequence[Any], out: Sequence[Any]) -> int:
        """Return the bytes that suffice for all sizes up to the profile's largest.

        Raises:
            BackendError: as ``configure_plugin``.
        """
        call, gpu = self._largest_call(in_), self._own_gpu()
        sizes = {"batch": call.batch, "tokens": call.tokens, "capacity": call.capacity}
        return largest_workspace_bytes(call.variant, gpu.architecture, gpu.processors, **sizes)

    def get_aliased_input(self, output_index: int) -> int:
        """Return the input whose memory an output is, -1 for none; asked for only where aliases are declared."""
        return next((past for past, present in self.parameters.caches if present == output_index), -1)

    # -- runtime

    @reported
    def on_shape_change(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Check the shapes, and have kernels and launches ready for them.

        Raises:
            BackendError: the kernels do not take them.
        """
        call, kernels = self._prepare(in_)
        kernels.plan(call.batch, call.tokens, call.capacity)
        self._ready = call, kernels

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
            outputs: device addresses; those of the present caches should be those of the past ones.
            workspace: device address of ``get_workspace_size`` bytes.
            stream: handle of a CUDA stream.

        Raises:
            BackendError: the kernels do not take these sizes or addresses, or a launch failed.
        """
        call, kernels = self._ready_for(input_desc)
        for past, present in self.parameters.caches:
            if inputs[past] != outputs[present]:
                desc = input_desc[past]
                size = int(np.prod(tuple(desc.dims), dtype=np.int64)) * int(desc.type.itemsize)
                _copy(outputs[present], inputs[past], size, stream)
        given = dict(zip(self.parameters.inputs, inputs, strict=True))
        made = dict(zip(self.parameters.outputs, outputs, strict=True))
        kernels.launch(
            stream,
            Buffers(
                query=given["query"],
                key=given["key"],
                latent=given["latent"],
                gate=given["gate"],
                key_cache=made["present_key"],
                latent_cache=made["present_latent"],
                key_scale=made.get("present_key_scale", 0),
                latent_scale=made.get("present_latent_scale", 0),
                past_length=given["past_length"],
                cos=given["cos"],
                sin=given["sin"],
                value_decoder=given["value_decoder"],
                output=made["output"],
                workspace=workspace,
            ),
            batch=call.batch,
            tokens=call.tokens,
            capacity=call.capacity,
            positions=call.positions,
            scale=self.parameters.scale,
        )

    # -- within

    def _largest_call(self, in_: Iterable[Any]) -> Call:
        """Return the largest call of a profile."""
        bounds = list(in_)
        types = tuple(type_name(each.desc.type) for each in bounds)
        return describe_call(self.parameters, types, tuple(tuple(each.max) for each in bounds), exact=False)

    def _ready_for(self, descs: Sequence[Any]) -> tuple[Call, AttentionKernels]:
        """Return what ``on_shape_change`` made ready, unless a size that changes from call to call is another."""
        query, past_key = descs[0].dims, descs[INPUTS.index("past_key")].dims  # all of them would take longer to read
        if self._ready is not None:
            call = self._ready[0]
            if (query[0], query[1], past_key[2]) == (call.batch, call.tokens, call.capacity):
                return self._ready
        return self._prepare(descs)

    def _prepare(self, descs: Iterable[Any]) -> tuple[Call, AttentionKernels]:
        types, shapes = zip(*((type_name(each.type), tuple(each.dims)) for each in descs), strict=True)
        call = describe_call(self.parameters, types, shapes)
        return call, attention_kernels(call.variant, self._own_gpu())


class AttentionCreator(Creator):
    """Makes attention plugins."""

    op, version, domain, fields = OP, VERSION, DOMAIN, FIELDS

    def _create(self, values: dict[str, Any], building: bool) -> Any:
        classes = plugin_classes(self.trt)
        parameters = read_parameters(values)
        if not (building and parameters.declare_alias):
            return classes.plugin(parameters, read_built(parameters, values))
        if classes.aliased is None:
            raise BackendError(
                f"{OP} has {DECLARE_ALIAS} = 1, which this TensorRT does not know",
                "leave the attribute out and bind past and present to one address",
            )
        return classes.aliased(parameters, read_built(parameters, values))


class Classes(NamedTuple):
    """The classes over one TensorRT module."""

    plugin: Any
    aliased: Any
    """The plugin that declares its aliases, None where TensorRT has no such thing."""


@cache
def plugin_classes(trt: Any) -> Classes:
    """Return the classes over a TensorRT module, made at the first call.

    Args:
        trt: the module.
    """
    second = getattr(trt, "IPluginV3OneBuildV2", None)
    return Classes(
        plugin=plugin_class(trt, _AttentionPlugin),
        aliased=second and plugin_class(trt, _AttentionPlugin, f"Aliased{OP}", second),
    )
