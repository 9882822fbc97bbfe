"""Whether a model file is a graph that this package's export writes, as far as anything here relies on it.

A bundle may come from anywhere, with a manifest that fits whatever its files hold. The passes, ONNX Runtime and the
parsers of TensorRT all take for granted that a graph is well formed; some of them crash, or allocate whatever a number
in it says. So everything that any of them relies on is checked here, on the file's own structure, before anything else
sees it: names, types and shapes by the config, operators and attributes from a list, every value made once and before
it is used, weights within their file, and the size of every value for the longest step (``shapes``). What such a graph
can still do is to compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.formats.weights import COLUMNS, PACKED, SCALE, TRANSPOSED, parameter_name
from gta_edge.graph.shapes import (
    ATTRIBUTES,
    BFLOAT16,
    FLOAT,
    FLOAT16,
    INPUTS,
    INT8,
    INT32,
    INT64,
    Known,
    outputs_of,
)
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import LOGITS, TOKEN_INPUTS, cache_tensors, input_shapes
from gta_edge.model.tables import table_names
from gta_edge.numerics.dtypes import DTYPES, PRECISIONS
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from gta_edge.support.text import brief

if TYPE_CHECKING:
    import onnx

__all__ = ["check_model"]

_IR_VERSIONS = range(8, 16)
_BITS = {DTYPES[name].onnx_number: DTYPES[name].bits for name in PRECISIONS} | {INT32: 32, INT64: 64}
_STORED = _BITS.keys() - {INT64}
_NUMPY = {FLOAT: "<f4", FLOAT16: "<f2", INT32: "<i4", INT64: "<i8"}
_MAX_INLINE_BYTES = 2**16
_MAX_FIXED, _MAX_PER_LAYER = 400, 100  # nodes, or stored tensors: a layer has 50 nodes at most

_MAX_ATTRIBUTES = 8

# Sizes of the inputs' axes to look at a graph with. The first are so small that no two dimensions are equal by chance;
# the second are those of a large step.
_SMALL = {"batch": 2, "tokens": 5, "positions": 3, "capacity": 11}
_LARGE = {"batch": 2, "tokens": 509, "positions": 16}
_ROOM = 4
"""How many times the estimate of what a step's values take they may take: it is an estimate."""

Symbols = Mapping[str, int]

_FIELDS = {
    "ModelProto": {"ir_version", "opset_import", "producer_name", "graph", "functions", "training_info"},
    "GraphProto": {"node", "name", "initializer", "input", "output", "value_info", "sparse_initializer"},
    "NodeProto": {"input", "output", "name", "op_type", "domain", "overload", "attribute"},
    "AttributeProto": {"name", "type", "ref_attr_name", "f", "i", "s", "t", "ints"},
    "TensorProto": {"dims", "data_type", "segment", "raw_data", "name", "external_data", "data_location"},
    "ValueInfoProto": {"name", "type"},
}
"""Fields of a model's messages that are looked at; what lies in others, remarks and hints, nobody gets to see."""


def _keep_known_fields(message: Any) -> None:
    """Clear every field of a protobuf message of a model, and of those in it, that ``check_model`` does not look at."""
    for field, content in message.ListFields():
        known = _FIELDS[message.DESCRIPTOR.name]
        if field.name not in known:
            message.ClearField(field.name)
        elif field.message_type is not None and field.message_type.name in _FIELDS:
            for each in content if field.is_repeated else [content]:
                _keep_known_fields(each)


def check_model(model: onnx.ModelProto, config: ModelConfig, file_bytes: Mapping[str, int]) -> None:
    """Raise ValueError, saying what is wrong, unless a model is one that export writes for a config.

    Args:
        model: as parsed from its file; what lies in fields that are not looked at is cleared.
        config: of the bundle.
        file_bytes: size of each file that weights may lie in, by name.
    """
    graph = model.graph
    _check_counts(graph, config)
    _keep_known_fields(model)
    _check_header(model)
    if graph.sparse_initializer:
        raise ValueError("it has sparse tensors")
    inputs, outputs = _interface(config)
    _check_interface("input", graph.input, inputs)
    _check_interface("output", graph.output, outputs)
    stored = _stored(graph.initializer, config, file_bytes)
    nodes = [_read_node(node, config) for node in graph.node]
    for symbols in (_SMALL, _LARGE | {"capacity": max(config.max_position_embeddings, _LARGE["tokens"])}):
        values = _evaluated(nodes, _inputs(inputs, symbols), stored)
        _check_declared((*graph.value_info, *graph.output), values, symbols)
        _check_size(values, nodes, config, symbols)


