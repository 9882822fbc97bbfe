"""What one matmul plugin is, and what one call of it takes: types and sizes. No call needs a workspace.

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
from gta_edge.plugins.matmul.definition import INPUTS, OPS, Sizes, output_names
from gta_edge.plugins.matmul.tiling import Variant
from gta_edge.plugins.plugin_call_base import CALLS_CACHED, FieldTypes, ParametersBase, Value

__all__ = ["FIELDS", "Call", "Parameters", "describe_call", "read_parameters"]

FIELDS = {
    bits: FieldTypes(
        op=name,
        attributes={"block_size": int, "output_sizes": tuple},
        variant={"compute": str},
        made_by="build",
    )
    for bits, name in OPS.items()
}
"""The plugins as their fields, by the bits of a weight."""

_TYPES = ("x", "int32", "fp16", "x")  # of the inputs


@dataclass(frozen=True)
class Parameters(ParametersBase[Variant]):
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
                f"{self.fields.op} has attributes that make no sense: {error}", "build the model again"
            ) from error

    @property
    def fields(self) -> FieldTypes:
        """The plugin's fields."""
        return FIELDS[self.bits]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order, of which the bias may be absent."""
        return INPUTS

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return output_names(len(self.output_sizes))

    @property
    def typed_like(self) -> tuple[int, ...]:
        """For each output, the place of the input that has its type: x."""
        return (0,) * len(self.output_sizes)

    def check_number(self, inputs: int) -> None:
        """Raise BackendError where the op has no such number of inputs."""
        if not len(INPUTS) - 1 <= inputs <= len(INPUTS):
            raise BackendError(
                f"{self.fields.op} has {inputs} inputs", f"expected {', '.join(INPUTS[:-1])}, and perhaps {INPUTS[-1]}"
            )

    def allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> tuple[str, ...]:
        """Return the types that an input or output may have, given those of all before it; none if there is no such."""
        if not len(INPUTS) - 1 <= num_inputs <= len(INPUTS) or place >= num_inputs + len(self.output_sizes):
            return ()
        if place == 0:
            return COMPUTE_TYPES
        wanted = _TYPES[place] if place < num_inputs else "x"
        return (types[0] if wanted == "x" else wanted,)

    def variant(self, compute: str) -> Variant:
        """Return what kernels are compiled for."""
        return Variant(self.bits, self.block_size, compute)

    def variant_values(self, variant: Variant) -> dict[str, Value]:
        """Return the values of the fields that say what kernels are compiled for."""
        return {"compute": variant.compute}

    def read_variant(self, values: Mapping[str, Any]) -> Variant:
        """Return what kernels are compiled for, given those fields' values.

        Raises:
            BackendError: there are no such kernels.
        """
        if values["compute"] not in COMPUTE_TYPES:
            raise BackendError(
                f"{self.fields.op} in this engine is damaged (it computes in {values['compute']!r})",
                "build the engine again",
            )
        return self.variant(values["compute"])


def read_parameters(bits: int, values: Mapping[str, Any]) -> Parameters:
    """Return the attributes among the values of a plugin's fields.

    Raises:
        BackendError: one is missing or makes no sense.
    """
    return Parameters(bits, **FIELDS[bits].attributes_among(values))


@dataclass(frozen=True)
class Call:
    """What one call is, beside its addresses."""

    variant: Variant
    leading: tuple[int, ...]
    """Sizes of x but for the last."""
    in_features: int
    output_sizes: tuple[int, ...]

    @cached_property
    def rows(self) -> int:
        """Rows of x, all its leading axes together."""
        return prod(self.leading)

    @property
    def sizes(self) -> tuple[int, int, tuple[int, ...]]:
        """Rows, K, and the outputs' widths: what the launch depends on."""
        return self.rows, self.in_features, self.output_sizes


@lru_cache(CALLS_CACHED)
def describe_call(parameters: Parameters, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Call:
    """Return what a call with these inputs is.

    Args:
        parameters: of the plugin.
        types: of the inputs, in order: ``fp16``, ``bf16``, ``int32`` or another name.
        shapes: of the inputs, in order.

    Raises:
        BackendError: the kernels do not take this combination of types and shapes; the message names what is wrong.
    """
    parameters.check_types(types)
    op, x = parameters.fields.op, shapes[0]
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
    return Call(parameters.variant(types[0]), x[:-1], x[-1], parameters.output_sizes)
