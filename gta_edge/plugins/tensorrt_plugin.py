"""``gta::GroupedLatentAttention`` as a TensorRT plugin: between TensorRT's descriptors and ``launch.py``.

The classes derive from those of the TensorRT module at hand, so they are made when they are asked for
(``plugin_classes``). One object is the plugin and its three capabilities: core, build and runtime.

Past and present caches are meant to be one memory: whoever runs the engine binds both to one address. That is not
declared to TensorRT unless the node's attribute ``declare_alias`` asks for it, which needs the preview feature
``ALIASED_PLUGIN_IO_10_03``. Where the addresses differ, as when the builder times the plugin, the past is copied to the
present first.

TensorRT calls the methods from C++. Its bindings catch what they raise, write it to stderr and give TensorRT an error,
so that the build or the run fails; ``take_failures`` has the messages for those who want to raise them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, wraps
from threading import Lock
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.optional import optional
from gta_edge.plugins.compiler import cuda_extra
from gta_edge.plugins.grouped_latent_attention import DOMAIN, INPUTS, OP, VERSION
from gta_edge.plugins.launch import AttentionKernels, Buffers, Gpu, attention_kernels, current_gpu
from gta_edge.plugins.plan import programs
from gta_edge.plugins.tensorrt_call import (
    DECLARE_ALIAS,
    Built,
    Call,
    Parameters,
    allowed_types,
    check_types,
    describe_call,
    largest_workspace_bytes,
    type_name,
)
from gta_edge.plugins.tensorrt_fields import (
    ATTRIBUTES,
    Fields,
    field_values,
    read_built,
    read_fields,
    read_parameters,
)
from gta_edge.trt import TensorRT

__all__ = ["Classes", "plugin_classes", "register_creators", "take_failures"]

_FAILURES_KEPT = 16


# --- what went wrong -------------------------------------------------------------------------------------------------

_failures: deque[str] = deque(maxlen=_FAILURES_KEPT)
_Method = TypeVar("_Method", bound=Callable[..., Any])


def take_failures() -> tuple[str, ...]:
    """Return the messages of the plugins' latest errors in this process, oldest first, and forget them.

    TensorRT itself tells its caller only that a plugin failed.
    """
    taken = []
    while _failures:
        taken.append(_failures.popleft())
    return tuple(dict.fromkeys(taken))


def _reported(method: _Method) -> _Method:
    """Keep the message of what a method raises, for ``take_failures``."""

    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception as error:  # whatever it is, TensorRT would hide it; it goes on as it was
            _failures.append(" ".join(str(error).split()) or type(error).__name__)
            raise

    return call  # type: ignore[return-value]  # the same signature, which ParamSpec cannot say of methods


# --- the GPU ---------------------------------------------------------------------------------------------------------


def _driver() -> Any:
    return optional("cuda.bindings.driver", cuda_extra())


def _current_device() -> int:
    """Return the number of the GPU that is current in this thread, which is TensorRT's; 0 where none is."""
    status, device = _driver().cuCtxGetDevice()
    return 0 if int(status) else int(device)


def _copy(destination: int, source: int, size: int, stream: int) -> None:
    """Queue a copy in the GPU's memory, ``size`` in bytes."""
    (status,) = _driver().cuMemcpyDtoDAsync(destination, source, size, stream)
    if int(status):
        raise BackendError(
            f"the past cache could not be copied to the present one ({getattr(status, 'name', status)}); bind both to "
            "one address, then nothing is copied"
        )


# --- the plugin ------------------------------------------------------------------------------------------------------


