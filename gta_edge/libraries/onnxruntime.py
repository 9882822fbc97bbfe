"""ONNX Runtime, as the whole package takes it: recent enough, and without telemetry.

Its events are turned off by a variable that ``optional`` sets before it is imported: releases from 1.31 on have begun
to write and send some by the time that its own function for that can be called. A program that imports it before this
package has to set ``ORT_DISABLE_TELEMETRY=1`` itself.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import driver_problem, gpu_compute_capability
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import installed, optional
from gta_edge.support.text import one_line

__all__ = [
    "CUDA_PROVIDER",
    "EXACT_PRODUCTS",
    "INT8_PRODUCTS",
    "WEIGHTS_FOLDER",
    "first_line",
    "is_out_of_memory",
    "load_onnxruntime",
    "load_onnxruntime_cuda",
    "quiet",
    "run_a_kernel",
    "why_no_gpu",
]

_OLDEST_VERSION = (1, 25)  # the first with TensorScatter
_LIBRARIES = "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'"
_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;\n]*")
_OLDEST_FOR_CUDA = (1, 27)  # the first with CUDA kernels for Cast and Reshape of opset 24
_NO_CODE = "no kernel image is available"  # CUDA's text for its error 209, cudaErrorNoKernelImageForDevice
_JETSONS = ((8, 7), (11, 0))  # Orin and Thor
_SUM = (  # a model that adds two numbers, "a" and "b", to "c", of opset 17
    b'\x08\x08:H\n\x0e\n\x01a\n\x01b\x12\x01c"\x03Add\x12\x03sumZ\x0f\n\x01a\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"Z\x0f\n\x01b\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01c\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
_WARNING, _FATAL = 2, 4  # ONNX Runtime's default severity of what it logs, and the highest

_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
INT8_PRODUCTS = (_ACCURACY_LEVEL, "4")
"""Session option: matmuls with int4 and int8 weights round activations to int8, up to four times faster."""
EXACT_PRODUCTS = (_ACCURACY_LEVEL, "1")
"""Session option: matmuls with int4 and int8 weights in float32, instead of with activations rounded to int8."""

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session option: the directory that a model given as bytes names its weights from."""

CUDA_PROVIDER = "CUDAExecutionProvider"


def load_onnxruntime(extra: str = "ort") -> Any:
    """Import ONNX Runtime and return it.

    Args:
        extra: of this package that brings it, for what the error says: ``ort`` or ``ort-gpu``.

    Raises:
        BackendError: it is missing or too old.
    """
    module = optional("onnxruntime", extra)
    if not installed(module):
        if sys.version_info < (3, 11) and find_spec("onnxruntime") is None:
            raise BackendError("ONNX Runtime 1.25 needs Python 3.11 or later", "use one, or choose another backend")
        module()  # says what is wrong, and what to do
    package = "onnxruntime-gpu" if extra == "ort-gpu" else "onnxruntime"
    found = str(module.__version__)
    if _numbers(found) < _OLDEST_VERSION:
        raise BackendError(
            f"ONNX Runtime {found} is too old for opset 24",
            f"run: pip install '{package}>=1.25' (it needs Python 3.11 or later)",
        )
    module.disable_telemetry_events()  # what is left to do where somebody imported it before
    return module


def load_onnxruntime_cuda(device_id: int = 0) -> Any:
    """Import ONNX Runtime, see that it can use a GPU, and return it.

    Raises:
        BackendError: it is missing, too old, or made for CPUs or for other GPUs; there is no NVIDIA driver or no GPU;
            or one of CUDA's libraries is missing, which ONNX Runtime itself only logs.
    """
    module = load_onnxruntime("ort-gpu")
    if CUDA_PROVIDER not in module.get_available_providers():
        raise BackendError(
            f"ONNX Runtime {module.__version__} has no CUDA provider: it is the package onnxruntime, and "
            "onnxruntime-gpu must be there in its place, not beside it",
            f"run: pip uninstall -y onnxruntime onnxruntime-gpu && {install_command('ort-gpu')}",
        )
    if _numbers(module.__version__) < _OLDEST_FOR_CUDA:
        raise BackendError(
            f"ONNX Runtime {module.__version__} would run a part of every layer on the CPU, as releases for CUDA 12 do",
            f"run: {_LIBRARIES}",
        )
    if problem := driver_problem():
        raise problem
    _check_driver(module, ctypes.CDLL("libcuda.so.1"))
    if hasattr(module, "preload_dlls"):
        with redirect_stdout(StringIO()), suppress(Exception):  # what it could not load is found out below
            module.preload_dlls()  # CUDA's libraries from NVIDIA's wheels, where the linker does not look
    try:
        with quiet(module):
            module.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", device_id)
            run_a_kernel(module, (CUDA_PROVIDER, {"device_id": str(device_id)}))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise why_no_gpu(module, error, device_id) from error
    return module


