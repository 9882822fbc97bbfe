"""Store the caches in integers or 8-bit floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gta_edge.errors import EngineError
from gta_edge.graph.attention import attention_nodes
from gta_edge.graph.types import title
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import BATCH_AXIS, CAPACITY_AXIS, CacheTensor
from gta_edge.numerics.dtypes import DTYPES, QUANTIZED_CACHE_TYPES
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import CACHE_DTYPE

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["QuantizeCachePass"]

_VALUES = ("past_key", "past_latent"), ("present_key", "present_latent")
"""Inputs and outputs of the op that hold keys and latents, or values."""


class QuantizeCachePass(ir.passes.InPlacePass):
    """Give the caches of ``GroupedLatentAttention`` a quantised type, and what that takes beside them.

    Keys and latents get the type, and in blocks another shape. Scales, and open blocks if there are any, are inputs
    ``past_…`` of the graph and outputs ``present_…``, behind all others. They are the op's last inputs and outputs, in
    that order, and its attribute ``cache_dtype`` says that they are there. The op's function knows none of this: only
    the plugin does.

    Args:
        cache: one of ``QUANTIZED_CACHE_TYPES``.
        tensors: what the cache consists of then, ``kv_cache.cache_tensors``.

    Where the caches have the type already, nothing changes.

    Raises:
        EngineError: there is no such type, the model has functions, or no such node, or one whose caches are not the
            graph's own, of a capacity that is a number (``SetCapacityPass``).
    """

    def __init__(self, cache: str, tensors: Sequence[CacheTensor]) -> None:
        super().__init__()
        if cache not in QUANTIZED_CACHE_TYPES:
            raise EngineError(f"the cache type is {cache!r}", f"expected one of {', '.join(QUANTIZED_CACHE_TYPES)}")
        self.cache, self.tensors = cache, tensors

    def requires(self, model: ir.Model) -> None:
        """There are such nodes, and no functions (``KeepPluginNodesPass``)."""
        nodes = attention_nodes(model.graph)
        if not nodes or model.functions:
            found = "the model keeps its functions" if nodes else f"the graph has no {op.OP}"
            raise EngineError(found, f"a cache in {self.cache} needs the plugin: choose the plugin form of the model")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the caches of ``model``."""
        graph = model.graph
        nodes = [node for node in attention_nodes(graph) if not self._is_quantised(node)]
        values: dict[str, ir.Value] = {}
        for layer, node in enumerate(nodes):
            values |= self._quantize(node, [tensor for tensor in self.tensors if tensor.layer == layer])
        for tensor in self.tensors if nodes else ():
            if not values[tensor.past].is_graph_input():
                graph.inputs.append(values[tensor.past])
                graph.outputs.append(values[tensor.present])
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Every node's cache is stored so."""
        if not all(self._is_quantised(node) for node in attention_nodes(model.graph)):
            raise ir.passes.PostconditionError("a cache has another type")

    def _is_quantised(self, node: ir.Node) -> bool:
        return node.attributes.get_string(CACHE_DTYPE, "") == self.cache

    def _quantize(self, node: ir.Node, tensors: Sequence[CacheTensor]) -> dict[str, ir.Value]:
        """Give a node the tensors of its layer; return them by name, old and new."""
        past = [node.inputs[op.INPUTS.index(name)] for name in _VALUES[0]]
        present = [node.outputs[op.OUTPUTS.index(name)] for name in _VALUES[1]]
        batch, capacity = _sizes(node, past, present, tensors)
        first, others, more = len(op.INPUTS), len(node.outputs), len(tensors) - len(past)
        node.attributes[CACHE_DTYPE] = ir.AttrString(CACHE_DTYPE, self.cache)
        node.resize_inputs(first + more)  # with gaps where optional inputs are absent
        node.resize_outputs(others + more)
        for i in range(more):
            node.replace_input_with(first + i, ir.Value())
        found: dict[str, ir.Value] = {}
        befores, afters = [*past, *node.inputs[first:]], [*present, *node.outputs[others:]]
        for before, after, tensor in zip(befores, afters, tensors, strict=True):
            assert before is not None  # checked, or just made
            for value, name in ((before, tensor.past), (after, tensor.present)):
                value.name, value.type = name, ir.TensorType(_element_type(tensor))
                value.shape = ir.Shape([batch, *tensor.shape(1, capacity)[1:]])
                found[name] = value
        return found


def _sizes(
    node: ir.Node, past: Sequence[ir.Value | None], present: Sequence[ir.Value], tensors: Sequence[CacheTensor]
) -> tuple[int | ir.SymbolicDim, int]:
    """Return the batch and the capacity of a node's cache, which is one that the graph is given and gives."""
    own = all(v is not None and v.is_graph_input() for v in past) and all(v.is_graph_output() for v in present)
    named = [value.name for value in past if value is not None] == [tensor.past for tensor in tensors[: len(past)]]
    if len(node.inputs) > len(op.INPUTS) or not own or not named:
        raise EngineError(f"{title(node)} has caches that are not the graph's own", "start from the bundle's own graph")
    shape = past[0].shape if past[0] is not None else None
    assert shape is not None  # the graph's own input
    batch, capacity = shape[BATCH_AXIS], shape[CAPACITY_AXIS]
    if not isinstance(capacity, int):
        raise EngineError(f"{title(node)} has caches of the capacity {capacity}", "expected a number: set it first")
    return batch, capacity


def _element_type(tensor: CacheTensor) -> ir.DataType:
    """Return ONNX's type of a tensor; bytes that hold several codes have a sign, since plugins get none without."""
    return ir.DataType.INT8 if tensor.dtype == "uint8" else ir.DataType[DTYPES[tensor.dtype].onnx]
