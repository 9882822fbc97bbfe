"""Grouped-head latenT Attention (arXiv 2506.17286)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import Architecture
from gta_edge.model.config_entries import check_size, require
from gta_edge.model.model_config import CacheSpec, ModelConfig
from gta_edge.plugins.attention.definition import Sizes

__all__ = ["GTAConfig"]

_GTA_KEYS = ("num_query_heads", "query_dim", "num_key_heads", "key_dim", "num_value_heads", "value_dim")


@dataclass(frozen=True, kw_only=True)
class GTAConfig(ModelConfig):
    """Grouped-head latent attention: ``num_query_heads`` attention maps (n_q) shared by the n_h heads.

    ``num_key_heads`` (n_k) keys of width ``key_dim`` (d_k) and ``num_latent_heads`` (n_c) latents of width
    ``latent_dim`` (d_l) are cached. In ``config.json`` the last two are ``num_value_heads`` and ``value_dim``, and
    ``query_dim`` repeats ``key_dim``.
    """

    num_query_heads: int
    num_key_heads: int
    key_dim: int
    num_latent_heads: int
    latent_dim: int

    def _check_attention(self) -> None:
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} times head_dim {self.head_dim} is "
                f"{self.num_attention_heads * self.head_dim}",
                f"expected hidden_size {self.hidden_size}",
            )
        for a, b in (
            ("num_attention_heads", "num_query_heads"),
            ("num_query_heads", "num_key_heads"),
            ("num_query_heads", "num_latent_heads"),
        ):
            if getattr(self, a) % getattr(self, b):
                raise ConfigError(f"{a} {getattr(self, a)} is not a multiple of {b} {getattr(self, b)}")
        width = self.num_query_heads * self.latent_dim
        if self.hidden_size % width:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_query_heads {self.num_query_heads} times "
                f"the latent width (value_dim) {self.latent_dim}, which is {width}"
            )

    @property
    def architecture(self) -> str:
        return "GTAForCausalLM"

    @property
    def attention(self) -> Sizes:
        heads = self.num_query_heads, self.num_key_heads, self.num_latent_heads
        return Sizes(*heads, self.key_dim, self.latent_dim, self.hidden_size)

    @property
    def expansion(self) -> int:
        """How many times e the value decoder widens a latent: H / (n_q·d_l)."""
        return self.hidden_size // (self.num_query_heads * self.latent_dim)

    @property
    def value_decoder_shape(self) -> tuple[int, int, int]:
        """Shape of W_P, ``[n_q, d_l, e·d_l]``: the row-major memory of ``v_b_proj.weight`` seen so."""
        return self.num_query_heads, self.latent_dim, self.expansion * self.latent_dim

    @property
    def caches(self) -> tuple[CacheSpec, CacheSpec]:
        return (
            CacheSpec("key", self.num_key_heads, self.key_dim),
            CacheSpec("latent", self.num_latent_heads, self.latent_dim),
        )

    @property
    def optional_biases(self) -> frozenset[str]:
        return frozenset({"q_proj", "k_proj", "v_proj", "g_proj"})

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        h, n_q, d_l = self.hidden_size, self.num_query_heads, self.latent_dim
        return self._with_biases(
            {
                "q_proj": (n_q * self.key_dim, h),
                "k_proj": (self.num_key_heads * self.key_dim, h),
                "v_proj": (self.num_latent_heads * d_l, h),
                "g_proj": (h, h),
                "v_b_proj": (self.expansion * d_l, n_q * d_l),
                "o_proj": (h, h),
            }
        )

    def _attention_entries(self) -> dict[str, Any]:
        return {
            "num_query_heads": self.num_query_heads,
            "query_dim": self.key_dim,
            "num_key_heads": self.num_key_heads,
            "key_dim": self.key_dim,
            "num_value_heads": self.num_latent_heads,
            "value_dim": self.latent_dim,
            "num_key_value_heads": self.num_key_heads,
        }

    @classmethod
    def read_attention(cls, entries: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
        values = {key: require(entries, key) for key in _GTA_KEYS}
        for key, value in values.items():
            check_size(key, value)
        if values["query_dim"] != values["key_dim"]:
            raise ConfigError(
                f"query_dim is {values['query_dim']} and key_dim {values['key_dim']}",
                "they must be equal, since a score is their product",
            )
        return {
            "num_query_heads": values["num_query_heads"],
            "num_key_heads": values["num_key_heads"],
            "key_dim": values["key_dim"],
            "num_latent_heads": values["num_value_heads"],
            "latent_dim": values["value_dim"],
        }
