"""Torch's tensors on the host, taken for a GPU's: what stands between them and the kernels, without a GPU."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

STREAM = 5


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let a module that gives tensors to kernels find a GPU, whose current stream is ``STREAM``."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(module, "current_gpu", lambda index: None)


def memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What is at an address; writing to it is writing there."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
