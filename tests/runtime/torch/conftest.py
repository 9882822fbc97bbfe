"""CUDA graphs as far as they go without a GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and captures that do nothing, and host memory that cannot be pinned."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name in ("Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: contextlib.nullcontext())
    for name in ("zeros", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *sizes, pin_memory=False, make=make, **kind: make(*sizes, **kind))
