"""What all models have in common: their sizes, the rules of these, and every figure that follows from them.

Nothing here needs torch, and no other module repeats a tensor's name or a shape.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import LLAMA
from gta_edge.model.config_entries import check_size, is_int, is_number
from gta_edge.model.rope import RopeScaling, inverse_frequencies
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CacheSpec", "ModelConfig"]

_MAX_NUMBER = sys.float_info.max
_MAX_KEY_WIDTH = 2**16


@dataclass(frozen=True)
class CacheSpec:
    """One of the two tensors that a layer caches: ``[B, heads, S, width]``."""

    name: str
    heads: int
    width: int

    @property
    def values_per_token(self) -> int:
        """Values that one token adds, in one layer."""
        return self.heads * self.width


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Sizes that all models have in common; names as in a Llama ``config.json``.

    Raises:
        ConfigError: on construction, naming the first size that is out of range or does not divide another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.type == "int":
                check_size(entry.name, getattr(self, entry.name))
        if not (is_number(self.rms_norm_eps) and 0 < self.rms_norm_eps < 1):
            raise ConfigError(f"rms_norm_eps is {brief(self.rms_norm_eps)}", "expected a number between 0 and 1")
        if not (is_number(self.rope_theta) and 1 < self.rope_theta <= _MAX_NUMBER):
            raise ConfigError(f"rope_theta is {brief(self.rope_theta)}", "expected a finite number above 1")
        if not isinstance(self.dtype, str) or self.dtype not in CHECKPOINT_DTYPES:
            raise ConfigError(f"dtype is {brief(self.dtype)}", f"expected one of {', '.join(CHECKPOINT_DTYPES)}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings is {brief(self.tie_word_embeddings)}", "expected true or false")
        self._check_tokens()
        self._check_attention()
        if self.key_width % 2 or self.key_width > _MAX_KEY_WIDTH:
            raise ConfigError(
                f"the key width is {self.key_width}",
                f"expected an even number, since RoPE turns pairs, and at most {_MAX_KEY_WIDTH}",
            )
        inverse_frequencies(self.key_width, self.rope_theta, self.rope_scaling, self.max_position_embeddings)

    def _check_tokens(self) -> None:
        begin = () if self.bos_token_id is None else (self.bos_token_id,)
        for name, ids in (("bos_token_id", begin), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if not (is_int(token) and 0 <= token < self.vocab_size):
                    raise ConfigError(
                        f"{name} is {brief(token)}", f"expected a token id below vocab_size {self.vocab_size}"
                    )

    @abstractmethod
    def _check_attention(self) -> None:
        """Raise ConfigError where the heads do not divide as the attention needs it."""

    # --- what the attention is ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Name in ``architectures`` of a config.json."""

    @property
    @abstractmethod
    def attention(self) -> Sizes:
        """The attention op's sizes, and which of its optional inputs there are."""

    @property
    @abstractmethod
    def caches(self) -> tuple[CacheSpec, CacheSpec]:
        """The key cache and what takes the place of the value cache, in the graph's order."""

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of one layer for one pair of a query token and a cached token (a multiply-add is 2)."""
        return 2 * self.attention.num_query_heads * (self.attention.key_dim + self.attention.latent_dim)

    @abstractmethod
    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint shapes of one layer's attention, by name below ``self_attn.``, biases included."""

    @property
    @abstractmethod
    def optional_biases(self) -> frozenset[str]:
        """Projections that may or may not have a bias."""

    @property
    def qk_norm(self) -> bool:
        """Whether each head of queries and keys goes through an RMSNorm before RoPE."""
        return False

    @property
    def unrotated_layers(self) -> tuple[int, ...]:
        """Layers without RoPE."""
        return ()

    @property
    def key_width(self) -> int:
        """Width d_k of a query and a key."""
        return self.caches[0].width

    @property
    def scale(self) -> float:
        """Factor on the scores, 1/sqrt(d_k)."""
        return 1.0 / math.sqrt(self.key_width)

    # --- figures -----------------------------------------------------------------------------------------------

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of one layer with their shapes, by name below ``model.layers.N.``, biases included."""
        h, f = self.hidden_size, self.intermediate_size
        mlp = self._with_biases({"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)})
        return {
            "input_layernorm.weight": (h,),
            **{f"self_attn.{name}": shape for name, shape in self.attention_shapes().items()},
            "post_attention_layernorm.weight": (h,),
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
        }

    def _with_biases(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of projections' tensors, given those of their matrices."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in matrices.items():
            shapes[f"{name}.weight"] = shape
            if name in self.optional_biases:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of a checkpoint with its shape, in the order of the forward pass, biases included."""
        table = (self.vocab_size, self.hidden_size)
        layer = self.layer_shapes()
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = table
        return shapes

    def is_optional(self, parameter: str) -> bool:
        """Tell whether a checkpoint may lack this tensor (a bias that is then absent, not zero by mistake)."""
        module, _, kind = parameter.rpartition(".")
        return kind == "bias" and module.rpartition(".")[2] in self.optional_biases

    @property
    def parameters(self) -> int:
        """Learned values, biases included, a tied embedding counted once."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_hidden_layers * layer + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint's tensors in its own dtype."""
        return self.parameters * CHECKPOINT_DTYPES[self.dtype].bytes

    @property
    def cache_values_per_token_per_layer(self) -> int:
        """Values that one token adds to the cache of one layer: n_k·d_k + n_c·d_l, or 2·n_kv·d_h."""
        return sum(cache.values_per_token for cache in self.caches)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one decode step with ``context`` tokens attended: every matrix once, and the attention."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values() if len(shape) == 2)
        matrices = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        return 2 * matrices + self.num_hidden_layers * self.attention_flops_per_pair * context

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, validated anew."""
        return replace(self, **changes)

    # --- config.json -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``, in the published layout."""
        entries: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": LLAMA.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_config(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "torch_dtype": self.dtype,
        }
        return entries | self._attention_entries()

    @abstractmethod
    def _attention_entries(self) -> dict[str, Any]:
        """Return the entries of ``config.json`` that only this attention has."""
