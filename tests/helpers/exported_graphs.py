"""Exported graphs run with caches of zeros, and what they ought to compute."""

from typing import Any

import numpy as np

from tests.helpers import reference
from tests.helpers.rope_tables import scaled_tables

TOLERANCE = 1e-4  # largest error over the standard deviation of the exact logits


def exact_logits(entries: dict[str, Any], weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] in float64, from the formula; scaled rotations as transformers computes them."""
    formula = reference.gta_logits if "num_query_heads" in entries else reference.llama_logits
    tables = scaled_tables(entries, ids.shape[1]) if entries.get("rope_scaling") else None
    return np.stack([formula(entries, weights, row, tables) for row in ids])


def empty_feeds(session: Any, batch: int, capacity: int) -> dict[str, np.ndarray]:
    """Zeroed caches for a graph, from its own interface."""
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
    return {n: np.zeros((batch, s[1], capacity, s[3]), np.float32) for n, s in shapes.items() if n != "past_length"}


def run(session: Any, feeds: dict[str, np.ndarray], ids: np.ndarray, past: np.ndarray) -> np.ndarray:
    """One step of a graph; moves the present caches into ``feeds`` and returns all logits."""
    batch, tokens = ids.shape
    names = list(feeds)
    outputs = ["logits", *(name.replace("past", "present") for name in names)]
    positions = np.tile(np.arange(tokens), (batch, 1))
    logits, *presents = session.run(
        outputs, {**feeds, "input_ids": ids, "past_length": past, "logit_positions": positions}
    )
    feeds.update(zip(names, presents, strict=True))
    return logits
