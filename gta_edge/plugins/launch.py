"""The attention kernels on a GPU: compiled and loaded once, then launched on raw device addresses.

Knows of no framework. Whoever holds the memory (a session, an engine's plugin) gives addresses and a stream; a launch
allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.optional import optional
from gta_edge.plugins.compiler import compile_program, cuda_extra, driver_cuda_version
from gta_edge.plugins.plan import (
    MAX_INT32,
    KernelLaunch,
    Plan,
    decode_launches,
    plan_attention,
    prefill_launches,
    programs,
)
from gta_edge.plugins.tiling import Variant

__all__ = ["AttentionKernels", "Buffers", "Gpu", "attention_kernels", "current_gpu"]

OLDEST = (8, 0)
"""Compute capability that has asynchronous copies to shared memory and bf16 in tensor cores."""

_ALIGNMENT = 16
_ALIGNMENTS = {"past_length": 8, "key_scale": 4, "latent_scale": 4}
_SCALES = ("key_scale", "latent_scale")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAY_BE_ABSENT = (*_SCALES, "workspace")
_LAUNCHES_KEPT = 256
_STREAMS_KEPT = 16


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as the kernels care."""

    device_id: int
    name: str
    architecture: str
    """``sm_87``."""
    processors: int
    """Multiprocessors."""


@dataclass(frozen=True)
class Buffers:
    """Device addresses of the op's inputs and outputs: 16-bit floats of the variant's compute type, if not said else.

    All are multiples of 16 bytes, but for ``past_length`` (8) and the scales (4).

    Raises:
        BackendError: an address is missing or not aligned.
    """

    query: int
    """[B, T, n_q·d_k], before RoPE."""
    key: int
    """[B, T, n_k·d_k], before RoPE."""
    latent: int
    """[B, T, n_c·d_l]"""
    gate: int
    """[B, T, H], before the sigmoid."""
    key_cache: int
    """[B, n_k, S, d_k] of the variant's cache type, updated in place."""
    latent_cache: int
    """[B, n_c, S, d_l] of the variant's cache type, updated in place."""
    key_scale: int
    """float32 [B, n_k, S], updated in place; 0 if the cache has none."""
    latent_scale: int
    """float32 [B, n_c, S], updated in place; 0 if the cache has none."""
    past_length: int
    """int64 [B]"""
    cos: int
    """[P, d_k/2]"""
    sin: int
    """[P, d_k/2]"""
    value_decoder: int
    """[n_q, d_l, e·d_l]"""
    output: int
    """[B, T, H]"""
    workspace: int
    """``AttentionKernels.workspace_bytes`` bytes of no meaning between calls; 0 if that is 0."""

    def __post_init__(self) -> None:
        for name, address in vars(self).items():
            alignment = _ALIGNMENTS.get(name, _ALIGNMENT)
            if address % alignment:
                raise BackendError(
                    f"{name} is at address {address:#x}; expected a multiple of {alignment}: copy it to memory "
                    "that is aligned so"
                )
            if not address and name not in _MAY_BE_ABSENT:
                raise BackendError(f"{name} is at address 0; expected memory of the GPU")


@cache
def current_gpu(device_id: int = 0) -> Gpu:
    """Return a GPU's properties, which are asked for once.

    Args:
        device_id: CUDA's number for it.

    Raises:
        BackendError: there is no driver, no such GPU, or the kernels cannot run on it.
    """
    if driver_cuda_version() is None:
        raise BackendError(
            "there is no NVIDIA driver (libcuda.so.1 is not found); install it, in a container pass the GPU in "
            "(docker run --gpus all), or choose another backend"
        )
    core = optional("cuda.core", cuda_extra())
    try:
        device = core.Device(device_id)
        major, minor = device.compute_capability
        gpu = Gpu(device_id, device.name, f"sm_{major}{minor}", device.properties.multiprocessor_count)
    except BackendError:
        raise
    except Exception as error:  # CUDAError, ValueError, RuntimeError: by what fails
        raise BackendError(
            f"there is no usable CUDA device {device_id} ({_one_line(error)}); nvidia-smi lists those that there are"
        ) from error
    if (major, minor) < OLDEST:
        raise BackendError(
            f"{gpu.name} has compute capability {major}.{minor}; the kernels need {OLDEST[0]}.{OLDEST[1]} or later "
            "(Ampere, Jetson Orin): choose another backend"
        )
    return gpu


