"""Model sizes by name: those of the GTA paper (arXiv 2506.17286) and the baselines it compares them with.

Weights of a preset are random (``gta-edge init``): presets are for benchmarks and plans, so their position limit is
32768 and not the published 2048, which is a limit of the table and not of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from gta_edge.errors import InputError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.support.choices import unknown

__all__ = ["DEFAULT_MAX_LENGTH", "PRESETS", "gqa_like", "preset"]

DEFAULT_MAX_LENGTH = 32768


@dataclass(frozen=True)
class _Family:
    """What a GTA model and its baselines of one size have in common."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    tied: bool


_160M = _Family(24, 768, 1920, 12, 32000, True)
_500M = _Family(24, 1280, 3584, 20, 32000, False)
_1B = _Family(54, 1280, 3584, 20, 128256, True)

# GTA: (n_q, n_k, n_c).  Baselines: heads that are cached.
_GTA = {
    "gta1-160m": (_160M, (3, 1, 1)),
    "gta2-160m": (_160M, (6, 1, 1)),
    "gta3-500m": (_500M, (5, 1, 1)),
    "gta4-500m": (_500M, (10, 1, 2)),
    "gta-1b": (_1B, (5, 1, 1)),
}
_BASELINES = {
    "gqa-160m": (_160M, 3),
    "gqa-500m": (_500M, 4),
    "gqa-1b": (_1B, 5),
    "mha-160m": (_160M, 12),
    "mha-500m": (_500M, 20),
}
PRESETS: tuple[str, ...] = (*_GTA, *_BASELINES)


def preset(name: str) -> ModelConfig:
    """Return the config of a preset.

    Raises:
        InputError: no preset of this name.
    """
    if name not in tuple(PRESETS):  # which any object may be asked of
        raise InputError(*unknown("no preset is called {}; there are {}", name, PRESETS))
    family = (_GTA.get(name) or _BASELINES[name])[0]
    common: dict[str, Any] = {
        "vocab_size": family.vocab,
        "hidden_size": family.hidden,
        "intermediate_size": family.intermediate,
        "num_hidden_layers": family.layers,
        "num_attention_heads": family.heads,
        "head_dim": 64,
        "max_position_embeddings": DEFAULT_MAX_LENGTH,
        "tie_word_embeddings": family.tied,
    }
    if name in _BASELINES:
        return GQAConfig(**common, num_key_value_heads=_BASELINES[name][1])
    n_q, n_k, n_c = _GTA[name][1]
    return GTAConfig(
        **common,
        num_query_heads=n_q,
        num_key_heads=n_k,
        key_dim=64,
        num_latent_heads=n_c,
        latent_dim=128,
    )


def gqa_like(config: ModelConfig) -> GQAConfig | None:
    """Return GQA of a GTA model's sizes, with a key and a value for each of its groups of heads; None of other models.

    It is what a GTA model's cache is compared with: the paper's baselines have about as many groups.
    """
    if not isinstance(config, GTAConfig):
        return None
    common = {field.name: getattr(config, field.name) for field in fields(ModelConfig) if field.init}
    return GQAConfig(**common, num_key_value_heads=config.num_query_heads)