class _Plugin:
    """What the plugin does; the classes of TensorRT that it is of are mixed in by ``plugin_classes``.

    An object is used by one thread at a time, as TensorRT promises. What objects share is the kernels, which do not
    change once they are loaded.

    Args:
        parameters: the node's attributes.
        built: what a build settled, once there was one.
    """

    trt: ClassVar[Any]
    bases: ClassVar[tuple[Any, ...]]
    plugin_name: str
    plugin_version: str
    plugin_namespace: str
    num_outputs: int
    timing_cache_id: str
    metadata_string: str

    def __init__(self, parameters: Parameters, built: Built | None = None) -> None:
        for base in self.bases:
            base.__init__(self)
        self.parameters, self.built = parameters, built
        self.plugin_name, self.plugin_version, self.plugin_namespace = OP, str(VERSION), DOMAIN
        self.num_outputs = len(parameters.outputs)
        self.timing_cache_id = self.metadata_string = json.dumps(field_values(parameters, None))
        self._gpu: Gpu | None = None
        self._ready: tuple[Call, AttentionKernels] | None = None
        self._serialised: Fields | None = None

    # -- core

    def get_capability_interface(self, type: Any) -> Any:  # noqa: A002  # the bindings' name
        """Return the object that has a capability: core, build and runtime are all this one."""
        return self

    @_reported
    def clone(self) -> Any:
        """Return another plugin that is configured like this one."""
        return type(self)(self.parameters, self.built)

    # -- build

    @_reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types: the query's, and those of the past caches.

        Raises:
            BackendError: there are no kernels for this combination of types.
        """
        check_types(self.parameters, [type_name(each) for each in input_types])
        return [input_types[0], *(input_types[past] for past, _ in self.parameters.caches)]

    @_reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """Return the outputs' shapes: the gate's, and those of the past caches, whatever these are."""
        if len(inputs) != len(self.parameters.inputs):
            raise BackendError(f"{OP} has {len(inputs)} inputs; expected {len(self.parameters.inputs)}")
        return [inputs[INPUTS.index("gate")], *(inputs[past] for past, _ in self.parameters.caches)]

    @_reported
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Tell whether an input or output may have its type and format, given those of all before it."""
        if num_inputs != len(self.parameters.inputs) or in_out[pos].desc.format != self.trt.TensorFormat.LINEAR:
            return False
        types = [type_name(each.desc.type) for each in in_out[: pos + 1]]
        return types[pos] in allowed_types(self.parameters, pos, types)

    @_reported
    def configure_plugin(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Take the types and the sizes for which an engine is built.

        Raises:
            BackendError: the kernels do not take them, or there is no GPU that can run the kernels.
        """
        call = self._largest_call(in_)
        gpu = current_gpu(_current_device())
        programs(call.variant, gpu.architecture)
        self.built, self._gpu = Built(call.variant, gpu.architecture, gpu.processors), gpu

    @_reported
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

    def set_tactic(self, tactic: int) -> None:
        """Do nothing: there is one tactic."""

    @_reported
    def attach_to_context(self, resource_context: Any) -> Any:
        """Return the plugin of one execution context, its kernels loaded.

        Raises:
            BackendError: the kernels cannot be loaded here, or the engine is another GPU's.
        """
        attached = self.clone()
        if self.built is not None:
            attention_kernels(self.built.variant, attached._own_gpu())
        return attached

    @_reported
    def on_shape_change(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Check the shapes, and have kernels and launches ready for them.

        Raises:
            BackendError: the kernels do not take them.
        """
        call, kernels = self._prepare(in_)
        kernels.plan(call.batch, call.tokens, call.capacity)
        self._ready = call, kernels

    @_reported
    def get_fields_to_serialize(self) -> Any:
        """Return all that ``create_plugin`` needs to make this plugin again."""
        # The bindings copy the addresses only; so what is at them lives as long as the plugin.
        self._serialised = Fields(self.trt, field_values(self.parameters, self.built))
        return self._serialised.collection

    @_reported
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

    def _own_gpu(self) -> Gpu:
        """Return the GPU to plan for: the current one, with no more multiprocessors than the workspace is made for."""
        if self._gpu is None:
            gpu, built = current_gpu(_current_device()), self.built
            if built is not None:
                if gpu.architecture != built.architecture:
                    raise BackendError(
                        f"this engine was built on a GPU of {built.architecture}, {gpu.name} is {gpu.architecture}; "
                        "build the engine again on this machine"
                    )
                gpu = replace(gpu, processors=min(gpu.processors, built.processors))
            self._gpu = gpu
        return self._gpu


class _Creator:
    """Makes plugins from a node's attributes, and from what an engine holds of them."""

    trt: ClassVar[Any]
    base: ClassVar[Any]
    name: str
    plugin_version: str
    plugin_namespace: str
    field_names: Any

    def __init__(self) -> None:
        self.base.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = OP, str(VERSION), DOMAIN
        # The parser passes on the attributes that are declared here.
        self._declared = Fields(self.trt, {name: kind(1) for name, kind in ATTRIBUTES.items()})
        self.field_names = self._declared.collection

    @_reported
    def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
        """Make a plugin.

        Args:
            name: of the layer.
            field_collection: the node's attributes, in the phase RUNTIME what ``get_fields_to_serialize`` returned.
            phase: BUILD or RUNTIME.

        Raises:
            BackendError: a field is missing, unknown, ill-typed or out of range.
        """
        classes = plugin_classes(self.trt)
        values = read_fields(self.trt, field_collection)
        parameters = read_parameters(values)
        building = phase == self.trt.TensorRTPhase.BUILD
        if not (building and parameters.declare_alias):
            return classes.plugin(parameters, read_built(parameters, values))
        if classes.aliased is None:
            raise BackendError(
                f"{OP} has {DECLARE_ALIAS} = 1, which this TensorRT does not know; leave the attribute out and bind "
                "past and present to one address"
            )
        return classes.aliased(parameters, read_built(parameters, values))


class Classes(NamedTuple):
    """The classes over one TensorRT module."""

    plugin: Any
    aliased: Any
    """The plugin that declares its aliases, None where TensorRT has no such thing."""
    creator: Any


@cache
def plugin_classes(trt: Any) -> Classes:
    """Return the classes over a TensorRT module, made at the first call.

    Args:
        trt: the module.
    """

    def plugin(name: str, build: Any) -> Any:
        bases = (trt.IPluginV3, trt.IPluginV3OneCore, build, trt.IPluginV3OneRuntime)
        # The bindings' classes have a metaclass of their own.
        return type(trt.IPluginV3)(name, (_Plugin, *bases), {"trt": trt, "bases": bases})

    second = getattr(trt, "IPluginV3OneBuildV2", None)
    creator_base = trt.IPluginCreatorV3One
    return Classes(
        plugin=plugin(OP, trt.IPluginV3OneBuild),
        aliased=second and plugin(f"Aliased{OP}", second),
        creator=type(creator_base)(f"{OP}Creator", (_Creator, creator_base), {"trt": trt, "base": creator_base}),
    )


# --- the registry ----------------------------------------------------------------------------------------------------

_creators: list[Any] = []  # the registry refers to them for as long as the process lives
_registering = Lock()


def register_creators(trt: TensorRT) -> None:
    """Register our creators, unless they are.

    Args:
        trt: whose registry.

    Raises:
        BackendError: it has no plugins, or refuses ours.
    """
    if not trt.plugins:
        raise BackendError(
            f"{trt.flavour} {trt.version_text} takes no plugins; build the form without them: "
            "gta-edge build --engine tensorrt-rtx"
        )
    with _registering:
        registry = trt.module.get_plugin_registry()
        if registry.get_creator(OP, str(VERSION), DOMAIN) is not None:
            return
        creator = plugin_classes(trt.module).creator()
        if not registry.register_creator(creator, DOMAIN):
            raise BackendError(
                f"{trt.flavour} {trt.version_text} did not register the plugin {DOMAIN}::{OP} version {VERSION}; "
                "start a new process in which nothing else of that name is registered"
            )
        _creators.append(creator)
