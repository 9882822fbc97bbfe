"""What one attention plugin is, and what one call of it takes: types, sizes and workspace.

Nothing here calls TensorRT; descriptors come in as names of types and as tuples of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import CACHES, COMPUTE_TYPES, QUANTIZED_CACHE_TYPES, CacheType
from gta_edge.plugins.attention.definition import (
    FEATURE_INPUTS,
    MAX_BIAS_ROWS,
    MODEL_INPUTS,
    MODEL_OPTIONAL_INPUTS,
    OBSERVATIONS,
    OBSERVE,
    OP,
    OPEN_INPUTS,
    SCALE_INPUTS,
    Features,
    Sizes,
)
from gta_edge.plugins.attention.launches import plan_attention, programs_for
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_call_base import CALLS_CACHED, FieldTypes, ParametersBase, Value
from gta_edge.support.text import brief

__all__ = [
    "BIAS_ROWS",
    "CACHE_DTYPE",
    "FEATURE_FLAGS",
    "FIELDS",
    "INPUT_FLAGS",
    "Call",
    "Parameters",
    "describe_call",
    "largest_workspace_bytes",
    "read_parameters",
]

CACHE_DTYPE = "cache_dtype"
"""Attribute: how a quantised cache is stored, one of ``QUANTIZED_CACHE_TYPES``; it says which of these inputs there
are, before a plugin sees any. Not there, or ``none``: caches are of the query's type."""

_PLAIN = "none"

_BYTES = "int8"
"""Type of codes that share bytes: TensorRT gives plugins none without a sign."""

UNOBSERVED = "none"
"""The attribute ``observe`` of a node that observes nothing, where it is given: a field of no length is none."""

_INTEGERS = ("past_length", "positions", "branch_start", "branches")

INPUT_FLAGS = {name: f"has_{name}" for name in MODEL_OPTIONAL_INPUTS}
"""Inputs that a model need not have, and the attribute, 0 or 1, that says so: a plugin's inputs have no gaps."""

FEATURE_FLAGS = {"positions": "has_positions", "branches": "has_branches"}
"""Inputs of a managed cache, and the attribute, 0 or 1, that says that they are there."""

BIAS_ROWS = "bias_rows"
"""Attribute: rows of ``row_bias``; 0 where it is not there. Of ``past_received`` and its like ``observe`` says it."""

FIELDS = FieldTypes(
    op=OP,
    attributes={
        "num_query_heads": int,
        "num_key_heads": int,
        "num_latent_heads": int,
        "scale": float,
        CACHE_DTYPE: str,
        **dict.fromkeys((*INPUT_FLAGS.values(), *FEATURE_FLAGS.values(), BIAS_ROWS), int),
        OBSERVE: str,
    },
    variant={"key_dim": int, "latent_dim": int, "hidden_size": int, "compute": str},
    made_by="export",
    optional=(CACHE_DTYPE, *INPUT_FLAGS.values(), *FEATURE_FLAGS.values(), BIAS_ROWS, OBSERVE),
)
"""The plugin as its fields."""


