"""The parts of attention, in nodes, that do not depend on what its cache is held in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.graph.builder import Nodes, static_size
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["CONTRIB", "LOWEST", "Attended", "Layer", "Mask", "by_head", "positions"]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

LOWEST = float(np.finfo(np.float32).min)
"""Score of a row that is not seen."""


def positions(nodes: Nodes, tokens: ir.Value, length: ir.Value) -> ir.Value:
    """Return int64 [B, T]."""
    count = nodes("Squeeze", tokens)
    steps = nodes("Range", nodes.scalar(0, np.int64), count, nodes.scalar(1, np.int64))
    return nodes("Add", nodes("Unsqueeze", length, nodes.constant(1)), steps)


def by_head(nodes: Nodes, latent: ir.Value, heads: int) -> ir.Value:
    """Return [B, n_c, T, d_l] of [B, T, n_c·d_l]."""
    if heads == 1:
        return nodes("Unsqueeze", latent, nodes.constant(1))
    split = nodes("Reshape", latent, nodes.constant(0, 0, heads, static_size(latent, 2) // heads))
    return nodes("Transpose", split, perm=[0, 2, 1, 3])


class Mask:
    """Which rows of the cache a query sees, and how scores are laid out for the softmax.

    Args:
        nodes: makes what all layers share.
        heads: n_q, n_k, n_c.
        seen: last row that each query sees, int64 [B, T].
        tokens: T, int64 [1].
        capacity: S, int64 [1].
    """

    def __init__(
        self, nodes: Nodes, heads: tuple[int, int, int], seen: ir.Value, tokens: ir.Value, capacity: ir.Value
    ) -> None:
        n_q, n_k, n_c = heads
        rows = nodes("Range", nodes.scalar(0, np.int64), nodes("Squeeze", capacity), nodes.scalar(1, np.int64))
        visible = nodes("LessOrEqual", rows, nodes("Unsqueeze", seen, nodes.constant(-1)))  # [B, T, S]
        zero, lowest = nodes.scalar(0, np.float32), nodes.scalar(LOWEST, np.float32)
        mask = nodes("Unsqueeze", nodes("Where", visible, zero, lowest), nodes.constant(1))  # [B, 1, T, S]
        self._shapes: tuple[ir.Value, ir.Value] | None = None
        if n_k == n_c:  # the rows of one matmul are those of the next
            self._mask = nodes("Tile", mask, nodes.constant(1, 1, n_q // n_k, 1))
            return
        self._mask = mask
        by_query = nodes("Concat", nodes.constant(0), nodes.constant(n_q), tokens, capacity, axis=0)
        by_latent = nodes("Concat", nodes.constant(0), nodes.constant(n_c), nodes.constant(-1), capacity, axis=0)
        self._shapes = by_query, by_latent

    def received(self, nodes: Nodes, weights: ir.Value) -> ir.Value | None:
        """Return present_received [B, S] of the weights where it is kept; nodes may be a branch's."""
        return None

    def mixed(self, nodes: Nodes, mix: ir.Value) -> ir.Value:
        """Return the mix [B, n_q, T, d_l] as it counts: here, as it is."""
        return mix

    def softmax(self, nodes: Nodes, scores: ir.Value) -> ir.Value:
        """Return weights [B, n_c, (n_q / n_c)·T, S] of scores [B, n_k, (n_q / n_k)·T, S]; nodes may be a branch's."""
        if self._shapes is None:
            return nodes("Softmax", nodes("Add", scores, self._mask), axis=-1)
        by_query, by_latent = self._shapes
        weights = nodes("Softmax", nodes("Add", nodes("Reshape", scores, by_query), self._mask), axis=-1)
        return nodes("Reshape", weights, by_latent)


@dataclass(frozen=True)
class Attended:
    """What attention adds to a graph.

    Attributes:
        mix: float32 [B, n_c, (n_q / n_c)·T, d_l].
        present_key: the cache with the new rows.
        present_latent: likewise.
        received: present_received, where it is kept.
    """

    mix: ir.Value
    present_key: ir.Value
    present_latent: ir.Value
    received: ir.Value | None


@dataclass(frozen=True)
class Layer:
    """A node's inputs and sizes.

    Attributes:
        rotated: queries and keys after RoPE, float32 [B, n_q + n_k, T, d_k].
        latents: new ones, float32 [B, n_c, T, d_l].
        past_key: the graph's input, float32 [B, n_k, S, d_k].
        past_latent: likewise, [B, n_c, S, d_l].
        length: past_length, int64 [B].
        heads: n_q, n_k, n_c.
        scale: factor of the scores.
        tokens: T, int64 [1].
        mask: which rows are seen.
    """

    rotated: ir.Value
    latents: ir.Value
    past_key: ir.Value
    past_latent: ir.Value
    length: ir.Value
    heads: tuple[int, int, int]
    scale: float
    tokens: ir.Value
    mask: Mask
