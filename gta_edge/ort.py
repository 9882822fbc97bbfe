"""ONNX Runtime, as the whole package takes it: recent enough, and without telemetry."""

from __future__ import annotations

import sys
from typing import Any

from gta_edge.errors import BackendError
from gta_edge.optional import installed, optional

__all__ = ["EXACT_PRODUCTS", "INT8_PRODUCTS", "first_line", "load_onnxruntime"]

_OLDEST_VERSION = (1, 25)  # the first with TensorScatter

_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
INT8_PRODUCTS = (_ACCURACY_LEVEL, "4")
"""Session option: products with int4 and int8 weights round activations to int8, up to four times faster."""
EXACT_PRODUCTS = (_ACCURACY_LEVEL, "1")
"""Session option: products with int4 and int8 weights in float32, instead of with activations rounded to int8."""


def load_onnxruntime() -> Any:
    """Import ONNX Runtime and return it.

    Raises:
        BackendError: it is missing or too old.
    """
    module = optional("onnxruntime", "ort")
    if not installed(module):
        if sys.version_info < (3, 11):
            raise BackendError("ONNX Runtime 1.25 needs Python 3.11 or later; use one, or choose another backend")
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
