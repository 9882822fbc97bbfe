"""ONNX Runtime, as the whole package takes it: recent enough, and without telemetry."""

from __future__ import annotations

from typing import Any

from gta_edge.errors import BackendError
from gta_edge.optional import installed, optional

__all__ = ["first_line", "load_onnxruntime"]

_OLDEST_VERSION = (1, 25)  # the first with TensorScatter


def load_onnxruntime() -> Any:
    """Import ONNX Runtime and return it.

    Raises:
        BackendError: it is missing or too old.
    """
    module = optional("onnxruntime", "ort")
    if not installed(module):
        module()  # says what to install
    found = str(module.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_VERSION:
        raise BackendError(
            f"ONNX Runtime {found} is too old for opset 24; "
            "run: pip install 'onnxruntime>=1.25' (it needs Python 3.11 or later)"
        )
    module.disable_telemetry_events()
    return module


def first_line(error: Exception) -> str:
    """Return the first line of an error of ONNX Runtime, which has no base class and often many lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]
