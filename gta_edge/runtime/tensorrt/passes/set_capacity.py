"""Fix the cache's capacity, and the batch where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gta_edge.errors import EngineError
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import BATCH_AXIS, CAPACITY_AXIS, PAST

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["SetCapacityPass"]


class SetCapacityPass(ir.passes.InPlacePass):
    """Replace the symbolic capacity of the caches by a number wherever it is named.

    TensorRT's KVCacheUpdate wants it static; the kernels' tables of addresses are laid out for it.

    Args:
        capacity: rows of each cache; of a graph whose layers have each a capacity of their own, one for each layer.
        batch: rows of a step; symbolic if None.

    Inputs called ``past_*.{i}`` are caches [B, heads, S, width] of layer i, their scales [B, heads, S], or what their
    rows have received [B, S]. Equal names of symbolic dimensions mean equal sizes, so no shape of a value of the graph
    names them afterwards.

    Raises:
        EngineError: there are no caches, they are of another size already, or layers that share one are given several.
    """

    def __init__(self, capacity: int | Sequence[int], batch: int | None = None) -> None:
        super().__init__()
        self.capacity, self.batch = capacity, batch

    def requires(self, model: ir.Model) -> None:
        """There are caches."""
        if not any(str(value.name).startswith(PAST) for value in model.graph.inputs):
            raise EngineError("the graph has no inputs past_*, so no caches", "export the bundle again")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the sizes in ``model``."""
        graph = model.graph
        sizes: dict[str, int] = {}
        for value in _caches(graph):
            self._name(value, CAPACITY_AXIS, self._rows(value), sizes)
            if self.batch is not None:
                self._name(value, BATCH_AXIS, self.batch, sizes)
        values = [*graph.inputs, *(value for node in graph for value in node.outputs), *graph.outputs]
        modified = [_replace(value, sizes) for value in values]
        return ir.passes.PassResult(model, modified=any(modified))

    def ensures(self, model: ir.Model) -> None:
        """Every cache has the capacity."""
        for value in _caches(model.graph):
            if value.shape is None or value.shape[CAPACITY_AXIS] != self._rows(value):
                raise ir.passes.PostconditionError("a cache has another capacity")

    def _rows(self, value: ir.Value) -> int:
        """Return the capacity of a cache."""
        if isinstance(self.capacity, int):
            return self.capacity
        layer = str(value.name).rpartition(".")[2]
        if not layer.isdecimal() or int(layer) >= len(self.capacity):
            raise EngineError(f"{value.name} is the cache of no layer", f"expected {len(self.capacity)} layers")
        return self.capacity[int(layer)]

    @staticmethod
    def _name(value: ir.Value, axis: int, size: int, sizes: dict[str, int]) -> None:
        """Note what the symbol of a dimension stands for."""
        assert value.shape is not None
        found = value.shape[axis]
        if isinstance(found, int):
            if found != size:
                raise EngineError(f"{value.name} is {value.shape}, fixed already", f"expected {size} at axis {axis}")
        elif found.value is None:
            raise EngineError(f"axis {axis} of {value.name} has no name", "export the bundle again")
        elif sizes.setdefault(found.value, size) != size:
            raise EngineError(
                f"{value.name} has the capacity of other layers, {sizes[found.value]}, and {size} is asked for",
                "start from the graph of a managed cache",
            )


def _caches(graph: ir.Graph) -> list[ir.Value]:
    return [v for v in graph.inputs if str(v.name).startswith(PAST) and v.shape is not None and len(v.shape) == 4]


def _replace(value: ir.Value, sizes: dict[str, int]) -> bool:
    """Replace the symbols in a value's shape; tell whether there were any."""
    if value.shape is None:
        return False
    found = list(value.shape)
    known = [sizes.get(str(size.value), size) if isinstance(size, ir.SymbolicDim) else size for size in found]
    if known == found:
        return False
    value.shape = ir.Shape(known)
    return True