@dataclass(frozen=True)
class Parameters(ParametersBase[Variant]):
    """The node's attributes.

    Raises:
        BackendError: one of them makes no sense.
    """

    num_query_heads: int
    num_key_heads: int
    num_latent_heads: int
    scale: float
    cache_dtype: str = _PLAIN
    has_gate: bool = True
    has_value_decoder: bool = True
    has_positions: bool = False
    has_branches: bool = False
    bias_rows: int = 0
    observe: str = UNOBSERVED

    def __post_init__(self) -> None:
        if self.cache_dtype not in (_PLAIN, *QUANTIZED_CACHE_TYPES):
            expected = ", ".join((*QUANTIZED_CACHE_TYPES, _PLAIN))
            raise BackendError(f"{OP} has {CACHE_DTYPE} = {brief(self.cache_dtype)}", f"expected one of {expected}")
        if self.observe not in (UNOBSERVED, *OBSERVATIONS):
            expected = ", ".join((*OBSERVATIONS, UNOBSERVED))
            raise BackendError(f"{OP} has observe = {brief(self.observe)}", f"expected one of {expected}")
        if not 0 <= self.bias_rows <= MAX_BIAS_ROWS:
            raise BackendError(f"{OP} has bias_rows = {self.bias_rows}", f"expected 0 to {MAX_BIAS_ROWS}")
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

    @property
    def fields(self) -> FieldTypes:
        """The plugin's fields."""
        return FIELDS

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        given = tuple(name for name in MODEL_INPUTS if getattr(self, INPUT_FLAGS.get(name, ""), True))
        return given + self.features.inputs + self._beside

    @property
    def quantised(self) -> CacheType | None:
        """How the cache is stored; None where it is of the query's type."""
        return CACHES.get(self.cache_dtype)

    @property
    def _beside(self) -> tuple[str, ...]:
        """Names of the inputs that a quantised cache has beside it."""
        cache = self.quantised
        return SCALE_INPUTS * (cache is not None) + OPEN_INPUTS * (cache is not None and cache.in_blocks)

    @cached_property
    def features(self) -> Features:
        """Which inputs of a managed cache there are."""
        observe = None if self.observe == UNOBSERVED else self.observe
        return Features(observe, self.bias_rows, self.has_positions, self.has_branches)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.features.outputs + tuple(name.replace("past", "present") for name in self._beside)

    @cached_property
    def caches(self) -> tuple[tuple[int, int], ...]:
        """For each output that is an input updated: the input's place and the output's."""
        return tuple(
            (self.inputs.index(name.replace("present", "past")), place)
            for place, name in enumerate(self.outputs)
            if name.startswith("present")
        )

    @property
    def as_computed(self) -> str:
        """Name of the input that holds latents as wide as they are computed with, [B, n_c, rows, d_l]."""
        return OPEN_INPUTS[1] if OPEN_INPUTS[1] in self.inputs else "past_latent"

    @property
    def typed_like(self) -> tuple[int, ...]:
        """For each output, the place of the input that has its type: the query, and the past caches."""
        return (0, *(past for past, _ in self.caches))

    @property
    def circumstances(self) -> str:
        """What else the allowed types depend on."""
        return f" and {self._flags}"

    @property
    def _flags(self) -> str:
        """The attributes that say which inputs there are, as errors have them; most only where not as in a bundle."""
        absent = [f"{name} = 0" for name in INPUT_FLAGS.values() if not getattr(self, name)]
        given = [f"{name} = 1" for name in FEATURE_FLAGS.values() if getattr(self, name)]
        given += [f"{BIAS_ROWS} = {self.bias_rows}"] * bool(self.bias_rows)
        given += [f"{OBSERVE} = {self.observe}"] * (self.observe != UNOBSERVED)
        return ", ".join((f"{CACHE_DTYPE} = {self.cache_dtype}", *absent, *given))

    def check_number(self, inputs: int) -> None:
        """Raise BackendError where the op has no such number of inputs."""
        if inputs != len(self.inputs):
            raise BackendError(
                f"{OP} has {inputs} inputs",
                f"with {self._flags} it has {len(self.inputs)}: {', '.join(self.inputs)}",
            )

    def allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> tuple[str, ...]:
        """Return the types that an input or output may have, given those of all before it; none if there is no such."""
        if num_inputs != len(self.inputs):
            return ()
        name = (self.inputs + self.outputs)[place]
        if name == "query":
            return COMPUTE_TYPES
        if name in _INTEGERS:
            return ("int64",)
        cache = self.quantised
        if name in FEATURE_INPUTS or name == "present_received":
            return ("fp32",)
        if cache is not None and name.endswith("_scale"):
            return (str(cache.scale),)
        if cache is not None and name in ("past_key", "past_latent", "present_key", "present_latent"):
            return (_BYTES if cache.in_blocks else cache.dtype,)
        return (types[0],)

    def sizes(self, key_dim: int, latent_dim: int, hidden_size: int) -> Sizes:
        """Return a model's sizes, of the attributes and these widths.

        Raises:
            ValueError: they do not go together.
        """
        heads = (self.num_query_heads, self.num_key_heads, self.num_latent_heads)
        return Sizes(*heads, key_dim, latent_dim, hidden_size, self.has_gate, self.has_value_decoder)

    def variant_values(self, variant: Variant) -> dict[str, Value]:
        """Return the values of the fields that say what kernels are compiled for."""
        sizes = variant.sizes
        numbers = (sizes.key_dim, sizes.latent_dim, sizes.hidden_size)
        return dict(zip(FIELDS.variant, (*numbers, variant.compute), strict=True))

    def read_variant(self, values: Mapping[str, Any]) -> Variant:
        """Return what kernels are compiled for, given those fields' values.

        Raises:
            BackendError: there are no such kernels.
        """
        try:
            sizes = self.sizes(values["key_dim"], values["latent_dim"], values["hidden_size"])
        except ValueError as error:
            raise BackendError(f"{OP} in this engine is damaged ({error})", "build the engine again") from error
        return self.variant(sizes, values["compute"])

    def variant(self, sizes: Sizes, compute: str) -> Variant:
        """Return what kernels are compiled for.

        Raises:
            BackendError: there are no such kernels.
        """
        cache = compute if self.quantised is None else self.quantised.name
        return Variant(sizes, compute, cache, self.features)


def read_parameters(values: Mapping[str, Any]) -> Parameters:
    """Return the attributes among the values of a plugin's fields.

    Raises:
        BackendError: one is missing or makes no sense.
    """
    given = FIELDS.attributes_among(values)
    for name in (set(FIELDS.optional) - {CACHE_DTYPE, OBSERVE, BIAS_ROWS}) & set(given):
        if given[name] not in (0, 1):
            raise BackendError(f"{OP} has {name} = {given[name]}", "expected 0 or 1")
        given[name] = bool(given[name])
    return Parameters(**given)


@dataclass(frozen=True)
class Call:
    """What one call is, beside its addresses."""

    variant: Variant
    batch: int
    tokens: int
    capacity: int
    positions: int
    branch_rows: int = 0
    """Words of ``branches`` for each sequence."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, T and S: what the launches depend on."""
        return self.batch, self.tokens, self.capacity


