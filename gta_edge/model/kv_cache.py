"""The KV cache as a graph has it: names, shapes and bytes of its tensors, and the graph's inputs and outputs around it.

A layer caches a key and what takes the place of the value, GTA's latent or the value itself. A cache of 8 bits has a
float32 scale per head and token beside each. Every tensor is an input of the graph, ``past_…``, and an output of the
same shape, ``present_…``; a session gives both the same memory.

    past_key.{i}           [B, n_k, S, d_k]    the key after RoPE
    past_latent.{i}        [B, n_c, S, d_l]    GTA's; others have past_value.{i} [B, n_kv, S, d_h]
    past_key_scale.{i}     [B, n_k, S]         float32, of a cache in int8 or fp8
    past_latent_scale.{i}  [B, n_c, S]         likewise

A cache of 4 bits (``int4``; in ``int4v2`` values have 2) holds codes of whole blocks of 32 tokens, so that S is a
multiple of 32, and the tokens of the last block, which is not full, as they are:

    past_key.{i}           uint8 [B, n_k, S / 32, d_k, 16]    a channel's 32 tokens together (numerics.cache_codes)
    past_latent.{i}        uint8 [B, n_c, S, d_l / 2], or d_l / 4
    past_key_scale.{i}     float16 [B, n_k, S / 32, 2, d_k]   scale and minimum
    past_latent_scale.{i}  float16 [B, n_c, S, 2]             likewise
    past_key_open.{i}      [B, n_k, 32, d_k]                  of the type of activations; position mod 32 is the row
    past_latent_open.{i}   [B, n_c, 32, d_l]                  likewise

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

One with positions and branches alone (``TREES``) has the same rows in every layer, and so one S for all, and
past_length and branch_start int64 [B].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gta_edge.model.config import ModelConfig
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import CACHES, DTYPES
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
    "TREES",
    "CacheTensor",
    "bytes_per_token",
    "cache_bytes",
    "cache_tensors",
    "capacity_of",
    "input_shapes",
    "interface_names",
    "is_open",
    "is_scale",
    "managed_shapes",
    "open_name",
    "received_name",
    "received_tensors",
    "scale_name",
    "step_bytes",
]

PAST, PRESENT = "past_", "present_"
"""What names of a graph's inputs and outputs begin with where they are caches."""

INPUT_IDS, PAST_LENGTH, LOGIT_POSITIONS = TOKEN_INPUTS = ("input_ids", "past_length", "logit_positions")
"""The graph's other inputs: int64 [B, T], [B] and [B, M]."""

POSITIONS, ROW_BIAS, BRANCH_START, BRANCHES = "positions", "row_bias", "branch_start", "branches"
QUERY_WEIGHT, DECAY = "query_weight", "decay"
"""Inputs of the graph of a managed cache, named as the op's."""

TREES = Features(has_positions=True, has_branches=True)
"""Of a cache that holds trees of tokens, whose rows are those of every layer."""

LOGITS = "logits"
"""The graph's first output, float32 [B, M, V]."""

BATCH_AXIS, CAPACITY_AXIS = 0, 2
"""Of a cache [B, heads, S, width], and of its scales [B, heads, S]."""

_SCALE, _OPEN = "_scale", "_open"

Size = TypeVar("Size", int, str)
"""A number, or the name of a symbolic dimension."""


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache of one layer.

    Attributes:
        name: without ``past_`` or ``present_``: ``key.0``, ``latent_scale.53``.
        heads: that are cached.
        width: values per head and token; None for scales.
        dtype: of its elements, one of ``DTYPES``.
        transposed: whether tokens are the last axis, behind the width.
        row: what it holds for each head, and token or block of tokens.
        block: tokens that share a row: 32 in a block's; 0 of an open block, which is of 32 rows whatever the capacity.
    """

    name: str
    heads: int
    width: int | None
    dtype: str
    transposed: bool = False
    row: tuple[int, ...] = ()
    block: int = 1

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
        """Return ``(batch, heads, rows, *row)``, with the last two swapped if transposed.

        There are as many rows as ``capacity``, or blocks in it, rounded up. Of a symbol, blocks are ``capacity/32``.
        """
        rows = self._rows(capacity)
        if self.transposed:
            return batch, self.heads, *(self.row or (1,)), rows
        return batch, self.heads, rows, *self.row

    def _rows(self, capacity: Size) -> Size | int:
        if not self.block:
            return BLOCK
        if self.block == 1:
            return capacity
        return f"{capacity}/{self.block}" if isinstance(capacity, str) else -(-capacity // self.block)

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


def open_name(name: str) -> str:
    """Return what the open block of a cache is called: ``past_key_open.0`` for ``past_key.0``."""
    kind, dot, layer = name.partition(".")
    return f"{kind}{_OPEN}{dot}{layer}"


def is_open(name: str) -> bool:
    """Tell whether an input or output of a graph is a cache's open block."""
    return name.partition(".")[0].endswith(_OPEN)


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
    rows: tuple[Size | int, ...] = (batch,) if features == TREES else (layers, batch)
    shapes: dict[str, tuple[Size | int, ...]] = {PAST_LENGTH: rows}
    if features.has_positions:
        shapes[POSITIONS] = (batch, tokens)
    if features.bias_rows:
        shapes[ROW_BIAS] = (layers, batch, features.bias_rows)
    if features.has_branches:
        shapes |= {BRANCH_START: rows, BRANCHES: (batch, words)}
    if features.observe:
        shapes |= {QUERY_WEIGHT: (batch, tokens), DECAY: (batch,)}
        shapes |= {PAST + received_name(i): (batch, capacity) for i, capacity in enumerate(capacities)}
    return shapes


