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
        self._heads = heads
        self._given = given = op.given_inputs(node.inputs)
        self.observe = node.attributes.get_string(op.OBSERVE, "")
        rows, no_bias = _count(nodes, capacity), nodes.scalar(0, np.float32)
        branched = "branches" in given
        visible = _in_branches(nodes, given, rows, tokens) if branched else _causal(nodes, given, rows, tokens)
        self._visible = visible if branched else None  # where a query may see nothing
        bias = _bias(nodes, given["row_bias"], capacity) if "row_bias" in given else no_bias
        lowest = nodes.scalar(LOWEST, np.float32)
        self._mask = nodes("Where", visible, bias, lowest)  # [B, 1, T, S]
        if branched and not self.observe:
            best = nodes("ReduceMax", self._mask, nodes.constant(-1), keepdims=1)
            self._sees = nodes("Greater", best, lowest)  # [B, 1, T, 1]
        if self.observe:
            self._observing(nodes, places)

    def softmax(self, nodes: Nodes, scores: ir.Value) -> ir.Value:
        """Return weights [B, n_c, (n_q / n_c)·T, S] of scores [B, n_k, (n_q / n_k)·T, S]; nodes may be a branch's."""
        n_q, n_k, n_c = self._heads
        weights = nodes("Softmax", nodes("Add", _by_heads(nodes, scores, n_k, n_q), self._mask), axis=-1)
        if self._visible is not None and self.observe:  # the weights of a query that sees nothing are all equal now
            weights = nodes("Where", self._visible, weights, nodes.scalar(0, np.float32))
        return _by_heads(nodes, weights, n_q, n_c)

    def mixed(self, nodes: Nodes, mix: ir.Value) -> ir.Value:
        """Return the mix with zeros for queries that see nothing: less to write than weights of zero."""
        if self._visible is None or self.observe:
            return mix
        return nodes("Where", self._sees, mix, nodes.scalar(0, np.float32))

    def received(self, nodes: Nodes, weights: ir.Value) -> ir.Value | None:
        """Return present_received [B, S] of the weights where it is kept; nodes may be a branch's."""
        if not self.observe:
            return None
        n_q, _, n_c = self._heads
        if self.observe == "mass":
            new = nodes("MatMul", self._query_weight, _by_heads(nodes, weights, n_c, 1))  # [B, 1, 1, S]
            decayed = nodes("Mul", self._old_received, self._decay)
            return nodes("Add", decayed, nodes("Squeeze", new, nodes.constant(1, 2)))
        largest = nodes("ReduceMax", _by_heads(nodes, weights, n_c, n_q), nodes.constant(1), keepdims=0)  # [B, T, S]
        important = nodes("GreaterOrEqual", largest, self._threshold)
        marks = nodes("Where", important, self._positions, nodes.scalar(_NEVER, np.float32))
        return nodes("Max", self._old_received, nodes("ReduceMax", marks, nodes.constant(1), keepdims=0))

    def _observing(self, nodes: Nodes, places: ir.Value) -> None:
        """Make what ``received`` needs."""
        given, query_weight, last = self._given, self._given["query_weight"], nodes.constant(-1)
        mass = self.observe == "mass"
        # new rows have what they would have if nothing had looked at them
        fresh = nodes("Expand", nodes.scalar(0 if mass else _NEVER, np.float32), nodes("Shape", query_weight))
        self._old_received = nodes("TensorScatter", given["past_received"], fresh, given["past_length"], axis=1)
        if mass:
            by_query = nodes("Tile", query_weight, nodes.constant(1, self._heads[0]))
            self._query_weight = nodes("Unsqueeze", by_query, nodes.constant(1, 2))  # [B, 1, 1, n_q·T]
            self._decay = nodes("Unsqueeze", given["decay"], last)
            return
        never, zero = nodes.scalar(np.inf, np.float32), nodes.scalar(0, np.float32)
        threshold = nodes("Where", nodes("Greater", query_weight, zero), nodes("Reciprocal", query_weight), never)
        self._threshold = nodes("Unsqueeze", threshold, last)  # [B, T, 1]
        self._positions = nodes("Unsqueeze", nodes("Cast", places, to=int(ir.DataType.FLOAT)), last)


