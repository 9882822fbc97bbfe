"""Graphs written down node by node: what the passes that make new nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["Nodes", "lazy_initializer", "static_size", "take_place"]


def static_size(value: ir.Value, axis: int) -> int:
    """Return a size that is a number in every graph that has been read (``validate``)."""
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)
    return size


class Nodes:
    """Makes nodes one after the other; calling it makes one and returns its first output.

    Attributes:
        made: the nodes, in order, to be inserted into a graph.
    """

    def __init__(self) -> None:
        self.made: list[ir.Node] = []

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> ir.Value:
        self.made.append(ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs))
        return self.made[-1].outputs[0]

    def constant(self, *numbers: int) -> ir.Value:
        """Return int64 [len(numbers)]."""
        return self("Constant", value=ir.tensor(np.array(numbers, np.int64)))

    def scalar(self, number: float, dtype: type[np.generic]) -> ir.Value:
        """Return a tensor without dimensions."""
        return self("Constant", value=ir.tensor(np.array(number, dtype)))

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """All outputs of the last node."""
        return self.made[-1].outputs


def lazy_initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], ir.TensorProtocol]
) -> ir.Value:
    """Add an initializer whose data is made when the model is written, and return it.

    Numbers that are none, in damaged weights, are no reason for numpy's warnings on stderr.
    """

    def quietly() -> ir.TensorProtocol:
        with np.errstate(all="ignore"):
            return make()

    data = ir.LazyTensor(quietly, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=data)
    graph.register_initializer(value)
    return value


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be what ``old`` was: for all its users, with its shape and type, and by name where that is public."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
