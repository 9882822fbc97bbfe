"""Say what a managed cache and trees of tokens take in operators that ONNX Runtime's CUDA provider has in opset 24."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.errors import BundleError
from gta_edge.graph.builder import Nodes, take_place
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort-gpu")

__all__ = ["SpellForCudaPass"]

_HALF = MAX_BRANCH_TOKENS // 2
"""Bits of half a word: a number of so many is not negative, and neither is twice it."""


class SpellForCudaPass(ir.passes.InPlacePass):
    """Replace Pad and ReduceMax, of which the provider has kernels of older opsets alone, BitwiseAnd, and GatherND.

    What a Pad gives is gathered, and what it is padded with put in its place. Where the largest of something is asked
    for in "last", a sum gives it: a query found a row important if the number of its heads that did is not 0; and since
    a step's positions ascend, the last query that did is the one behind which nobody did. A bit of a row's word is read
    off the half of the word that it is in: bit t of h is set if h modulo 2^(t+1) is at least 2^t.

    Nor is there a GatherND, or a Concat of what lies in the GPU's memory: their kernels copy sizes from the host's,
    which a CUDA graph reads again in each replay, whatever lies there by then.

    Precondition: functions are inlined.
    Postcondition: there is none of them.

    Raises:
        BundleError: one of them stands elsewhere.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model``."""
        modified = False
        for op_type, rewrite in _SPELT.items():
            for node in [node for node in model.graph if node.op_type == op_type]:
                if node.graph is not None:  # with one before it, it may have gone
                    rewrite(model.graph, node)
                    modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """There is none of them."""
        left = next((node.op_type for node in model.graph if node.op_type in _SPELT), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"a {left} is left")


def _gather(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a Pad of the last axis, in front or behind, of at least one number."""
    data, filled_with = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    amounts = [] if node.inputs[1] is None else _entries(node.inputs[1])
    axes = len(amounts) // 2
    places = [i for i, amount in enumerate(amounts) if amount != 0]
    if data is None or len(places) != 1 or places[0] not in (axes - 1, 2 * axes - 1):
        raise _elsewhere(node)
    nodes, amount = Nodes(), amounts[places[0]]
    amount = nodes.constant(amount) if isinstance(amount, int) else amount
    size, one = nodes("Shape", data, start=axes - 1, end=axes), nodes.scalar(1, np.int64)
    whole = nodes("Squeeze", nodes("Add", size, amount))
    index = nodes("Range", nodes.scalar(0, np.int64), whole, one)
    if places[0] < axes:
        kept = nodes("GreaterOrEqual", index, amount)
        index = nodes("Max", nodes("Sub", index, amount), nodes.constant(0))
    else:
        kept = nodes("Less", index, size)
        index = nodes("Min", index, nodes("Sub", size, one))
    if filled_with is None:
        filled_with = nodes.scalar(0, _kind(data).numpy().type)
    values = nodes("Gather", data, index, axis=axes - 1)
    _replace(graph, node, nodes, nodes("Where", kept, values, filled_with))


def _gather_elements(graph: ir.Graph, node: ir.Node) -> None:
    """Replace GatherND (words [B, W], Unsqueeze (index [B, S])) of the words of each sequence."""
    words, indices = node.inputs
    column = None if indices is None else indices.producer()
    if node.attributes.get_int("batch_dims", 0) != 1 or column is None or column.op_type != "Unsqueeze":
        raise _elsewhere(node)
    nodes = Nodes()
    _replace(graph, node, nodes, nodes("GatherElements", words, column.inputs[0], axis=1))
    graph.remove(column, safe=True)


def _entries(value: ir.Value) -> list[int | ir.Value]:
    """Return the numbers of a list that is written down, or concatenated from such and others of one number."""
    stored = ir.convenience.get_const_tensor(value)
    if stored is not None:
        return [int(number) for number in stored.numpy().reshape(-1)]
    made = value.producer()
    if made is None or made.op_type != "Concat":
        return [value]
    return [entry for part in made.inputs if part is not None for entry in _entries(part)]


def _kind(value: ir.Value) -> ir.DataType:
    """Return a value's type: where that is not noted, what it was sliced or padded from has the same."""
    while value.dtype is None:
        stored, made = ir.convenience.get_const_tensor(value), value.producer()
        if stored is not None:
            return stored.dtype
        before = None if made is None else made.inputs[0]
        assert before is not None  # the graph's inputs have types
        value = before
    return value.dtype


