"""The ops of our own: what they mean, and their implementations."""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def register(trt: Any = None) -> None:
    """Make our ops known to TensorRT: register their plugins' creators. Calling it again does nothing.

    Args:
        trt: the TensorRT module (``tensorrt``, or another with its interface); the one installed, if none is given.

    Raises:
        BackendError: TensorRT is missing, too old, or has no plugins.
    """
    from gta_edge.libraries.tensorrt import describe, load
    from gta_edge.plugins.attention.plugin import ATTENTION_PLUGINS
    from gta_edge.plugins.matmul.plugin import MATMUL_PLUGINS
    from gta_edge.plugins.plugin_registry import register_plugins

    register_plugins(load() if trt is None else describe(trt), (*ATTENTION_PLUGINS, *MATMUL_PLUGINS))
