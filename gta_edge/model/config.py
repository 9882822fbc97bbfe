"""What a model is: its sizes, their rules, and every figure that follows from them.

``GTAConfig`` is Grouped-head latenT Attention (arXiv 2506.17286); ``GQAConfig`` is Llama and what is like it
(grouped-query attention, or multi-head where every query head has a key head of its own), by ``architectures``. Both
share ``ModelConfig``. Nothing here needs torch, and no other module repeats a size, a tensor's name or a shape.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import ARCHITECTURES, LLAMA, Architecture, architecture_of
from gta_edge.model.config_entries import (
    check_size,
    check_supported,
    common_entries,
    is_int,
    is_number,
    layers_without_rope,
    require,
)
from gta_edge.model.rope import RopeScaling, inverse_frequencies
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.support.json_files import read_json
from gta_edge.support.text import brief, printable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CacheSpec", "GQAConfig", "GTAConfig", "ModelConfig", "read_config"]

_MAX_NUMBER = sys.float_info.max
_MAX_KEY_WIDTH = 2**16
_MAX_FILE_BYTES = 2**20  # of a config.json; real ones have a few thousand
_GTA_KEYS = ("num_query_heads", "query_dim", "num_key_heads", "key_dim", "num_value_heads", "value_dim")


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

    @staticmethod
    def from_dict(entries: object) -> ModelConfig:
        """Read the content of a ``config.json``.

        Raises:
            ConfigError: not an object, a key missing or of the wrong type, a size that does not fit, or an
                architecture that is not supported.
        """
        if not isinstance(entries, Mapping):
            raise ConfigError(f"the config is {type(entries).__name__}", "expected a JSON object")
        names = entries.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"architectures is {brief(names)}", "expected a list of names")
        model_type = entries.get("model_type")
        is_gta = any(name.startswith(("GTA", "GLA")) for name in names) if names else "num_query_heads" in entries
        row = LLAMA if is_gta else architecture_of(names, model_type)
        if row is None:
            raise ConfigError(
                f"architectures is {brief(names)} and model_type {brief(model_type)}",
                f"expected one of GTAForCausalLM, {', '.join(ARCHITECTURES)}, and the type that goes with it",
            )
        entries = {**row.defaults, **entries}
        check_supported(entries, row)
        cls: type[GTAConfig | GQAConfig] = GTAConfig if is_gta else GQAConfig
        return cls(**common_entries(entries), **cls._read_attention(entries, row))


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
    def _read_attention(cls, entries: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
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
    def _read_attention(cls, entries: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
        heads = entries.get("num_key_value_heads")
        # a switch says what may be there; whether it is, the tensors show
        return {
            "architecture": row.name,
            "num_key_value_heads": require(entries, "num_attention_heads") if heads is None else heads,
            **{switch: bool(entries.get(switch)) for switch in row.bias_switches},
            "layers_without_rope": layers_without_rope(entries) if row.may_lack_rope else (),
        }


def read_config(path: Path) -> ModelConfig:
    """Read a ``config.json``.

    Raises:
        ConfigError: the file is missing, is no JSON, or describes no model that is supported; the message starts
            with the path.
    """
    entries = read_json(path, ConfigError, "expected a model's config.json: copy it anew", max_bytes=_MAX_FILE_BYTES)
    try:
        return ModelConfig.from_dict(entries)
    except ConfigError as error:
        raise ConfigError(f"{printable(str(path))}: {error}") from error
