"""Measures the machine that a plan is for when no device is named: memory, bandwidth, and the rate of matmuls."""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import Gpu, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import cuda_extra
from gta_edge.libraries.optional import optional
from gta_edge.machine.devices import Device
from gta_edge.support.cores import usable_cores
from gta_edge.support.memory import available_bytes, total_bytes
from gta_edge.support.text import one_line

__all__ = ["cpu_bandwidth", "measure", "measure_cpu", "measure_gpu"]

CPU_EFFICIENCY = 0.9
_CPU_RUNTIME_BYTES = 80_000_000  # Python, numpy and ONNX Runtime before a model is loaded: docs/plan.md
_CPU_OPERATOR_S = 1.5e-6
_GPU_EFFICIENCY = 0.8
_GPU_RUNTIME_BYTES = 600_000_000

_READ_BYTES = 2**27  # by each core: more than caches hold
_MIN_READ_BYTES = 2**23
_READ_SECONDS = 0.5
_MATRIX = 1024
_GPU_COPY_BYTES = 2**29
_MIN_COPY_BYTES = 2**26  # free; smaller copies would measure its caches

# Dense operations per multiprocessor and clock in fp32, in fp16 with float32 sums, and in int8, by compute capability:
# NVIDIA's architecture whitepapers.
_PER_CLOCK = {
    "sm_80": (128, 2048, 4096),
    "sm_86": (256, 512, 2048),
    "sm_87": (256, 2048, 4096),
    "sm_89": (256, 512, 2048),
    "sm_90": (256, 4096, 8192),
    "sm_100": (256, 8192, 16384),
    "sm_110": (256, 8192, 16384),
    "sm_120": (256, 512, 2048),
    "sm_121": (256, 1024, 2048),
}


def measure(name: str) -> Device:
    """Return this machine: its GPU if it has one that can be used, otherwise its CPU; ``this-cpu`` its CPU at once.

    A CPU that was not asked for says why it is not the GPU.
    """
    if name == "this-cpu":
        return measure_cpu(name)
    try:
        return measure_gpu()
    except BackendError as error:
        return replace(measure_cpu(name), fallback_reason=str(error))


# --- the CPU ---------------------------------------------------------------------------------------------------------


def measure_cpu(name: str = "this-cpu") -> Device:
    """Measure memory, the bandwidth that all cores read at, and the rate of float32 matmuls. Takes about a second.

    Raises:
        BackendError: the system does not say how much memory there is.
    """
    total, free = _memory()
    cores = usable_cores()
    rate = _matmul_rate()
    return Device(
        name=name,
        title=f"{_processor()}, {cores} cores",
        kind="cpu",
        memory_bytes=total,
        system_bytes=total - free,
        runtime_bytes=_CPU_RUNTIME_BYTES,
        bandwidth=_read_bandwidth(cores),
        rates={"fp32": rate, "fp16": rate, "int8": rate},
        efficiency=CPU_EFFICIENCY,
        operator_s=_CPU_OPERATOR_S,
        source="measured just now: reading with all cores, and float32 matmuls",
        verified=True,
        assumptions=("system: what other programs take now", "other programs that run now make both slower"),
    )


def cpu_bandwidth() -> float:
    """Return the bytes per second at which the cores that this process may use read memory together. Takes a second."""
    return _read_bandwidth(usable_cores())