def _check_counts(graph: onnx.GraphProto, config: ModelConfig) -> None:
    """Refuse more than can be looked at in a short time: an empty message takes two bytes of a file."""
    most = _MAX_FIXED + _MAX_PER_LAYER * config.num_hidden_layers
    for what in ("node", "initializer", "value_info"):
        if len(getattr(graph, what)) > most:
            raise ValueError(f"it has {len(getattr(graph, what))} entries of {what}, expected at most {most}")
    if any(len(node.attribute) > _MAX_ATTRIBUTES for node in graph.node):
        raise ValueError(f"it has a node of more than {_MAX_ATTRIBUTES} attributes")


def _check_header(model: onnx.ModelProto) -> None:
    if model.ir_version not in _IR_VERSIONS:
        raise ValueError(f"its IR version is {model.ir_version}, expected {_IR_VERSIONS[0]} to {_IR_VERSIONS[-1]}")
    opsets = sorted((entry.domain, entry.version) for entry in model.opset_import)
    if opsets not in ([("", OPSET)], [("", OPSET), (DOMAIN, VERSION)]):
        raise ValueError(f"its opsets are {brief(opsets)}, expected {OPSET} of the standard, {VERSION} of ours")
    if model.training_info:
        raise ValueError("it has graphs for training")
    functions = [(function.domain, function.name, function.overload) for function in model.functions]
    if functions not in ([], [(DOMAIN, op.OP, "")]):
        raise ValueError(f"its functions are {brief(functions)}, expected {DOMAIN}::{op.OP} or none")


# --- inputs and outputs ----------------------------------------------------------------------------------------------

Interface = Mapping[str, tuple[int, tuple[int | str, ...]]]
"""Element type and shape by name, in order."""


def _interface(config: ModelConfig) -> tuple[Interface, Interface]:
    shapes = input_shapes(config, batch="batch", tokens="tokens", positions="positions", capacity="capacity")
    inputs = {name: (INT64 if name in TOKEN_INPUTS else FLOAT, shape) for name, shape in shapes.items()}
    logits = {LOGITS: (FLOAT, ("batch", "positions", config.vocab_size))}
    return inputs, {**logits, **{cache.present: inputs[cache.past] for cache in cache_tensors(config)}}


def _check_interface(what: str, found: Sequence[onnx.ValueInfoProto], expected: Interface) -> None:
    if len(found) != len(expected):
        raise ValueError(f"it has {len(found)} {what}s, expected {len(expected)} for config.json")
    for value, (name, (dtype, shape)) in zip(found, expected.items(), strict=True):
        if value.name != name:
            raise ValueError(f"its {what} {brief(value.name)} should be {name}")
        given = _declared(value)
        if given is None or given != (dtype, list(shape)):
            raise ValueError(f"its {what} {name} is {brief(given)}, expected {brief((dtype, list(shape)))}")


def _declared(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]] | None:
    """Return the element type and shape that a file gives a value, None where it gives no shape."""
    if value.type.WhichOneof("value") != "tensor_type":
        raise ValueError(f"{brief(value.name)} is no tensor")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    sizes = [size.dim_value if size.WhichOneof("value") == "dim_value" else size.dim_param for size in tensor.shape.dim]
    return tensor.elem_type, sizes


def _inputs(interface: Interface, symbols: Symbols) -> dict[str, Known]:
    return {
        name: Known(dtype, tuple(symbols[size] if isinstance(size, str) else size for size in shape))
        for name, (dtype, shape) in interface.items()
    }


# --- stored tensors --------------------------------------------------------------------------------------------------


def _stored(
    tensors: Iterable[onnx.TensorProto], config: ModelConfig, file_bytes: Mapping[str, int]
) -> dict[str, Known]:
    known: dict[str, Known] = {}
    parameters = config.parameter_shapes()
    for tensor in tensors:
        name = tensor.name
        if not name or name in known:
            raise ValueError(f"it has two tensors called {brief(name)}, or one without a name")
        known[name] = _tensor(tensor, file_bytes)
        _check_stored(name, known[name], parameters, config)
    return known


