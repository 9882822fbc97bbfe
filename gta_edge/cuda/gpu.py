"""A GPU, kernels loaded on it, and their launch on a stream: what all of the plugins' kernels have in common.

Knows of no framework and of no op.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from gta_edge.cuda.architecture import Launch
from gta_edge.cuda.compiler import Compilable, compile_program
from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import cuda_extra, driver_cuda_version, driver_problem, nvrtc_distribution
from gta_edge.libraries.optional import optional

__all__ = ["OLDEST", "Gpu", "Launcher", "check_addresses", "current_gpu"]

OLDEST = (8, 0)
"""Compute capability that has asynchronous copies to shared memory and bf16 in tensor cores."""

_ALIGNMENT = 16
"""Bytes that kernels read at once."""
_STREAMS_CACHED = 16


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as the kernels care."""

    device_id: int
    name: str
    architecture: str
    """``sm_87``."""
    processors: int
    """Multiprocessors."""


@cache
def current_gpu(device_id: int = 0) -> Gpu:
    """Return a GPU's properties, which are asked for once.

    Args:
        device_id: CUDA's number for it.

    Raises:
        BackendError: there is no driver that starts, no such GPU, or the kernels cannot run on it.
    """
    if driver_cuda_version() is None:
        raise driver_problem() or BackendError("the NVIDIA driver does not say what CUDA it knows", "install it again")
    core = optional("cuda.core", cuda_extra())
    try:
        device = core.Device(device_id)
        major, minor = device.compute_capability
        gpu = Gpu(device_id, device.name, f"sm_{major}{minor}", device.properties.multiprocessor_count)
    except BackendError:
        raise
    except Exception as error:  # CUDAError, ValueError, RuntimeError: by what fails
        raise BackendError(
            f"there is no usable CUDA device {device_id} ({_one_line(error)})", "nvidia-smi lists those that there are"
        ) from error
    if (major, minor) < OLDEST:
        raise BackendError(
            f"{gpu.name} has compute capability {major}.{minor}",
            f"the kernels need {OLDEST[0]}.{OLDEST[1]} or later (Ampere, Jetson Orin): choose another backend",
        )
    return gpu


def check_addresses(
    addresses: Iterable[tuple[str, int]], alignments: Mapping[str, int], optional: Collection[str]
) -> None:
    """See that a kernel can be given these addresses.

    Args:
        addresses: in the GPU's memory, by the argument's name; 0 for none.
        alignments: bytes that an address must be a multiple of, where these are not 16.
        optional: arguments that there need not be.

    Raises:
        BackendError: one is missing or not aligned.
    """
    for name, address in addresses:
        alignment = alignments.get(name, _ALIGNMENT)
        if address % alignment:
            raise BackendError(
                f"{name} is at address {address:#x}",
                f"expected a multiple of {alignment}: copy it to memory that is aligned so",
            )
        if not address and name not in optional:
            raise BackendError(f"{name} is at address 0", "expected memory of the GPU")


