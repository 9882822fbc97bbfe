"""Plugins of the attention: their attributes, and the types and shapes of their inputs, as TensorRT has them."""

from __future__ import annotations

from typing import Any

from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.plugin_call import Parameters
from tests.helpers.plugin_values import Fields, bounds, trt

OP = "GroupedLatentAttention"
BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
HALF, BF16, FLOAT, INT8, FP8, INT64 = (
    getattr(trt.DataType, name) for name in ("HALF", "BF16", "FLOAT", "INT8", "FP8", "INT64")
)
TYPES = {"fp16": HALF, "bf16": BF16, "int8": INT8, "fp8": FP8, "int4": INT8, "int4v2": INT8}
BLOCK_TYPES = {"int4": 4, "int4v2": 2}
"""Caches in blocks, and bits of a value in them."""

SIZES = Sizes(5, 1, 1, 64, 128, 1280)
ATTRIBUTES: dict[str, Any] = {"num_query_heads": 5, "num_key_heads": 1, "num_latent_heads": 1, "scale": 0.125}
PARAMETERS = Parameters(5, 1, 1, 0.125)

# Grouped-query attention: neither gate nor value decoder; and each of them alone.
GQA = Sizes(8, 2, 2, 64, 64, 512, False, False)
GQA_ATTRIBUTES = ATTRIBUTES | {"num_query_heads": 8, "num_key_heads": 2, "num_latent_heads": 2}
GQA_ATTRIBUTES |= {"has_gate": 0, "has_value_decoder": 0}
GQA_PARAMETERS = Parameters(8, 2, 2, 0.125, "none", False, False)
FORMS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def make(creator: Any, phase: Any = BUILD, **attributes: Any) -> Any:
    fields = Fields(**(ATTRIBUTES | attributes))
    return creator.create_plugin("layer", fields.collection, phase)


def stored_as(compute: str, cache: str) -> dict[str, str]:
    """What the node says of its cache; nothing where it is of the type to compute in."""
    return {} if cache == compute else {"cache_dtype": cache}


def types_beside(compute: str, cache: str) -> list[Any]:
    """Types of what a cache has beside it."""
    if cache in BLOCK_TYPES:
        return [HALF, HALF, TYPES[compute], TYPES[compute]]
    return [] if cache == compute else [FLOAT, FLOAT]


def input_types(compute: str = "fp16", cache: str = "fp16", gate: int = 1, decoder: int = 1) -> list[Any]:
    computed, cached = TYPES[compute], TYPES[cache]
    given = [computed] * (3 + gate) + [cached, cached, INT64] + [computed] * (2 + decoder)
    return given + types_beside(compute, cache)


def shapes(b: int, t: int, s: int, p: int, sizes: Sizes = SIZES, cache: str = "") -> list[tuple[int, ...]]:
    n_q, n_k, n_c = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
    d_k, d_l, hidden = sizes.key_dim, sizes.latent_dim, sizes.hidden_size
    past: list[tuple[int, ...]] = [(b, n_k, s, d_k), (b, n_c, s, d_l)]
    beside: list[tuple[int, ...]] = [(b, n_k, s), (b, n_c, s)] if cache in ("int8", "fp8") else []
    if cache in BLOCK_TYPES:
        past = [(b, n_k, s // 32, d_k, 16), (b, n_c, s, d_l * BLOCK_TYPES[cache] // 8)]
        beside = [(b, n_k, s // 32, 2, d_k), (b, n_c, s, 2), (b, n_k, 32, d_k), (b, n_c, 32, d_l)]
    found: list[tuple[int, ...]] = [
        (b, t, n_q * d_k),
        (b, t, n_k * d_k),
        (b, t, n_c * d_l),
        (b, t, hidden),
        *past,
        (b,),
        (p, d_k // 2),
        (p, d_k // 2),
        (n_q, d_l, hidden // n_q),
    ]
    if not getattr(sizes, "has_value_decoder", True):
        del found[9]
    if not getattr(sizes, "has_gate", True):
        del found[3]
    return found + beside


def profile(b: int, t: int, s: int, p: int, compute: str = "fp16", cache: str = "fp16") -> list[Any]:
    return bounds(input_types(compute, cache), shapes(1, 1, s, p, cache=cache), shapes(b, t, s, p, cache=cache))
