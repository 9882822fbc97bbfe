"""Steps of trees of tokens as CUDA graphs: one for each of a few widths, which a step is padded to.

A graph's shapes are fixed. So tokens are padded to a power of two, which see nothing and are written to rows behind the
others, and words to a multiple of many. A step of a few tokens is as many launches as one of a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.libraries.optional import optional
from gta_edge.model.decoder import Cache
from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.session import Ids
from gta_edge.runtime.torch.cuda_graph import DecodeGraph, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["TreeGraphs", "width_of"]

_WORDS_STEP = 1024
_MAX_GRAPHS = 12


def width_of(tokens: int) -> int:
    """Return the tokens per sequence, of up to 64, that a step of so many is padded to."""
    return min(1 << (tokens - 1).bit_length(), MAX_BRANCH_TOKENS)


class TreeGraphs:
    """Steps that append the new nodes of trees, captured as they are needed.

    Args:
        step: what runs one, called as a ``Decoder``, and gives logits for every token.
        caches: per layer; their memory is part of the graphs and has to stay where it is.
        batch: B.
    """

    def __init__(self, step: Step, caches: Sequence[Cache], batch: int) -> None:
        self._step, self._caches, self._batch = step, caches, batch
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}  # by tokens and words, the last used at the end

    def run(self, ids: Ids, logit_positions: Ids, managed: ManagedStep) -> Tensor:
        """Append ids [B, T] in a cache with room for the width that they are padded to.

        Args:
            ids: int64 [B, T].
            logit_positions: int64 [B, M].
            managed: the step's other inputs.

        Returns:
            float32 logits [B, M, V] in host memory, a copy.

        Raises:
            CaptureError: the step runs and cannot be captured.
            CapacityError, RuntimeError: it does not run, or there is no memory for it.
        """
        positions, branches = managed.positions, managed.branches
        assert positions is not None and branches is not None  # it is of trees
        tokens, words = ids.shape[1], branches.shape[1]
        width = width_of(tokens)
        most = -(-words // _WORDS_STEP) * _WORDS_STEP
        padded = ManagedStep(
            past_length=managed.past_length,
            positions=np.pad(positions, ((0, 0), (0, width - tokens))),
            branch_start=managed.branch_start,
            branches=np.pad(branches, ((0, 0), (0, most - words))),
        )
        graph = self._graphs.pop((width, most), None)
        if graph is None:
            graph = DecodeGraph(self._step, self._caches, self._batch, TREES, tokens=width, words=most)
        self._graphs[width, most] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        logits = graph.replay(np.pad(ids, ((0, 0), (0, width - tokens))), managed.past_length[0], padded)
        chosen = torch.from_numpy(np.ascontiguousarray(logit_positions))
        return logits.gather(1, chosen[:, :, None].expand(-1, -1, logits.shape[2]))
