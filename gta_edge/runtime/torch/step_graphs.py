"""Steps of a session as CUDA graphs: of a single token, of a few tokens, and of new nodes of trees.

A graph's shapes are fixed, so there is one for each of a few widths. A step between two of them is padded: what pads it
is written to rows behind the others, where the next step writes, weighs nothing in what rows receive, and no token sees
it. In caches in blocks there are no such rows: there steps of the widths alone are replayed. A step of a few tokens is
as many launches as one of a single token, and takes hardly longer while weights are most of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.decoder import Cache
from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS, Features
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.session import Ids
from gta_edge.runtime.step_costs import graph_width
from gta_edge.runtime.torch.cuda_graph import CaptureError, DecodeGraph, GraphMemory, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["StepGraphs", "tree_width"]

_WORDS_STEP = 1024
_MAX_GRAPHS = 16  # beside that of a single token
_MAX_LOGITS_BYTES = 2**27  # of those graphs together; what else they take is one pool's

_Key = tuple[int, int]
"""Tokens of a sequence, and words for a tree's rows."""
_SINGLE: _Key = (1, 0)


def tree_width(tokens: int) -> int:
    """Return the nodes per sequence, of up to 64, that a step of so many is padded to."""
    return min(1 << (tokens - 1).bit_length(), MAX_BRANCH_TOKENS)


class StepGraphs:
    """Steps that append a few tokens to every sequence, captured as they are needed.

    Args:
        step: what runs one, called as a ``Decoder``, and gives logits for every token.
        caches: per layer; their memory is part of the graphs and has to stay where it is.
        batch: B.
        capacities: rows that each layer has room for.
        features: of a cache that a policy manages; None of another, with trees or without.
        received: what its rows have received, float32 [B, S] per layer, which has to stay likewise.
        in_blocks: whether the cache is in blocks, which padding would close.
        vocab_size: V.

    Attributes:
        captured: graphs that were made so far.
    """

    def __init__(
        self,
        step: Step,
        caches: Sequence[Cache],
        batch: int,
        capacities: Sequence[int],
        *,
        features: Features | None = None,
        received: Sequence[Tensor] = (),
        in_blocks: bool = False,
        vocab_size: int,
    ) -> None:
        self._step, self._caches, self._batch = step, caches, batch
        self._capacities = capacities
        self._features, self._received, self._in_blocks = features, received, in_blocks
        self._logits_bytes = 4 * batch * vocab_size  # of a token of each sequence
        self._graphs: dict[_Key, DecodeGraph] = {}  # the last used at the end
        self._memory = GraphMemory(caches[0].key.device)
        self._only_single = False
        self.captured = 0

    @property
    def single(self) -> DecodeGraph | None:
        """The graph of a single token, if there is one."""
        return self._graphs.get(_SINGLE)

    def run(self, ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None) -> Tensor | None:
        """Append ids [B, T]; None where there is no graph for such a step, which then has not run.

        A graph gives logits for all tokens. For a few that continue the text and want fewer none is made: they are the
        end of a prompt, and the next is of another length.

        Args:
            ids: int64 [B, T].
            past_length: rows in use, int64 [B].
            logit_positions: int64 [B, M].
            managed: the step's other inputs; None of a cache without a policy, whose tokens continue the text.

        Returns:
            float32 logits [B, M, V] in host memory, a copy.

        Raises:
            CaptureError: a single token runs and cannot be captured.
            CapacityError, RuntimeError: it does not run, or there is no memory for it.
        """
        tokens, wanted = ids.shape[1], logit_positions.shape[1]
        key = self._key(tokens, past_length, managed)
        if key is None or (key not in self._graphs and wanted != tokens and not key[1]):
            return None
        graph = self._graph(key, None if managed is None else self._features or TREES)
        if graph is None:
            return None
        given = managed and managed.padded(key[0] - tokens, key[1])
        logits = graph.replay(np.pad(ids, ((0, 0), (0, key[0] - tokens))), past_length, given)
        if wanted == tokens:  # of all of them
            return logits[:, :tokens]
        chosen = torch.tensor(logit_positions)
        return logits.gather(1, chosen[:, :, None].expand(-1, -1, logits.shape[2]))

    def _key(self, tokens: int, past_length: Ids, managed: ManagedStep | None) -> _Key | None:
        """Return the graph that a step can be run by; None if there cannot be one."""
        words = 0
        if managed is not None and managed.branches is not None:
            words = -(-managed.branches.shape[1] // _WORDS_STEP) * _WORDS_STEP
        if tokens == 1 and not words:
            return _SINGLE
        if self._only_single or tokens > MAX_BRANCH_TOKENS:
            return None
        rows = past_length if managed is None else managed.past_length
        if words:
            width = tree_width(tokens)
            return (width, words) if (rows.max(1) + width <= self._capacities).all() else None
        width = graph_width(tokens, rows, self._capacities, padding=not self._in_blocks)
        return (width, 0) if width else None

    def _graph(self, key: _Key, features: Features | None) -> DecodeGraph | None:
        """Return the graph of a width, the last used from now on; None where there can be none but of single tokens."""
        graph = self._graphs.pop(key, None)
        if graph is None and not self._make_room(key):
            return None
        try:
            self._graphs[key] = graph = graph or self._made(key, features)
        except (CaptureError, RuntimeError, MemoryError) as error:
            lacks_memory = is_out_of_memory(error)
            if key == _SINGLE or not (lacks_memory or isinstance(error, CaptureError)):
                raise
            self._only_single = True  # without a graph a step takes less memory, and may still run
        return graph

    def _made(self, key: _Key, features: Features | None) -> DecodeGraph:
        self.captured += 1
        sizes = {"tokens": key[0], "words": key[1]}
        received = () if features == TREES else self._received
        return DecodeGraph(self._step, self._caches, self._batch, features, received, memory=self._memory, **sizes)

    def _make_room(self, key: _Key) -> bool:
        """Let go of graphs that were used longest ago, for one more; tell whether that leaves enough."""
        if key == _SINGLE:
            return True
        if key[0] * self._logits_bytes > _MAX_LOGITS_BYTES:
            return False
        others = [each for each in self._graphs if each != _SINGLE]
        while others and (
            len(others) >= _MAX_GRAPHS
            or (key[0] + sum(width for width, _ in others)) * self._logits_bytes > _MAX_LOGITS_BYTES
        ):
            del self._graphs[others.pop(0)]
        return True
