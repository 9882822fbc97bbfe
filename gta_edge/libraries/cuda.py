"""NVIDIA's driver: the CUDA version it knows, why it does not start, and the extra of this package that fits it."""

from __future__ import annotations

import ctypes

from gta_edge.errors import BackendError
from gta_edge.support.text import one_line

__all__ = ["cuda_extra", "driver_cuda_version", "driver_problem", "gpu_compute_capability", "nvrtc_distribution"]

_NO_DRIVER = (
    "there is no NVIDIA driver (libcuda.so.1 is not found)",
    "install it, in a container pass the GPU in (docker run --gpus all), or choose another backend",
)

_COMPUTE_CAPABILITY = (75, 76)  # CUdevice_attribute of its two numbers

# What to make of the codes that cuInit may return: CUDA's driver API, CUresult.
_START_FAILURES = {
    34: (
        "the libcuda.so.1 that is found is CUDA's stub, which programs are linked with and which drives no GPU",
        "take the directory stubs out of LD_LIBRARY_PATH, so that the driver's own is found",
    ),
    100: (
        "the NVIDIA driver finds no GPU that it can use",
        "see CUDA_VISIBLE_DEVICES, and in a container pass the GPU in (docker run --gpus all)",
    ),
    802: ("the NVIDIA driver is not ready yet", "start nvidia-fabricmanager, or wait"),
    803: ("the NVIDIA driver's library and kernel module are of different releases", "restart the machine"),
    804: (
        "the CUDA compatibility libraries do not fit this GPU's driver",
        "take cuda-compat out of LD_LIBRARY_PATH, or upgrade the driver",
    ),
}


def driver_cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver knows, None where there is no driver that says so."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def driver_problem() -> BackendError | None:
    """Return why CUDA cannot be used here, as an error to be raised; None where the driver starts and finds a GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        status = library.cuInit(0)
    except OSError as error:
        if "No such file" in str(error):
            return BackendError(*_NO_DRIVER)
        problem = f"the NVIDIA driver's libcuda.so.1 cannot be loaded ({one_line(error)})"
        return BackendError(problem, "install the driver again")
    except AttributeError:
        return BackendError("libcuda.so.1 is not the NVIDIA driver's", "take its directory out of LD_LIBRARY_PATH")
    if not status:
        return None
    what, remedy = _START_FAILURES.get(status, ("the NVIDIA driver does not start", "restart the machine"))
    return BackendError(f"{what} (CUDA error {status})", remedy)


def gpu_compute_capability(device_id: int = 0) -> tuple[int, int] | None:
    """Return a GPU's compute capability as the driver says it, without any other library; None where it does not."""
    device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), device_id)
        for number, value in zip(_COMPUTE_CAPABILITY, values, strict=True):
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    except (OSError, AttributeError):
        return None
    return None if failed else (values[0].value, values[1].value)


def nvrtc_distribution() -> str:
    """Return the distribution that brings NVRTC, CUDA's run-time compiler, of ``cuda_extra``."""
    return {"cuda12": "nvidia-cuda-nvrtc-cu12", "cuda13": "nvidia-cuda-nvrtc"}[cuda_extra()]


def cuda_extra() -> str:
    """Return the extra of this package that fits the driver: ``cuda12`` or ``cuda13``."""
    version = driver_cuda_version()
    return "cuda12" if version and version[0] < 13 else "cuda13"
