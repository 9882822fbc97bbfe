"""What one attention plugin of TensorRT is, and what one call of it takes: types, sizes, launches and workspace.

Nothing here calls TensorRT; descriptors come in as names of types and as tuples of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES, QUANTIZED_CACHE_TYPES
from gta_edge.plugins.attention.definition import INPUTS, OP, OUTPUTS, Sizes
from gta_edge.plugins.attention.launches import plan_attention, programs
from gta_edge.plugins.attention.tiling import DECODE_TOKENS, Variant
from gta_edge.plugins.plugin_fields import FieldTypes, Value

__all__ = [
    "CALLS_KEPT",
    "DECLARE_ALIAS",
    "FIELDS",
    "PAST_SCALES",
    "PRESENT_SCALES",
    "QUANTISED_CACHE",
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
]

PAST_SCALES = ("past_key_scale", "past_latent_scale")  # float32 [B, n_k, S], [B, n_c, S]
PRESENT_SCALES = ("present_key_scale", "present_latent_scale")

QUANTISED_CACHE = "quantised_cache"
"""Attribute, 0 or 1: the node has scales. A plugin says how many outputs it has before it sees its inputs."""
DECLARE_ALIAS = "declare_alias"
"""Attribute, 0 or 1: present caches are declared to be the past ones' memory."""

CALLS_KEPT = 1024

FIELDS = FieldTypes(
    op=OP,
    attributes={
        "num_query_heads": int,
        "num_key_heads": int,
        "num_latent_heads": int,
        "scale": float,
        QUANTISED_CACHE: int,
        DECLARE_ALIAS: int,
    },
    built={
        "key_dim": int,
        "latent_dim": int,
        "hidden_size": int,
        "compute": str,
        "cache": str,
        "architecture": str,
        "processors": int,
    },
)
"""The plugin as its fields."""
_OPTIONAL = (QUANTISED_CACHE, DECLARE_ALIAS)


@dataclass(frozen=True)
class Parameters:
    """The node's attributes.

    Raises:
        BackendError: one of them makes no sense.
    """

    num_query_heads: int
    num_key_heads: int
    num_latent_heads: int
    scale: float
    quantised_cache: bool = False
    declare_alias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_query_heads", "num_key_heads", "num_latent_heads"):
            value = getattr(self, name)
            if value < 1 or self.num_query_heads % value:
                raise BackendError(
                    f"{OP} has {name} = {value}",
                    f"expected a number from 1 that divides num_query_heads, {self.num_query_heads}",
                )
        object.__setattr__(self, "scale", float(np.float32(self.scale)))  # as it is serialised
        if not 0 < self.scale < float("inf"):
            raise BackendError(f"{OP} has scale = {self.scale}", "expected more than 0")

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return INPUTS + PAST_SCALES * self.quantised_cache

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return OUTPUTS + PRESENT_SCALES * self.quantised_cache

    @cached_property
    def caches(self) -> tuple[tuple[int, int], ...]:
        """For each output that is an input updated: the input's place and the output's."""
        return tuple(
            (self.inputs.index(name.replace("present", "past")), place)
            for place, name in enumerate(self.outputs)
            if name.startswith("present")
        )


@dataclass(frozen=True)
class Built:
    """What a build settled: the engine fits this, and its workspace was reserved for it."""

    variant: Variant
    architecture: str
    processors: int
    """Multiprocessors of the GPU that it was built on."""


@dataclass(frozen=True)
class Call:
    """What one call is, beside its addresses."""

    variant: Variant
    batch: int
    tokens: int
    capacity: int
    positions: int


def read_parameters(values: Mapping[str, Any]) -> Parameters:
    """Return the attributes among the values of a plugin's fields.

    Raises:
        BackendError: one is missing or makes no sense.
    """
    missing = [name for name in FIELDS.attributes if name not in values and name not in _OPTIONAL]
    if missing:
        raise BackendError(f"{OP} lacks {', '.join(missing)}", "export the model again")
    given = {name: values[name] for name in FIELDS.attributes if name in values}
    for name in _OPTIONAL:
        if given.get(name, 0) not in (0, 1):
            raise BackendError(f"{OP} has {name} = {given[name]}", "expected 0 or 1")
        given[name] = bool(given.get(name, 0))
    return Parameters(**given)


def read_built(parameters: Parameters, values: Mapping[str, Any]) -> Built | None:
    """Return what a build settled, None where the plugin was serialised before it.

    Raises:
        BackendError: part of it is missing, or there are no such kernels.
    """
    if not FIELDS.built_among(values):
        return None
    heads = (parameters.num_query_heads, parameters.num_key_heads, parameters.num_latent_heads)
    try:
        sizes = Sizes(*heads, values["key_dim"], values["latent_dim"], values["hidden_size"])
    except ValueError as error:
        raise BackendError(f"{OP} in this engine is damaged ({error})", "build the engine again") from error
    return Built(Variant(sizes, values["compute"], values["cache"]), values["architecture"], values["processors"])


def field_values(parameters: Parameters, built: Built | None) -> dict[str, Value]:
    """Return all that a plugin is made of, by the field's name."""
    values: dict[str, Value] = {name: kind(getattr(parameters, name)) for name, kind in FIELDS.attributes.items()}
    if built is not None:
        variant = built.variant
        numbers = (variant.sizes.key_dim, variant.sizes.latent_dim, variant.sizes.hidden_size)
        all_values = (*numbers, variant.compute, variant.cache, built.architecture, built.processors)
        values |= dict(zip(FIELDS.built, all_values, strict=True))
    return values


