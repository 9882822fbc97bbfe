"""The KV cache as a graph has it: names, shapes and bytes of its tensors, and the graph's inputs and outputs around it.

A layer caches a key and what takes the place of the value, GTA's latent or the value itself. A cache of 8 bits has a
float32 scale per head and token beside each. Every tensor is an input of the graph, ``past_…``, and an output of the
same shape, ``present_…``; a session gives both the same memory.

    past_key.{i}           [B, n_k, S, d_k]    the key after RoPE
    past_latent.{i}        [B, n_c, S, d_l]    GTA's; others have past_value.{i} [B, n_kv, S, d_h]
    past_key_scale.{i}     [B, n_k, S]         float32, of a cache in int8 or fp8
    past_latent_scale.{i}  [B, n_c, S]         likewise

On ONNX Runtime's CPU a cache of int8 has keys transposed, [B, n_k, d_k, S], and scales [B, n, 1, S].

i is the layer, B the rows of a batch, S the capacity in tokens. Sizes are the config's (``ModelConfig.caches``).

A managed cache, whose rows are evicted or merged, has a capacity S_i for each layer, and more inputs (``Features``):

    past_length          int64 [L, B]         rows in use of each layer, instead of [B]
    positions            int64 [B, T]         of the new tokens
    row_bias             float32 [L, B, R]    added to the scores of rows 0 to R - 1
    branch_start         int64 [L, B]         see the op's definition
    branches             int64 [B, W]
    query_weight         float32 [B, T]       where attention is observed; so are the two below
    decay                float32 [B]
    past_received.{i}    float32 [B, S_i]     what the rows of a layer have received, and present_received.{i}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.attention.definition import Features

__all__ = [
    "BATCH_AXIS",
    "BRANCHES",
    "BRANCH_START",
    "CAPACITY_AXIS",
    "DECAY",
    "INPUT_IDS",
    "LOGITS",
    "LOGIT_POSITIONS",
    "PAST",
    "PAST_LENGTH",
    "POSITIONS",
    "PRESENT",
    "QUERY_WEIGHT",
    "ROW_BIAS",
    "TOKEN_INPUTS",
    "CacheTensor",
    "bytes_per_token",
    "cache_bytes",
    "cache_tensors",
    "input_shapes",
    "interface_names",
    "is_scale",
    "managed_shapes",
    "received_name",
    "received_tensors",
    "scale_name",
]

PAST, PRESENT = "past_", "present_"
"""What names of a graph's inputs and outputs begin with where they are caches."""

INPUT_IDS, PAST_LENGTH, LOGIT_POSITIONS = TOKEN_INPUTS = ("input_ids", "past_length", "logit_positions")
"""The graph's other inputs: int64 [B, T], [B] and [B, M]."""

POSITIONS, ROW_BIAS, BRANCH_START, BRANCHES = "positions", "row_bias", "branch_start", "branches"
QUERY_WEIGHT, DECAY = "query_weight", "decay"
"""Inputs of the graph of a managed cache, named as the op's."""

LOGITS = "logits"
"""The graph's first output, float32 [B, M, V]."""

BATCH_AXIS, CAPACITY_AXIS = 0, 2
"""Of a cache [B, heads, S, width], and of its scales [B, heads, S]."""

_SCALE_DTYPE = "fp32"
_SCALE = "_scale"

Size = TypeVar("Size", int, str)
"""A number, or the name of a symbolic dimension."""


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache of one layer.

    Attributes:
        name: without ``past_`` or ``present_``: ``key.0``, ``latent_scale.53``.
        heads: that are cached.
        width: values per head and token; None for scales, of which each has one and no axis for it.
        dtype: ``fp32`` or one of ``CACHE_TYPES``.
        transposed: whether tokens are the last axis, behind the width.
    """

    name: str
    heads: int
    width: int | None
    dtype: str
    transposed: bool = False

    @property
    def layer(self) -> int:
        """The layer that it is of."""
        return int(self.name.rpartition(".")[2])

    @property
    def past(self) -> str:
        """Name of the graph's input."""
        return PAST + self.name

    @property
    def present(self) -> str:
        """Name of the graph's output."""
        return PRESENT + self.name

    def shape(self, batch: Size, capacity: Size) -> tuple[Size | int, ...]:
        """Return ``(batch, heads, capacity, width)``, without the width for scales, with both swapped if transposed."""
        if self.transposed:
            return batch, self.heads, self.width or 1, capacity
        if self.width is None:
            return batch, self.heads, capacity
        return batch, self.heads, capacity, self.width

    @property
    def capacity_axis(self) -> int:
        """Axis of its tokens."""
        return CAPACITY_AXIS + self.transposed

    def parts(self, batch: int) -> int:
        """Return how many times the rows of all tokens lie one behind the other in it."""
        return math.prod(self.shape(batch, 1)[: self.capacity_axis])

    def nbytes(self, batch: int, capacity: int) -> int:
        """Return the bytes of this tensor."""
        return math.prod(self.shape(batch, capacity)) * DTYPES[self.dtype].bytes


