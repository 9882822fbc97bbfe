"""Attention on a cache of int8, in operators that ONNX Runtime's CPU kernels have.

A row of the cache, a token's key or latent of one head, is stored as int8 codes and a float32 scale, its largest
magnitude over 127. Keys lie transposed, as a matmul of integers wants them. Of layer i:

    past_key.{i}           int8     [B, n_k, d_k, S]
    past_latent.{i}        int8     [B, n_c, S, d_l]    GTA's; others have past_value.{i}
    past_key_scale.{i}     float32  [B, n_k, 1, S]
    past_latent_scale.{i}  float32  [B, n_c, 1, S]

A step of few tokens reads the cache as it is. Queries are rounded to 8 bits, with a scale for each head and token,
and scores are sums of integers times both scales. A softmax weight times its latent's scale is written in 16 bits of
the largest in its row, as two bytes, and latents are multiplied by high bytes and by low ones.

A step of many tokens dequantises the layer's cache once and goes on in float32: it has more weights to round than
values to dequantise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.graph.builder import Nodes, static_size
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import scale_name
from gta_edge.numerics.dtypes import LARGEST_CODES
from gta_edge.runtime.onnxruntime.passes.attention_nodes import CONTRIB, Attended, Layer
from gta_edge.runtime.onnxruntime.passes.managed_nodes import ManagedMask

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["MAX_FEW_TOKENS", "attend_in_int8"]

MAX_FEW_TOKENS = 64
"""Of each sequence, in a step that reads the cache as it is; a tree of tokens has no more. With so many it still takes
a sixth less time than the other way, in GTA-1B and in GQA-1B (``benchmarks/attention_layer.py``)."""

_LARGEST_CODE = LARGEST_CODES["int8"]
_MIDDLE = 128  # how a query's code of 0 is stored, which is unsigned
_SMALLEST = 1e-18  # magnitude of a row: one of zeros has a scale too, and nothing is divided by 0
_SMALLEST_WEIGHT = 1e-30  # that is told apart from none
_LEVELS = 65535.0  # of a weight


def attend_in_int8(nodes: Nodes, graph: ir.Graph, layer: Layer, present: tuple[ir.Value, ir.Value]) -> Attended:
    """Let a layer append to a cache of int8 and attend to it.

    Args:
        nodes: makes them.
        graph: that the caches are inputs and outputs of; their scales are added behind all others.
        layer: its inputs and sizes.
        present: the outputs of the node for key and latent, the graph's own, which are given their type and shape too.
    """
    n_q, n_k, _ = layer.heads
    assert layer.past_key.shape is not None  # the graph's own inputs
    assert layer.past_latent.shape is not None
    batch, _, rows, d_k = layer.past_key.shape
    _, n_c, _, d_l = layer.past_latent.shape
    past_scales = []
    for heads, shape, past, new in (
        (n_k, (batch, n_k, d_k, rows), layer.past_key, present[0]),
        (n_c, (batch, n_c, rows, d_l), layer.past_latent, present[1]),
    ):
        for value in (past, new):
            value.type, value.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(shape)
        past_scales.append(_scale_of(past, (batch, heads, 1, rows)))
    graph.inputs.extend(past_scales)

    # queries and keys are divided by their largest magnitude together, head by head
    largest = _largest(nodes, layer.rotated)
    split = nodes.constant(n_q, n_k)
    query_units = nodes("Split", nodes("Div", layer.rotated, largest), split, axis=1, outputs=2)
    key_units = nodes.outputs[1]
    query_largest = nodes("Split", largest, split, axis=1, outputs=2)
    key_largest = nodes.outputs[1]
    latent_largest = _largest(nodes, layer.latents)
    latent_units = nodes("Div", layer.latents, latent_largest)

    appended, scales = [], []
    for units, magnitude, past, past_scale, key in (
        (key_units, key_largest, layer.past_key, past_scales[0], True),
        (latent_units, latent_largest, layer.past_latent, past_scales[1], False),
    ):
        codes = nodes("QuantizeLinear", units, nodes.scalar(1 / _LARGEST_CODE, np.float32), nodes.scalar(0, np.int8))
        if key:
            codes = nodes("Transpose", codes, perm=[0, 1, 3, 2])
        scale = nodes("Mul", magnitude, nodes.scalar(1 / _LARGEST_CODE, np.float32))
        scale = nodes("Transpose", scale, perm=[0, 1, 3, 2])  # [B, heads, 1, T]
        appended.append(nodes("TensorScatter", past, codes, layer.length, axis=3 if key else 2))
        scales.append(nodes("TensorScatter", past_scale, scale, layer.length, axis=3))
    for value, old, like in zip(scales, present, past_scales, strict=True):
        value.name, value.type, value.shape = scale_name(str(old.name)), like.type, like.shape
        graph.outputs.append(value)

    cache = _Cache(appended[0], appended[1], scales[0], scales[1])
    few = nodes("LessOrEqual", layer.tokens, nodes.constant(MAX_FEW_TOKENS))
    in_place = _branch("few", _attend_in_place, layer, cache, query_units, query_largest)
    dequantised = _branch("many", _attend_dequantised, layer, cache, query_units, query_largest)
    kept = len(in_place.outputs)  # the mix, and what rows received where it is kept
    mix = nodes("If", few, then_branch=in_place, else_branch=dequantised, outputs=kept)
    return Attended(mix, appended[0], appended[1], nodes.outputs[1] if kept > 1 else None)


@dataclass(frozen=True)
class _Cache:
    """A layer's cache with the new rows."""

    key: ir.Value
    latent: ir.Value
    key_scale: ir.Value
    latent_scale: ir.Value