class Launcher:
    """Loads kernels on one GPU, for good, and launches them.

    Args:
        gpu: where they run.
        name: what they are called in errors, ``"attention"``.
        sources: directory of their sources.

    Raises:
        BackendError: CUDA's Python modules are missing.
    """

    def __init__(self, gpu: Gpu, name: str, sources: Path) -> None:
        self.gpu, self.name, self._sources = gpu, name, sources
        self._core = optional("cuda.core", cuda_extra())
        self._stream = lru_cache(_STREAMS_CACHED)(self._core.Stream.from_handle)

    def load(self, programs: Mapping[Compilable, Mapping[str, int]]) -> dict[tuple[Compilable, str], Any]:
        """Compile programs and return their kernels, loaded.

        Args:
            programs: of each, its kernels' names and the most dynamic shared memory that a launch asks for.

        Raises:
            BackendError: they cannot be compiled or not be loaded.
        """
        cubins = {program: compile_program(program, self.gpu.architecture, self._sources).cubin for program in programs}
        # Now and not at their first launch, which may be in the capture of a graph.
        with self._current():
            return {
                (program, name): kernel
                for program, shared_bytes in programs.items()
                for name, kernel in self._load(program.source, cubins[program], shared_bytes).items()
            }

    def config(self, launch: Launch) -> Any:
        """Return a grid and a block as cuda.core takes them."""
        return self._core.LaunchConfig(grid=launch.grid, block=launch.threads, shmem_size=launch.shared_bytes)

    def launch(self, stream: Any, calls: Iterable[tuple[Any, ...]]) -> None:
        """Launch kernels one after the other.

        Args:
            stream: of the GPU: a ``cuda.core.Stream``, anything with ``__cuda_stream__``, or a handle. The GPU's
                context is current in the calling thread: handle 0 means the default stream of what is current.
            calls: of each its config, its kernel, and its arguments.

        Raises:
            BackendError: a launch failed.
        """
        launch = self._core.launch
        try:
            stream = self._as_stream(stream)
            for config, kernel, *arguments in calls:
                launch(stream, config, kernel, *arguments)
        except Exception as error:  # CUDAError, or TypeError for a stream that is none
            raise BackendError(
                f"the {self.name} kernels could not be launched ({_one_line(error)})",
                f"expected a stream of device {self.gpu.device_id}, {self.gpu.name}",
            ) from error

    def _as_stream(self, stream: Any) -> Any:
        """Return what cuda.core launches on; it would take a foreign stream too, but with a warning."""
        if isinstance(stream, self._core.Stream):
            return stream
        if hasattr(stream, "__cuda_stream__"):
            _, stream = stream.__cuda_stream__()
        return self._stream(stream) if isinstance(stream, int) else stream

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the GPU's primary context current, which is the one that frameworks use, and then what was before."""
        driver = optional("cuda.bindings.driver", cuda_extra())
        with self._loading():
            device = self._core.Device(self.gpu.device_id)
            before = _result(driver.cuCtxGetCurrent())
            device.set_current()
        try:
            yield
        finally:
            if int(before):
                driver.cuCtxSetCurrent(before)

    def _load(self, source: str, cubin: bytes, shared_bytes: Mapping[str, int]) -> dict[str, Any]:
        """Load a program's kernels for good, with leave for the shared memory that their launches ask for."""
        driver = optional("cuda.bindings.driver", cuda_extra())
        kernels = {}
        with self._loading():
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = _result(driver.cuDeviceGet(self.gpu.device_id))
            code = self._core.ObjectCode.from_cubin(cubin, name=source)
            for name, most_bytes in shared_bytes.items():
                kernel = kernels[name] = code.get_kernel(name)
                _result(driver.cuKernelSetAttribute(attribute, most_bytes, kernel.handle, device))
                function = _result(driver.cuKernelGetFunction(kernel.handle))
                with suppress(RuntimeError):  # before CUDA 12.4 there is no such call, and the first launch loads
                    driver.cuFuncLoad(function)
        return kernels

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Translate what goes wrong while kernels are loaded."""
        try:
            yield
        except BackendError:
            raise
        except Exception as error:  # CUDAError, or RuntimeError of the driver's own functions
            version = driver_cuda_version()
            known = f"CUDA {version[0]}.{version[1]}" if version else "no CUDA"
            below = f"<{version[0]}.{version[1] + 1}" if version else ""  # NVRTC's cubins are for its own CUDA or later
            raise BackendError(
                f"the {self.name} kernels cannot be loaded on {self.gpu.name} ({_one_line(error)})",
                f"its driver knows {known}: update it, or run: pip install '{nvrtc_distribution()}{below}'",
            ) from error


def _result(answer: tuple[Any, ...]) -> Any:
    """Return what a function of the driver gave, or raise its error code."""
    status, *values = answer
    if int(status):
        raise RuntimeError(getattr(status, "name", str(status)))
    return values[0] if values else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
