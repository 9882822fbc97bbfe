"""One decode step of the `torch` backend as a CUDA graph: captured once, replayed for every token.

A step of a small model is hundreds of launches of a few microseconds each, which Python cannot issue as fast as the GPU
runs them. What changes from step to step lies in device memory: ids and lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.model.decoder import Cache, Decoder
from gta_edge.runtime.session import Ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["DecodeGraph"]


class DecodeGraph:
    """The step that appends one token to each row of the caches.

    Args:
        model: on a CUDA device, its attention in place.
        caches: per layer; their memory is part of the graph and has to stay where it is.
        batch: B.

    Before it is captured, the model runs once with lengths of zero, which writes each cache's first position; what was
    there is put back.
    """

    def __init__(self, model: Decoder, caches: Sequence[Cache], batch: int) -> None:
        device = caches[0][0].device
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._past_length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._inputs = torch.zeros(2, batch, dtype=torch.int64, pin_memory=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # held, as the graph holds its address alone: freed, the memory would be the next small tensor's
        self._positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)

        first = [(key[:, :, :1].clone(), value[:, :, :1].clone()) for key, value in caches]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            model(self._ids, self._past_length, self._positions, caches)  # what is compiled or loaded lazily, is so now
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # other threads may go on using CUDA meanwhile
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._device_logits, _ = model(self._ids, self._past_length, self._positions, caches)
        for (key, value), (first_key, first_value) in zip(caches, first, strict=True):
            key[:, :, :1].copy_(first_key)
            value[:, :, :1].copy_(first_value)
        torch.cuda.synchronize(device)
        self._logits = torch.empty(self._device_logits.shape, dtype=torch.float32, pin_memory=True)

    def replay(self, ids: Ids, past_length: Ids) -> Tensor:
        """Append ids [B, 1] at ``past_length`` [B]; returns float32 logits [B, 1, V] in host memory, a copy."""
        self._inputs[0].copy_(torch.from_numpy(ids[:, 0]))
        self._inputs[1].copy_(torch.from_numpy(past_length))
        self._stream.wait_stream(torch.cuda.current_stream(self._ids.device))  # chunks of a prompt before it
        with torch.cuda.stream(self._stream):
            self._ids[:, 0].copy_(self._inputs[0], non_blocking=True)
            self._past_length.copy_(self._inputs[1], non_blocking=True)
            self._graph.replay()
            self._logits.copy_(self._device_logits, non_blocking=True)
        self._stream.synchronize()
        return self._logits.clone()
