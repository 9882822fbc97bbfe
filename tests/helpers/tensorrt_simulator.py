"""TensorRT's runtime and CUDA's driver on the host, for the session's tests where there is no GPU.

Memory is the host's, an engine is a prepared model that ONNX Runtime runs on it, and the rules that a session can break
are checked: work that is queued happens when the stream is waited for, and not before; copies are between the GPU's
memory and pinned memory; nothing is allocated or waited for while a graph is captured; a captured graph reads and
writes the addresses that it was captured with; shapes are within the profile, and have run before they are captured;
memory is not zero until it is set, and is given back. What TensorRT computes, and how fast, is for tests on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest

from gta_edge.cuda import session as runtime_cuda
from gta_edge.cuda.gpu import Gpu
from gta_edge.formats.artifacts import made_from
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.tensorrt import TensorRT
from gta_edge.numerics.dtypes import CACHES
from gta_edge.runtime.tensorrt import session as runtime_tensorrt
from gta_edge.runtime.tensorrt.build import profile_shapes
from gta_edge.runtime.tensorrt.engine import EngineManifest, EngineSpec
from gta_edge.runtime.tensorrt.lower import lower
from gta_edge.runtime.tensorrt.session import TensorRTSession
from tests.helpers.block_engine import PluginGraph
from tests.helpers.engines import keep_engine

driver_enums = pytest.importorskip("cuda.bindings.driver", reason="the package cuda-bindings is needed")

GPU = Gpu(0, "a simulated GPU", "sm_87", 8)
VERSION = "0.0 (simulated)"
STREAM = 1

_RESULT = driver_enums.CUresult
_OK = _RESULT.CUDA_SUCCESS
_ONNX_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_ONNX_TYPES |= {"tensor(int8)": np.int8}


@dataclass
class Driver:
    """CUDA's driver: as many of its functions as sessions call, each returning a status first.

    Args:
        memory_bytes: of the GPU.
        block_bytes: the most that it gives at once.
        pinned_bytes: the most that it pins of the host's.
        integrated: whether its memory is the host's.
    """

    memory_bytes: int = 2**28
    block_bytes: int = 2**28
    pinned_bytes: int = 2**28
    integrated: bool = False
    live: dict[int, tuple[Any, str]] = field(default_factory=dict)
    """Buffers by address, and whose memory it is: ``device`` or ``pinned``."""
    calls: list[str] = field(default_factory=list)
    pending: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None
    graphs: list[list[Callable[[], None]]] = field(default_factory=list)
    freed_graphs: set[int] = field(default_factory=set)
    stale: set[int] = field(default_factory=set)
    """Graphs of contexts whose shapes have changed since."""
    objects: int = 0
    """Engines and contexts that are alive: they must be gone before the GPU's context is."""
    current: int = 0
    """The GPU's context that is current; 0 for none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return getattr(driver_enums, name)
        raise AttributeError(name)

    def used_bytes(self, whose: str = "device") -> int:
        return sum(len(buffer) for buffer, kind in self.live.values() if kind == whose)

    def within(self, address: int, size: int, kind: str) -> bool:
        return any(
            start <= address and address + size <= start + len(buffer) and kind == whose
            for start, (buffer, whose) in self.live.items()
        )

    def gone(self) -> None:
        self.objects -= 1

    def queue(self, work: Callable[[], None]) -> None:
        (self.pending if self.captured is None else self.captured).append(work)

    def _allocated(self, size: int, kind: str) -> tuple[Any, ...]:
        self.calls.append(f"allocate {kind}")
        if not self.current:
            return _RESULT.CUDA_ERROR_INVALID_CONTEXT, None
        if self.captured is not None:
            return _RESULT.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        limit = self.memory_bytes if kind == "device" else self.pinned_bytes
        if self.used_bytes(kind) + size > limit or (kind == "device" and size > self.block_bytes):
            return _RESULT.CUDA_ERROR_OUT_OF_MEMORY, None
        buffer = (ctypes.c_ubyte * size)()
        address = ctypes.addressof(buffer)
        ctypes.memset(address, 0xFF, size)  # NaN, -1
        self.live[address] = buffer, kind
        return _OK, address

    def _freed(self, address: int, kind: str) -> tuple[Any]:
        if not self.current:
            return (_RESULT.CUDA_ERROR_INVALID_CONTEXT,)
        if self.live.get(address, (None, ""))[1] != kind:
            return (_RESULT.CUDA_ERROR_INVALID_VALUE,)
        del self.live[address]
        return (_OK,)

    def _copied(self, to: int, source: int, size: int, kinds: tuple[str, str]) -> tuple[Any]:
        self.calls.append(f"copy {kinds[1]} to {kinds[0]}")
        if not self.current:
            return (_RESULT.CUDA_ERROR_INVALID_CONTEXT,)
        if not (self.within(to, size, kinds[0]) and self.within(source, size, kinds[1])):
            return (_RESULT.CUDA_ERROR_INVALID_VALUE,)
        self.queue(lambda: ctypes.memmove(to, source, size) and None)
        return (_OK,)

    # the driver's functions, with the driver's names

    def cuInit(self, flags: int) -> tuple[Any]:
        return (_OK,)

    def cuDeviceGet(self, number: int) -> tuple[Any, int]:
        return _OK, number

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, int]:
        return _OK, int(self.integrated and attribute == driver_enums.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        self.calls.append("retain")
        return _OK, 1

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.calls.append("release")
        assert not self.objects, "TensorRT's objects outlive the GPU's context"
        return (_OK,)

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return _OK, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[Any]:
        self.current = context
        return (_OK,)

    def cuStreamCreate(self, flags: Any) -> tuple[Any, int]:
        return (_OK if self.current else _RESULT.CUDA_ERROR_INVALID_CONTEXT), STREAM

    def cuStreamDestroy(self, stream: int) -> tuple[Any]:
        return (_OK,)

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        return _OK, self.memory_bytes - self.used_bytes(), self.memory_bytes

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        return self._allocated(size, "device")

    def cuMemAllocHost(self, size: int) -> tuple[Any, ...]:
        return self._allocated(size, "pinned")

    def cuMemFree(self, address: int) -> tuple[Any]:
        return self._freed(address, "device")

    def cuMemFreeHost(self, address: int) -> tuple[Any]:
        return self._freed(address, "pinned")

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        if not self.within(address, size, "device"):
            return (_RESULT.CUDA_ERROR_INVALID_VALUE,)
        self.queue(lambda: ctypes.memset(address, value, size) and None)
        return (_OK,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self._copied(to, source, size, ("device", "pinned"))

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self._copied(to, source, size, ("pinned", "device"))

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self._copied(to, source, size, ("device", "device"))

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        if self.captured is not None:
            return (_RESULT.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        while self.pending:
            self.pending.pop(0)()
        return (_OK,)

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self.calls.append("capture")
        self.captured = []
        return (_OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, int]:
        assert self.captured is not None
        self.graphs.append(self.captured)
        self.captured = None
        return _OK, len(self.graphs) - 1

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        return _OK, graph

    def cuGraphDestroy(self, graph: int) -> tuple[Any]:
        return (_OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[Any]:
        self.freed_graphs.add(graph)
        return (_OK,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:
        self.calls.append("replay")
        if graph in self.freed_graphs or graph in self.stale or not self.current:
            return (_RESULT.CUDA_ERROR_INVALID_VALUE,)
        for work in self.graphs[graph]:
            self.queue(work)
        return (_OK,)


@dataclass(eq=False)
class Context:
    """An execution context."""

    driver: Driver
    engine: Engine
    profile: int | None = None
    scratch: tuple[int, int] = (0, 0)
    graphs: set[int] = field(default_factory=set)
    """Those that were captured with it."""
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ran: list[dict[str, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver.objects += 1
        weakref.finalize(self, self.driver.gone)

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < len(self.engine.profiles)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert self.profile is not None
        least, _, most = self.engine.profiles[self.profile][name]
        within = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if within and self.shapes.get(name) != tuple(shape):
            self.shapes[name] = tuple(shape)
            self.driver.stale |= self.graphs  # "when change the input shapes, you have to re-capture the graph"
        return within

    def execute_async_v3(self, stream: int) -> bool:
        self.driver.calls.append("run")
        capturing = self.driver.captured is not None
        if stream != STREAM or not self.driver.current or (capturing and self.shapes not in self.ran):
            return False
        if not self.driver.within(*self.scratch, "device") or self.scratch[1] < self.engine.scratch_bytes(self.profile):
            self.engine.log.log(0, "there is too little scratch memory")
            return False
        if capturing:
            if not self.engine.captures:
                self.engine.log.log(0, "something that cannot be captured")
                return False
            self.graphs.add(len(self.driver.graphs))
        inputs = [
            (each.name, self.addresses[each.name], self.shapes[each.name], each.type) for each in self.engine.inputs
        ]
        for name, address, shape, kind in inputs:
            if not self.driver.within(address, prod(shape) * np.dtype(_ONNX_TYPES[kind]).itemsize, "device"):
                self.engine.log.log(0, f"{name} is not in the GPU's memory")
                return False
        outputs = [(each.name, self.addresses[each.name]) for each in self.engine.outputs]
        self.ran.append(dict(self.shapes))

        driver, session = self.driver, self.engine.session  # what is queued keeps no context alive

        def work() -> None:
            feeds = {name: _array(address, shape, _ONNX_TYPES[kind]) for name, address, shape, kind in inputs}
            results = session.run([name for name, _ in outputs], feeds)
            for (name, address), result in zip(outputs, results, strict=True):
                assert driver.within(address, result.nbytes, "device"), name
                ctypes.memmove(address, result.ctypes.data, result.nbytes)

        self.driver.queue(work)
        return True


class RuntimeCache:
    """Kernels that were compiled while engines ran: their number."""

    def __init__(self) -> None:
        self.kernels = 0

    def deserialize(self, blob: Any) -> bool:
        known = bytes(blob).startswith(b"kernels ")
        if known:
            self.kernels = int(bytes(blob).split()[1])
        return known

    def serialize(self) -> memoryview:
        return memoryview(f"kernels {self.kernels}".encode())


class RuntimeConfig:
    """What TensorRT-RTX asks for instead of a strategy."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        pass

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    """An engine: a prepared model, and the profiles it was built with."""

    def __init__(self, driver: Driver, log: Any, plan: Any) -> None:
        document = json.loads(bytes(plan))
        self.driver, self.log = driver, log
        self.capturable, self.captures = document["capturable"], document["captures"]
        self.profiles: list[Mapping[str, Any]] = document["profiles"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # no activations in int8
        self.session: Any = (
            PluginGraph(document["model"])
            if document["plugin"]
            else onnxruntime.InferenceSession(document["model"], options, providers=["CPUExecutionProvider"])
        )
        self.inputs, self.outputs = self.session.get_inputs(), self.session.get_outputs()
        self.names = {each.name for each in (*self.inputs, *self.outputs)}
        self.kinds: list[str] = []  # of kernels that contexts want compiled
        self.contexts: list[weakref.ref[Context]] = []
        driver.objects += 1
        weakref.finalize(self, driver.gone)

    def scratch_bytes(self, profile: int | None) -> int:
        return 1000 * (1 + (profile or 0))

    get_device_memory_size_for_profile_v2 = scratch_bytes

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any) -> Context:
        if isinstance(how, RuntimeConfig):
            assert how.cache is not None
            how.cache.kernels = max(how.cache.kernels, 2)
            self.kinds.append(how.dynamic_shapes_kernel_specialization_strategy)
        made = Context(self.driver, self)
        self.contexts.append(weakref.ref(made))
        return made

    @property
    def alive(self) -> list[Context]:
        """The contexts that are not freed yet."""
        return [context for each in self.contexts if (context := each()) is not None]


