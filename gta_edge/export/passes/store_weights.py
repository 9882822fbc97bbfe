"""Attach the weights, in the type they are stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.formats.weights import parameter_name, stored_dtype, to_stored
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["StoreWeightsPass"]


class StoreWeightsPass(ir.passes.InPlacePass):
    """Give every initializer its data, lazily, and cast what is not stored in float32 where it is used.

    The graph computes in float32 whatever the storage: a matrix in fp16 or bf16 goes through a Cast. An embedding is
    cast after the Gather, so only the rows that are looked up are converted.

    Args:
        read: returns a parameter by its checkpoint name; called when the model is written, once per tensor.
        tables: arrays that are no parameters (cos and sin), stored as they are.
        precision: a key of ``gta_edge.numerics.dtypes.PRECISIONS``.

    Precondition: initializers carry stored names and shapes (``FoldWeightViewsPass``); what is quantised has its data.
    Postcondition: every initializer has data; every use of one is float32 (of a quantised one, after its arithmetic).
    """

    def __init__(
        self,
        read: Callable[[str], npt.NDArray[Any]],
        tables: dict[str, npt.NDArray[np.float32]],
        precision: str,
    ) -> None:
        super().__init__()
        self.read = read
        self.tables = tables
        self.precision = precision

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Attach data to every initializer of ``model``."""
        for name, value in list(model.graph.initializers.items()):
            if name in self.tables:
                value.const_value = ir.tensor(self.tables[name], name=name)
                continue
            assert value.shape is not None and value.dtype is not None  # the precondition
            if value.dtype != ir.DataType.FLOAT:
                continue  # quantised
            dtype = stored_dtype(len(value.shape), self.precision)
            value.const_value = self._lazy(name, value.shape, dtype)
            if dtype != np.float32:
                value.dtype = ir.DataType.from_numpy(dtype)
                _cast_uses(model.graph, value)
        return ir.passes.PassResult(model, modified=True)

    def _lazy(self, name: str, shape: ir.Shape, dtype: np.dtype[Any]) -> ir.LazyTensor:
        def load() -> ir.TensorProtocol:
            return ir.tensor(to_stored(self.read(parameter_name(name)), name, shape.numpy(), dtype), name=name)

        return ir.LazyTensor(load, dtype=ir.DataType.from_numpy(dtype), shape=shape, name=name)


def _cast_uses(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast to float32 behind ``value``: after a Gather of it, before any other use."""
    for node, index in list(value.uses()):
        if node.op_type == "Gather":
            rows = node.outputs[0]
            rows.type = value.type
            cast = _cast(rows, rows.shape)
            users = [use for use in rows.uses() if use[0] is not cast]
            graph.insert_after(node, cast)
            for user, i in users:
                user.replace_input_with(i, cast.outputs[0])
        else:
            cast = _cast(value, value.shape)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, shape: ir.Shape | None) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}.float32"
    cast.outputs[0].shape, cast.outputs[0].dtype = shape, ir.DataType.FLOAT
    return cast
