"""The presets against the paper and its baselines, and figures that follow from sizes."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gta_edge.errors import InputError
from gta_edge.model.config import GQAConfig, GTAConfig, parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.model.presets import PRESETS, preset
from tests.helpers import reference

# name: layers, hidden, ffn, n_h, n_q, n_k, n_c, vocab, tied
GTA_PRESETS = {
    "gta1-160m": (24, 768, 1920, 12, 3, 1, 1, 32000, True),
    "gta2-160m": (24, 768, 1920, 12, 6, 1, 1, 32000, True),
    "gta3-500m": (24, 1280, 3584, 20, 5, 1, 1, 32000, False),
    "gta4-500m": (24, 1280, 3584, 20, 10, 1, 2, 32000, False),
    "gta-1b": (54, 1280, 3584, 20, 5, 1, 1, 128256, True),
}
# name: the GTA model it is the baseline of, heads that are cached
BASELINES = {
    "gqa-160m": ("gta1-160m", 3),
    "mha-160m": ("gta1-160m", 12),
    "gqa-500m": ("gta3-500m", 4),
    "mha-500m": ("gta3-500m", 20),
    "gqa-1b": ("gta-1b", 5),
}


# --- presets and figures ---------------------------------------------------------------------------------------------


def test_the_presets_are_those_of_the_paper_and_its_baselines():
    assert set(PRESETS) == set(GTA_PRESETS) | set(BASELINES)


@pytest.mark.parametrize("name", GTA_PRESETS)
def test_a_preset_has_the_published_sizes(name):
    layers, hidden, ffn, n_h, n_q, n_k, n_c, vocab, tied = GTA_PRESETS[name]
    assert preset(name) == GTAConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=n_h,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        num_query_heads=n_q,
        num_key_heads=n_k,
        key_dim=64,
        num_latent_heads=n_c,
        latent_dim=128,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_differs_from_its_gta_model_in_the_attention_alone(name):
    peer, n_kv = BASELINES[name]
    layers, hidden, ffn, n_h, *_, vocab, tied = GTA_PRESETS[peer]
    assert preset(name) == GQAConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=n_h,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        num_key_value_heads=n_kv,
    )


@pytest.mark.parametrize("name", ["gta-2b", "", "GTA-1B", "gta-1b "])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match=r"gta-1b.*gqa-1b"):
        preset(name)


def test_cache_figures_of_the_paper():
    gta, gqa = preset("gta-1b"), preset("gqa-1b")
    assert gta.cache_values_per_token_per_layer == 192
    assert gqa.cache_values_per_token_per_layer == 640


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("gta1-160m", 192), ("gta2-160m", 192), ("gta3-500m", 192), ("gta4-500m", 320)),
        *(("gqa-160m", 384), ("mha-160m", 1536), ("gqa-500m", 512), ("mha-500m", 2560)),
    ],
)
def test_cached_values_of_a_token_in_a_layer(name, values):
    assert preset(name).cache_values_per_token_per_layer == values


def test_attention_flops_of_the_paper():
    # counted there in multiply-adds: n_q(d_k + d_l) = 960 against 2·n_h·d_h = 2560
    gta, gqa = preset("gta-1b"), preset("gqa-1b")
    assert gta.attention_flops_per_pair == 2 * 960
    assert gqa.attention_flops_per_pair == 2 * 2560
    assert 1 - gta.attention_flops_per_pair / gqa.attention_flops_per_pair == 0.625


def test_caches_are_the_key_and_what_takes_the_values_place():
    def flat(config):
        return [(cache.name, cache.heads, cache.width) for cache in config.caches]

    assert flat(preset("gta4-500m")) == [("key", 1, 64), ("latent", 2, 128)]
    assert flat(preset("gqa-500m")) == [("key", 4, 64), ("value", 4, 64)]


def test_scale_and_expansion_follow_from_the_widths():
    config = parse_config(reference.gta_entries(heads=6, n_q=2, d_k=48, d_l=16, e=3))
    assert config.scale == pytest.approx(1 / math.sqrt(48))
    assert config.expansion == 3
    assert config.value_decoder_shape == (2, 16, 48)
    assert preset("gta-1b").expansion == 2
    assert preset("gqa-1b").scale == 0.125


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_a_preset_against_independent_counts(name):
    config = preset(name)
    expected = reference.shapes(config.to_dict())
    found = config.parameter_shapes()
    assert found == expected
    assert config.parameters == sum(math.prod(shape) for shape in expected.values())
    assert config.weight_bytes == 2 * config.parameters  # presets are bfloat16
    assert config.replace(dtype="float32").weight_bytes == 4 * config.parameters
    with torch.device("meta"):
        module = Decoder(config)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected


@pytest.mark.parametrize("name", BASELINES)
def test_parameters_of_a_baseline_against_transformers(name):
    config = preset(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_order_of_parameters_is_that_of_the_forward_pass():
    names = list(parse_config(reference.gta_entries(tie_word_embeddings=False)).parameter_shapes())
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [name.split(".")[2] for name in names[1:-2]] == ["0"] * 15 + ["1"] * 15


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("entries", [reference.gta_entries(e=2), reference.llama_entries()])
def test_flops_of_a_decode_step(entries, tied):
    config = parse_config(entries | {"tie_word_embeddings": tied})
    tensors = reference.shapes(entries | {"tie_word_embeddings": tied})
    head = entries["vocab_size"] * entries["hidden_size"]
    products = sum(math.prod(shape) for name, shape in tensors.items() if ".layers." in name and len(shape) == 2)
    assert config.flops_per_token(0) == 2 * (products + head)
    if "num_query_heads" in entries:
        pair = 2 * entries["num_query_heads"] * (entries["key_dim"] + entries["value_dim"])
    else:
        pair = 2 * 2 * entries["num_attention_heads"] * entries["head_dim"]
    assert config.flops_per_token(100) - config.flops_per_token(0) == 100 * pair * entries["num_hidden_layers"]


def test_only_the_biases_of_the_published_projections_are_optional():
    config = parse_config(reference.gta_entries())
    optional = {name for name in config.parameter_shapes() if config.is_optional(name)}
    layers = [f"model.layers.{i}.self_attn." for i in range(2)]
    assert optional == {f"{layer}{kind}_proj.bias" for layer in layers for kind in "qkvg"}
    baseline = parse_config(reference.llama_entries())
    assert not any(baseline.is_optional(name) for name in baseline.parameter_shapes())