def _module(driver: Driver) -> Any:
    """TensorRT's module."""

    class ILogger:
        ERROR = 1

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: Any) -> Engine:
            return Engine(driver, self.log, plan)

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", LAZY="lazy"),
    )


def build(bundle: Bundle, spec: EngineSpec, directory: Path, *, capturable: bool = True, captures: bool = True) -> None:
    """Put an engine for the simulation into a bundle, and the model that it stands for into a directory.

    That of a cache in blocks has the plugin's nodes (``block_engine``), others are standard operators.
    """
    plugin = CACHES[spec.cache_dtype].in_blocks
    capacities = spec.capacities(bundle.config)
    options = {"compute": spec.compute, "capacity": capacities[0]}
    if spec.features:
        options |= {"capacity": capacities, "features": spec.features}
    options |= {"form": "plugin", "cache_dtype": spec.cache_dtype} if plugin else {"form": "function"}
    model = lower(bundle, directory, **options)
    document = {"model": str(model), "profiles": profile_shapes(bundle, spec), "plugin": plugin}
    document |= {"capturable": capturable, "captures": captures}
    record = EngineManifest(spec, made_from(bundle), VERSION, ["8.7"])
    keep_engine(bundle, record, json.dumps(document).encode(), force=True)


@contextmanager
def simulated(driver: Driver, compiles_at_run_time: bool = False) -> Iterator[None]:
    """Let sessions that are opened in the body find TensorRT and a GPU."""
    trt = TensorRT(
        module=_module(driver),
        flavour="tensorrt-rtx",
        version=(0, 0),
        version_text=VERSION,
        builds=False,
        plugins=False,
        namespace_by_domain=True,
        strongly_typed_flag=False,
        parses_newer_ops=True,
        times_kernels=False,
        compiles_at_run_time=compiles_at_run_time,
    )
    with (
        patch.object(runtime_cuda, "optional", lambda *_: driver),
        patch.object(runtime_tensorrt, "current_gpu", lambda _: GPU),
        patch.object(runtime_tensorrt, "load", lambda _: trt),
    ):
        yield


def open_simulated(
    bundle: Bundle, engine: str, driver: Driver | None = None, *, compiles_at_run_time: bool = False, **options: Any
) -> TensorRTSession:
    """Open a session of an engine that ``build`` made."""
    with simulated(driver or Driver(), compiles_at_run_time):
        return TensorRTSession(bundle, engine=engine, **options)


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
