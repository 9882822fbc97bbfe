"""Compute in float16 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import EngineError
from gta_edge.graph.types import Types, input_kinds, title, types_of_outputs, value_types
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import PRESENT, is_scale
from gta_edge.numerics.dtypes import DTYPES, FLOAT_TYPES
from gta_edge.plugins.attention import definition as attention
from gta_edge.plugins.domain import DOMAIN
from gta_edge.plugins.matmul import definition as blockwise_matmul

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["ConvertPrecisionPass"]


class ConvertPrecisionPass(ir.passes.InPlacePass):
    """Turn a graph that computes in float32 into a strongly typed one in ``compute``.

    Activations, the residual stream, caches, value decoder, cos and sin get that type, and so does every stored tensor
    of floats: matrices, norms' weights, biases, and the scales of quantised matrices, whose codes stay packed behind
    their DequantizeLinear. They are converted when the model is written. The Casts behind which they were stored go.
    The scales of ``PackMatMulsPass`` stay float16, as the op takes them.

    What stays float32: what a managed cache is told and tells (biases of rows, weights of queries, what rows received);
    the softmax, which the graph marks by a Cast of what is float32 already; the norms' sums (``stash_type`` 1); and the
    logits, by a Cast behind the head's product. That product stays in ``compute``: engines read a matrix of 16 bits or
    of codes, and sum in float32; with its inputs cast the head, the largest matrix of a small model, would be read at
    four bytes a weight. So logits have ``compute``'s resolution and float32's type.

    Functions say CastLike where they mean the type of their input, and need no change.

    Args:
        compute: ``fp16`` or ``bf16``; with ``fp32`` nothing changes.

    Precondition: the graph computes in float32, as in a bundle; caches are not quantised yet (``QuantizeCachePass``).
    Postcondition: inputs, outputs and initializers of floats have the type, but for those of a managed cache, outputs
    other than the caches, and packed scales. Inputs of one kind have one type at every node. A graph that is so already
    is not modified.

    Raises:
        EngineError: the graph computes in another type already, a value is beyond the type's range (when it is
            written), or a node mixes types.
    """

    def __init__(self, compute: str) -> None:
        super().__init__()
        if compute not in FLOAT_TYPES:
            raise EngineError(f"compute is {compute!r}", f"expected one of {', '.join(FLOAT_TYPES)}")
        self.dtype = ir.DataType[DTYPES[compute].onnx]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert ``model``."""
        graph = model.graph
        narrowed = [value for value in graph.inputs if not _is_managed(value)]
        found = {value.dtype for value in (*narrowed, *graph.initializers.values())} & _floats()
        if self.dtype == ir.DataType.FLOAT or found <= {self.dtype} or self._is_done(graph):
            return ir.passes.PassResult(model, modified=False)
        _Retyping(graph, self.dtype).run()
        return ir.passes.PassResult(model, modified=True)

    def _is_done(self, graph: ir.Graph) -> bool:
        """Tell whether the inputs have the type, but for those that are always float32."""
        scales = [value for value in graph.inputs if is_scale(str(value.name))]
        others = [value for value in graph.inputs if value not in scales and not _is_managed(value)]
        found = {value.dtype for value in others} & _floats()
        if not found <= {self.dtype, ir.DataType.FLOAT} or len(found) > 1:
            names = " and ".join(sorted(dtype.name.lower() for dtype in found if dtype is not None))
            raise EngineError(f"the graph's inputs are {names}, expected float32", "start from the bundle's own graph")
        return found == {self.dtype} or bool(scales and not found)


def _is_managed(value: ir.Value) -> bool:
    """Tell whether a graph's input is one of a managed cache: it has the name of the op's."""
    return str(value.name).partition(".")[0] in attention.FEATURE_INPUTS