@cache
def attention_kernels(variant: Variant, gpu: Gpu) -> AttentionKernels:
    """Return the kernels of a variant on a GPU, compiled and loaded at the first call.

    Raises:
        BackendError: as for ``AttentionKernels``.
    """
    return AttentionKernels(variant, gpu)


class AttentionKernels:
    """All kernels of one variant, loaded on one GPU.

    Args:
        variant: the model's sizes and types.
        gpu: where they run.

    Raises:
        BackendError: the kernels do not fit the GPU, cannot be compiled, or not be loaded.
    """

    def __init__(self, variant: Variant, gpu: Gpu) -> None:
        self.variant, self.gpu = variant, gpu
        self.programs = programs(variant, gpu.architecture)
        self._core = optional("cuda.core", cuda_extra())
        cubins = {program: compile_program(program, gpu.architecture).cubin for program in self.programs.all}
        # Neither the kernels nor their shared memory depend on a call's sizes.
        samples = [decode_launches(self.programs.decode, gpu.processors, 1, 1, 1)]
        samples += [prefill_launches(program, 1, 1) for program in self.programs.prefill]
        with _current(gpu):
            # Now and not at their first launch, which may be in the capture of a graph.
            self._kernels = {
                (each.program, each.kernel): kernel
                for launches in samples
                for each, kernel in zip(launches, _load(launches, cubins[launches[0].program], gpu), strict=True)
            }
        self._stream = lru_cache(_STREAMS_KEPT)(self._core.Stream.from_handle)
        self.plan = lru_cache(_LAUNCHES_KEPT)(self._plan)
        self._prepared = lru_cache(_LAUNCHES_KEPT)(self._prepare)

    def workspace_bytes(self, batch: int, tokens: int, capacity: int) -> int:
        """Return the size of the workspace that a call with these sizes needs; 0 for long prompts.

        Args:
            batch: B.
            tokens: T.
            capacity: S.

        Raises:
            BackendError: a size that the kernels cannot take.
        """
        return self.plan(batch, tokens, capacity).workspace_bytes

    def launch(
        self,
        stream: Any,
        buffers: Buffers,
        *,
        batch: int,
        tokens: int,
        capacity: int,
        positions: int,
        scale: float,
    ) -> None:
        """Launch one call of the op.

        Args:
            stream: of the GPU: a ``cuda.core.Stream``, anything with ``__cuda_stream__``, or a handle. The GPU's
                context is current in the calling thread: handle 0 means the default stream of what is current.
            buffers: of the sizes below; they must live until the stream has passed the launches.
            batch: B, up to 65535.
            tokens: T, at most ``capacity``.
            capacity: S.
            positions: P.
            scale: factor of the scores, before the softmax; more than 0.

        Raises:
            BackendError: a size or an address that the kernels cannot take, or a launch failed.
        """
        plan, launches = self._prepared(batch, tokens, capacity, positions, scale)
        for name in _SCALES:
            if bool(getattr(buffers, name)) != self.variant.quantised:
                raise BackendError(
                    f"{name} is {'given' if getattr(buffers, name) else 'missing'}; a cache of type "
                    f"{self.variant.cache} has {'scales' if self.variant.quantised else 'none'}"
                )
        if plan.workspace_bytes and not buffers.workspace:
            raise BackendError(f"there is no workspace; expected {plan.workspace_bytes} bytes of the GPU's memory")
        addresses = dict(vars(buffers))
        for name, offset in plan.offsets.items():
            addresses[name] = buffers.workspace + offset
        launch = self._core.launch
        try:
            stream = self._as_stream(stream)
            for config, kernel, names, numbers in launches:
                launch(stream, config, kernel, *map(addresses.__getitem__, names), *numbers)
        except Exception as error:  # CUDAError, or TypeError for a stream that is none
            raise BackendError(
                f"the attention kernels could not be launched ({_one_line(error)}); expected a stream of device "
                f"{self.gpu.device_id}, {self.gpu.name}"
            ) from error

    def _as_stream(self, stream: Any) -> Any:
        """Return what cuda.core launches on; it would take a foreign stream too, but with a warning."""
        if isinstance(stream, self._core.Stream):
            return stream
        if hasattr(stream, "__cuda_stream__"):
            _, stream = stream.__cuda_stream__()
        return self._stream(stream) if isinstance(stream, int) else stream

    def _plan(self, batch: int, tokens: int, capacity: int) -> Plan:
        return plan_attention(self.programs, self.gpu.processors, batch=batch, tokens=tokens, capacity=capacity)

    def _prepare(
        self, batch: int, tokens: int, capacity: int, positions: int, scale: float
    ) -> tuple[Plan, tuple[Any, ...]]:
        """Return the plan, and of each launch all that does not depend on addresses, as cuda.core takes it."""
        plan = self.plan(batch, tokens, capacity)
        if tokens > capacity:
            raise BackendError(f"tokens is {tokens}; expected at most the capacity, {capacity}")
        # The largest product must give the largest score; what counts is the float32 that the kernels get.
        if not (0 < scale <= _MAX_FLOAT32 and np.float32(scale) > 0):
            raise BackendError(f"scale is {scale}; expected more than 0, and a number that float32 has")
        if not 1 <= positions <= MAX_INT32:
            raise BackendError(f"positions is {positions}; expected 1 to {MAX_INT32}")
        # An int of Python would be passed as 8 bytes, a float too.
        values: dict[str, Any] = {name: np.int32(value) for name, value in plan.numbers.items()}
        values |= {"positions": np.int32(positions), "scale": np.float32(scale)}
        return plan, tuple(
            (
                self._core.LaunchConfig(
                    grid=each.launch.grid, block=each.launch.threads, shmem_size=each.launch.shared_bytes
                ),
                self._kernels[each.program, each.kernel],
                each.signature.addresses,
                tuple(values[name] for name in each.signature.numbers),
            )
            for each in plan.launches
        )


