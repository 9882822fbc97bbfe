"""Make a model of many layers out of one that was traced with a single layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import INPUT_IDS, LOGIT_POSITIONS

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["RepeatLayersPass"]

_FIRST = "model.layers.0."


class RepeatLayersPass(ir.passes.InPlacePass):
    """Repeat the first layer: nodes, weights by name, and a pair of cache inputs and outputs for each.

    Layers differ in their weights alone, and tracing costs per layer, so one is traced and the others are stamped.

    Args:
        layers: how many there are to be.
        interface: the inputs' and the outputs' names of the whole model, in order; those that end in ``.0`` are the
            first layer's and must be there already.

    Precondition: a single layer, whose weights are called ``model.layers.0.*``; it reads one activation of the graph
    before it (the embedded tokens) and gives one to the graph behind it.
    Postcondition: the graph's interface is the one given, and layer i's weights are called ``model.layers.i.*``.
    """

    def __init__(self, layers: int, interface: tuple[list[str], list[str]]) -> None:
        super().__init__()
        self.layers = layers
        self.inputs, self.outputs = interface

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Stamp the layers of ``model``."""
        graph = model.graph
        entry, leave = _boundary(graph)
        own = _dependents(graph, [entry, *_of_first(graph.inputs), *_weights(graph)])  # the sizes, all layers share
        nodes = [node for node in _ancestors(graph, [leave, *_of_first(graph.outputs)], entry) if node in own]
        behind = [(node, index) for node, index in leave.uses() if node not in nodes]
        value, last = leave, nodes[-1]
        for i in range(1, self.layers):
            known = {entry: value}  # from a value of the first layer to this one's
            copies = [_stamp(graph, node, i, known) for node in nodes]
            graph.insert_after(last, copies)
            value, last = known[leave], copies[-1]
        for node, index in behind:
            node.replace_input_with(index, value)
        inputs = {value.name: value for value in graph.inputs}
        outputs = {value.name: value for value in graph.outputs}
        graph.inputs[:] = [inputs[name] for name in self.inputs]
        graph.outputs[:] = [outputs[name] for name in self.outputs]
        return ir.passes.PassResult(model, modified=self.layers > 1)


def _of_first(interface: Iterable[ir.Value]) -> list[ir.Value]:
    return [value for value in interface if str(value.name).endswith(".0")]


def _weights(graph: ir.Graph) -> list[ir.Value]:
    return [value for name, value in graph.initializers.items() if name.startswith(_FIRST)]


def _boundary(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Return what the layer reads from the graph before it, and what it gives to the graph behind it."""
    named = {str(value.name): value for value in graph.inputs}
    weights = _weights(graph)
    tokens, head = _dependents(graph, [named[INPUT_IDS]]), _dependents(graph, [named[LOGIT_POSITIONS]])
    layer = _dependents(graph, weights)
    (entry,) = {v for node in layer - head for v in node.inputs if v is not None and v.producer() in tokens - layer}
    (leave,) = {v for node in head for v in node.inputs if v is not None and v.producer() in layer - head}
    return entry, leave


def _dependents(graph: ir.Graph, seeds: list[ir.Value]) -> set[ir.Node]:
    """Return the nodes that read one of the values, or what was made from them; their sizes do not count."""
    made = set(seeds)
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type != "Shape" and not made.isdisjoint(node.inputs):
            made.update(node.outputs)
            found.add(node)
    return found


def _ancestors(graph: ir.Graph, targets: list[ir.Value], stop: ir.Value) -> list[ir.Node]:
    """Return the nodes that make the targets out of ``stop``, graph inputs and weights, in the graph's order."""
    found: set[ir.Node] = set()
    open_values = list(targets)
    while open_values:
        value = open_values.pop()
        node = value.producer()
        if value is not stop and node is not None and node not in found:
            found.add(node)
            open_values += [v for v in node.inputs if v is not None]
    return [node for node in graph if node in found]


def _stamp(graph: ir.Graph, node: ir.Node, i: int, known: dict[ir.Value, ir.Value]) -> ir.Node:
    """Return a copy of a node of the first layer for layer ``i``; its values are added to ``known``."""
    for value in node.inputs:
        if value is not None and value not in known:
            known[value] = _outside(graph, value, i)
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else known[value] for value in node.inputs],
        attributes=node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}.{i}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        cache = old.is_graph_output()
        new.name = f"{str(old.name).removesuffix('.0')}.{i}" if cache else f"{old.name}.{i}"
        new.shape, new.type = old.shape, old.type
        known[old] = new
        if cache:
            graph.outputs.append(new)
    return copy


def _outside(graph: ir.Graph, value: ir.Value, i: int) -> ir.Value:
    """Return what stands for an input or a weight of the first layer in layer ``i``: its own, or the shared one."""
    name = str(value.name)
    if value.is_initializer() and name.startswith(_FIRST):
        own = ir.Value(name=f"model.layers.{i}.{name.removeprefix(_FIRST)}", shape=value.shape, type=value.type)
        own.const_value = value.const_value  # shape and type; data is attached by name later
        graph.register_initializer(own)
        return own
    if value.is_graph_input() and name.endswith(".0"):
        own = ir.Value(name=f"{name.removesuffix('.0')}.{i}", shape=value.shape, type=value.type)
        graph.inputs.append(own)
        return own
    return value
