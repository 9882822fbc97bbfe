"""Closed sets of the command line: enums, so that help, usage errors and shell completion know them.

They repeat names of the package, since an enum's members are written out; a test holds both together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import typer

from gta_edge.support.choices import unknown

__all__ = [
    "BACKEND_NAMES",
    "Backend",
    "BatchSpeculate",
    "CacheDtype",
    "Compute",
    "Dtype",
    "EmbeddingPrecision",
    "Engine",
    "Matmul",
    "Precision",
    "Speculate",
    "backend_list",
    "checked",
    "completed",
    "completed_list",
    "value_of",
]


class Precision(str, Enum):
    """What weights are stored in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class EmbeddingPrecision(str, Enum):
    """What an int4 bundle's embedding and head are stored in."""

    INT8 = "int8"
    INT4 = "int4"


class Dtype(str, Enum):
    """A checkpoint's type, as config.json spells it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Compute(str, Enum):
    """What an engine computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class CacheDtype(str, Enum):
    """What a cache holds."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    INT4V2 = "int4v2"


class Backend(str, Enum):
    """What runs a bundle, or the fastest that works."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    ONNXRUNTIME = "onnxruntime"
    TORCH = "torch"


class Engine(str, Enum):
    """What builds and runs an engine."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Matmul(str, Enum):
    """What multiplies by int8 and int4 matrices."""

    PLUGIN = "plugin"
    NATIVE = "native"
    AUTO = "auto"


class Speculate(str, Enum):
    """What guesses tokens to come."""

    LOOKUP = "lookup"
    DRAFT = "draft"
    OFF = "off"


class BatchSpeculate(str, Enum):
    """What guesses tokens of several texts at once."""

    LOOKUP = "lookup"
    OFF = "off"


BACKEND_NAMES = tuple(each.value for each in Backend if each is not Backend.AUTO)


def value_of(choice: Enum | None) -> str | None:
    """Return a choice as the package takes it; None stays None."""
    return None if choice is None else str(choice.value)


def backend_list(text: str) -> str:
    """Return ``A,B@PYTHON`` as it is, and nothing for ``auto``; a name that is no backend's is wrong usage."""
    if text == Backend.AUTO.value:
        return ""
    for part in text.split(","):
        name = part.strip().partition("@")[0]
        if name not in BACKEND_NAMES:
            raise typer.BadParameter("; ".join(unknown("no backend is called {}; there are {}", name, BACKEND_NAMES)))
    return text


def checked(message: str, names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """Return a parser of names from a table that is too long for an enum; another name is wrong usage.

    Args:
        message: as ``unknown`` takes it.
        names: returns what is allowed, when it is asked for.
    """

    def parse(text: str) -> str:
        allowed = list(names())
        if text not in allowed:
            raise typer.BadParameter("; ".join(unknown(message, text, allowed)))
        return text

    return parse


def completed(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what completes a name."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def completed_list(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes the last of several names with commas between; what follows an @ is left alone."""
    allowed = list(names)

    def complete(incomplete: str) -> list[str]:
        given, comma, last = incomplete.rpartition(",")
        return [f"{given}{comma}{name}" for name in allowed if name.startswith(last)]

    return complete
