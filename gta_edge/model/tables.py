"""The cos and sin tables of a model by the names that they have in a graph, and which of them a layer reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gta_edge.model.config import ModelConfig
from gta_edge.model.rope import inverse_frequencies, rope_tables

__all__ = ["TABLES", "UNROTATED", "layer_tables", "model_tables", "rotations", "table_names"]

TABLES, UNROTATED = ("cos", "sin"), ("unrotated_cos", "unrotated_sin")
"""Names of cos and sin; and of those that rotate nothing, for layers without RoPE."""


def table_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of all tables that a model's graph holds."""
    return (*TABLES, *UNROTATED) if config.unrotated_layers else TABLES


def layer_tables(config: ModelConfig, layer: int) -> tuple[str, str]:
    """Return the names of the tables that a layer reads, cos first."""
    return UNROTATED if layer in config.unrotated_layers else TABLES


def model_tables(config: ModelConfig, positions: int | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """Return all tables by name, float32 [positions, d_k/2].

    Args:
        config: the model's sizes.
        positions: how many of them to make tables for; all of the model's by default.

    Raises:
        ConfigError: they would be too large, or not finite.
    """
    rope = config.key_width, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    cos, sin = rope_tables(*rope, positions=positions)
    found = dict(zip(TABLES, (cos, sin), strict=True))
    if config.unrotated_layers:
        found |= dict(zip(UNROTATED, (np.ones_like(cos), np.zeros_like(sin)), strict=True))
    return found


def rotations(
    config: ModelConfig, shifts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cos and sin, float32 [..., d_k/2], that take a key from one position to another.

    Args:
        config: the model's sizes.
        shifts: by how many positions each key moves on, or back where it is below 0.
    """
    frequencies, _ = inverse_frequencies(
        config.key_width, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    angles = shifts[..., None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
