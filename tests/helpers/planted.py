"""Models with a fault planted: in the graph that was written, or between a bundle and its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ChangedCheckpoint:
    """A checkpoint some of whose parameters are others when they are read."""

    source: Checkpoint
    changes: Mapping[str, Change]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str) -> np.ndarray:
        values = self.source.read(name)
        if name not in self.changes:
            return values
        changed = self.changes[name](values.astype(np.float32))
        assert changed.shape == values.shape
        return changed.astype(values.dtype)


def heads_swapped(width: int) -> Change:
    """The first two heads of so many outputs in each other's place."""
    return lambda w: np.concatenate([w[width : 2 * width], w[:width], w[2 * width :]])


# --- the graph -------------------------------------------------------------------------------------------------------

GraphChange = Callable[[onnx.GraphProto], None]


def planted(bundle: Path, change: GraphChange) -> Bundle:
    """Return the bundle in a directory, opened before its graph was changed."""
    opened = Bundle.open(bundle)
    model = onnx.load(opened.model_path, load_external_data=False)
    change(model.graph)
    onnx.save(model, opened.model_path)
    return opened


def multiplied(parameter: str, factor: float) -> GraphChange:
    """What a matrix gives is so many times as large."""

    def change(graph: onnx.GraphProto) -> None:
        place = matmul(graph, parameter)
        node = graph.node[place]
        result = node.output[0]
        node.output[0] = f"{result}.right"
        by = onnx.numpy_helper.from_array(np.array(factor, np.float32), "by")
        graph.node.insert(place + 1, onnx.helper.make_node("Mul", [node.output[0], "planted.by"], [result]))
        graph.node.insert(place, onnx.helper.make_node("Constant", [], ["planted.by"], value=by))

    return change


def exchanged(one: str, other: str) -> GraphChange:
    """Two matrices of one shape in each other's place."""

    def change(graph: onnx.GraphProto) -> None:
        first, second = (graph.node[matmul(graph, name)] for name in (one, other))
        first.input[1], second.input[1] = second.input[1], first.input[1]
        # a matrix is cast or dequantised right before it is multiplied by, which is too late now
        early = [is_of_weights(graph, node) for node in graph.node]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        del graph.node[:]
        graph.node.extend(
            node for first in (True, False) for node, is_ in zip(copies, early, strict=True) if is_ is first
        )

    return change


def attribute(op_type: str, name: str, factor: float) -> GraphChange:
    """An attribute of every node of this operator is so many times as large."""

    def change(graph: onnx.GraphProto) -> None:
        found = [a for node in graph.node if node.op_type == op_type for a in node.attribute if a.name == name]
        assert found
        for each in found:
            each.f *= factor

    return change


def matmul(graph: onnx.GraphProto, parameter: str) -> int:
    """The place of the MatMul with this matrix."""
    return next(i for i, n in enumerate(graph.node) if n.op_type == "MatMul" and n.input[1].startswith(parameter))


def is_of_weights(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether a node needs nothing but what is stored, as it is or cast."""
    if node.op_type not in ("Cast", "DequantizeLinear"):
        return False
    known = {tensor.name for tensor in graph.initializer}
    known |= {n.output[0] for n in graph.node if n.op_type == "Cast" and n.input[0] in known}
    return all(name in known for name in node.input)


def change_table(bundle: Bundle, name: str, position: int, change: Change) -> None:
    """Let the rows of a table from a position on be others, in the file of the weights."""
    model = onnx.load(bundle.model_path, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    path = bundle.directory / place["location"]
    values = np.memmap(path, np.float32, "r+", int(place.get("offset", 0)), tuple(tensor.dims))
    values[position:] = change(values[position:].copy())
    values.flush()