def _tensor(tensor: onnx.TensorProto, file_bytes: Mapping[str, int] | None) -> Known:
    """Return what a tensor is, if all of its data is there: in a file where it may lie in one, or in itself."""
    name, shape = brief(tensor.name), tuple(tensor.dims)
    if tensor.data_type not in _BITS or tensor.HasField("segment"):
        raise ValueError(f"the tensor {name} is of type {tensor.data_type}, which no bundle has")
    if min(shape, default=0) < 0 or len(shape) > 4:
        raise ValueError(f"the tensor {name} has the shape {brief(shape)}")
    needed = -(-math.prod(shape) * _BITS[tensor.data_type] // 8)
    if tensor.data_location and file_bytes is not None:
        _check_external(tensor, name, needed, file_bytes)
        return Known(tensor.data_type, shape)
    if tensor.data_location or tensor.external_data:
        raise ValueError(f"the tensor {name} may not lie in a file")
    if len(tensor.raw_data) != needed or needed > _MAX_INLINE_BYTES:
        raise ValueError(f"the tensor {name} has {len(tensor.raw_data)} bytes, expected {needed} for {brief(shape)}")
    numbers = np.frombuffer(tensor.raw_data, "<i8").reshape(shape) if tensor.data_type == INT64 else None
    return Known(tensor.data_type, shape, numbers)


def _check_external(tensor: onnx.TensorProto, name: str, needed: int, file_bytes: Mapping[str, int]) -> None:
    """Refuse a tensor whose data does not lie wholly in one of the files."""
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    place = dict(entries)
    if len(place) != len(entries) or not {"location"} <= place.keys() <= {"location", "offset", "length", "checksum"}:
        raise ValueError(f"the tensor {name} does not say in one way where it lies")
    if place["location"] not in file_bytes:
        raise ValueError(f"the tensor {name} lies outside the bundle, in {brief(place['location'])}")
    numbers = {key: place.get(key, default) for key, default in (("offset", "0"), ("length", str(needed)))}
    if not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers.values()):
        raise ValueError(f"the tensor {name} lies at {brief(numbers)}")
    offset, length = (int(text) for text in numbers.values())
    if length != needed or offset + length > file_bytes[place["location"]]:
        raise ValueError(
            f"the tensor {name} passes the end of {place['location']}, or its {length} bytes are not the {needed} "
            "of its type and shape"
        )