def _scale_of(cache: ir.Value, shape: tuple[Any, ...]) -> ir.Value:
    name = scale_name(str(cache.name))
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _largest(nodes: Nodes, values: ir.Value) -> ir.Value:
    """Return the largest magnitude of each row, [..., 1], at least ``_SMALLEST``; NaN where one is NaN."""
    largest = nodes("ReduceMax", nodes("Abs", values), nodes.constant(-1), keepdims=1)
    return nodes("Max", largest, nodes.scalar(_SMALLEST, np.float32))


def _branch(name: str, attend: _Attend, layer: Layer, cache: _Cache, units: ir.Value, largest: ir.Value) -> ir.Graph:
    """Return a branch of an If: a graph without inputs that reads the values around it."""
    nodes = Nodes()
    outputs = [value for value in attend(nodes, layer, cache, units, largest) if value is not None]
    for i, value in enumerate(value for node in nodes.made for value in node.outputs):
        value.name = f"{layer.past_key.name}.{name}.{i}"  # names of all branches are one set, with the graph's
    return ir.Graph([], outputs, nodes=nodes.made, name=name)


def _attend_in_place(nodes: Nodes, layer: Layer, cache: _Cache, units: ir.Value, largest: ir.Value) -> _Found:
    n_k, d_k = layer.heads[1], static_size(layer.past_key, 2)
    unit = nodes.scalar(1 / _LARGEST_CODE, np.float32)
    codes = nodes("QuantizeLinear", units, unit, nodes.scalar(_MIDDLE, np.uint8))
    codes = nodes("Reshape", codes, nodes.constant(0, n_k, -1, d_k))
    factor = nodes("Mul", largest, nodes.scalar(layer.scale / _LARGEST_CODE, np.float32))  # [B, n_q, T, 1]
    factor = nodes("Reshape", factor, nodes.constant(0, n_k, -1, 1))
    one = nodes.scalar(1, np.float32)
    middle = nodes.scalar(_MIDDLE, np.uint8)
    sums = nodes("MatMulIntegerToFloat", codes, cache.key, one, cache.key_scale, middle, domain=CONTRIB)
    weights = layer.mask.softmax(nodes, nodes("Mul", sums, factor))

    received = layer.mask.received(nodes, weights)

    weights = nodes("Mul", weights, cache.latent_scale)  # [B, n_c, R, S]
    largest = nodes("ReduceMax", weights, nodes.constant(-1), keepdims=1)
    if isinstance(layer.mask, ManagedMask):  # a query may see no row, and then all its weights are zero
        largest = nodes("Max", largest, nodes.scalar(_SMALLEST_WEIGHT, np.float32))
    levels = nodes("Mul", weights, nodes("Div", nodes.scalar(_LEVELS, np.float32), largest))
    levels = nodes("Add", levels, nodes.scalar(0.5, np.float32))
    low = nodes("Cast", nodes("Cast", levels, to=ir.DataType.INT32), to=ir.DataType.UINT8)  # modulo 256
    high = nodes("Cast", nodes("Mul", levels, nodes.scalar(1 / 256, np.float32)), to=ir.DataType.UINT8)
    level = nodes.scalar(1 / _LEVELS, np.float32)
    both = nodes("Concat", high, low, axis=2)
    sums = nodes("MatMulIntegerToFloat", both, cache.latent, level, one, domain=CONTRIB)
    high = nodes("Split", sums, axis=2, num_outputs=2, outputs=2)
    low = nodes.outputs[1]
    return nodes("Mul", nodes("Add", nodes("Mul", high, nodes.scalar(256, np.float32)), low), largest), received


def _attend_dequantised(nodes: Nodes, layer: Layer, cache: _Cache, units: ir.Value, largest: ir.Value) -> _Found:
    n_k, d_k = layer.heads[1], static_size(layer.past_key, 2)
    queries = nodes("Reshape", nodes("Mul", units, largest), nodes.constant(0, n_k, -1, d_k))
    keys = nodes("Mul", nodes("Cast", cache.key, to=ir.DataType.FLOAT), cache.key_scale)
    scores = nodes("FusedMatMul", queries, keys, domain=CONTRIB, alpha=layer.scale)
    weights = layer.mask.softmax(nodes, scores)
    scale = nodes("Transpose", cache.latent_scale, perm=[0, 1, 3, 2])
    latents = nodes("Mul", nodes("Cast", cache.latent, to=ir.DataType.FLOAT), scale)
    return nodes("MatMul", weights, latents), layer.mask.received(nodes, weights)


_Found = tuple["ir.Value", "ir.Value | None"]
"""The mix, and what rows received where it is kept."""

_Attend = Callable[[Nodes, Layer, _Cache, "ir.Value", "ir.Value"], _Found]