def _compare(graph: ir.Graph, node: ir.Node) -> None:
    """Replace Cast (BitwiseAnd (words [B, 1, S], powers [T, 1])), where powers are padded to the tokens with zeros."""
    words = node.inputs[0]
    assert words is not None  # it has two inputs
    chain = [node]  # and what makes the powers
    for op_type, index in (("Unsqueeze", 1), ("Pad", 0), ("Slice", 0)):
        value = chain[-1].inputs[index]
        made = None if value is None else value.producer()
        if made is None or made.op_type != op_type:
            raise _elsewhere(node)
        chain.append(made)
    _, column, padded, taken = chain
    users, tokens = [use.node for use in node.outputs[0].uses()], taken.inputs[2]
    if [user.op_type for user in users] != ["Cast"]:
        raise _elsewhere(node)
    nodes = Nodes()
    axis, one, bits = nodes.constant(-1), nodes.scalar(1, np.int64), nodes.scalar(1 << _HALF, np.int64)
    token = nodes("Range", nodes.scalar(0, np.int64), nodes("Squeeze", tokens), one)
    table = nodes.constant(*(1 << token % _HALF for token in range(MAX_BRANCH_TOKENS)))
    place = nodes("Min", token, nodes.scalar(MAX_BRANCH_TOKENS - 1, np.int64))  # of more tokens words are 0
    bit = nodes("Unsqueeze", nodes("Gather", table, place), axis)  # [T, 1]
    in_upper = nodes("GreaterOrEqual", nodes("Unsqueeze", token, axis), nodes.constant(_HALF))

    def half(x: ir.Value) -> ir.Value:
        """Return the lower half of integers, whose remainder may have either sign."""
        return nodes("Mod", nodes("Add", nodes("Mod", x, bits), bits), bits)

    lower = half(words)
    upper = half(nodes("Div", nodes("Sub", words, lower), bits))
    own = nodes("Where", in_upper, upper, lower)  # [B, T, S]
    seen = nodes("GreaterOrEqual", nodes("Mod", own, nodes("Add", bit, bit)), bit)
    _replace(graph, users[0], nodes, seen)
    for each in (node, column, padded):
        graph.remove(each, safe=True)


def _sum(graph: ir.Graph, node: ir.Node) -> None:
    """Replace what "last" takes from weights [B, n_q, T, S] on, up to the newest mark [B, S]."""
    chain = [node]
    for op_type in ("Mul", "GreaterOrEqual", "Where", "ReduceMax"):
        users = [use.node for use in chain[-1].outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != op_type:
            raise _elsewhere(node)
        chain.append(users[0])
    largest, product, comparison, marks, newest = chain
    column = next(value for value in product.inputs if value is not largest.outputs[0])  # [B, T, 1]
    threshold, position = comparison.inputs[1], marks.inputs[1]  # 1; float32 [B, T, 1]
    nodes = Nodes()
    axis, one = nodes.constant(1), nodes.scalar(1, np.float32)
    importance = nodes("Mul", nodes("Unsqueeze", column, axis), largest.inputs[0])
    found = nodes("Cast", nodes("GreaterOrEqual", importance, threshold), to=ir.DataType.FLOAT)
    heads = nodes("ReduceSum", found, axis, keepdims=0)  # [B, T, S]
    important = nodes("Cast", nodes("GreaterOrEqual", heads, one), to=ir.DataType.FLOAT)
    from_here = nodes("CumSum", important, nodes.scalar(1, np.int64), reverse=1)  # queries from this on
    last = nodes("Mul", important, nodes("Cast", nodes("LessOrEqual", from_here, one), to=ir.DataType.FLOAT))
    mark = nodes("Mul", last, nodes("Add", position, one))
    total = nodes("ReduceSum", mark, axis, keepdims=0)
    _replace(graph, newest, nodes, nodes("Add", total, nodes.scalar(-1, np.float32)))
    for each in reversed(chain[:-1]):
        graph.remove(each, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, nodes: Nodes, result: ir.Value) -> None:
    graph.insert_before(node, nodes.made)
    take_place(node.outputs[0], result)
    graph.remove(node, safe=True)


def _elsewhere(node: ir.Node) -> BundleError:
    return BundleError(f"a {node.op_type} is not where export writes one", "export the bundle again")


_SPELT = {"BitwiseAnd": _compare, "GatherND": _gather_elements, "Pad": _gather, "ReduceMax": _sum}
"""What is replaced, and by what, in this order: the powers of a BitwiseAnd are padded."""
