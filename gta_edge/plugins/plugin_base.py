"""What all plugins of TensorRT here share: failures, the GPU, the fields, the creator, the registry.

A plugin derives from ``Plugin`` and says what its op is; ``plugin_class`` mixes in the classes of the TensorRT module
at hand. One object is the plugin and its three capabilities: core, build and runtime.

TensorRT calls the methods from C++. Its bindings catch what they raise, write it to stderr and give TensorRT an error,
so that the build or the run fails; ``take_failures`` has the messages for those who want to raise them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, wraps
from threading import Lock
from typing import Any, ClassVar, Protocol, TypeVar

from gta_edge.cuda.gpu import Gpu, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import cuda_extra
from gta_edge.libraries.optional import optional
from gta_edge.libraries.tensorrt import TensorRT
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.plugin_fields import Fields, FieldTypes, Value, read_fields

__all__ = [
    "Creator",
    "Plugin",
    "Settled",
    "creator_class",
    "cuda_driver",
    "gpu_here",
    "plugin_class",
    "register_creators",
    "reported",
    "take_failures",
    "type_name",
]

_FAILURES_KEPT = 16
_DATA_TYPES = {dtype.tensorrt: dtype.name for dtype in DTYPES.values()} | {"INT32": "int32", "INT64": "int64"}


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


def reported(method: _Method) -> _Method:
    """Keep the message of what a method raises, for ``take_failures``."""

    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception as error:  # whatever it is, TensorRT would hide it; it goes on as it was
            _failures.append(" ".join(str(error).split()) or type(error).__name__)
            raise

    return call  # type: ignore[return-value]  # the same signature, which ParamSpec cannot say of methods


# --- TensorRT's types and the GPU ------------------------------------------------------------------------------------


@cache
def type_name(data_type: Any) -> str:
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


def gpu_here() -> Gpu:
    """Return the GPU that is current in this thread.

    Raises:
        BackendError: there is none, or one that the kernels cannot run on.
    """
    return current_gpu(_current_device())


# --- the plugin ------------------------------------------------------------------------------------------------------


class Settled(Protocol):
    """What a build settled: the engine fits this, and its workspace was reserved for it."""

    @property
    def architecture(self) -> str:
        """Of the GPU that it was built on, ``sm_87``."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the GPU that it was built on."""