def scale_name(name: str) -> str:
    """Return what the scales of a cache are called: ``past_key_scale.0`` for ``past_key.0``."""
    kind, dot, layer = name.partition(".")
    return f"{kind}{_SCALE}{dot}{layer}"


def is_scale(name: str) -> bool:
    """Tell whether an input or output of a graph is a cache's scales."""
    return name.partition(".")[0].endswith(_SCALE)


def received_name(layer: int) -> str:
    """Return what a layer's received attention is called, without ``past_`` or ``present_``."""
    return f"received.{layer}"


def received_tensors(layers: int) -> list[CacheTensor]:
    """Return the tensors of what each layer's rows have received of attention, [B, S], as caches of one head."""
    return [CacheTensor(received_name(layer), 1, None, "fp32") for layer in range(layers)]


def managed_shapes(
    features: Features, *, batch: Size, tokens: Size, capacities: Sequence[Size], words: Size | int = 0
) -> dict[str, tuple[Size | int, ...]]:
    """Return the shapes of a graph's inputs for a managed cache, by name; ``past_length`` has another than elsewhere.

    Args:
        features: which there are.
        batch: B, a number or a symbol's name; so are the others.
        tokens: T, new ones per row.
        capacities: S of each layer.
        words: W, of ``branches``.
    """
    layers = len(capacities)
    shapes: dict[str, tuple[Size | int, ...]] = {PAST_LENGTH: (layers, batch)}
    if features.has_positions:
        shapes[POSITIONS] = (batch, tokens)
    if features.bias_rows:
        shapes[ROW_BIAS] = (layers, batch, features.bias_rows)
    if features.has_branches:
        shapes |= {BRANCH_START: (layers, batch), BRANCHES: (batch, words)}
    if features.observe:
        shapes |= {QUERY_WEIGHT: (batch, tokens), DECAY: (batch,)}
        shapes |= {PAST + received_name(i): (batch, capacity) for i, capacity in enumerate(capacities)}
    return shapes


def cache_tensors(config: ModelConfig, dtype: str = "fp32", *, transposed: bool = False) -> list[CacheTensor]:
    """Return the tensors of the whole cache in the graph's order: layer by layer, scales behind all caches.

    Args:
        config: the model's sizes.
        dtype: of cached values, ``fp32`` or one of ``CACHE_TYPES``; float32 is what a bundle's own graph has.
        transposed: whether keys and scales lie as matmuls of integers take them on ONNX Runtime's CPU.
    """
    tensors = [tensor for i in range(config.num_hidden_layers) for tensor in _layer_tensors(config, dtype, i)]
    if transposed:
        first = config.caches[0].name  # the key's
        tensors = [replace(t, transposed=t.width is None or t.name.startswith(f"{first}.")) for t in tensors]
    return sorted(tensors, key=lambda tensor: tensor.width is None)  # which keeps the order otherwise


def _layer_tensors(config: ModelConfig, dtype: str, layer: int) -> list[CacheTensor]:
    values = [CacheTensor(f"{cache.name}.{layer}", cache.heads, cache.width, dtype) for cache in config.caches]
    if not DTYPES[dtype].needs_scale:
        return values
    return values + [CacheTensor(scale_name(value.name), value.heads, None, _SCALE_DTYPE) for value in values]


def bytes_per_token(config: ModelConfig, dtype: str = "fp32") -> int:
    """Return the bytes that one token adds to the cache of all layers, scales included."""
    return config.num_hidden_layers * sum(tensor.nbytes(1, 1) for tensor in _layer_tensors(config, dtype, 0))


def cache_bytes(config: ModelConfig, dtype: str, tokens: int, batch: int = 1) -> int:
    """Return the bytes of the cache of all layers for ``tokens`` in each of ``batch`` rows, scales included."""
    return batch * tokens * bytes_per_token(config, dtype)


def input_shapes(
    config: ModelConfig, dtype: str = "fp32", *, batch: Size, tokens: Size, positions: Size, capacity: Size
) -> dict[str, tuple[Size | int, ...]]:
    """Return the shape of every input of the graph by name, in its order.

    Args:
        config: the model's sizes.
        dtype: of cached values, ``fp32`` or one of ``CACHE_TYPES``.
        batch: B, a number or a symbol's name; so are the others.
        tokens: T, new ones per row.
        positions: M, of each row, that logits are given for.
        capacity: S, tokens per row that the cache has room for.
    """
    of_tokens: tuple[tuple[Size | int, ...], ...] = ((batch, tokens), (batch,), (batch, positions))
    caches = {tensor.past: tensor.shape(batch, capacity) for tensor in cache_tensors(config, dtype)}
    return dict(zip(TOKEN_INPUTS, of_tokens, strict=True)) | caches


def interface_names(config: ModelConfig, dtype: str = "fp32") -> tuple[list[str], list[str]]:
    """Return the names of the graph's inputs and outputs, in order."""
    tensors = cache_tensors(config, dtype)
    return [*TOKEN_INPUTS, *(each.past for each in tensors)], [LOGITS, *(each.present for each in tensors)]
