"""Hold the caches in integers or 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.errors import EngineError
from gta_edge.graph.types import title
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import scale_name
from gta_edge.numerics.dtypes import DTYPES, ROW_CACHE_TYPES
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.plugin_call import QUANTISED_CACHE
from gta_edge.plugins.domain import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["QuantizeCachePass"]


class QuantizeCachePass(ir.passes.InPlacePass):
    """Give the caches of ``GroupedLatentAttention`` a type of 8 bits, and a scale per head and row beside them.

    Layer i's scales are graph inputs ``past_key_scale.{i}`` [B, n_k, S] and ``past_latent_scale.{i}`` [B, n_c, S],
    float32, and outputs ``present_*`` likewise, behind all others and layer by layer. They are the op's last inputs and
    outputs, in that order, and its attribute ``quantised_cache`` says that they are there. The op's function knows
    none of this: only the plugin does.

    Args:
        cache: ``int8`` or ``fp8`` (e4m3).

    Where the caches have the type already, nothing changes.

    Raises:
        EngineError: the model has functions, or no such node, or one whose caches are not the graph's own.
    """

    def __init__(self, cache: str) -> None:
        super().__init__()
        if cache not in ROW_CACHE_TYPES:
            raise EngineError(f"the cache type is {cache!r}", f"expected one of {', '.join(ROW_CACHE_TYPES)}")
        self.dtype = ir.DataType[DTYPES[cache].onnx]

    def requires(self, model: ir.Model) -> None:
        """There are such nodes, and no functions (``KeepPluginNodesPass``)."""
        nodes = _attention(model.graph)
        if not nodes or model.functions:
            found = "the model keeps its functions" if nodes else f"the graph has no {op.OP}"
            raise EngineError(found, "caches of 8 bits need the plugin: choose the plugin form of a GTA model")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the caches of ``model``."""
        modified = [self._quantize(model.graph, node) for node in _attention(model.graph)]
        return ir.passes.PassResult(model, modified=any(modified))

    def ensures(self, model: ir.Model) -> None:
        """Every cache has the type."""
        caches = [value for node in _attention(model.graph) for value in (*_past(node), *_present(node))]
        if any(value is None or value.dtype != self.dtype for value in caches):
            raise ir.passes.PostconditionError("a cache has another type")

    def _quantize(self, graph: ir.Graph, node: ir.Node) -> bool:
        past, present = _past(node), _present(node)
        if {value.dtype for value in past if value is not None} == {self.dtype}:
            return False
        own = all(v is not None and v.is_graph_input() for v in past) and all(v.is_graph_output() for v in present)
        if len(node.inputs) > len(op.INPUTS) or not own:
            raise EngineError(
                f"{title(node)} has caches that are not the graph's own", "start from the bundle's own graph"
            )
        node.attributes[QUANTISED_CACHE] = ir.AttrInt64(QUANTISED_CACHE, 1)
        scales = [self._narrow(value) for value in past]
        first = len(op.INPUTS)
        node.resize_inputs(first + len(scales))  # with gaps where optional inputs are absent
        for index, value in enumerate(scales, first):
            graph.inputs.append(value)
            node.replace_input_with(index, value)
        others = len(node.outputs)
        node.resize_outputs(others + len(scales))
        for value, new in zip(present, node.outputs[others:], strict=True):
            scale = self._narrow(value)
            new.name, new.shape, new.type = scale.name, scale.shape, scale.type
            graph.outputs.append(new)
        return True

    def _narrow(self, cache: ir.Value | None) -> ir.Value:
        """Give a cache [B, heads, S, width] the type, and return a value for its scales [B, heads, S]."""
        assert cache is not None and cache.shape is not None  # the graph's own input or output
        cache.type = ir.TensorType(self.dtype)
        shape, name = ir.Shape(list(cache.shape)[:3]), scale_name(str(cache.name))
        return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))


def _attention(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if (node.domain, node.op_type) == (DOMAIN, op.OP)]


def _past(node: ir.Node) -> list[ir.Value | None]:
    return [node.inputs[op.MODEL_INPUTS.index(name)] for name in ("past_key", "past_latent")]


def _present(node: ir.Node) -> list[ir.Value]:
    return [node.outputs[op.MODEL_OUTPUTS.index(name)] for name in ("present_key", "present_latent")]
