"""A decode step of the `torch` backend as a CUDA graph: captured once, replayed for every token, or every few.

A step of a small model is hundreds of launches of a few microseconds each, which Python cannot issue as fast as the GPU
runs them. What changes from step to step lies in device memory: ids and lengths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import numpy as np

from gta_edge.errors import BackendError, CapacityError
from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.decoder import Cache, ManagedInputs
from gta_edge.model.kv_cache import (
    BRANCH_START,
    BRANCHES,
    DECAY,
    INPUT_IDS,
    PAST_LENGTH,
    POSITIONS,
    QUERY_WEIGHT,
    ROW_BIAS,
)
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.session import Ids
from gta_edge.support.text import one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["CHECKED", "CaptureError", "DecodeGraph", "GraphMemory"]

Step: TypeAlias = "Callable[..., tuple[Tensor, list[Cache]]]"
"""What ``Decoder.forward`` takes, to logits and present caches."""


_ALIGNMENT = 16  # values, at whose multiples arrays begin

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


class _Packed:
    """Small inputs of one dtype in one piece of memory, pinned and on the device: one copy brings them there.

    Attributes:
        on_device: tensors by name.
        on_host: arrays by name, over the pinned memory.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()]
        self._pinned = torch.zeros(sum(sizes), dtype=dtype, pin_memory=bool(shapes))
        self._there = torch.zeros(sum(sizes), dtype=dtype, device=device)
        starts = np.cumsum([0, *sizes]).tolist()

        def parted(values: Tensor) -> dict[str, Tensor]:
            places = zip(shapes.items(), starts, strict=False)
            return {name: values[a : a + math.prod(shape)].view(shape) for (name, shape), a in places}

        self.on_device = parted(self._there)
        self.on_host = {name: tensor.numpy() for name, tensor in parted(self._pinned).items()}

    def copy(self) -> None:
        """Bring what is in ``on_host`` to the device, on the current stream."""
        if self.on_host:
            self._there.copy_(self._pinned, non_blocking=True)