def _check_stored(name: str, found: Known, parameters: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Refuse a stored tensor that the config does not know, or of another size than it has there."""
    if name in table_names(config):
        fits = found.dtype == FLOAT and found.shape == (config.max_position_embeddings, config.key_width // 2)
    else:
        parameter = parameter_name(name.removesuffix(SCALE))
        if parameter not in parameters:
            raise ValueError(f"it holds {brief(name)}, unknown to config.json")
        shape = parameters[parameter]
        values = math.prod(shape)
        if name.endswith(SCALE):
            fits = found.dtype == FLOAT16 and found.elements <= values and found.shape[-1:] == shape[:1]
        elif name.endswith(PACKED):
            codes = found.shape[:1] == shape[:1] and found.elements in (values // 8, values // 4)
            fits = found.dtype == INT32 and len(found.shape) == 2 and codes
        elif name.endswith((TRANSPOSED, COLUMNS)):
            fits = found.shape == shape[::-1] and (found.dtype == INT8 or name.endswith(TRANSPOSED))
        else:
            fits = found.elements == values and found.dtype in (FLOAT, FLOAT16, BFLOAT16)
    if not fits or found.dtype not in _STORED:
        raise ValueError(f"{brief(name)} is {brief(found.shape)} of type {found.dtype}, not as config.json has it")


# --- nodes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """A node whose operator and attributes are on the list."""

    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.op_type} {brief(self.outputs[0], 60)}"


def _read_node(node: onnx.NodeProto, config: ModelConfig) -> _Node:
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if node.op_type not in INPUTS or node.domain != (DOMAIN if node.op_type == op.OP else "") or node.overload:
        raise ValueError(f"it has a node {brief(name)}, which no bundle has")
    least, most = INPUTS[node.op_type]
    outputs = len(op.MODEL_OUTPUTS) if node.op_type == op.OP else 1
    if not least <= len(node.input) <= most or len(node.output) != outputs:
        raise ValueError(f"a {node.op_type} has {len(node.input)} inputs and {len(node.output)} outputs")
    kinds, attributes = ATTRIBUTES.get(node.op_type, {}), {}
    for attribute in node.attribute:
        kind = kinds.get(attribute.name)
        if kind is None or attribute.name in attributes:
            raise ValueError(f"a {node.op_type} has the attribute {brief(attribute.name)}, or has it twice")
        if attribute.ref_attr_name or attribute.type != _attribute_types()[kind]:
            raise ValueError(f"the attribute {attribute.name} of a {node.op_type} is of another type")
        attributes[attribute.name] = _attribute(attribute, kind)
    if node.op_type == op.OP:
        if attributes.keys() != kinds.keys():
            raise ValueError(f"a {op.OP} lacks one of its attributes")
        _check_form(node, config)
    return _Node(node.op_type, tuple(node.input), tuple(node.output), attributes)


def _check_form(node: onnx.NodeProto, config: ModelConfig) -> None:
    """Refuse an attention node with other optional inputs than the config has: a model has one function for all."""
    given, sizes = op.given_inputs([name or None for name in node.input]), config.attention
    for name, expected in (("gate", sizes.has_gate), ("value_decoder", sizes.has_value_decoder)):
        if (name in given) != expected:
            raise ValueError(f"a {op.OP} {'lacks' if expected else 'has'} the input {name}")


def _attribute_types() -> dict[str, int]:
    from onnx import AttributeProto as Proto

    return {"f": Proto.FLOAT, "i": Proto.INT, "ints": Proto.INTS, "s": Proto.STRING, "t": Proto.TENSOR}


def _attribute(attribute: onnx.AttributeProto, kind: str) -> Any:
    value = getattr(attribute, kind)
    if kind == "t":
        return _tensor(value, None)
    return list(value) if kind == "ints" else value


def _evaluated(nodes: Sequence[_Node], inputs: Mapping[str, Known], stored: Mapping[str, Known]) -> dict[str, Known]:
    """Return what is known of every value; refuse one that is made twice, or used before it is made."""
    values = dict(inputs)
    for name, known in stored.items():
        if name in values:
            raise ValueError(f"{brief(name)} is an input and stored")
        values[name] = known
    for node in nodes:
        # empty is what is absent, which the attention alone may lack: its form has been looked at
        absent = {""} if node.op_type == op.OP else set()
        missing = next((name for name in node.inputs if name not in values and name not in absent), None)
        if missing is not None:
            raise ValueError(f"{node.title} reads {brief(missing)}, which is not made before it")
        try:
            results = outputs_of(
                node.op_type, [values[name] if name else None for name in node.inputs], node.attributes
            )
        except ValueError as error:
            raise ValueError(f"{node.title}: {error}") from error
        for name, known in zip(node.outputs, results, strict=True):
            if not name or name in values:
                raise ValueError(f"{node.title} makes {brief(name)}, which there is already, or has no name")
            values[name] = known
    return values


def _check_declared(declared: Iterable[onnx.ValueInfoProto], values: Mapping[str, Known], symbols: Symbols) -> None:
    """Refuse a declared type or shape that is not the real one: passes believe it, and take equal names for equal."""
    for value in declared:
        known = values.get(value.name)
        if known is None:
            raise ValueError(f"it describes {brief(value.name)}, which nothing makes")
        given = _declared(value)
        if value.type.tensor_type.elem_type != known.dtype:
            raise ValueError(f"{brief(value.name)} is declared of type {value.type.tensor_type.elem_type}")
        if given is None:
            continue
        # a name that is none of the inputs' may stand for anything
        same = len(given[1]) == len(known.shape) and all(
            symbols.get(size, real) == real if isinstance(size, str) else size == real
            for size, real in zip(given[1], known.shape, strict=True)
        )
        if not same:
            raise ValueError(f"{brief(value.name)} is declared as {brief(given[1])}, and is {brief(known.shape)}")


def _check_size(values: Mapping[str, Known], nodes: Sequence[_Node], config: ModelConfig, symbols: Symbols) -> None:
    """Refuse a graph whose values or products are far larger than a model of this config has."""
    batch, tokens, positions, capacity = (symbols[name] for name in ("batch", "tokens", "positions", "capacity"))
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    parameters = sum(math.prod(shape) for shape in config.parameter_shapes().values())
    cached = sum(cache.values_per_token for cache in config.caches)
    layer = tokens * (16 * h + 6 * f + 8 * capacity * (heads + 1)) + 8 * capacity * (cached + 1)
    head = (tokens + positions) * (32 * h + 64) + 4 * positions * config.vocab_size
    most = _ROOM * (batch * (layer * config.num_hidden_layers + head) + 2 * parameters)
    made = sum(values[name].elements for node in nodes for name in node.outputs)
    if made > most:
        raise ValueError(f"its values would be {made:.3g} numbers in a long step, expected at most {most:.3g}")
    per_pair = config.attention_flops_per_pair // 2 + heads
    multiplied = batch * (tokens + positions) * (2 * parameters + capacity * per_pair * config.num_hidden_layers)
    products = sum(_multiplied(node, values) for node in nodes)
    if products > _ROOM * multiplied:
        most = _ROOM * multiplied
        raise ValueError(f"it would multiply {products:.3g} times in a long step, expected at most {most:.3g}")


def _multiplied(node: _Node, values: Mapping[str, Known]) -> int:
    if node.op_type not in ("MatMul", "Gemm"):
        return 0
    return values[node.outputs[0]].elements * values[node.inputs[0]].shape[-1]