def run_a_kernel(module: Any, provider: Any) -> None:
    """Add two numbers, which fails where ONNX Runtime holds no code for this GPU: no other way tells for every build.

    Raises:
        Exception: whatever ONNX Runtime raises, or RuntimeError for a wrong sum.
    """
    settings = module.SessionOptions()
    settings.log_severity_level = _FATAL  # what is wrong is raised
    session = module.InferenceSession(_SUM, settings, providers=[provider])
    ones = np.ones(1, np.float32)
    (total,) = session.run(None, {"a": ones, "b": ones})
    if total.tolist() != [2.0]:
        raise RuntimeError(f"1 + 1 is {total.tolist()} there")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _check_driver(module: Any, driver: ctypes.CDLL) -> None:
    """Refuse a driver that is older than the CUDA which ONNX Runtime is made for."""
    version = ctypes.c_int()
    wanted = _cuda(module)
    if not wanted or driver.cuDriverGetVersion(ctypes.byref(version)):
        return
    if version.value // 1000 < int(wanted.partition(".")[0]):
        raise BackendError(
            f"ONNX Runtime {module.__version__} is made for CUDA {wanted}, and the NVIDIA driver knows CUDA up to "
            f"{version.value // 1000}.{version.value % 1000 // 10}",
            "upgrade the driver, or choose another backend",
        )


def _cuda(module: Any) -> str:
    """Return the version of CUDA that ONNX Runtime is made for, empty if it does not say."""
    version = str(getattr(module, "cuda_version", "") or "")
    return version if version.partition(".")[0].isdigit() else ""


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Let ONNX Runtime log nothing: its errors are raised, and must not stand beside ours on stderr."""
    module.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        module.set_default_logger_severity(_WARNING)


def why_no_gpu(module: Any, error: Exception, device_id: int = 0) -> BackendError:
    """Return as an error why ONNX Runtime has no use of the GPU, given what it raised, and what to do."""
    version = f"ONNX Runtime {module.__version__}"
    if is_out_of_memory(error):
        return BackendError("the GPU's memory is full", "close other programs")
    if _NO_CODE in str(error):
        return _no_code(version, gpu_compute_capability(device_id))
    cuda = "" if _CUDA_FAILURE.search(str(error)) else _cuda(module)
    missing = next((name for name in _cuda_libraries(cuda) if not _loads(name)), None)
    if missing:
        return BackendError(f"{version} is made for CUDA {cuda} and {missing} is not found", f"run: {_LIBRARIES}")
    return BackendError(f"{version} cannot use the GPU ({first_line(error)})", "run `gta-edge doctor`")


def _no_code(version: str, capability: tuple[int, int] | None) -> BackendError:
    """Return as an error that this build is for other GPUs, and what to do."""
    of = f" of compute capability {capability[0]}.{capability[1]}" if capability else ""
    of_pypi = platform.machine() == "aarch64" and capability in _JETSONS
    hint = ", not PyPI's, which has none for Jetson" if of_pypi else ""
    return BackendError(
        f"{version} holds no code for this GPU{of}",
        f"choose the backend tensorrt, or install a build of onnxruntime-gpu for this GPU{hint}",
    )


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of ONNX Runtime, or around it, is that a device or the host has no memory left."""
    texts = "Failed to allocate memory", "out of memory", "CUDA failure 2:", "bad_alloc", "bad allocation"
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def _cuda_libraries(cuda: str) -> list[str]:
    """Return the names of the libraries that the CUDA provider may need, those that it always does first."""
    if not cuda:
        return []
    major = cuda.partition(".")[0]
    numbered = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas")]
    return [*numbered, "libcurand.so.10", f"libcufft.so.{int(major) - 1}", "libcudnn.so.9"]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def first_line(error: Exception) -> str:
    """Return what an error of ONNX Runtime says, which has no base class and often many lines, in a printable one.

    It quotes names of the graph, which may be anything.
    """
    text = str(error)
    failure = _CUDA_FAILURE.search(text)  # hidden behind the name of a template
    return one_line(failure.group() if failure else (text.splitlines() or [type(error).__name__])[0])
