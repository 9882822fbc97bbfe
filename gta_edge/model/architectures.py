"""Architectures with grouped-query attention, one row each: what is not as in Llama's.

Rows follow transformers' classes of these names. Names of tensors are Llama's in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHITECTURES", "LLAMA", "Architecture", "architecture_of"]

_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (*_QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """How one architecture differs from Llama's, and how its ``config.json`` does.

    Attributes:
        name: in ``architectures``.
        model_type: as ``config.json`` has it.
        other_names: in ``architectures``, that mean the same: earlier spellings, and the model without its head, which
            the checkpoint shows to be there or tied.
        defaults: entries that a ``config.json`` may lack, where they are not Llama's.
        biases: projections that have a bias, whatever ``config.json`` says.
        bias_switches: entries that say whether there are further ones, with the projections that they are of.
        qk_norm: whether each head of queries and keys goes through an RMSNorm before RoPE.
        may_lack_rope: whether layers can be without RoPE (``no_rope_layers``).
        always_windowed: whether ``sliding_window`` is of every layer, whatever else says otherwise.
    """

    name: str
    model_type: str
    other_names: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    qk_norm: bool = False
    may_lack_rope: bool = False
    always_windowed: bool = False


LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    other_names=frozenset({"LLaMAForCausalLM", "LlamaModel"}),
    bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
)

_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False}

ARCHITECTURES = {
    row.name: row
    for row in (
        LLAMA,
        Architecture(
            "MistralForCausalLM",
            "mistral",
            other_names=frozenset({"MistralModel"}),
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            always_windowed=True,
        ),
        Architecture(
            "Qwen2ForCausalLM",
            "qwen2",
            other_names=frozenset({"Qwen2Model"}),
            defaults=_QWEN,
            biases=_QKV,
        ),
        Architecture(
            "Qwen3ForCausalLM",
            "qwen3",
            other_names=frozenset({"Qwen3Model"}),
            defaults={**_QWEN, "head_dim": 128},
            bias_switches={"attention_bias": _ATTENTION},
            qk_norm=True,
        ),
        Architecture(
            "SmolLM3ForCausalLM",
            "smollm3",
            other_names=frozenset({"SmolLM3Model"}),
            defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
                "use_sliding_window": False,
            },
            bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            may_lack_rope=True,
        ),
    )
}
"""By name."""


def architecture_of(names: Collection[str], model_type: object) -> Architecture | None:
    """Return the row that a ``config.json`` names by both of its entries, or by the one that it has; None for none."""
    for row in ARCHITECTURES.values():
        named = not {row.name, *row.other_names}.isdisjoint(names)
        if (named and model_type in (None, "", row.model_type)) or (not names and model_type == row.model_type):
            return row
    return None