def cache_tensors(
    config: ModelConfig, dtype: str = "fp32", *, compute: str = "fp16", transposed: bool = False
) -> list[CacheTensor]:
    """Return the tensors of the whole cache in the graph's order.

    That is layer by layer, scales behind all keys and values, and open blocks behind those.

    Args:
        config: the model's sizes.
        dtype: how values are stored, one of ``CACHES``; float32 is what a bundle's own graph has.
        compute: type of activations, in which a cache in blocks has its open block.
        transposed: whether keys and scales lie as matmuls of integers take them on ONNX Runtime's CPU.
    """
    layers = [_layer_tensors(config, dtype, compute, i) for i in range(config.num_hidden_layers)]
    tensors = [tensor for kinds in zip(*layers, strict=True) for tensors in kinds for tensor in tensors]
    if transposed:
        first = config.caches[0].name  # the key's
        tensors = [replace(t, transposed=t.width is None or t.name.startswith(f"{first}.")) for t in tensors]
    return tensors


def _layer_tensors(config: ModelConfig, dtype: str, compute: str, layer: int) -> list[list[CacheTensor]]:
    """Return a layer's keys and values, the scales of both if there are any, and likewise the open blocks."""
    cache = CACHES[dtype]
    both = [(f"{each.name}.{layer}", each.heads, each.width) for each in config.caches]
    if not cache.in_blocks:
        values = [CacheTensor(name, heads, width, cache.dtype, row=(width,)) for name, heads, width in both]
        if cache.scale is None:
            return [values]
        return [values, [CacheTensor(scale_name(name), heads, None, cache.scale) for name, heads, _ in both]]
    opened = [CacheTensor(open_name(name), heads, width, compute, row=(width,), block=0) for name, heads, width in both]
    (key, key_heads, key_width), (value, heads, width) = both
    assert cache.scale is not None  # a table's entry in blocks has one
    codes = [
        CacheTensor(key, key_heads, key_width, cache.dtype, row=(key_width, BLOCK * cache.key_bits // 8), block=BLOCK),
        CacheTensor(value, heads, width, cache.dtype, row=(width * cache.value_bits // 8,)),
    ]
    scales = [
        CacheTensor(scale_name(key), key_heads, None, cache.scale, row=(2, key_width), block=BLOCK),
        CacheTensor(scale_name(value), heads, None, cache.scale, row=(2,)),
    ]
    return [codes, scales, opened]


def bytes_per_token(config: ModelConfig, dtype: str = "fp32") -> int:
    """Return the bytes that one token adds to the cache of all layers, scales included; an open block is none's."""
    tensors = (tensor for tensor in cache_tensors(config, dtype) if tensor.block)
    return -(-sum(tensor.nbytes(1, BLOCK) for tensor in tensors) // BLOCK)


def cache_bytes(config: ModelConfig, dtype: str, tokens: int, batch: int = 1, *, compute: str = "fp16") -> int:
    """Return the bytes of the cache of all layers for ``tokens`` in each of ``batch`` rows.

    Scales are included, and open blocks, which are of the type ``compute``; blocks are whole.
    """
    room = capacity_of(dtype, tokens)
    return sum(tensor.nbytes(batch, room) for tensor in cache_tensors(config, dtype, compute=compute))


def step_bytes(config: ModelConfig, dtype: str, rows: int, batch: int = 1, *, compute: str = "fp16") -> int:
    """Return the bytes of cache that go through memory when a step reads or writes so many rows, each once.

    An open block is read whole in every step, whatever is in it.

    Args:
        config: the model's sizes.
        dtype: how values are stored, one of ``CACHES``.
        rows: of each sequence, those of all layers together.
        batch: sequences.
        compute: type of activations, in which a cache in blocks has its open block.
    """
    opened = cache_bytes(config, dtype, 0, compute=compute)
    return batch * (rows * bytes_per_token(config, dtype) // config.num_hidden_layers + opened)


def capacity_of(dtype: str, tokens: int) -> int:
    """Return the smallest capacity that a cache may have which holds ``tokens``: whole blocks, where there are any."""
    return -(-tokens // BLOCK) * BLOCK if CACHES[dtype].in_blocks else tokens


def input_shapes(
    config: ModelConfig,
    dtype: str = "fp32",
    *,
    batch: Size,
    tokens: Size,
    positions: Size,
    capacity: Size,
    compute: str = "fp16",
) -> dict[str, tuple[Size | int, ...]]:
    """Return the shape of every input of the graph by name, in its order.

    Args:
        config: the model's sizes.
        dtype: how cached values are stored, one of ``CACHES``.
        batch: B, a number or a symbol's name; so are the others.
        tokens: T, new ones per row.
        positions: M, of each row, that logits are given for.
        capacity: S, tokens per row that the cache has room for.
        compute: type of activations.
    """
    of_tokens: tuple[tuple[Size | int, ...], ...] = ((batch, tokens), (batch,), (batch, positions))
    caches = {tensor.past: tensor.shape(batch, capacity) for tensor in cache_tensors(config, dtype, compute=compute)}
    return dict(zip(TOKEN_INPUTS, of_tokens, strict=True)) | caches


def interface_names(config: ModelConfig, dtype: str = "fp32") -> tuple[list[str], list[str]]:
    """Return the names of the graph's inputs and outputs, in order."""
    tensors = cache_tensors(config, dtype)
    return [*TOKEN_INPUTS, *(each.past for each in tensors)], [LOGITS, *(each.present for each in tensors)]
