"""Spellings of a Llama ``config.json`` that are found in the wild: what transformers makes of each, or a refusal."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gta_edge.accuracy.reference import build_decoder, reference_logits
from gta_edge.errors import ConfigError
from gta_edge.model.config import parse_config
from gta_edge.model.rope import inverse_frequencies
from tests.helpers import reference

ENTRIES = reference.llama_entries(vocab_size=97, max_position_embeddings=256)
IDS = np.random.default_rng(0).integers(0, 97, (1, 24))
PROMPT = 16

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SAME = {
    "as it is": {},
    # rope: keys that the type does not use, old names, what is null
    "default with a factor": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "a factor without a type": {"rope_scaling": {"factor": 4.0}},
    "default with what others have": {"rope_scaling": {**YARN, "rope_type": "default"}},
    "default under its old name": {"rope_scaling": {"type": "default"}},
    "default with its base": {"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}},
    "nothing": {"rope_scaling": {}},
    "empty list": {"rope_scaling": []},
    "false": {"rope_scaling": False},
    "null": {"rope_scaling": None, "rope_parameters": None},
    "linear with an original length": {"rope_scaling": {**LINEAR, "original_max_position_embeddings": 64}},
    "linear with keys of other types": {
        "rope_scaling": {**LINEAR, "beta_fast": 32, "attention_factor": 2.0, "low_freq_factor": "low", "mscale": None}
    },
    "linear and finetuned": {"rope_scaling": {"type": "linear", "factor": 4, "finetuned": True, "attn_factor": 1.0}},
    "linear, both names": {"rope_scaling": {**LINEAR, "type": "linear"}},
    "linear below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "linear with an unknown key": {
        "rope_scaling": {**LINEAR, "note": "as trained", "x": {}, "y": [], "long_factor": None}
    },
    "linear with its share": {"rope_scaling": {**LINEAR, "partial_rotary_factor": 1.0}},
    "linear with a length outside": {"rope_scaling": LINEAR, "original_max_position_embeddings": 64},
    "yarn": {"rope_scaling": YARN},
    "yarn and finetuned": {
        "rope_scaling": {**YARN, "finetuned": True, "attn_factor": 1.0, "extrapolation_factor": 1.0}
    },
    "yarn with null": {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None, "attention_factor": None}},
    "yarn with one mscale": {"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": 0.7}},
    "yarn with two": {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}},
    "yarn with zero": {"rope_scaling": {**YARN, "mscale": 0, "mscale_all_dim": 0.7}},
    "yarn not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn, truncate null": {"rope_scaling": {**YARN, "truncate": None}},
    "yarn, factor null": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, factor null, length outside": {
        "rope_scaling": {"rope_type": "yarn", "factor": None},
        "original_max_position_embeddings": 32,
    },
    "yarn, factor null, no length": {"rope_scaling": {"rope_type": "yarn", "factor": None}},
    "yarn without a length": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, two lengths": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn, integers": {"rope_scaling": {**YARN, "factor": 4, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3 with keys of yarn": {"rope_scaling": {**LLAMA3, "truncate": True, "mscale": 2.0, "beta_fast": -1}},
    "llama3, length outside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "a length outside alone": {"original_max_position_embeddings": 64},
    # rope as release 5 writes it
    "parameters": {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {**YARN, "rope_theta": 5e5}},
    "parameters, only a base": {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 5e5}},
    "parameters, base outside": {"rope_theta": 5e5, "rope_scaling": ..., "rope_parameters": LINEAR},
    "scaling before parameters": {"rope_scaling": LINEAR, "rope_parameters": {**YARN, "rope_theta": 5e5}},
    "empty scaling, parameters": {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 5e5}},
    "two bases": {"rope_theta": 500.0, "rope_scaling": {**LINEAR, "rope_theta": 20000}},
    "base is whole": {"rope_theta": 500000},
    "no base": {"rope_theta": ...},
    "share is null": {"partial_rotary_factor": None},
    "share is 1": {"partial_rotary_factor": 1},
    # the rest
    "swish": {"hidden_act": "swish"},
    "no activation": {"hidden_act": ...},
    "null for key heads": {"num_key_value_heads": None, "head_dim": None},
    "no key heads": {"num_key_value_heads": ...},
    "no head width": {"head_dim": ...},
    "no end": {"eos_token_id": -1, "bos_token_id": -1, "pad_token_id": -1},
    "null tokens": {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None},
    "several ends": {"eos_token_id": [2, -1, 5]},
    "an end that there is not": {"eos_token_id": [2, 97, 5]},
    "a beginning that there is not": {"bos_token_id": 97},
    "biases that the checkpoint lacks": {"attention_bias": True, "mlp_bias": True},
    "half": {"torch_dtype": "half"},
    "new dtype": {"torch_dtype": "bfloat16", "dtype": "float32"},
    "no dtype": {"torch_dtype": None},
    "wide dtype": {"torch_dtype": "float64"},
    "wide dtype by another name": {"dtype": "double"},
    "narrow dtype": {"dtype": "float8_e4m3fn"},
    "slices": {"pretraining_tp": 4},
    "window as long as the model": {"sliding_window": 256},
    "no window": {"sliding_window": None, "attention_chunk_size": None},
    "window that no layer uses": {"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]},
    "layers by their old name": {"layer_types": ["attention", "attention"]},
    "code of its own, which is not run": {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
    "no quantisation": {"quantization_config": None},
    "causal": {"is_causal": True},
    "what says nothing": {
        "use_cache": False,
        "attention_dropout": 0.1,
        "initializer_range": 0.5,
        "transformers_version": "4.31.0",
        "_name_or_path": "/secret",
        "is_encoder_decoder": False,
        "unsloth_fixed": True,
        "bos_token": "<s>",
        "final_logit_softcapping": None,
        "logits_scaling": 1.0,
    },
}

REFUSED = {
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "longrope": ({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
    "su": ({"rope_scaling": {"type": "su"}}, "su"),
    "proportional": ({"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 1.0}}, "proportional"),
    "types that contradict": ({"rope_scaling": {**LINEAR, "type": "yarn"}}, "type"),
    "a factor for each pair": ({"rope_scaling": {**LINEAR, "long_factor": [1.0, 2.0]}}, "long_factor"),
    "sections": ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
    "one for each kind of layer": (
        {"rope_parameters": {"full_attention": LINEAR}, "rope_scaling": None},
        "full_attention",
    ),
    "no factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    "factor as text": ({"rope_scaling": {**LINEAR, "factor": "4"}}, "factor"),
    "half of the dimensions": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "half of them, inside": ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "another name of the activation": ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
    "a window": ({"sliding_window": 255}, "sliding_window"),
    "a window of nothing": ({"sliding_window": 0}, "sliding_window"),
    "chunks": ({"attention_chunk_size": 8}, "attention_chunk_size"),
    "a window in one layer": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "layers that differ": ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    "both directions": ({"is_causal": False}, "is_causal"),
    "caps": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "caps in the attention": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "multipliers": ({"logits_scaling": 8.0}, "logits_scaling"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config.bits is 3"),
    "quantised, of any size": ({"quantization_config": {"ignored": ["x" * 500] * 1000}}, "quantization_config"),
    "quantised by MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    "dtype": ({"torch_dtype": "nonsense"}, "dtype"),
    "null for a type": ({"rope_scaling": {"rope_type": None, "factor": 8.0}}, "rope_type is null, with 'factor'"),
    "null for a type by its old name": ({"rope_scaling": {"type": None, "beta_fast": 8.0}}, "type is null"),
    "null under both names": ({"rope_parameters": {"rope_type": None, "type": None, "alpha": 8.0}}, "is null"),
    "a window that may be used": ({"sliding_window": 255, "use_sliding_window": True}, "sliding_window"),
    "chunks, whatever of the window": ({"attention_chunk_size": 8, "use_sliding_window": False}, "attention_chunk"),
    "no end within the vocabulary": ({"eos_token_id": [97, -1]}, "eos_token_id"),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json with other entries; ``...`` for those that it lacks."""
    entries = {key: value for key, value in {**ENTRIES, **changes}.items() if value is not ...}
    return json.loads(json.dumps(entries))