@contextmanager
def _current(gpu: Gpu) -> Iterator[None]:
    """Make the GPU's primary context current, which is the one that frameworks use, and then what was before."""
    core, driver = optional("cuda.core", cuda_extra()), optional("cuda.bindings.driver", cuda_extra())
    with _loading(gpu):
        device = core.Device(gpu.device_id)
        before = _result(driver.cuCtxGetCurrent())
        device.set_current()
    try:
        yield
    finally:
        if int(before):
            driver.cuCtxSetCurrent(before)


def _load(launches: tuple[KernelLaunch, ...], cubin: bytes, gpu: Gpu) -> list[Any]:
    """Load a program's kernels for good, with leave for the shared memory that their launches ask for."""
    core, driver = optional("cuda.core", cuda_extra()), optional("cuda.bindings.driver", cuda_extra())
    kernels = []
    with _loading(gpu):
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = _result(driver.cuDeviceGet(gpu.device_id))
        code = core.ObjectCode.from_cubin(cubin, name=launches[0].program.source)
        for each in launches:
            kernel = code.get_kernel(each.kernel)
            _result(driver.cuKernelSetAttribute(attribute, each.launch.shared_bytes, kernel.handle, device))
            function = _result(driver.cuKernelGetFunction(kernel.handle))
            with suppress(RuntimeError):  # before CUDA 12.4 there is no such call, and the first launch loads
                driver.cuFuncLoad(function)
            kernels.append(kernel)
    return kernels


@contextmanager
def _loading(gpu: Gpu) -> Iterator[None]:
    """Translate what goes wrong while kernels are loaded."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # CUDAError, or RuntimeError of the driver's own functions
        version = driver_cuda_version()
        known = f"CUDA {version[0]}.{version[1]}" if version else "no CUDA"
        raise BackendError(
            f"the attention kernels cannot be loaded on {gpu.name} ({_one_line(error)}); its driver knows {known}: "
            f"update it, or run: pip install 'gta-edge[{cuda_extra()}]'"
        ) from error


def _result(answer: tuple[Any, ...]) -> Any:
    """Return what a function of the driver gave, or raise its error code."""
    status, *values = answer
    if int(status):
        raise RuntimeError(getattr(status, "name", str(status)))
    return values[0] if values else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
