"""What one plugin for matmuls with quantised matrices is, and what one call of it takes: types, sizes and workspace.

Nothing here calls TensorRT; descriptors come in as names of types and as tuples of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES
from gta_edge.plugins.matmul.definition import INPUTS, MAX_OUTPUTS, OPS, Sizes
from gta_edge.plugins.matmul.kernels import MatMulKernels
from gta_edge.plugins.matmul.tiling import FEW_ROWS, MatMulVariant
from gta_edge.plugins.plugin_fields import FieldTypes, Value

__all__ = [
    "CALLS_KEPT",
    "FIELDS",
    "Built",
    "Call",
    "Parameters",
    "allowed_types",
    "check_types",
    "describe_call",
    "field_values",
    "largest_workspace_bytes",
    "read_built",
    "read_parameters",
    "variant",
]

CALLS_KEPT = 1024

FIELDS = {
    bits: FieldTypes(
        op=name,
        attributes={"block_size": int, "output_sizes": tuple},
        built={"compute": str, "architecture": str, "processors": int},
    )
    for bits, name in OPS.items()
}
"""The plugins as their fields, by the width of a code in bits."""

_TYPES = ("x", "int32", "fp16", "x")  # of the inputs


@dataclass(frozen=True)
class Parameters:
    """The op and the node's attributes.

    Raises:
        BackendError: one of them makes no sense.
    """

    bits: int
    block_size: int
    output_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            Sizes(128, self.output_sizes, self.bits, self.block_size)  # any number of inputs: it is not known yet
        except ValueError as error:
            raise BackendError(
                f"{self.op} has attributes that make no sense: {error}", "build the model again"
            ) from error

    @property
    def op(self) -> str:
        """The op's name."""
        return OPS[self.bits]

    @cached_property
    def out_features(self) -> int:
        """N, of all outputs."""
        return sum(self.output_sizes)


@dataclass(frozen=True)
class Built:
    """What a build settled: the engine fits this, and its workspace was reserved for it."""

    compute: str
    architecture: str
    processors: int
    """Multiprocessors of the GPU that it was built on."""


@dataclass(frozen=True)
class Call:
    """What one call is, beside its addresses."""

    compute: str
    leading: tuple[int, ...]
    """Sizes of x but for the last."""
    in_features: int

    @cached_property
    def rows(self) -> int:
        """Rows that x has, all its leading axes together."""
        return prod(self.leading)


def variant(parameters: Parameters, compute: str) -> MatMulVariant:
    """Return what the kernels are made for."""
    return MatMulVariant(parameters.bits, parameters.block_size, compute)


def read_parameters(bits: int, values: Mapping[str, Any]) -> Parameters:
    """Return the attributes among the values of a plugin's fields.

    Raises:
        BackendError: one is missing or makes no sense.
    """
    missing = [name for name in FIELDS[bits].attributes if name not in values]
    if missing:
        raise BackendError(f"{OPS[bits]} lacks {', '.join(missing)}", "build the model again")
    return Parameters(bits, values["block_size"], values["output_sizes"])


def read_built(parameters: Parameters, values: Mapping[str, Any]) -> Built | None:
    """Return what a build settled, None where the plugin was serialised before it.

    Raises:
        BackendError: part of it is missing or makes no sense.
    """
    fields = FIELDS[parameters.bits]
    if not fields.built_among(values):
        return None
    built = Built(**{name: values[name] for name in fields.built})
    if built.compute not in COMPUTE_TYPES:
        raise BackendError(
            f"{parameters.op} in this engine is damaged (it computes in {built.compute!r})", "build the engine again"
        )
    return built


def field_values(parameters: Parameters, built: Built | None) -> dict[str, Value]:
    """Return all that a plugin is made of, by the field's name."""
    fields = FIELDS[parameters.bits]
    values: dict[str, Value] = {name: getattr(parameters, name) for name in fields.attributes}
    if built is not None:
        values |= {name: getattr(built, name) for name in fields.built}
    return values


def allowed_types(place: int, types: Sequence[str], num_inputs: int) -> tuple[str, ...]:
    """Return the types that an input or output may have, given those of all before it."""
    if not len(INPUTS) - 1 <= num_inputs <= len(INPUTS) or place >= num_inputs + MAX_OUTPUTS:
        return ()
    if place == 0:
        return COMPUTE_TYPES
    wanted = _TYPES[place] if place < num_inputs else "x"
    return (types[0] if wanted == "x" else wanted,)


def check_types(parameters: Parameters, types: Sequence[str]) -> None:
    """Raise BackendError where the inputs' types are not a combination that there are kernels for."""
    op = parameters.op
    if not len(INPUTS) - 1 <= len(types) <= len(INPUTS):
        raise BackendError(
            f"{op} has {len(types)} inputs", f"expected {', '.join(INPUTS[:-1])}, and perhaps {INPUTS[-1]}"
        )
    for place, (name, found) in enumerate(zip(INPUTS, types, strict=False)):
        allowed = allowed_types(place, types, len(types))
        if found not in allowed:
            raise BackendError(
                f"{op} has {name} of type {found} with x of {types[0]}",
                f"expected {' or '.join(allowed)}: retype the model, and build a strongly typed network",
            )


@lru_cache(CALLS_KEPT)
def describe_call(parameters: Parameters, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Call:
    """Return what a call with these inputs is.

    Args:
        parameters: of the plugin.
        types: of the inputs, in order: ``fp16``, ``bf16``, ``int32`` or another name.
        shapes: of the inputs, in order.

    Raises:
        BackendError: the kernels do not take this combination of types and shapes; the message names what is wrong.
    """
    check_types(parameters, types)
    op, x = parameters.op, shapes[0]
    if len(x) < 2 or min(x) < 1:
        raise BackendError(f"{op} has x of shape {list(x)}", "expected at least two axes, of at least 1 each")
    try:
        sizes = Sizes(x[-1], parameters.output_sizes, parameters.bits, parameters.block_size)
    except ValueError as error:
        raise BackendError(f"{op} has x of shape {list(x)}, which does not fit its attributes: {error}") from error
    expected = {"weight": sizes.weight_shape, "scale": sizes.scale_shape, "bias": (sizes.out_features,)}
    for name, shape in zip(INPUTS[1:], shapes[1:], strict=False):
        if shape != expected[name]:
            raise BackendError(f"{op} has {name} of shape {list(shape)}", f"expected {list(expected[name])}")
    return Call(types[0], x[:-1], x[-1])


def largest_workspace_bytes(kernels: MatMulKernels, rows: int, in_features: int, output_sizes: tuple[int, ...]) -> int:
    """Return the workspace that suffices for all calls of up to so many rows.

    Few rows may share out the inputs, and so need more than more rows do: all of them are asked.

    Args:
        kernels: of the call's variant.
        rows: most rows.
        in_features: K.
        output_sizes: widths of the outputs.

    Raises:
        BackendError: the kernels do not take these sizes.
    """
    asked = {*range(1, min(rows, FEW_ROWS) + 1), rows}
    return max(kernels.workspace_bytes(each, in_features, output_sizes) for each in asked)
