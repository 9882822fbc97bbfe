"""One decode step of the `torch` backend as a CUDA graph: captured once, replayed for every token.

A step of a small model is hundreds of launches of a few microseconds each, which Python cannot issue as fast as the GPU
runs them. What changes from step to step lies in device memory: ids and lengths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from gta_edge.errors import BackendError, CapacityError
from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.decoder import Cache, Decoder
from gta_edge.runtime.session import Ids
from gta_edge.support.text import one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["CHECKED", "CaptureError", "DecodeGraph"]


CHECKED = "GTA_EDGE_CHECK_GRAPHS"
"""Environment variable: set to 1, every replay first checks that what its graph reads is still there (torch 2.13)."""


class CaptureError(BackendError):
    """A step that runs cannot be captured as a CUDA graph."""


def _liveness_option() -> dict[str, Any]:
    """Return the option that makes torch check the inputs of a graph at each replay, where it is asked for and known.

    For tests alone: it walks over every parameter and cache at each token, 69 us for the 864 of GTA-1B's 54 layers on
    the host of an AMD EPYC, while the GPU waits.
    """
    asked = os.environ.get(CHECKED) == "1"
    known = asked and "check_input_liveness" in signature(torch.cuda.graph).parameters
    return {"check_input_liveness": True} if known else {}


class DecodeGraph:
    """The step that appends one token to each row of the caches.

    Args:
        model: on a CUDA device, its attention in place.
        caches: per layer; their memory is part of the graph and has to stay where it is.
        batch: B.

    Before it is captured, the model runs once with lengths of zero, which writes each cache's first position; what was
    there is put back.

    Raises:
        CaptureError: the step runs and cannot be captured.
        CapacityError, RuntimeError: it does not run, or there is no memory for it.
    """

    def __init__(self, model: Decoder, caches: Sequence[Cache], batch: int) -> None:
        device = caches[0][0].device
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._past_length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._inputs = torch.zeros(2, batch, dtype=torch.int64, pin_memory=True)
        self._inputs_in_numpy = self._inputs.numpy()  # the same memory
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # held, as the graph holds its address alone: freed, the memory would be the next small tensor's
        self._positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)

        first = [(key[:, :, :1].clone(), value[:, :, :1].clone()) for key, value in caches]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._stream):  # what is compiled or loaded lazily, is so now
                model(self._ids, self._past_length, self._positions, caches)
            self._stream.synchronize()
            self._graph = self._captured(model, caches)
        finally:
            for (key, value), (first_key, first_value) in zip(caches, first, strict=True):
                key[:, :, :1].copy_(first_key)
                value[:, :, :1].copy_(first_value)
        torch.cuda.synchronize(device)
        self._logits = torch.empty(self._device_logits.shape, dtype=torch.float32, pin_memory=True)

    def _captured(self, model: Decoder, caches: Sequence[Cache]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._ids.device)
        try:
            # around it, since a capture that fails leaves its own stream current; other threads may go on using CUDA
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local", **_liveness_option()),
            ):
                self._device_logits, _ = model(self._ids, self._past_length, self._positions, caches)
        except CapacityError:
            raise
        except (RuntimeError, BackendError) as error:  # the step itself has just run
            if is_out_of_memory(error):
                raise
            raise CaptureError(
                f"the step cannot be captured as a CUDA graph ({one_line(error)})", "run it as it is"
            ) from error
        return graph

    def replay(self, ids: Ids, past_length: Ids) -> Tensor:
        """Append ids [B, 1] at ``past_length`` [B]; returns float32 logits [B, 1, V] in host memory, a copy."""
        self._inputs_in_numpy[0], self._inputs_in_numpy[1] = ids[:, 0], past_length
        self._stream.wait_stream(torch.cuda.current_stream(self._ids.device))  # chunks of a prompt before it
        with torch.cuda.stream(self._stream):
            self._ids[:, 0].copy_(self._inputs[0], non_blocking=True)
            self._past_length.copy_(self._inputs[1], non_blocking=True)
            self._graph.replay()
            self._logits.copy_(self._device_logits, non_blocking=True)
        self._stream.synchronize()
        return self._logits.clone()

    def launch(self) -> None:
        """Queue the last step once more on the current stream, which writes the same again: for timing on the GPU."""
        self._graph.replay()
