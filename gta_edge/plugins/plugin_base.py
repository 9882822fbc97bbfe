"""What the ops' ``plugin.py`` share: TensorRT's calls, failures, and the GPU.

A plugin derives from ``Plugin`` and says what its op is; ``plugin_registry.py`` mixes in the classes of the TensorRT
module at hand. One object is the plugin and its three capabilities: core, build and runtime.

TensorRT calls the methods from C++. Its bindings catch what they raise, write it to stderr and give TensorRT an error,
so that the build or the run fails; ``take_failures`` has the messages for those who want to raise them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, wraps
from typing import Any, ClassVar, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

from gta_edge.cuda.gpu import Gpu, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import cuda_extra
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.plugin_call_base import Built, Call, Fields, ParametersBase

__all__ = ["Plugin", "Run", "cuda_driver", "reported", "take_failures"]

_MAX_FAILURES = 16
_DATA_TYPES = {dtype.tensorrt: name for name, dtype in DTYPES.items() if name != "uint8"}  # whose bytes are INT8 here
_DATA_TYPES |= {"INT32": "int32", "INT64": "int64"}


# --- what went wrong -------------------------------------------------------------------------------------------------

_failures: deque[str] = deque(maxlen=_MAX_FAILURES)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def take_failures() -> tuple[str, ...]:
    """Return the messages of the plugins' latest errors in this process, oldest first, and forget them.

    TensorRT itself tells its caller only that a plugin failed.
    """
    taken = []
    while _failures:
        taken.append(_failures.popleft())
    return tuple(dict.fromkeys(taken))


def reported(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keep the message of what a method raises, for ``take_failures``."""

    @wraps(method)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _R:
        try:
            return method(*arguments, **options)
        except Exception as error:  # whatever it is, TensorRT would hide it; it goes on as it was
            _failures.append(" ".join(str(error).split()) or type(error).__name__)
            raise

    return call


# --- TensorRT's types and the GPU ------------------------------------------------------------------------------------


@cache
def _type_name(data_type: Any) -> str:
    """Return this package's name of one of TensorRT's types, TensorRT's own where there is none."""
    name = str(getattr(data_type, "name", data_type))
    return _DATA_TYPES.get(name, name)


def cuda_driver() -> Any:
    """Return CUDA's driver API."""
    return optional("cuda.bindings.driver", cuda_extra())


def _current_device() -> int:
    """Return the number of the GPU that is current in this thread, which is TensorRT's; 0 where none is."""
    status, device = cuda_driver().cuCtxGetDevice()
    return 0 if int(status) else int(device)


def _gpu_here() -> Gpu:
    """Return the GPU that is current in this thread.

    Raises:
        BackendError: there is none, or one that the kernels cannot run on.
    """
    return current_gpu(_current_device())


# --- the plugin ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What ``enqueue`` is given, as far as a launch takes it."""

    input_desc: Sequence[Any]
    inputs: Sequence[int]
    outputs: Sequence[int]
    workspace: int
    stream: int


class Kernels(Protocol):
    """An op's kernels, loaded on a GPU."""

    def plan(self, *sizes: Any, **more: Any) -> object:
        """Return what a call with these sizes launches."""


_ParametersT = TypeVar("_ParametersT", bound=ParametersBase[Any])
_CallT = TypeVar("_CallT", bound=Call)
_KernelsT = TypeVar("_KernelsT", bound=Kernels)


