"""Steps of small models with a managed cache: every layer with rows and a capacity of its own."""

from typing import Any

import numpy as np

from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import TREES, managed_shapes
from gta_edge.plugins.attention.definition import Features
from tests.helpers.small_models import LAYERS, MODELS, VOCAB, P

Feeds = dict[str, np.ndarray]

CAPACITIES = (13, 17)
FEATURES = {
    "positions": Features(has_positions=True),
    "bias": Features(None, 3, True),
    "branches": TREES,
    "mass": Features("mass", 0, True),
    "last": Features("last", 0, True),
    "all": Features("mass", 2, True, True),
    "all, last": Features("last", 8, True, True),
}


def managed_step(
    name: str, tokens: int, features: Features, capacities: tuple[int, ...] = CAPACITIES, words: int = 7
) -> Feeds:
    """A step of three sequences: positions apart from rows, and rows that differ by layer where they can."""
    rng, config = np.random.default_rng(tokens), parse_config(MODELS[name])
    past = np.array([[4, 0, 7], [6, 2, 1]])
    if features == TREES:
        past, capacities = past[0], capacities[:1] * LAYERS
    shapes: dict[str, Any] = managed_shapes(features, batch=3, tokens=tokens, capacities=capacities, words=words)
    feeds = {
        "input_ids": rng.integers(0, VOCAB, (3, tokens)),
        "past_length": past,
        "logit_positions": np.tile(np.arange(tokens)[::-1], (3, 1)),
        "positions": np.array([[9], [3], [12]]) + rng.permutation(tokens),
    }
    assert feeds["positions"].max() < P and past.shape == shapes.pop("past_length")
    del shapes["positions"]
    for key, shape in shapes.items():
        if key == "branches":
            feeds[key] = rng.integers(-(2**63), 2**63, shape, endpoint=False)
        elif key == "branch_start":
            feeds[key] = rng.integers(0, past + 1)
        elif key == "query_weight":
            feeds[key] = rng.uniform(0, 1 if features.observe == "mass" else 10, shape).astype(np.float32)
        else:
            feeds[key] = rng.uniform(0, 1, shape).astype(np.float32)
    for i in range(LAYERS):
        for cache in config.caches:
            shape = 3, cache.heads, capacities[i], cache.width
            feeds[f"past_{cache.name}.{i}"] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def as_unmanaged(feeds: Feeds) -> Feeds:
    """The same step for a graph without management; all layers must hold as many rows."""
    names = {"input_ids", "logit_positions"}
    plain = {
        name: x
        for name, x in feeds.items()
        if name in names or name.startswith(("past_key", "past_latent", "past_value"))
    }
    return plain | {"past_length": feeds["past_length"][0]}


def specified(outputs: Feeds, feeds: Feeds) -> Feeds:
    """Outputs without the rows of what is received that nothing is said about."""
    tokens = feeds["input_ids"].shape[1]
    kept = {}
    for name, value in outputs.items():
        kept[name] = value
        if name.startswith("present_received"):
            rows = np.arange(value.shape[1]) < feeds["past_length"][int(name.rpartition(".")[2])][:, None] + tokens
            kept[name] = np.where(rows, value, 0)
    return kept
