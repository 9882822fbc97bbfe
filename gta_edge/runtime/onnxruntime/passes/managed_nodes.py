"""The parts of attention with a managed cache, in nodes: positions, mask, bias, branches, received attention.

Layers differ in the rows that they have in use, so that they share no mask. What can be computed for all of them at
once, from inputs that are stacked by layer, is: each then takes its slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.graph.attention import node_features
from gta_edge.graph.builder import Nodes
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.runtime.onnxruntime.passes.attention_nodes import LOWEST, Mask, positions

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["ManagedMask", "mask_of", "positions_of"]

_POWERS = tuple(1 << bit if bit < 63 else -(1 << 63) for bit in range(op.MAX_BRANCH_TOKENS))
_NEVER = -1.0

Given = Mapping[str, "ir.Value"]
"""An attention node's inputs by name, without those that are absent."""


def positions_of(nodes: Nodes, given: Given, tokens: ir.Value) -> ir.Value:
    """Return int64 [B, T], an input or the rows that new tokens are written to."""
    return given["positions"] if "positions" in given else positions(nodes, tokens, given["past_length"])


def mask_of(
    nodes: Nodes, node: ir.Node, heads: tuple[int, int, int], places: ir.Value, tokens: ir.Value, capacity: ir.Value
) -> Mask:
    """Return what an attention node's queries see: a ``ManagedMask`` where it has inputs of a managed cache.

    Args:
        nodes: makes what all layers share, or a layer once.
        node: the attention.
        heads: n_q, n_k, n_c.
        places: ``positions_of`` it.
        tokens: T, int64 [1].
        capacity: S, int64 [1].
    """
    if node_features(node) == op.Features():
        return Mask(nodes, heads, places, tokens, capacity)
    return ManagedMask(nodes, node, heads, places, tokens, capacity)


class ManagedMask(Mask):
    """Which rows of a managed cache a query sees, how scores become weights, and what rows receive of them.

    Attributes:
        observe: what is kept of what rows receive: ``mass``, ``last``, or empty for nothing.

    Args:
        nodes: makes what all layers share, or a layer once.
        node: the attention.
        heads: n_q, n_k, n_c.
        places: ``positions_of`` it.
        tokens: T, int64 [1].
        capacity: S, int64 [1].
    """

    def __init__(
        self,
        nodes: Nodes,
        node: ir.Node,
        heads: tuple[int, int, int],
        places: ir.Value,
        tokens: ir.Value,
        capacity: ir.Value,
    ) -> None:
        n_q, n_k, n_c = heads
        self._layouts(nodes, heads, tokens, capacity)
        self._given = given = op.given_inputs(node.inputs)
        self.observe = node.attributes.get_string(op.OBSERVE, "")
        self._some_see_nothing = "branches" in given
        # scores have a row for each token, or for each of the heads that share a key and each token
        rows_of_scores = n_q // n_k if n_k == n_c else 1
        rows = _count(nodes, capacity)
        if "branches" in given:
            self._visible = _in_branches(nodes, given, rows, rows_of_scores, tokens)
        else:
            self._visible = _causal(nodes, given["past_length"], rows, rows_of_scores, tokens)
        self._bias = _bias(nodes, given["row_bias"], capacity) if "row_bias" in given else None
        if self.observe:
            self._observing(nodes, n_q // n_c, places)

    def softmax(self, nodes: Nodes, scores: ir.Value) -> ir.Value:
        """Return weights [B, n_c, (n_q / n_c)·T, S] of scores [B, n_k, (n_q / n_k)·T, S]; nodes may be a branch's."""
        if self._shapes is not None:
            scores = nodes("Reshape", scores, self._shapes[0])
        if self._bias is not None:
            scores = nodes("Add", scores, self._bias)
        masked = nodes("Where", self._visible, scores, nodes.scalar(LOWEST, np.float32))
        weights = nodes("Softmax", masked, axis=-1)
        if self._some_see_nothing:  # whose weights are all equal now
            weights = nodes("Where", self._visible, weights, nodes.scalar(0, np.float32))
        return weights if self._shapes is None else nodes("Reshape", weights, self._shapes[1])

    def received(self, nodes: Nodes, weights: ir.Value) -> ir.Value | None:
        """Return present_received [B, S] of the weights where it is kept; nodes may be a branch's."""
        if not self.observe:
            return None
        axes = nodes.constant(1, 2)
        if self.observe == "mass":
            new = nodes("ReduceSum", nodes("MatMul", self._query_weight, weights), axes, keepdims=0)
            return nodes("Add", nodes("Mul", self._old_received, self._decay), new)
        important = nodes("GreaterOrEqual", weights, self._threshold)
        marks = nodes("Where", important, self._positions, nodes.scalar(_NEVER, np.float32))
        return nodes("Max", self._old_received, nodes("ReduceMax", marks, axes, keepdims=0))

    def _observing(self, nodes: Nodes, group: int, places: ir.Value) -> None:
        """Make what ``received`` needs; ``group`` heads share a latent, and are rows of the weights."""
        given, column = self._given, nodes.constant(1)
        mass, repeats = self.observe == "mass", nodes.constant(1, group)
        query_weight = nodes("Tile", given["query_weight"], repeats)  # [B, (n_q / n_c)·T]
        # rows without a past have what they would have if nothing had looked at them
        fresh = nodes("Expand", nodes.scalar(0 if mass else _NEVER, np.float32), nodes("Shape", given["query_weight"]))
        self._old_received = nodes("TensorScatter", given["past_received"], fresh, given["past_length"], axis=1)
        if mass:
            self._query_weight = nodes("Unsqueeze", query_weight, nodes.constant(1, 2))
            self._decay = nodes("Unsqueeze", given["decay"], column)
            return
        never, zero = nodes.scalar(np.inf, np.float32), nodes.scalar(0, np.float32)
        threshold = nodes("Where", nodes("Greater", query_weight, zero), nodes("Reciprocal", query_weight), never)
        self._threshold = nodes("Unsqueeze", threshold, nodes.constant(1, 3))
        tiled = nodes("Tile", nodes("Cast", places, to=int(ir.DataType.FLOAT)), repeats)
        self._positions = nodes("Unsqueeze", tiled, nodes.constant(1, 3))


def _count(nodes: Nodes, number: ir.Value) -> ir.Value:
    """Return 0, 1, … of as many as an int64 [1] says."""
    return nodes("Range", nodes.scalar(0, np.int64), nodes("Squeeze", number), nodes.scalar(1, np.int64))


def _for_all_layers(nodes: Nodes, compute: Callable[..., ir.Value], *values: ir.Value) -> ir.Value:
    """Return a function of values of one layer, computed for all at once where they are slices of stacked inputs.

    The function must not care for axes before its values' own.
    """
    slices = [value.producer() for value in values]
    if any(node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) for node in slices):
        return compute(*values)
    stacked, indices = zip(*(node.inputs for node in slices if node is not None), strict=True)
    return nodes("Gather", compute(*stacked), indices[0], axis=0)


