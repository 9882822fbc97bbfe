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
    from gta_edge.plugins.attention.plugin import AttentionCreator
    from gta_edge.plugins.matmul.plugin import Int4MatMulCreator, Int8MatMulCreator
    from gta_edge.plugins.plugin_base import register_creators

    register_creators(
        load() if trt is None else describe(trt), [AttentionCreator, Int4MatMulCreator, Int8MatMulCreator]
    )
