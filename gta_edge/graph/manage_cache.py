"""Let a graph take what a managed cache needs: rows in use by layer, positions, bias, branches, received attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.graph.attention import attention_nodes, node_features
from gta_edge.graph.builder import Nodes
from gta_edge.graph.io import add_attention_function
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import (
    BRANCH_START,
    CAPACITY_AXIS,
    INPUT_IDS,
    PAST,
    PAST_LENGTH,
    PRESENT,
    ROW_BIAS,
    TOKEN_INPUTS,
    TREES,
    managed_shapes,
    received_name,
)
from gta_edge.plugins.attention import definition as op

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["ManageCachePass"]

_BY_LAYER = (PAST_LENGTH, ROW_BIAS, BRANCH_START)
"""Inputs of the graph that have an axis for layers before the op's."""
_RECEIVED = "past_received"


class ManageCachePass(ir.passes.InPlacePass):
    """Give every ``GroupedLatentAttention`` of a bundle's graph the inputs of a managed cache.

    The graph then has the inputs of ``kv_cache.managed_shapes``: what is of all layers, shared or stacked, is behind
    the tokens' inputs, and what each layer's rows have received of attention comes last. Every layer's caches have a
    capacity of their own, ``capacity.{i}``, but for trees of tokens, whose rows are those of every layer.

    Args:
        features: of every node. A managed cache always has positions.

    Raises:
        ValueError: the features lack positions.
        ir.passes.PreconditionError: the graph is managed already.
    """

    def __init__(self, features: op.Features) -> None:
        super().__init__()
        if not features.has_positions:
            raise ValueError("a managed cache needs positions: its rows are none")
        self.features = features
        self._by_layer = () if features == TREES else _BY_LAYER

    def requires(self, model: ir.Model) -> None:
        """No node has such inputs, and nothing else asks for the length."""
        nodes = attention_nodes(model.graph)
        users = {use.node for use in _input(model.graph, PAST_LENGTH).uses()}
        if any(node_features(node) != op.Features() for node in nodes) or users != set(nodes):
            raise ir.passes.PreconditionError("the cache is managed already, or its length has other users")

    def ensures(self, model: ir.Model) -> None:
        """Every node has them."""
        if any(node_features(node) != self.features for node in attention_nodes(model.graph)):
            raise ir.passes.PostconditionError("an attention lacks an input of the managed cache")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model``."""
        graph, nodes = model.graph, attention_nodes(model.graph)
        inputs = self._add_inputs(graph, len(nodes))
        for layer, node in enumerate(nodes):
            given = {
                name: _slice(node, layer, value) if name in self._by_layer else value for name, value in inputs.items()
            }
            self._manage(graph, node, layer, given)
        if any(identifier[1] == op.OP for identifier in model.functions):
            add_attention_function(model)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _add_inputs(self, graph: ir.Graph, layers: int) -> dict[str, ir.Value]:
        """Add the inputs that are not of one layer, and return them by name, the length among them."""
        length, ids = _input(graph, PAST_LENGTH), _input(graph, INPUT_IDS)
        batch, tokens = (str(size) for size in ids.shape or ())
        sizes = {"batch": batch, "tokens": tokens, "words": "words"}
        shapes = managed_shapes(self.features, **sizes, capacities=[_capacity(layer) for layer in range(layers)])
        length.shape = ir.Shape(shapes.pop(PAST_LENGTH))
        inputs = {PAST_LENGTH: length}
        for name, shape in shapes.items():
            if not name.startswith(PAST):
                inputs[name] = _value(name, shape)
                graph.inputs.insert(len(TOKEN_INPUTS) + len(inputs) - 2, inputs[name])
        return inputs

    def _manage(self, graph: ir.Graph, node: ir.Node, layer: int, given: dict[str, ir.Value]) -> None:
        """Give one node its inputs, and its caches a capacity of their own."""
        caches = (node.inputs[op.INPUTS.index(name)] for name in ("past_key", "past_latent"))
        for value in (*caches, *node.outputs[1:]) if self._by_layer else ():
            assert value is not None and value.shape is not None  # the graph's own
            shape = list(value.shape)
            shape[CAPACITY_AXIS] = ir.SymbolicDim(_capacity(layer))
            value.shape = ir.Shape(shape)
        if self.features.observe:
            received = received_name(layer)
            batch = given[PAST_LENGTH].shape
            assert batch is not None
            past = given[_RECEIVED] = _value(PAST + received, [*batch, _capacity(layer)])
            graph.inputs.append(past)
            node.resize_outputs(len(op.OUTPUTS))
            present = node.outputs[-1]
            present.name, present.shape, present.type = PRESENT + received, past.shape, past.type
            graph.outputs.append(present)
            node.attributes[op.OBSERVE] = ir.AttrString(op.OBSERVE, self.features.observe)
        node.resize_inputs(1 + max(op.INPUTS.index(name) for name in given))
        for name, value in given.items():
            node.replace_input_with(op.INPUTS.index(name), value)


def _capacity(layer: int) -> str:
    """Return the name of a layer's capacity."""
    return f"capacity.{layer}"


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _value(name: str, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    kind = name.partition(".")[0]
    dtype = ir.DataType.INT64 if kind in op.INT64_INPUTS else ir.DataType.FLOAT
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _slice(node: ir.Node, layer: int, stacked: ir.Value) -> ir.Value:
    """Return a layer's part of an input, made before the node."""
    assert stacked.shape is not None and node.graph is not None
    nodes = Nodes()
    part = nodes("Gather", stacked, nodes.scalar(layer, np.int64), axis=0)
    part.shape, part.type = ir.Shape(list(stacked.shape)[1:]), stacked.type
    node.graph.insert_before(node, nodes.made)
    return part
