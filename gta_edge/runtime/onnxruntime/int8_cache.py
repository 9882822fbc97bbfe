"""What a cache of int8 asks of a session on ONNX Runtime's CPU kernels; how it is read is in ``passes``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gta_edge.errors import BackendError

__all__ = ["MAX_ROWS", "require_exact_products", "rows_for"]

MAX_ROWS = (2**31 - 1) // (255 * 127)
"""Tokens of each sequence at most: the sums of so many products of a byte and a code are within 32 bits."""

_LINE_BYTES, _ALIASED_BYTES = 64, 512
_FATAL = 4
_PRODUCT = (  # a model of opset 17: MatMulInteger of "a", uint8 [1, 64], and "b", int8 [64, 16]
    b'\x08\x08:^\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x03sumZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n'
    b"\x02\x08\x01\n\x02\x08@Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08@\n\x02\x08\x10b\x13\n\x01c\x12\x0e\n"
    b"\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x10B\x04\n\x00\x10\x11"
)


def rows_for(capacity: int) -> int:
    """Return the rows of memory for so many tokens: some more where a key's channels would lie too evenly apart.

    A channel's codes are as many bytes as there are rows. At a multiple of 4096 all channels of a token share a place
    in the processor's first cache, and reading them takes three times as long.
    """
    return capacity + (_LINE_BYTES if capacity % _ALIASED_BYTES == 0 else 0)


def require_exact_products(module: Any) -> None:
    """Refuse a processor on which ONNX Runtime's products of bytes and signed bytes saturate.

    Without VNNI, x86 sums two such products in 16 bits. Others, Arm's among them, have instructions that do not.

    Args:
        module: ONNX Runtime.

    Raises:
        BackendError: they do.
    """
    settings = module.SessionOptions()
    settings.log_severity_level = _FATAL  # errors are raised
    session = module.InferenceSession(_PRODUCT, settings, providers=["CPUExecutionProvider"])
    largest = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    (found,) = session.run(None, largest)
    if (found != 64 * 255 * 127).any():
        raise BackendError(
            "a cache of int8 is not possible on this processor: its products of 8-bit integers saturate, as those of "
            "x86 without VNNI do",
            "take a cache of fp32",
        )
