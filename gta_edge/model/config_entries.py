"""What the entries of a ``config.json`` mean, key by key, as transformers reads them.

Many keys mean nothing to an architecture and are passed over, as there. Those that would make it another model are
refused by name, so that no model is exported as something that it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import Architecture
from gta_edge.model.rope import ROPE_TYPES, RopeScaling, rope_type_of
from gta_edge.model.weight_scheme import weight_scheme
from gta_edge.support.text import brief

__all__ = [
    "check_size",
    "check_supported",
    "common_entries",
    "is_int",
    "is_number",
    "layers_without_rope",
    "names_no_token",
    "require",
]

_DTYPE_NAMES = {"half": "float16", "float": "float32", "auto": "float32"}  # what is stored, the tensors say themselves
# Other floating types, which config.json may name whatever the tensors are stored in.
_OTHER_DTYPE = re.compile(r"double|float64|float[48]_e\w{1,16}")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_LARGEST_SIZE = 2**31 - 1
_ORIGINAL = "original_max_position_embeddings"
_ROPE_LAYERS, _ROPE_INTERVAL = "no_rope_layers", "no_rope_layer_interval"

_OTHER_MODEL = "a model that uses it is not supported: remove it if the model was trained without it"

# Keys with which a model of this architecture computes something else, and the values with which it does not.
_REFUSED: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": ([],),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    _ROPE_LAYERS: ([],),
    "num_experts": (0, 1),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({}, []),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
}


def check_supported(entries: Mapping[str, Any], row: Architecture) -> None:
    """Raise ConfigError where an entry asks for a model that computes something else."""
    for name in ("hidden_act", "hidden_activation"):
        value = entries.get(name, "silu")
        if value is None and name != "hidden_act":
            continue
        if value not in _ACTIVATIONS:
            raise ConfigError(f"{name} is {brief(value)}", "only 'silu', also called 'swish', is supported")
    weight_scheme(entries)
    for name, harmless in _REFUSED.items():
        value = entries.get(name)
        if value is not None and value not in harmless and not (name == _ROPE_LAYERS and row.may_lack_rope):
            raise ConfigError(f"{name} is {brief(value)}", _OTHER_MODEL)
    _check_windows(entries, always=row.always_windowed)


def _check_windows(entries: Mapping[str, Any], *, always: bool) -> None:
    """Raise ConfigError where a layer attends to less than all of the tokens before."""
    layers = entries.get("layer_types")
    if layers:
        other = (
            [each for each in layers if each not in ("full_attention", "attention")]
            if isinstance(layers, list)
            else layers
        )
        if other:
            raise ConfigError(f"layer_types is {brief(layers)}", "only full attention in every layer is supported")
        if not always:
            return  # said for every layer, so a window is not used
    positions = entries.get("max_position_embeddings", 2048)
    # models made from others may have a window that is switched off
    unused = entries.get("use_sliding_window") is False and not always
    windows = ("attention_chunk_size",) if unused else _WINDOWS
    for name in windows:
        value = entries.get(name)
        if value is not None and not (is_int(value) and is_int(positions) and value >= positions):
            raise ConfigError(
                f"{name} is {brief(value)}, below max_position_embeddings {brief(positions)}",
                "only full attention is supported: set it to null if the model was trained without",
            )


def common_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that every architecture has, defaults as in transformers' LlamaConfig.

    Where an architecture has other defaults, ``entries`` have them.

    A first token beyond the vocabulary can never be given to the model, and counts as none; so does an end token that
    the model can never produce, beside others. Where no end token is left of those that are named, they stay, and the
    config refuses them: every generation would run on.

    Raises:
        ConfigError: one is missing or cannot be read. What their values may be, the config checks.
    """
    scaling = _rope_entry(entries)
    theta = scaling.get("rope_theta") if isinstance(scaling, Mapping) else None
    heads, hidden = require(entries, "num_attention_heads"), require(entries, "hidden_size")
    check_size("num_attention_heads", heads)
    check_size("hidden_size", hidden)
    head_dim = entries.get("head_dim")
    vocab_size = require(entries, "vocab_size")
    check_size("vocab_size", vocab_size)
    eos, bos = entries.get("eos_token_id"), entries.get("bos_token_id")
    ends = [i for i in (eos if isinstance(eos, list) else [eos]) if not names_no_token(i)]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": require(entries, "intermediate_size"),
        "num_hidden_layers": require(entries, "num_hidden_layers"),
        "num_attention_heads": heads,
        "head_dim": hidden // heads if head_dim is None else head_dim,
        "max_position_embeddings": entries.get("max_position_embeddings", 2048),
        "rms_norm_eps": entries.get("rms_norm_eps", 1e-6),
        "rope_theta": theta if theta is not None else entries.get("rope_theta", 10000.0),
        "rope_scaling": RopeScaling.from_config(scaling),
        "tie_word_embeddings": entries.get("tie_word_embeddings", False),
        "bos_token_id": None if names_no_token(bos) or _is_beyond(bos, vocab_size) else bos,
        "eos_token_ids": tuple([i for i in ends if not _is_beyond(i, vocab_size)] or ends),
        "dtype": _dtype(entries.get("dtype") or entries.get("torch_dtype") or "float32"),
    }


