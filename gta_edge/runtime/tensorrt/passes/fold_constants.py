"""Write integers that are known as constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["FoldConstantsPass"]

Integers = npt.NDArray[np.int64]


class FoldConstantsPass(ir.passes.InPlacePass):
    """Replace Cast, Reshape, Squeeze, Unsqueeze and Concat of int64 constants by a Constant.

    A tracer computes axes and shapes in nodes. TensorRT's parsers before 10.15 want axes as constants, and take no
    computed ones ("does not support dynamic axes").

    Postcondition: no such node has only int64 Constants for inputs. Other types are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the constants of ``model``, and of no function."""
        known: dict[ir.Value, Integers] = {}
        modified = False
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "Constant":
                content = _content(node)
                if content is not None:
                    known[node.outputs[0]] = content
                continue
            fold = _FOLDS.get(node.op_type) if node.domain == "" else None
            given = [known.get(value) for value in node.inputs if value is not None]
            result = fold(node, given) if fold and given and all(array is not None for array in given) else None
            if result is None:
                continue
            made = ir.node("Constant", [], attributes={"value": ir.tensor(result)})
            known[made.outputs[0]] = result
            model.graph.insert_before(node, made)
            node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _content(constant: ir.Node) -> Integers | None:
    ((name, attribute),) = constant.attributes.items()
    if name in ("value_int", "value_ints"):
        return np.array(attribute.value, np.int64)
    tensor = attribute.as_tensor() if name == "value" else None
    return tensor.numpy() if tensor is not None and tensor.dtype == ir.DataType.INT64 else None


def _cast(node: ir.Node, given: Sequence[Any]) -> Integers | None:
    return given[0] if node.attributes.get_int("to") == ir.DataType.INT64 else None


def _reshape(node: ir.Node, given: Sequence[Any]) -> Integers | None:
    array, shape = given
    if 0 in shape:  # takes a size over, or means none: not worth telling apart
        return None
    return np.ascontiguousarray(array.reshape(tuple(shape)))


def _squeeze(node: ir.Node, given: Sequence[Any]) -> Integers | None:
    axes = tuple(given[1]) if len(given) > 1 else None
    return np.asarray(np.squeeze(given[0], axes))


def _unsqueeze(node: ir.Node, given: Sequence[Any]) -> Integers | None:
    return np.expand_dims(given[0], tuple(int(axis) for axis in given[1]))


def _concat(node: ir.Node, given: Sequence[Any]) -> Integers | None:
    return np.concatenate(given, axis=node.attributes.get_int("axis"))


_FOLDS: dict[str, Callable[[ir.Node, Sequence[Any]], Integers | None]] = {
    "Cast": _cast,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
}
