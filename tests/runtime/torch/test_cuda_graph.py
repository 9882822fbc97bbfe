"""The decode step's CUDA graph, as far as it shows without a GPU: what it reads stays where it is."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gta_edge.runtime.torch.cuda_graph import DecodeGraph


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and captures that do nothing, and host memory that cannot be pinned."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: contextlib.nullcontext())
    for name in ("zeros", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *sizes, pin_memory=False, make=make, **kind: make(*sizes, **kind))


@pytest.mark.usefixtures("no_gpu")
def test_what_a_graph_reads_lives_as_long_as_the_graph() -> None:
    """A replay reads addresses: a tensor that is freed leaves its memory to the next one of its size."""
    read: dict[str, weakref.ref[torch.Tensor]] = {}

    def model(*inputs: Any) -> tuple[torch.Tensor, Any]:
        for name, tensor in zip(("ids", "past_length", "logit_positions"), inputs[:3], strict=True):
            read[name] = weakref.ref(tensor)
        return torch.ones(1, 1, 8), inputs[3]

    graph = DecodeGraph(model, [(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))], 1)
    gc.collect()
    assert {name: tensor() is not None for name, tensor in read.items()} == dict.fromkeys(read, True)
    assert len(read) == 3
    del graph
    gc.collect()
    assert {name: tensor() is None for name, tensor in read.items()} == dict.fromkeys(read, True)  # it would be seen
