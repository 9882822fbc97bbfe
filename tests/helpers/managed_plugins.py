"""Nodes of the attention with inputs of a managed cache, as a plugin sees them."""

from __future__ import annotations

from typing import Any

from gta_edge.plugins.attention.definition import Features, Sizes
from tests.helpers.attention_plugins import FLOAT, INT64, SIZES, shapes, types_beside
from tests.helpers.attention_plugins import input_types as model_types

FEATURES = [
    Features(has_positions=True),
    Features("mass", has_positions=True),
    Features("last", 8, has_positions=True),
    Features(None, 1, has_positions=True),
    Features("mass", 3, has_positions=True, has_branches=True),
    Features(has_branches=True),
]
WORDS = 40
"""W of ``branches``."""


def attributes(of: Features) -> dict[str, Any]:
    """What the node says of its features; what it has not is left out, as ``OmitAbsentInputsPass`` does."""
    found: dict[str, Any] = {"has_positions": 1} if of.has_positions else {}
    found |= {"has_branches": 1} if of.has_branches else {}
    found |= {"bias_rows": of.bias_rows} if of.bias_rows else {}
    return found | ({"observe": of.observe} if of.observe else {})


def feature_types(of: Features) -> list[Any]:
    kinds = {"positions": INT64, "branch_start": INT64, "branches": INT64}
    return [kinds.get(name, FLOAT) for name in of.inputs]


def feature_shapes(of: Features, b: int, t: int, s: int) -> list[tuple[int, ...]]:
    every = {
        "positions": (b, t),
        "row_bias": (b, of.bias_rows),
        "branch_start": (b,),
        "branches": (b, WORDS),
        "past_received": (b, s),
        "query_weight": (b, t),
        "decay": (b,),
    }
    return [every[name] for name in of.inputs]


def input_types(of: Features, compute: str = "fp16", cache: str = "fp16") -> list[Any]:
    """Types of all inputs: the model's, the features', the scales."""
    beside = types_beside(compute, cache)
    model = model_types(compute, cache)
    return [*model[: len(model) - len(beside)], *feature_types(of), *beside]


def input_shapes(
    of: Features, b: int, t: int, s: int, p: int, cache: str = "", sizes: Sizes = SIZES
) -> list[tuple[int, ...]]:
    model, all_ = shapes(b, t, s, p, sizes), shapes(b, t, s, p, sizes, cache)
    return [*model, *feature_shapes(of, b, t, s), *all_[len(model) :]]