class Plugin(Generic[_ParametersT, _CallT, _KernelsT]):
    """What TensorRT calls, for all ops alike; a subclass says what its own op does.

    An object is used by one thread at a time, as TensorRT promises. What objects share is the kernels, which do not
    change once they are loaded.

    Args:
        parameters: the node's attributes.
        built: what a build settled, once there was one.
    """

    trt: ClassVar[Any]
    bases: ClassVar[tuple[Any, ...]]

    def __init__(self, parameters: _ParametersT, built: Built[Any] | None = None) -> None:
        for base in self.bases:
            base.__init__(self)
        self.parameters, self.built = parameters, built
        self.plugin_name, self.plugin_version, self.plugin_namespace = parameters.fields.op, str(VERSION), DOMAIN
        self.num_outputs = len(parameters.outputs)
        self.timing_cache_id = self.metadata_string = json.dumps(parameters.field_values(None))
        self._gpu: Gpu | None = None
        self._ready: tuple[_CallT, _KernelsT] | None = None
        self._serialised: Fields | None = None

    # -- what an op says of itself
    # They raise where an op lacks one, and are no abstract methods: ABC's metaclass does not go with that of the
    # bindings' classes, which are mixed in.

    def _describe(self, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], exact: bool) -> _CallT:
        """Return the call that inputs of these types and shapes are; ``exact`` unless shapes are a profile's bounds."""
        raise NotImplementedError

    def _output_shapes(self, inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """Return the outputs' shapes as TensorRT's expressions."""
        raise NotImplementedError

    def _check_largest(self, call: _CallT, gpu: Gpu) -> None:
        """Raise BackendError where the kernels do not take the largest call of a profile."""
        raise NotImplementedError

    def _workspace_bytes(self, call: _CallT, gpu: Gpu) -> int:
        """Return the workspace that suffices for all calls up to this one; none, unless an op needs some."""
        return 0

    def _kernels(self, variant: Any, gpu: Gpu) -> _KernelsT:
        """Return the kernels of a variant, compiled and loaded at the first call."""
        raise NotImplementedError

    def _fits(self, call: _CallT, descs: Sequence[Any]) -> bool:
        """Tell whether the sizes that change from call to call are this one's; reading all would take longer."""
        raise NotImplementedError

    def _launch(self, call: _CallT, kernels: _KernelsT, run: Run) -> None:
        """Launch a call's kernels."""
        raise NotImplementedError

    # -- core

    def get_capability_interface(self, type: Any) -> Any:  # noqa: A002  # the bindings' name
        """Return the object that has a capability: core, build and runtime are all this one."""
        return self

    @reported
    def clone(self) -> Any:
        """Return another plugin that is configured like this one."""
        return type(self)(self.parameters, self.built)

    # -- build

    @reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types, each that of an input.

        Raises:
            BackendError: there are no kernels for this combination of types.
        """
        self.parameters.check_types([_type_name(each) for each in input_types])
        return [input_types[place] for place in self.parameters.typed_like]

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """Return the outputs' shapes, of the inputs' own expressions: nothing is lost that TensorRT knows of them.

        Raises:
            BackendError: the op has no such number of inputs.
        """
        self.parameters.check_number(len(inputs))
        return self._output_shapes(inputs, expr_builder)

    @reported
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Tell whether an input or output may have its type and format, given those of all before it."""
        if in_out[pos].desc.format != self.trt.TensorFormat.LINEAR:
            return False
        types = [_type_name(each.desc.type) for each in in_out[: pos + 1]]
        return types[pos] in self.parameters.allowed_types(pos, types, num_inputs)

    @reported
    def configure_plugin(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Take the types and the sizes for which an engine is built.

        Raises:
            BackendError: the kernels do not take them, or there is no GPU that can run the kernels.
        """
        call, gpu = self._largest_call(in_), _gpu_here()
        self._check_largest(call, gpu)
        self.built, self._gpu = Built(call.variant, gpu.architecture, gpu.processors), gpu

    @reported
    def get_workspace_size(self, in_: Sequence[Any], out: Sequence[Any]) -> int:
        """Return the bytes that suffice for all sizes up to the profile's largest.

        Raises:
            BackendError: as ``configure_plugin``.
        """
        return self._workspace_bytes(self._largest_call(in_), self._own_gpu())

    # -- runtime

    def set_tactic(self, tactic: int) -> None:
        """Do nothing: there is one tactic."""

    @reported
    def attach_to_context(self, resource_context: Any) -> Any:
        """Return the plugin of one execution context, its kernels loaded.

        Raises:
            BackendError: the kernels cannot be loaded here, or the engine is another GPU's.
        """
        attached = self.clone()
        if self.built is not None:
            attached._kernels(self.built.variant, attached._own_gpu())
        return attached

    @reported
    def get_fields_to_serialize(self) -> Any:
        """Return all that ``create_plugin`` needs to make this plugin again."""
        # The bindings copy the addresses only; so what is at them lives as long as the plugin.
        self._serialised = Fields(self.trt, self.parameters.field_values(self.built))
        return self._serialised.collection

    @reported
    def on_shape_change(self, in_: Sequence[Any], out: Sequence[Any]) -> None:
        """Check the shapes, and have kernels and launches ready for them.

        Raises:
            BackendError: the kernels do not take them.
        """
        call, kernels = self._prepare(in_)
        kernels.plan(*call.sizes)
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
            outputs: device addresses.
            workspace: device address of ``get_workspace_size`` bytes.
            stream: handle of a CUDA stream.

        Raises:
            BackendError: the kernels do not take these sizes or addresses, or a launch failed.
        """
        ready = self._ready
        if ready is None or not self._fits(ready[0], input_desc):
            ready = self._prepare(input_desc)
        self._launch(*ready, Run(input_desc, inputs, outputs, workspace, stream))

    # -- within

    def _largest_call(self, in_: Iterable[Any]) -> _CallT:
        """Return the largest call of a profile."""
        types, shapes = zip(*((_type_name(each.desc.type), tuple(each.max)) for each in in_), strict=True)
        return self._describe(types, shapes, exact=False)

    def _prepare(self, descs: Iterable[Any]) -> tuple[_CallT, _KernelsT]:
        """Return the call that inputs of these types and shapes are, and its kernels."""
        types, shapes = zip(*((_type_name(each.type), tuple(each.dims)) for each in descs), strict=True)
        call = self._describe(types, shapes, exact=True)
        return call, self._kernels(call.variant, self._own_gpu())

    def _own_gpu(self) -> Gpu:
        """Return the GPU to plan for: the current one, with no more multiprocessors than the workspace is made for."""
        if self._gpu is None:
            gpu = _gpu_here()
            if self.built is not None:
                if gpu.architecture != self.built.architecture:
                    raise BackendError(
                        f"this engine was built on a GPU of {self.built.architecture}, {gpu.name} is "
                        f"{gpu.architecture}",
                        "build the engine again on this machine",
                    )
                gpu = replace(gpu, processors=min(gpu.processors, self.built.processors))
            self._gpu = gpu
        return self._gpu
