"""Element types of a graph's values, as the operators' own definitions give them: for passes that change types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from gta_edge.errors import EngineError
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN
from gta_edge.plugins.matmul import definition as blockwise_matmul

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import defs
else:
    ir, defs = optional("onnx_ir", "tensorrt"), optional("onnx.defs", "tensorrt")

__all__ = ["Types", "fits", "input_kinds", "title", "types_of_outputs", "value_types"]

Types = dict["ir.Value", "ir.DataType"]
"""Element types by value."""


def value_types(graph: ir.Graph) -> Types:
    """Return the element type of every value of a graph that has no subgraphs.

    Raises:
        EngineError: an operator's result has no known type.
    """
    types: Types = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype is None:
            raise EngineError(f"{value.name} has no element type", "export the bundle again")
        types[value] = value.dtype
    for node in graph:
        types.update(zip(node.outputs, types_of_outputs(node, types, graph.opset_imports), strict=False))
    return types


def types_of_outputs(node: ir.Node, types: Mapping[ir.Value, ir.DataType], opsets: Mapping[str, int]) -> list[Any]:
    """Return the element type of each output, given those of the inputs."""
    given = [None if value is None else types[value] for value in node.inputs]
    if (node.domain, node.op_type) == (DOMAIN, op.OP):  # the output is like the query, what is present like the past
        past = [given[op.INPUTS.index(name)] for name in ("past_key", "past_latent")]
        received = [ir.DataType.FLOAT] * ("past_received" in op.given_inputs(node.inputs))
        return [given[0], *past, *received, *given[len(op.INPUTS) :]]
    if node.domain == DOMAIN and node.op_type in blockwise_matmul.OPS.values():  # all are like x
        return [given[0]] * len(node.outputs)
    if node.op_type == "Cast":
        return [ir.DataType(node.attributes.get_int("to"))]
    if node.op_type == "Constant":
        return [_constant(node)]
    if node.op_type == "DequantizeLinear":
        return [ir.DataType(node.attributes.get_int("output_dtype", 0) or int(given[1] or 0))]
    schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 0))
    bound = dict(input_kinds(node, types, opsets))
    outputs = [_output(schema, kind, bound) for kind, _ in zip(_kinds(schema.outputs), node.outputs, strict=False)]
    if None in outputs or any(isinstance(a.value, ir.Graph) for a in node.attributes.values()):
        raise EngineError(f"the types of {title(node)} are not known", "export the bundle again")
    return outputs


def input_kinds(
    node: ir.Node, types: Mapping[ir.Value, ir.DataType], opsets: Mapping[str, int]
) -> Iterator[tuple[str, ir.DataType]]:
    """Yield for each input that is given the name of the kind that the standard calls it by, and its type.

    Inputs of one kind must have one type.
    """
    schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 0))
    for kind, value in zip(_kinds(schema.inputs), node.inputs, strict=False):
        if value is not None:
            yield kind, types[value]


def fits(node: ir.Node, types: Mapping[ir.Value, ir.DataType], version: int) -> bool:
    """Tell whether a standard operator has this form, attributes and types of inputs, in this opset too."""
    try:
        schema = _schema(node.domain, node.op_type, version)
    except EngineError:
        return False
    if schema.deprecated or not set(node.attributes) <= set(schema.attributes) or len(node.inputs) > schema.max_input:
        return False
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    given = input_kinds(node, types, {node.domain: version})
    return all(_type_string(dtype) in allowed.get(kind, (kind,)) for kind, dtype in given)


def title(node: ir.Node) -> str:
    """Return what an error calls a node."""
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')}".rstrip()


@cache
def _schema(domain: str, op_type: str, version: int) -> Any:
    try:
        return defs.get_schema(op_type, version, domain)
    except defs.SchemaError as error:
        where = f"opset {version} of {domain or 'the standard'}"
        raise EngineError(f"{op_type} is no operator of {where}", "export the bundle again") from error


def _kinds(parameters: Any) -> Iterator[str]:
    for parameter in parameters:
        yield parameter.type_str
    while parameters and parameters[-1].option == defs.OpSchema.FormalParameterOption.Variadic:
        yield parameters[-1].type_str


def _output(schema: Any, kind: str, bound: Mapping[str, ir.DataType]) -> ir.DataType | None:
    if kind in bound:
        return bound[kind]
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == kind), [kind])
    name = allowed[0].removeprefix("tensor(").removesuffix(")").upper() if len(allowed) == 1 else ""
    return ir.DataType[name] if name in ir.DataType.__members__ else None


def _type_string(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def _constant(node: ir.Node) -> ir.DataType:
    tensor = node.attributes.get("value")
    if tensor is not None:
        return ir.DataType(tensor.as_tensor().dtype)
    whole = "value_int" in node.attributes or "value_ints" in node.attributes
    return ir.DataType.INT64 if whole else ir.DataType.FLOAT