def allowed_types(parameters: Parameters, place: int, types: Sequence[str]) -> tuple[str, ...]:
    """Return the types that an input or output may have, given those of all before it."""
    name = (parameters.inputs + parameters.outputs)[place]
    if name == "query":
        return COMPUTE_TYPES
    if name == "past_length":
        return ("int64",)
    if name.endswith("_scale"):
        return ("fp32",)
    if name == "past_key" and parameters.quantised_cache:
        return QUANTIZED_CACHE_TYPES
    if name in ("past_latent", "present_key", "present_latent"):
        return (types[parameters.inputs.index("past_key")],)
    return (types[0],)


def check_types(parameters: Parameters, types: Sequence[str]) -> None:
    """Raise BackendError where the inputs' types are not a combination that there are kernels for."""
    if len(types) != len(parameters.inputs):
        raise BackendError(
            f"{OP} has {len(types)} inputs",
            f"with {QUANTISED_CACHE} = {int(parameters.quantised_cache)} it has "
            f"{len(parameters.inputs)}: {', '.join(parameters.inputs)}",
        )
    for place, (name, found) in enumerate(zip(parameters.inputs, types, strict=True)):
        allowed = allowed_types(parameters, place, types)
        if found not in allowed:
            raise BackendError(
                f"{OP} has {name} of type {found} with a query of {types[0]} and {QUANTISED_CACHE} = "
                f"{int(parameters.quantised_cache)}",
                f"expected {' or '.join(allowed)}: retype the model, and build a strongly typed network",
            )


@lru_cache(CALLS_KEPT)
def describe_call(
    parameters: Parameters, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], exact: bool = True
) -> Call:
    """Return what a call with these inputs is.

    Args:
        parameters: of the plugin.
        types: of the inputs, in order: ``fp16``, ``bf16``, ``fp32``, ``int8``, ``fp8``, ``int64`` or TensorRT's name.
        shapes: of the inputs, in order.
        exact: whether B, T, S and P must be the same wherever they stand; the bounds of a profile may differ.

    Raises:
        BackendError: the kernels do not take this combination of types and shapes; the message names what is wrong.
    """
    check_types(parameters, types)
    given = dict(zip(parameters.inputs, shapes, strict=True))
    for name, rank in (("gate", 3), ("past_key", 4), ("past_latent", 4), ("cos", 2)):
        if len(given[name]) != rank:
            raise BackendError(f"{OP} has {name} of shape {list(given[name])}", f"expected {rank} axes")
    (b, t, hidden), (_, _, s, d_k), d_l = given["gate"], given["past_key"], given["past_latent"][3]
    n_q, n_k, n_c = parameters.num_query_heads, parameters.num_key_heads, parameters.num_latent_heads
    try:
        sizes = Sizes(n_q, n_k, n_c, d_k, d_l, hidden)
    except ValueError as error:
        raise BackendError(f"{OP} has inputs that do not fit its attributes: {error}") from error
    expected: dict[str, tuple[int | str, ...]] = {
        "query": ("B", "T", n_q * d_k),
        "key": ("B", "T", n_k * d_k),
        "latent": ("B", "T", n_c * d_l),
        "gate": ("B", "T", hidden),
        "past_key": ("B", n_k, "S", d_k),
        "past_latent": ("B", n_c, "S", d_l),
        "past_length": ("B",),
        "cos": ("P", d_k // 2),
        "sin": ("P", d_k // 2),
        "value_decoder": (n_q, d_l, hidden // n_q),
        "past_key_scale": ("B", n_k, "S"),
        "past_latent_scale": ("B", n_c, "S"),
    }
    named = {"B": b, "T": t, "S": s, "P": given["cos"][0]}
    for name, shape in given.items():
        wanted = [named[size] if isinstance(size, str) else size for size in expected[name]]
        fixed = [exact or not isinstance(size, str) for size in expected[name]]
        if len(shape) != len(wanted) or any(
            f and found != want for f, found, want in zip(fixed, shape, wanted, strict=True)
        ):
            raise BackendError(f"{OP} has {name} of shape {list(shape)}", f"expected {wanted}")
    if t > s:
        raise BackendError(f"{OP} has {t} new tokens in caches for {s}", f"expected at most {s}: append smaller chunks")
    return Call(Variant(sizes, types[0], types[parameters.inputs.index("past_key")]), b, t, s, named["P"])


@lru_cache(CALLS_KEPT)
def largest_workspace_bytes(
    variant: Variant, architecture: str, processors: int, *, batch: int, tokens: int, capacity: int
) -> int:
    """Return the workspace that suffices for all calls up to these sizes.

    It does not grow with every size: two rows may share the GPU's blocks better than three. So all are asked.

    Args:
        variant: sizes and types.
        architecture: of the GPU.
        processors: of the GPU.
        batch: largest B.
        tokens: largest T.
        capacity: largest S.

    Raises:
        BackendError: the kernels do not take these sizes.
    """
    of = programs(variant, architecture)
    plan_attention(of, processors, batch=batch, tokens=tokens, capacity=capacity)
    # Above this many rows the splits no longer depend on the batch, and the workspace grows with it.
    split = min(batch, 2 * processors + 1)
    return max(
        plan_attention(of, processors, batch=rows, tokens=few, capacity=capacity).workspace_bytes
        for rows in {*range(1, split + 1), batch}
        for few in range(1, min(tokens, DECODE_TOKENS) + 1)
    )