def _read_bandwidth(cores: int) -> float:
    """Return the bytes per second at which all cores together read memory that no cache holds.

    Raises:
        BackendError: there is no memory to read.
    """
    free = available_bytes()
    each = _READ_BYTES if free is None else min(_READ_BYTES, free // (2 * cores))
    if each < _MIN_READ_BYTES:
        raise BackendError(
            f"{(free or 0) / 1e6:.0f} MB of memory are available, too little to measure with",
            "close other programs, or name a --device",
        )
    parts = [np.ones(each // 4, np.float32) for _ in range(cores)]
    size = sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(cores) as pool:
        return _best(lambda: list(pool.map(np.max, parts)), size)


def _matmul_rate() -> float:
    """Return the FLOPs per second of a float32 matmul of square matrices, by what numpy multiplies with."""
    matrix: npt.NDArray[np.float32] = np.ones((_MATRIX, _MATRIX), np.float32)
    return _best(lambda: matrix @ matrix, 2 * _MATRIX**3)


def _best(work: Any, amount: float) -> float:
    """Return the best rate of several runs within the time allowed, of two at least."""
    work()
    best, start = 0.0, time.perf_counter()
    while True:
        begin = time.perf_counter()
        work()
        end = time.perf_counter()
        best = max(best, amount / (end - begin))
        if end - start > _READ_SECONDS:
            return best


def _memory() -> tuple[int, int]:
    """Return the bytes of memory in all that this process may have, and those that new work can take."""
    total, free = total_bytes(), available_bytes()
    if total is None or free is None:
        raise BackendError("the system does not say how much memory there is (no /proc/meminfo)", "name a --device")
    return total, min(free, total)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.machine()


# --- the GPU ---------------------------------------------------------------------------------------------------------


def measure_gpu(name: str = "this") -> Device:
    """Measure a GPU's memory and the bandwidth of a copy in it; its rates follow from its kind and clock.

    Raises:
        BackendError: there is no GPU that the kernels run on, or no cuda-core.
    """
    gpu = current_gpu()
    per_clock = _PER_CLOCK.get(gpu.architecture)
    if per_clock is None:
        known = ", ".join(_PER_CLOCK)
        raise BackendError(f"{gpu.name} is {gpu.architecture}", f"rates are known of {known}: name a --device")
    core = optional("cuda.core", cuda_extra())
    try:
        device = core.Device(gpu.device_id)
        device.set_current()
        free, total = _gpu_memory()
        clock_hz, shared = 1e3 * device.properties.clock_rate, bool(device.properties.integrated)
        if shared:  # what CUDA calls free leaves out file caches, which can go
            total, free = _memory()
        _check_usable(gpu, free, clock_hz)
        bandwidth = _copy_bandwidth(device, min(_GPU_COPY_BYTES, free // 4))
    except BackendError:
        raise
    except Exception as error:  # CUDAError or a driver's code: memory that is full, a GPU that is another's alone
        raise BackendError(
            f"{gpu.name} cannot be used ({one_line(error)})",
            "end the programs that nvidia-smi lists there, or name a --device",
        ) from error
    rates = dict(zip(("fp32", "fp16", "int8"), (gpu.processors * clock_hz * n for n in per_clock), strict=True))
    return Device(
        name=name,
        title=f"{gpu.name}, {gpu.architecture}",
        kind="gpu",
        memory_bytes=total,
        system_bytes=total - free,
        runtime_bytes=_GPU_RUNTIME_BYTES,
        bandwidth=bandwidth,
        rates=rates,
        efficiency=_GPU_EFFICIENCY,
        shared_memory=shared,
        source="measured just now: memory, and a copy within it; rates from multiprocessors and clock",
        verified=True,
        assumptions=("system: what other programs take now", f"runtime: {_GPU_RUNTIME_BYTES / 1e9:.1f} GB assumed"),
    )


def _gpu_memory() -> tuple[int, int]:
    """Return the free bytes of the current GPU, and all of them."""
    status, *sizes = optional("cuda.bindings.driver", cuda_extra()).cuMemGetInfo()
    if int(status):
        raise RuntimeError(getattr(status, "name", str(status)))
    free, total = map(int, sizes)
    return free, total


def _check_usable(gpu: Gpu, free: int, clock_hz: float) -> None:
    """Refuse a GPU that nothing can be measured on.

    Raises:
        BackendError: its memory is full, or it does not say its clock.
    """
    if free < _MIN_COPY_BYTES:
        raise BackendError(
            f"the memory of {gpu.name} is full ({free / 1e6:.0f} MB free)", "close other programs, or name a --device"
        )
    if clock_hz <= 0:
        raise BackendError(f"{gpu.name} does not say its clock", "name a --device")


def _copy_bandwidth(device: Any, size: int) -> float:
    """Return bytes read and written per second by a copy on the GPU."""
    stream = device.create_stream()
    source, target = device.allocate(size, stream=stream), device.allocate(size, stream=stream)
    try:

        def copy() -> None:
            source.copy_to(target, stream=stream)
            stream.sync()

        return _best(copy, 2 * size)
    finally:
        source.close()
        target.close()
        stream.close()