class Plugin:
    """What a plugin does for all ops alike; a subclass says what its own does.

    An object is used by one thread at a time, as TensorRT promises. What objects share is the kernels, which do not
    change once they are loaded.

    Args:
        parameters: the node's attributes.
        built: what a build settled, once there was one.
    """

    trt: ClassVar[Any]
    bases: ClassVar[tuple[Any, ...]]
    op: ClassVar[str]
    version: ClassVar[int]
    domain: ClassVar[str]

    plugin_name: str
    plugin_version: str
    plugin_namespace: str
    num_outputs: int
    timing_cache_id: str
    metadata_string: str

    def __init__(self, parameters: Any, built: Any = None) -> None:
        for base in self.bases:
            base.__init__(self)
        self.parameters, self.built = parameters, built
        self.plugin_name, self.plugin_version, self.plugin_namespace = self.op, str(self.version), self.domain
        self.num_outputs = self._number_of_outputs()
        self.timing_cache_id = self.metadata_string = json.dumps(self._field_values(None))
        self._gpu: Gpu | None = None
        self._serialised: Fields | None = None

    # -- what an op says of itself; TensorRT's other methods are its own too
    # Not abstract methods: ABC's metaclass does not go with that of the bindings' classes, which are mixed in.

    def _number_of_outputs(self) -> int:
        """Return it; TensorRT asks before it shows the inputs."""
        raise NotImplementedError

    def _field_values(self, built: Any) -> dict[str, Value]:
        """Return all that the plugin is made of, by the field's name."""
        raise NotImplementedError

    def _allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> Sequence[str]:
        """Return the types that an input or output may have, given those of all before it; none if there is no such."""
        raise NotImplementedError

    def _load_kernels(self, gpu: Gpu) -> None:
        """Compile and load the kernels of what was built."""
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
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Tell whether an input or output may have its type and format, given those of all before it."""
        if in_out[pos].desc.format != self.trt.TensorFormat.LINEAR:
            return False
        types = [type_name(each.desc.type) for each in in_out[: pos + 1]]
        return types[pos] in self._allowed_types(pos, types, num_inputs)

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
            attached._load_kernels(attached._own_gpu())
        return attached

    @reported
    def get_fields_to_serialize(self) -> Any:
        """Return all that ``create_plugin`` needs to make this plugin again."""
        # The bindings copy the addresses only; so what is at them lives as long as the plugin.
        self._serialised = Fields(self.trt, self._field_values(self.built))
        return self._serialised.collection

    # -- within

    def _own_gpu(self) -> Gpu:
        """Return the GPU to plan for: the current one, with no more multiprocessors than the workspace is made for."""
        if self._gpu is None:
            built: Settled | None = self.built
            gpu = gpu_here()
            if built is not None:
                if gpu.architecture != built.architecture:
                    raise BackendError(
                        f"this engine was built on a GPU of {built.architecture}, {gpu.name} is {gpu.architecture}",
                        "build the engine again on this machine",
                    )
                gpu = replace(gpu, processors=min(gpu.processors, built.processors))
            self._gpu = gpu
        return self._gpu


class Creator:
    """Makes plugins from a node's attributes, and from what an engine holds of them."""

    trt: ClassVar[Any]
    base: ClassVar[Any]
    op: ClassVar[str]
    version: ClassVar[int]
    domain: ClassVar[str]
    fields: ClassVar[FieldTypes]

    name: str
    plugin_version: str
    plugin_namespace: str
    field_names: Any

    def __init__(self) -> None:
        self.base.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = self.op, str(self.version), self.domain
        # The parser passes on the attributes that are declared here.
        examples = {name: (1,) if kind is tuple else kind(1) for name, kind in self.fields.attributes.items()}
        self._declared = Fields(self.trt, examples)
        self.field_names = self._declared.collection

    @reported
    def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
        """Make a plugin.

        Args:
            name: of the layer.
            field_collection: the node's attributes, in the phase RUNTIME what ``get_fields_to_serialize`` returned.
            phase: BUILD or RUNTIME.

        Raises:
            BackendError: a field is missing, unknown, ill-typed or out of range.
        """
        values = read_fields(self.trt, self.fields, field_collection)
        return self._create(values, phase == self.trt.TensorRTPhase.BUILD)

    def _create(self, values: dict[str, Any], building: bool) -> Any:
        """Make a plugin of the values of its fields."""
        raise NotImplementedError  # each op's creator has it; why it is not abstract: see Plugin


# --- the classes over one TensorRT module ----------------------------------------------------------------------------


def plugin_class(trt: Any, behaviour: type[Plugin], name: str | None = None, build: Any = None) -> Any:
    """Return a plugin's class: its behaviour, and TensorRT's classes mixed in.

    Args:
        trt: the TensorRT module.
        behaviour: what the plugin does.
        name: of the class; the op's if none is given.
        build: TensorRT's class of the build capability; ``IPluginV3OneBuild`` if none is given.
    """
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, build or trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    # The bindings' classes have a metaclass of their own.
    return type(trt.IPluginV3)(name or behaviour.op, (behaviour, *bases), {"trt": trt, "bases": bases})


def creator_class(trt: Any, behaviour: type[Creator]) -> Any:
    """Return a creator's class, like ``plugin_class``."""
    base = trt.IPluginCreatorV3One
    return type(base)(f"{behaviour.op}Creator", (behaviour, base), {"trt": trt, "base": base})


# --- the registry ----------------------------------------------------------------------------------------------------

_creators: list[Any] = []  # the registry refers to them for as long as the process lives
_registering = Lock()


def register_creators(trt: TensorRT, creators: Sequence[type[Creator]]) -> None:
    """Register creators, except those that are registered.

    Args:
        trt: whose registry.
        creators: their behaviours.

    Raises:
        BackendError: it has no plugins, or refuses one.
    """
    if not trt.plugins:
        raise BackendError(
            f"{trt.flavour} {trt.version_text} takes no plugins",
            "build the form without them: gta-edge build --engine tensorrt-rtx",
        )
    with _registering:
        registry = trt.module.get_plugin_registry()
        for each in creators:
            if registry.get_creator(each.op, str(each.version), each.domain) is not None:
                continue
            creator = creator_class(trt.module, each)()
            if not registry.register_creator(creator, each.domain):
                raise BackendError(
                    f"{trt.flavour} {trt.version_text} did not register the plugin {each.domain}::{each.op} version "
                    f"{each.version}",
                    "start a new process in which nothing else of that name is registered",
                )
            _creators.append(creator)