def _by_heads(nodes: Nodes, x: ir.Value, found: int, wanted: int) -> ir.Value:
    """Return [B, wanted, (n_q / wanted)·T, S] of [B, found, (n_q / found)·T, S]."""
    return x if found == wanted else nodes("Reshape", x, nodes.constant(0, wanted, -1, 0))


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


def _causal(nodes: Nodes, given: Given, rows: ir.Value, tokens: ir.Value) -> ir.Value:
    """Return bool [B, 1, T, S]: rows up to the query's own."""
    steps = _count(nodes, tokens)

    def limits(length: ir.Value) -> ir.Value:  # [B, 1, T, 1]
        own = nodes("Add", nodes("Unsqueeze", length, nodes.constant(-1)), steps)
        return nodes("Unsqueeze", own, nodes.constant(-3, -1))

    return nodes("LessOrEqual", rows, _for_all_layers(nodes, limits, given["past_length"]))


def _bias(nodes: Nodes, row_bias: ir.Value, capacity: ir.Value) -> ir.Value:
    """Return the bias of every row, float32 [B, 1, 1, S]."""
    assert row_bias.shape is not None
    width = row_bias.shape[-1]
    assert isinstance(width, int)
    first = _for_all_layers(nodes, lambda bias: nodes("Unsqueeze", bias, nodes.constant(-3, -2)), row_bias)
    pads = nodes("Concat", nodes.constant(0), nodes("Sub", capacity, nodes.constant(width)), axis=0)
    return nodes("Pad", first, pads, None, nodes.constant(3))


def _in_branches(nodes: Nodes, given: Given, rows: ir.Value, tokens: ir.Value) -> ir.Value:
    """Return bool [B, 1, T, S]: rows before the branches, and those of the query's own.

    Every row has a word with a bit for each token: those of ``branches``, with a word of all bits in front of them, for
    all rows before, and one without any behind them, for all rows after. Where there are more tokens than bits, no row
    has a word, and queries see up to their own.
    """
    powers = nodes("Slice", nodes.constant(*_POWERS), nodes.constant(0), tokens)
    bitless = nodes("Sub", tokens, nodes("Shape", powers))
    has_bits = nodes("Equal", bitless, nodes.constant(0))
    causal = nodes("And", _causal(nodes, given, rows, tokens), nodes("Not", has_bits))
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
        kept = nodes("Where", nodes("And", nodes("LessOrEqual", word_index, used), has_bits), words, no_bit)
        return nodes("Unsqueeze", kept, nodes.constant(-3, -2))

    def row_of_first_word(length: ir.Value, branch_start: ir.Value) -> ir.Value:  # [B, 1, 1, 1]
        first, _ = start(length, branch_start)
        return nodes("Unsqueeze", nodes("Sub", first, nodes.constant(1)), nodes.constant(-3, -2, -1))

    own = given["past_length"], given["branch_start"]
    kept = _for_all_layers(nodes, words_in_use, *own)
    offset = nodes("Sub", rows, _for_all_layers(nodes, row_of_first_word, *own))
    offset = nodes("Clip", offset, no_bit, nodes("Squeeze", last))
    word_of_row = nodes("GatherElements", kept, offset, axis=-1)  # [B, 1, 1, S]
    bits = nodes("Pad", powers, nodes("Concat", nodes.constant(0), bitless, axis=0))
    bits = nodes("BitwiseAnd", word_of_row, nodes("Unsqueeze", bits, nodes.constant(1)))
    return nodes("Or", nodes("Cast", bits, to=int(ir.DataType.BOOL)), causal)