def _causal(nodes: Nodes, past_length: ir.Value, rows: ir.Value, rows_of_scores: int, tokens: ir.Value) -> ir.Value:
    """Return bool [B, 1, rows of scores, S]: rows up to the query's own."""
    steps = nodes("Tile", _count(nodes, tokens), nodes.constant(rows_of_scores))

    def limits(length: ir.Value) -> ir.Value:  # [B, 1, rows of scores, 1]
        own = nodes("Add", nodes("Unsqueeze", length, nodes.constant(-1)), steps)
        return nodes("Unsqueeze", own, nodes.constant(-3, -1))

    return nodes("LessOrEqual", rows, _for_all_layers(nodes, limits, past_length))


def _bias(nodes: Nodes, row_bias: ir.Value, capacity: ir.Value) -> ir.Value:
    """Return the bias of every row, float32 [B, 1, 1, S]."""
    assert row_bias.shape is not None
    width = row_bias.shape[-1]
    assert isinstance(width, int)
    first = _for_all_layers(nodes, lambda bias: nodes("Unsqueeze", bias, nodes.constant(-3, -2)), row_bias)
    pads = nodes("Concat", nodes.constant(0), nodes("Sub", capacity, nodes.constant(width)), axis=0)
    return nodes("Pad", first, pads, None, nodes.constant(3))


def _in_branches(nodes: Nodes, given: Given, rows: ir.Value, rows_of_scores: int, tokens: ir.Value) -> ir.Value:
    """Return bool [B, 1, rows of scores, S]: rows before the branches, and those of the query's own.

    Every row has a word with a bit for each token: those of ``branches``, with a word of all bits in front of them, for
    all rows before, and one without any behind them, for all rows after.
    """
    every_bit, no_bit = nodes.scalar(-1, np.int64), nodes.scalar(0, np.int64)
    words = nodes("Pad", given["branches"], nodes.constant(0, 1, 0, 0), every_bit)
    words = nodes("Pad", words, nodes.constant(0, 0, 0, 1), no_bit)  # [B, W + 2]
    last = nodes("Sub", nodes("Shape", words, start=1, end=2), nodes.constant(1))
    word_index = _count(nodes, nodes("Add", last, nodes.constant(1)))

    def start(length: ir.Value, branch_start: ir.Value) -> tuple[ir.Value, ir.Value]:
        filled = nodes("Add", length, tokens)
        return nodes("Min", branch_start, filled), filled

    def words_in_use(length: ir.Value, branch_start: ir.Value) -> ir.Value:  # [B, 1, 1, W + 2]
        first, filled = start(length, branch_start)
        used = nodes("Unsqueeze", nodes("Sub", filled, first), nodes.constant(-1))
        kept = nodes("Where", nodes("LessOrEqual", word_index, used), words, no_bit)
        return nodes("Unsqueeze", kept, nodes.constant(-3, -2))

    def row_of_first_word(length: ir.Value, branch_start: ir.Value) -> ir.Value:  # [B, 1, 1, 1]
        first, _ = start(length, branch_start)
        return nodes("Unsqueeze", nodes("Sub", first, nodes.constant(1)), nodes.constant(-3, -2, -1))

    own = given["past_length"], given["branch_start"]
    kept = _for_all_layers(nodes, words_in_use, *own)
    offset = nodes("Sub", rows, _for_all_layers(nodes, row_of_first_word, *own))
    offset = nodes("Clip", offset, no_bit, nodes("Squeeze", last))
    word_of_row = nodes("GatherElements", kept, offset, axis=-1)  # [B, 1, 1, S]
    bits = nodes("Slice", nodes.constant(*_POWERS), nodes.constant(0), tokens)
    bits = nodes("Unsqueeze", nodes("Tile", bits, nodes.constant(rows_of_scores)), nodes.constant(1))
    return nodes("Cast", nodes("BitwiseAnd", word_of_row, bits), to=int(ir.DataType.BOOL))