def weights(entries: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = {"num_key_value_heads": entries.get("num_key_value_heads") or entries["num_attention_heads"]}
    return reference.random_weights({**entries, **heads})


def transformers_logits(entries: dict[str, Any]) -> tuple[LlamaForCausalLM, np.ndarray]:
    """Transformers' model, and its logits [1, T, V] of a prompt and single tokens after it, with its cache."""
    model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(entries)))).eval().float()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights(entries).items()}, strict=False)
    ids, cache, parts = torch.from_numpy(IDS), None, []
    with torch.inference_mode():
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, IDS.shape[1]))]:
            output = model.model(ids[:, start:stop], None, None, cache, use_cache=True)
            cache = output.past_key_values
            parts.append(model.lm_head(output.last_hidden_state))
    return model, torch.cat(parts, 1).numpy()


@pytest.mark.parametrize("name", SAME)
def test_what_is_read_means_what_it_means_to_transformers(name: str) -> None:
    entries = changed(SAME[name])
    config = parse_config(entries)
    model, expected = transformers_logits(entries)
    rotary = model.model.rotary_emb
    found, factor = inverse_frequencies(
        config.key_width, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    np.testing.assert_allclose(found, rotary.inv_freq.double().numpy(), rtol=1e-5)
    assert factor == pytest.approx(rotary.attention_scaling)
    logits = reference_logits(build_decoder(config, weights(entries).items()), IDS)
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config


def test_a_window_that_is_switched_off_is_none() -> None:
    """In one pass; transformers' cache for single tokens goes by the window's width alone."""
    entries = changed({"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1})
    config = parse_config(entries)
    assert config == parse_config(changed({}))
    model, _ = transformers_logits(entries)
    with torch.inference_mode():
        expected = model(torch.from_numpy(IDS), use_cache=False).logits.numpy()
    logits = reference_logits(build_decoder(config, weights(entries).items()), IDS)
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


def test_the_logits_tell_rotations_apart() -> None:
    """So agreement above is no accident: no two of these spellings mean the same."""
    names = ("as it is", "linear below 1", "yarn", "yarn not truncated", "yarn with two", "yarn, two lengths", "llama3")
    logits = [transformers_logits(changed(SAME[name]))[1] for name in names]
    for i, first in enumerate(logits):
        for second in logits[:i]:
            assert np.abs(first - second).max() > 1e-3 * first.std()


CASES = [(make, *case) for make in (reference.llama_entries, reference.gta_entries) for case in REFUSED.values()]


@pytest.mark.parametrize(("make", "changes", "word"), CASES)
def test_what_would_mean_something_else_is_refused_by_name(make: Any, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        parse_config(make(max_position_embeddings=256) | changes)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