def layers_without_rope(entries: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that have no RoPE: ``no_rope_layers`` has a 0 for each, or every ``no_rope_layer_interval``-th.

    Raises:
        ConfigError: neither can be read.
    """
    layers, interval = require(entries, "num_hidden_layers"), entries.get(_ROPE_INTERVAL, 4)
    check_size("num_hidden_layers", layers)
    rotates = entries.get(_ROPE_LAYERS)
    if rotates is None:
        check_size(_ROPE_INTERVAL, interval)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(rotates, list) or len(rotates) < layers or any(each not in (0, 1) for each in rotates):
        raise ConfigError(f"{_ROPE_LAYERS} is {brief(rotates)}", f"expected a 0 or 1 for each of {layers} layers")
    return tuple(i for i, each in enumerate(rotates[:layers]) if not each)


def names_no_token(value: object) -> bool:
    """Tell whether this stands for no token: null, or as in many published configs -1."""
    return value is None or (is_int(value) and value < 0)


def _is_beyond(token: object, vocab_size: int) -> bool:
    """Tell whether this is an id of no row of the embedding table."""
    return is_int(token) and token >= vocab_size


def _dtype(value: object) -> object:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return "float32" if _OTHER_DTYPE.fullmatch(name) else _DTYPE_NAMES.get(name, name)


def _rope_entry(entries: Mapping[str, Any]) -> Any:
    """Return the rope settings that count where a config.json gives several, as transformers chooses them."""
    scaling = entries.get("rope_scaling") or entries.get("rope_parameters") or None
    if not isinstance(scaling, Mapping):
        return scaling
    known = ROPE_TYPES.get(rope_type_of(scaling), {})
    if _ORIGINAL in known and entries.get(_ORIGINAL) is not None:
        scaling = {**scaling, _ORIGINAL: entries[_ORIGINAL]}
    if "attention_factor" in known and "factor" in scaling and scaling["factor"] is None:
        scaling = {**scaling, "factor": _stretch(entries, scaling)}
    return scaling


def _stretch(entries: Mapping[str, Any], scaling: Mapping[str, Any]) -> float | None:
    """Return what null for yarn's factor means: how much longer the model's context is than the original one."""
    positions, original = entries.get("max_position_embeddings", 2048), scaling.get(_ORIGINAL)
    if original is None:
        return 1.0
    usable = is_number(positions) and is_number(original) and 1 <= original <= _LARGEST_SIZE
    return positions / original if usable and 1 <= positions <= _LARGEST_SIZE else None


def require(entries: Mapping[str, Any], key: str) -> Any:
    """Return an entry that must be there and not be null.

    Raises:
        ConfigError: it is not.
    """
    if entries.get(key) is None:
        raise ConfigError(f"the config has no {key!r}", "add it")
    return entries[key]


def check_size(name: str, value: object) -> None:
    """Raise ConfigError unless this is a size of a tensor: a whole number from 1 that has 31 bits."""
    if not (is_int(value) and 1 <= value <= _LARGEST_SIZE):
        raise ConfigError(f"{name} is {brief(value)}", f"expected a whole number from 1 to {_LARGEST_SIZE}")


def is_int(value: object) -> TypeGuard[int]:
    """Tell whether this is a whole number; JSON's true is an int to Python."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether this is a number, finite or not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