@lru_cache(CALLS_CACHED)
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
    parameters.check_types(types)
    given = dict(zip(parameters.inputs, shapes, strict=True))
    ranks = {"query": 3, "gate": 3, "past_latent": 4, "cos": 2, "value_decoder": 3, "branches": 2}
    in_blocks = parameters.quantised is not None and parameters.quantised.in_blocks
    ranks |= {"past_key": 5, "past_latent_open": 4} if in_blocks else {"past_key": 4}
    for name, shape in given.items():
        if len(shape) != ranks.get(name, len(shape)):
            raise BackendError(f"{OP} has {name} of shape {list(shape)}", f"expected {ranks[name]} axes")
    n_q, n_k, n_c = parameters.num_query_heads, parameters.num_key_heads, parameters.num_latent_heads
    d_k, d_l = given["past_key"][3], given[parameters.as_computed][3]
    s = given["past_latent" if in_blocks else "past_key"][2]
    b, t, hidden = given.get("gate", (*given["query"][:2], n_q * given.get("value_decoder", (d_l,))[-1]))
    try:
        sizes = parameters.sizes(d_k, d_l, hidden)
    except ValueError as error:
        raise BackendError(f"{OP} has inputs that do not fit its attributes: {error}") from error
    expected: dict[str, tuple[int | str, ...]] = {
        "query": ("B", "T", n_q * d_k),
        "key": ("B", "T", n_k * d_k),
        "latent": ("B", "T", n_c * d_l),
        "gate": ("B", "T", hidden),
        "past_length": ("B",),
        "cos": ("P", d_k // 2),
        "sin": ("P", d_k // 2),
        "value_decoder": (n_q, d_l, hidden // n_q),
        "positions": ("B", "T"),
        "row_bias": ("B", parameters.bias_rows),
        "branch_start": ("B",),
        "branches": ("B", "W"),
        "past_received": ("B", "S"),
        "query_weight": ("B", "T"),
        "decay": ("B",),
        **_cache_shapes(parameters, d_k, d_l),
    }
    words = given.get("branches", (0, 0))[1]
    named = {"B": b, "T": t, "S": s, "S/32": -(-s // BLOCK), "P": given["cos"][0], "W": words}
    for name, shape in given.items():
        wanted = [named[size] if isinstance(size, str) else size for size in expected[name]]
        fixed = [exact or not isinstance(size, str) for size in expected[name]]
        if len(shape) != len(wanted) or any(
            f and found != want for f, found, want in zip(fixed, shape, wanted, strict=True)
        ):
            raise BackendError(f"{OP} has {name} of shape {list(shape)}", f"expected {wanted}")
    if in_blocks and s % BLOCK:
        raise BackendError(f"{OP} has caches in blocks for {s} tokens", f"expected a multiple of {BLOCK}")
    if t > s:
        raise BackendError(f"{OP} has {t} new tokens in caches for {s}", f"expected at most {s}: append smaller chunks")
    return Call(parameters.variant(sizes, types[0]), b, t, s, named["P"], words)


def _cache_shapes(parameters: Parameters, d_k: int, d_l: int) -> dict[str, tuple[int | str, ...]]:
    """Return the shapes of a layer's caches and of what is beside them, by the input's name."""
    n_k, n_c, cache = parameters.num_key_heads, parameters.num_latent_heads, parameters.quantised
    if cache is None or not cache.in_blocks:
        return {
            "past_key": ("B", n_k, "S", d_k),
            "past_latent": ("B", n_c, "S", d_l),
            "past_key_scale": ("B", n_k, "S"),
            "past_latent_scale": ("B", n_c, "S"),
        }
    return {
        "past_key": ("B", n_k, "S/32", d_k, BLOCK * cache.key_bits // 8),
        "past_latent": ("B", n_c, "S", d_l * cache.value_bits // 8),
        "past_key_scale": ("B", n_k, "S/32", 2, d_k),
        "past_latent_scale": ("B", n_c, "S", 2),
        "past_key_open": ("B", n_k, BLOCK, d_k),
        "past_latent_open": ("B", n_c, BLOCK, d_l),
    }


@lru_cache(CALLS_CACHED)
def largest_workspace_bytes(
    variant: Variant, architecture: str, processors: int, *, batch: int, tokens: int, capacity: int
) -> int:
    """Return the workspace that suffices for all calls up to these sizes.

    It does not grow with every size: two sequences may share the GPU's blocks better than three. So all are asked.

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
    of = programs_for(variant, architecture)
    plan_attention(of, processors, batch=batch, tokens=tokens, capacity=capacity)
    # Above this many sequences the splits no longer depend on the batch, and the workspace grows with it.
    split = min(batch, 2 * processors + 1)
    return max(
        plan_attention(of, processors, batch=sequences, tokens=few, capacity=capacity).workspace_bytes
        for sequences in {*range(1, split + 1), batch}
        for few in range(1, min(tokens, variant.decode_tokens) + 1)
    )
