"""From a GTA language model to tokens on a constrained GPU.

    import gta_edge

    gta_edge.export_model("checkpoint", "bundle", precision="fp16")
    with gta_edge.load("bundle") as session:
        for piece in gta_edge.generate(session, "def main():"):
            print(piece, end="")

Importing this package loads neither torch, onnx nor onnxruntime; what needs them imports them when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gta_edge.errors import (
    BackendError,
    BundleError,
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    ExportError,
    GtaEdgeError,
    InputError,
    OutputError,
)
from gta_edge.version import __version__

if TYPE_CHECKING:
    from gta_edge.export.pipeline import export_model
    from gta_edge.model.config import GQAConfig, GTAConfig
    from gta_edge.model.presets import preset
    from gta_edge.runtime.generation.conversation import Conversation
    from gta_edge.runtime.generation.loop import generate
    from gta_edge.runtime.registry import load
    from gta_edge.runtime.session import Session

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "EngineError",
    "ExportError",
    "GQAConfig",
    "GTAConfig",
    "GtaEdgeError",
    "InputError",
    "OutputError",
    "Session",
    "__version__",
    "export_model",
    "generate",
    "load",
    "preset",
]

_LAZY = {
    "Conversation": "gta_edge.runtime.generation.conversation",
    "GQAConfig": "gta_edge.model.config",
    "GTAConfig": "gta_edge.model.config",
    "Session": "gta_edge.runtime.session",
    "export_model": "gta_edge.export.pipeline",
    "generate": "gta_edge.runtime.generation.loop",
    "load": "gta_edge.runtime.registry",
    "preset": "gta_edge.model.presets",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gta_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