def _input_shapes(
    batch: int, layers: int, features: Features | None, tokens: int, words: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of a step's integers and floats by name; names of the graph and of ``ManagedStep`` are one."""
    integers: dict[str, tuple[int, ...]] = {INPUT_IDS: (batch, tokens), PAST_LENGTH: (batch,)}
    if features is None:
        return integers, {}
    floats: dict[str, tuple[int, ...]] = {}
    if features.bias_rows:
        floats[ROW_BIAS] = (layers, batch, features.bias_rows)
    if features.observe:
        floats |= {QUERY_WEIGHT: (batch, tokens), DECAY: (batch,)}
    integers |= {PAST_LENGTH: (layers, batch), POSITIONS: (batch, tokens)}
    if features.has_branches:
        integers |= {BRANCH_START: (layers, batch), BRANCHES: (batch, words)}
    return integers, floats


def _managed_inputs(
    integers: Mapping[str, Tensor], floats: Mapping[str, Tensor], features: Features, received: Sequence[Tensor]
) -> ManagedInputs:
    return ManagedInputs(
        positions=integers[POSITIONS],
        row_bias=floats.get(ROW_BIAS),
        past_received=received if features.observe else None,
        query_weight=floats.get(QUERY_WEIGHT),
        decay=floats.get(DECAY),
        branch_start=integers.get(BRANCH_START),
        branches=integers.get(BRANCHES),
        observe=features.observe or "",
    )


class GraphMemory:
    """What graphs share that never run at the same time: a stream, a pool for what they compute, pinned logits.

    A replay may write to what another computed, whose logits have been copied by then.

    Args:
        device: of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        self.graphs: WeakSet[DecodeGraph] = WeakSet()  # that have been captured, and are still there
        self._pool: Any = None
        self._pinned = torch.zeros(0)

    def pool(self) -> Any:
        """Return torch's handle of the pool to capture in, which goes with the last of its graphs."""
        if self._pool is None or not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def logits(self, shape: Sequence[int]) -> Tensor:
        """Return pinned memory for logits, the same at each call where it is large enough."""
        if self._pinned.numel() < math.prod(shape):
            self._pinned = torch.empty(math.prod(shape), dtype=torch.float32, pin_memory=True)
        return self._pinned[: math.prod(shape)].view(*shape)


class DecodeGraph:
    """The step that appends one token, a few, or nodes of a tree, to each row of the caches.

    Args:
        model: what runs the step, called as a ``Decoder``: on a CUDA device, its attention in place.
        caches: per layer; their memory is part of the graph and has to stay where it is.
        batch: B.
        features: of a managed cache; None without one.
        received: what its rows have received, float32 [B, S] per layer, which has to stay likewise.
        tokens: T; logits are of all.
        words: W, of branches.
        memory: shared with other graphs.

    Before it is captured, the model runs once with lengths of zero, which writes each cache's first positions; what was
    there is put back.

    Raises:
        CaptureError: the step runs and cannot be captured.
        CapacityError, RuntimeError: it does not run, or there is no memory for it.
    """

    def __init__(
        self,
        model: Step,
        caches: Sequence[Cache],
        batch: int,
        features: Features | None = None,
        received: Sequence[Tensor] = (),
        *,
        tokens: int = 1,
        words: int = 0,
        memory: GraphMemory | None = None,
    ) -> None:
        device = caches[0].key.device
        self._device = device
        integers, floats = _input_shapes(batch, len(caches), features, tokens, words)
        self._integers, self._floats = _Packed(integers, torch.int64, device), _Packed(floats, torch.float32, device)
        self._memory = memory or GraphMemory(device)
        self._stream = self._memory.stream
        # held, as the graph holds its address alone: freed, the memory would be the next small tensor's
        self._positions = torch.arange(tokens, device=device).expand(batch, tokens)
        inputs = self._integers.on_device, self._floats.on_device
        arguments: list[Any] = [inputs[0][INPUT_IDS], inputs[0][PAST_LENGTH], self._positions, caches]
        if features is not None:
            arguments.append(_managed_inputs(*inputs, features, received))

        tensors = [tensor for cache in caches for tensor in cache.tensors]
        first = [tensor[:, :, :tokens].clone() for tensor in tensors]
        before = [each.clone() for each in received]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._stream):  # what is compiled or loaded lazily, is so now
                model(*arguments)
            self._stream.synchronize()
            self._graph = self._captured(model, arguments)
        finally:
            for tensor, old in zip(tensors, first, strict=True):
                tensor[:, :, :tokens].copy_(old)
            for each, old in zip(received, before, strict=True):
                each.copy_(old)
        torch.cuda.synchronize(device)
        self._memory.graphs.add(self)

    def _captured(self, model: Step, arguments: Sequence[Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        place: dict[str, Any] = {"stream": self._stream, "pool": self._memory.pool()}
        try:
            # around it, since a capture that fails leaves its own stream current; other threads may go on using CUDA
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, **place, capture_error_mode="thread_local", **_liveness_option()),
            ):
                self._device_logits, _ = model(*arguments)
        except CapacityError:
            raise
        except (RuntimeError, BackendError) as error:  # the step itself has just run
            if is_out_of_memory(error):
                raise
            raise CaptureError(
                f"the step cannot be captured as a CUDA graph ({one_line(error)})", "run it as it is"
            ) from error
        return graph

    def replay(self, ids: Ids, past_length: Ids, managed: ManagedStep | None = None) -> Tensor:
        """Append ids [B, T] at ``past_length`` [B]; returns float32 logits [B, T, V] in host memory, a copy."""
        self._integers.on_host[INPUT_IDS][...] = ids
        if managed is None:
            self._integers.on_host[PAST_LENGTH][...] = past_length
        else:
            for inputs in (self._integers.on_host, self._floats.on_host):
                for name in inputs.keys() - {INPUT_IDS}:
                    inputs[name][...] = getattr(managed, name)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # chunks of a prompt before it
        with torch.cuda.stream(self._stream):
            self._integers.copy()
            self._floats.copy()
            self._graph.replay()
            logits = self._memory.logits(self._device_logits.shape)
            logits.copy_(self._device_logits, non_blocking=True)
        self._stream.synchronize()
        return logits.clone()

    def launch(self) -> None:
        """Queue the last step once more on the current stream: for timing on the GPU.

        It writes the same again, but for what rows of a managed cache have received.
        """
        self._graph.replay()
