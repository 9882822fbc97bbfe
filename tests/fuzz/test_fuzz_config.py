"""Damaged and unusual config.json files: refused by name, or read with the meaning that transformers gives them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, logging
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gta_edge.model.config import GQAConfig, ModelConfig, parse_config, read_config
from gta_edge.model.rope import inverse_frequencies, rope_tables
from tests.helpers import reference
from tests.helpers.fuzz import CASES, ends_well, rng

SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "default"},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 8,
        "beta_fast": 16,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "attention_factor": 1.1,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
ROPE_KEYS = (
    *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "rope_theta", "finetuned"),
    *("attn_factor", "long_factor", "short_factor", "mrope_section", "partial_rotary_factor", "full_attention", "x"),
)
OTHER_KEYS = (
    *(
        "num_key_value_heads",
        "mlp_bias",
        "dtype",
        "rope_parameters",
        "original_max_position_embeddings",
        "pad_token_id",
    ),
    *("partial_rotary_factor", "sliding_window", "layer_types", "attention_chunk_size", "quantization_config"),
    *(
        "pretraining_tp",
        "per_layer_config",
        "is_causal",
        "logits_scaling",
        "hidden_activation",
        "auto_map",
        "use_cache",
    ),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 8, 16, 32, 64, 97, 2**31 - 1, 2**31, 2**53, 2**63, 10**39, -(10**39), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 1e-5, 1e4, 5e5, 1e-320, 5e-324, 1e308, -1e308, math.inf, -math.inf, math.nan),
    1.0000000000000002,
)
TEXTS = ("", "silu", "swish", "gelu", "default", "linear", "yarn", "llama3", "dynamic", "longrope", "llama", "float16")
NASTY = ("\x1b[2J\x1b]0;x\x07", "\u202etxt.exe", "a\nb\r\n", "x" * 100_000, "\x00", "\ud800", "\U000e0001" * 500)
MODERATE = (1e-3, 1e7)  # where float32, in which transformers computes, has digits to compare


def base(random_: random.Random) -> dict[str, Any]:
    make = random_.choice([reference.llama_entries, reference.gta_entries])
    return make(rope_scaling=random_.choice(SCALINGS), max_position_embeddings=random_.choice([64, 2048, 131072]))


def value(random_: random.Random, depth: int = 0) -> Any:
    """Any JSON value, often one that means something."""
    kind = random_.randrange(12 if depth < 3 else 9)
    if kind < 5:
        return random_.choice([*NUMBERS, random_.uniform(0.1, 100.0), random_.randrange(1, 300)])
    if kind < 8:
        return random_.choice([None, True, False, *TEXTS])
    if kind == 8:
        return random_.choice(NASTY)
    if kind == 9:
        return [value(random_, depth + 1) for _ in range(random_.choice([0, 1, 2, 200]))]
    if kind == 10:
        return {random_.choice([*ROPE_KEYS, *NASTY]): value(random_, depth + 1) for _ in range(random_.randrange(4))}
    return random_.choice(SCALINGS)


def mutate(entries: dict[str, Any], random_: random.Random) -> None:
    key = random_.choice([*entries, *OTHER_KEYS])
    rope = [name for name in ("rope_scaling", "rope_parameters") if isinstance(entries.get(name), dict)]
    if rope and random_.random() < 0.5:
        scaling = entries[rope[0]] = dict(entries[rope[0]])
        scaling[random_.choice(ROPE_KEYS)] = value(random_)
    elif random_.random() < 0.15:
        entries.pop(key, None)
    elif random_.random() < 0.1 and rope:
        entries["rope_parameters"] = {**entries.pop(rope[0]), "rope_theta": entries.pop("rope_theta", 1e4)}
    elif random_.random() < 0.05:
        entries[random_.choice([*NASTY, "x"])] = value(random_)
    else:
        entries[key] = value(random_)


def check(config: ModelConfig) -> None:
    """What holds of every config that is accepted."""
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parameters > 0
    assert config.flops_per_token(10) > 0
    for table in rope_tables(
        config.key_width,
        config.rope_theta,
        config.rope_scaling,
        config.max_position_embeddings,
        positions=min(100, config.max_position_embeddings),
    ):
        assert np.isfinite(table).all()


def is_moderate(config: ModelConfig) -> bool:
    low, high = MODERATE
    numbers = [
        config.rope_theta,
        *(p for p in config.rope_scaling.parameters.values() if not isinstance(p, bool) and p),
    ]
    return all(low <= number <= high for number in numbers) and config.rope_theta > 1.1


def check_against_transformers(entries: dict[str, Any], config: GQAConfig) -> bool:
    """Compare with what transformers makes of the same entries; tell whether it makes anything of them."""
    logging.set_verbosity(logging.CRITICAL)
    entries = {key: value for key, value in entries.items() if key.isidentifier() and "dtype" not in key}
    try:
        with np.errstate(all="ignore"):
            theirs = LlamaConfig(**entries)
            rotary = LlamaRotaryEmbedding(theirs)
            frequencies, factor = rotary.inv_freq.double().numpy(), float(rotary.attention_scaling)
    except Exception:  # whatever it has against them: then there is no meaning to compare
        return False
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, name) == getattr(theirs, name)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name)
    assert (config.attention_bias, config.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert theirs.hidden_act in ("silu", "swish")
    assert rotary.rope_type == config.rope_scaling.rope_type
    found, found_factor = inverse_frequencies(
        config.key_width, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    if is_moderate(config) and np.isfinite(frequencies).all():
        unscaled = float(config.rope_theta) ** (-np.arange(0, config.key_width, 2) / config.key_width)
        scale = np.maximum(unscaled, np.abs(found))
        np.testing.assert_array_less(np.abs(found - frequencies) / scale, 1e-4)
        assert found_factor == pytest.approx(factor, rel=1e-6)
    return True


@pytest.mark.parametrize("case", range(CASES))
def test_a_changed_config(case: int, tmp_path: Path) -> None:
    random_ = rng("config", case)
    entries = base(random_)
    for _ in range(random_.randint(1, 4)):
        mutate(entries, random_)
    text = json.dumps(entries)
    path = tmp_path / "config.json"
    path.write_text(text)
    read: list[ModelConfig] = []
    if ends_well(lambda: read.append(read_config(path))):
        return
    check(read[0])
    if isinstance(read[0], GQAConfig):
        check_against_transformers(json.loads(text), read[0])


@pytest.mark.parametrize("case", range(CASES))
def test_a_rope_setting(case: int) -> None:
    """Few refusals, so that most cases are compared."""
    random_ = rng("rope", case)
    scaling = dict(random_.choice(SCALINGS[1:]) or {})
    for _ in range(random_.randint(1, 3)):
        ordinary = [None, *(random_.uniform(0.5, 40.0) for _ in range(3)), random_.randint(1, 64), True, False, "x"]
        scaling[random_.choice(ROPE_KEYS[2:])] = random_.choice(ordinary)
    entries = reference.llama_entries(max_position_embeddings=random_.choice([64, 2048]))
    place = random_.choice(["rope_scaling", "rope_parameters"])
    entries = {k: v for k, v in entries.items() if k != "rope_scaling"} | {place: scaling}
    if random_.random() < 0.2:
        entries["original_max_position_embeddings"] = random_.choice([32, 4096])
    read: list[ModelConfig] = []
    if ends_well(lambda: read.append(parse_config(entries))):
        return
    check(read[0])
    assert isinstance(read[0], GQAConfig)
    check_against_transformers(json.loads(json.dumps(entries)), read[0])


@pytest.mark.parametrize("case", range(CASES))
def test_changed_bytes_of_a_config(case: int, tmp_path: Path) -> None:
    random_ = rng("config bytes", case)
    text = bytearray(json.dumps(base(random_)).encode())
    for _ in range(random_.randint(1, 8)):
        at = random_.randrange(len(text) + 1)
        kind = random_.randrange(5)
        if kind == 0:
            text[at : at + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            text[at:at] = random_.choice([b"[" * 50_000, b"\x1b", b"9" * 5000, b"\xff", b'"', b"{", b"NaN", b"e999"])
        elif kind == 2:
            del text[at : at + random_.randrange(1, 20)]
        elif kind == 3:
            other = random_.randrange(len(text) + 1)
            text[at:at] = text[other : other + random_.randrange(1, 40)]
        else:
            del text[at:]
    path = tmp_path / "config.json"
    path.write_bytes(text)
    read: list[ModelConfig] = []
    if ends_well(lambda: read.append(read_config(path))) is None:
        check(read[0])


def test_the_comparison_compares() -> None:
    entries = reference.llama_entries(rope_scaling=SCALINGS[3])
    config = parse_config(entries)
    assert isinstance(config, GQAConfig)
    assert check_against_transformers(entries, config)
    with pytest.raises(AssertionError):
        check_against_transformers(entries | {"rope_scaling": SCALINGS[4]}, config)
    with pytest.raises(AssertionError):
        check_against_transformers(entries | {"rms_norm_eps": 1e-3}, config)