def _narrow_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node of ours but for those that are float32 in every type."""
    names = attention.INPUTS if node.op_type == attention.OP else ()
    return [
        value
        for place, value in enumerate(node.inputs)
        if value is not None and not (place < len(names) and names[place] in attention.FEATURE_INPUTS)
    ]


def _floats() -> set[ir.DataType | None]:
    return {ir.DataType[DTYPES[name].onnx] for name in FLOAT_TYPES}


class _Retyping:
    """One walk over a graph, in order, that keeps the new type of every value it has passed."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.before = value_types(graph)
        self.now: Types = {}
        self.constants: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        graph = self.graph
        for value in graph.inputs:
            narrows = value.dtype == ir.DataType.FLOAT and not _is_managed(value)
            self._record(value, self.dtype if narrows else self.before[value])
        kept = _packed_scales(graph)
        for value in graph.initializers.values():
            if value.dtype in _floats() - {self.dtype} and value not in kept:
                _convert(value, self.dtype)
            self._record(value, value.dtype or self.before[value])
        for node in list(graph):
            self._retype(node)
        for index, value in enumerate(graph.outputs):
            if self.before[value] == ir.DataType.FLOAT != self.now[value] and not str(value.name).startswith(PRESENT):
                graph.outputs[index] = self._widened(value)

    def _record(self, value: ir.Value, dtype: ir.DataType) -> None:
        self.now[value] = dtype
        if value.type is not None and value.dtype != dtype:
            value.type = ir.TensorType(dtype)  # a new one: values may share theirs

    def _retype(self, node: ir.Node) -> None:
        if node.op_type == "Cast" and self._storage_cast(node):
            return
        if node.domain != DOMAIN:
            self._agree(node)
        elif any(self.now[value] == ir.DataType.FLOAT for value in _narrow_inputs(node)):
            raise EngineError(
                f"{title(node)} reads float32, expected {self.dtype.name.lower()}", "export the bundle again"
            )
        if node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self.dtype))
        if node.op_type.endswith("Normalization") and "stash_type" in node.attributes:
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", 1)
        found = types_of_outputs(node, self.now, self.graph.opset_imports)
        for value, dtype in zip(node.outputs, found, strict=False):
            self._record(value, dtype)

    def _storage_cast(self, node: ir.Node) -> bool:
        """Let a Cast of what is stored give the type instead of float32; tell whether it is gone."""
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None  # a Cast has one
        if node.attributes.get_int("to") != ir.DataType.FLOAT or self.before[source] == ir.DataType.FLOAT:
            return False  # float32 to float32: here float32 is meant
        if source.is_graph_input():
            return False  # positions, which are not stored, and of which 16 bits hold few
        if self.now[source] != self.dtype:
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
            return False
        if result.is_graph_output():
            return False
        result.replace_all_uses_with(source)
        self.graph.remove(node, safe=True)
        return True

    def _agree(self, node: ir.Node) -> None:
        """Give a constant the type of the activations that it meets."""
        given = list(input_kinds(node, self.now, self.graph.opset_imports))
        mixed = {kind for kind, dtype in given if dtype == self.dtype} & {
            kind for kind, dtype in given if dtype == ir.DataType.FLOAT
        }
        present = [i for i, value in enumerate(node.inputs) if value is not None]
        for index, (kind, dtype) in zip(present, given, strict=True):
            if kind in mixed and dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, self._constant(node, index))

    def _constant(self, node: ir.Node, index: int) -> ir.Value:
        value = node.inputs[index]
        assert value is not None
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            raise EngineError(
                f"{title(node)} mixes float32 ({value.name}) and {self.dtype.name.lower()}", "export the bundle again"
            )
        if value not in self.constants:
            content = ir.convenience.get_const_tensor(value)
            assert content is not None  # a Constant of floats
            tensor = ir.tensor(_within(content.numpy(), self.dtype, str(value.name)), dtype=self.dtype)
            made = ir.node("Constant", [], attributes={"value": tensor})
            self.graph.insert_after(producer, made)
            self._record(made.outputs[0], self.dtype)
            self.constants[value] = made.outputs[0]
        return self.constants[value]

    def _widened(self, value: ir.Value) -> ir.Value:
        """Return what takes the place of an output: the same in float32."""
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
        wide, name = cast.outputs[0], value.name
        value.name = f"{name}.{self.dtype.name.lower()}"
        wide.name, wide.shape, wide.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(cast)
        return wide


def _packed_scales(graph: ir.Graph) -> set[ir.Value | None]:
    """Return the scales of packed matrices, which our op takes in float16 whatever it computes in."""
    place = blockwise_matmul.INPUTS.index("scale")
    names = blockwise_matmul.OPS.values()
    return {node.inputs[place] for node in graph if node.domain == DOMAIN and node.op_type in names}


def _convert(value: ir.Value, dtype: ir.DataType) -> None:
    """Give an initializer another type; its data is converted when the model is written."""
    stored, name = value.const_value, str(value.name)
    if stored is None:
        raise EngineError(f"the initializer {name} has no data", "export the bundle again")

    def data() -> ir.TensorProtocol:
        converted = _within(stored.numpy(), dtype, name)
        if isinstance(stored, ir.ExternalTensor):
            stored.release()  # mapped pages count as memory in use
        return ir.tensor(converted, dtype=dtype, name=name)

    value.const_value = ir.LazyTensor(data, dtype=dtype, shape=value.shape or ir.Shape(stored.shape.numpy()), name=name)
    value.type = ir.TensorType(dtype)


def _within(array: npt.NDArray[Any], dtype: ir.DataType, name: str) -> npt.NDArray[Any]:
    """Return an array in another type, none of whose finite numbers became infinite."""
    with np.errstate(all="ignore"):
        converted: npt.NDArray[Any] = array.astype(dtype.numpy())
        if dtype == ir.DataType.FLOAT16 and not np.isfinite(converted).all() and np.isfinite(array).all():
            largest = float(np.abs(array.astype(np.float32)).max())
            raise EngineError(f"{name} has values up to {largest:.4g}, beyond float16's 65504", "use --compute bf16")
    return converted
