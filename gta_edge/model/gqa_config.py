"""Grouped-query attention, and multi-head where every query head has a key head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import ARCHITECTURES, LLAMA, Architecture
from gta_edge.model.config_entries import check_size, layers_without_rope, require
from gta_edge.model.model_config import CacheSpec, ModelConfig
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.support.text import brief

__all__ = ["GQAConfig"]


@dataclass(frozen=True, kw_only=True)
class GQAConfig(ModelConfig):
    """Grouped-query attention, where ``num_key_value_heads`` (n_kv) heads are cached: Llama and what is like it.

    ``attention_bias`` and ``mlp_bias`` say which projections may have biases, ``layers_without_rope`` which layers have
    no RoPE, where the architecture knows of such (``architectures``). A head's width need not be that of the hidden
    size over the heads.
    """

    architecture: str = LLAMA.name
    num_key_value_heads: int
    attention_bias: bool = False
    mlp_bias: bool = False
    layers_without_rope: tuple[int, ...] = ()

    def _check_attention(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"architecture is {brief(self.architecture)}", f"expected one of {', '.join(ARCHITECTURES)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        check_size("num_attention_heads times head_dim", self.num_attention_heads * self.head_dim)
        for switch in ("attention_bias", "mlp_bias"):
            given = getattr(self, switch)
            if not isinstance(given, bool) or (given and switch not in self._row.bias_switches):
                raise ConfigError(f"{switch} is {brief(given)}", f"expected false for {self.architecture}")
        if self.layers_without_rope and not self._row.may_lack_rope:
            raise ConfigError(f"{self.architecture} has RoPE in every layer", "leave out layers_without_rope")
        if not all(0 <= layer < self.num_hidden_layers for layer in self.layers_without_rope):
            raise ConfigError(
                f"layers without RoPE are {brief(self.layers_without_rope)}",
                f"expected layers from 0 to {self.num_hidden_layers - 1}",
            )

    @property
    def _row(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def attention(self) -> Sizes:
        heads, cached, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        return Sizes(heads, cached, cached, width, width, heads * width, has_gate=False, has_value_decoder=False)

    @property
    def caches(self) -> tuple[CacheSpec, CacheSpec]:
        heads, width = self.num_key_value_heads, self.head_dim
        return CacheSpec("key", heads, width), CacheSpec("value", heads, width)

    @property
    def optional_biases(self) -> frozenset[str]:
        switched = (names for switch, names in self._row.bias_switches.items() if getattr(self, switch))
        return frozenset(self._row.biases).union(*switched)

    @property
    def qk_norm(self) -> bool:
        return self._row.qk_norm

    @property
    def unrotated_layers(self) -> tuple[int, ...]:
        return self.layers_without_rope

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        h, q, kv = self.hidden_size, self.attention.hidden_size, self.num_key_value_heads * self.head_dim
        shapes = self._with_biases({"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h)})
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes | self._with_biases({"o_proj": (h, q)})

    def _attention_entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"model_type": self._row.model_type, "num_key_value_heads": self.num_key_value_heads}
        entries |= {switch: getattr(self, switch) for switch in ("attention_bias", "mlp_bias")}
        if "sliding_window" in self._row.defaults:
            entries["sliding_window"] = None
        if self._row.may_lack_rope:
            entries["no_rope_layers"] = [int(i not in self.layers_without_rope) for i in range(self.num_hidden_layers)]
        return entries

    @classmethod
    def read_attention(cls, entries: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
        heads = entries.get("num_key_value_heads")
        # a switch says what may be there; whether it is, the tensors show
        return {
            "architecture": row.name,
            "num_key_value_heads": require(entries, "num_attention_heads") if heads is None else heads,
            **{switch: bool(entries.get(switch)) for switch in row.bias_switches},
            "layers_without_rope": layers_without_rope(entries) if row.may_lack_rope else (),
        }
