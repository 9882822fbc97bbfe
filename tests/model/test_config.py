"""Configs: what is read and written, what is refused, and the figures that follow from the sizes."""

import json
import math
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from gta_edge.errors import ConfigError, InputError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig, parse_config, read_config
from gta_edge.model.decoder import Decoder
from gta_edge.model.presets import PRESETS, preset
from gta_edge.model.rope import RopeScaling
from tests.helpers import reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

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

COMMON_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "max_position_embeddings",
)
GTA_SIZES = ("num_query_heads", "query_dim", "num_key_heads", "key_dim", "num_value_heads", "value_dim")
NOT_A_SIZE = ("12", "", True, False, 0, -4, 2**31, 10**30, 1.5, 4.0, math.nan, math.inf, [4], {}, {"a": 1})

SCALINGS = [
    RopeScaling(),
    RopeScaling("linear", {"factor": 4.0}),
    RopeScaling(
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    RopeScaling("yarn", {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}),
]


def make(entries: dict) -> ModelConfig:
    return parse_config(entries)


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
    config = make(reference.gta_entries(heads=6, n_q=2, d_k=48, d_l=16, e=3))
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
    names = list(make(reference.gta_entries(tie_word_embeddings=False)).parameter_shapes())
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [name.split(".")[2] for name in names[1:-2]] == ["0"] * 15 + ["1"] * 15


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("entries", [reference.gta_entries(e=2), reference.llama_entries()])
def test_flops_of_a_decode_step(entries, tied):
    config = make(entries | {"tie_word_embeddings": tied})
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
    config = make(reference.gta_entries())
    optional = {name for name in config.parameter_shapes() if config.is_optional(name)}
    layers = [f"model.layers.{i}.self_attn." for i in range(2)]
    assert optional == {f"{layer}{kind}_proj.bias" for layer in layers for kind in "qkvg"}
    baseline = make(reference.llama_entries())
    assert not any(baseline.is_optional(name) for name in baseline.parameter_shapes())


# --- reading and writing ---------------------------------------------------------------------------------------------


@st.composite
def configs(draw):
    common = {
        "vocab_size": draw(st.integers(3, 300000)),
        "intermediate_size": draw(st.integers(1, 10000)),
        "num_hidden_layers": draw(st.integers(1, 100)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "rms_norm_eps": draw(st.floats(1e-12, 0.5)),
        "rope_theta": draw(st.floats(1.5, 1e9)),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": draw(st.none() | st.integers(0, 2)),
        "eos_token_ids": draw(st.lists(st.integers(0, 2), max_size=3, unique=True).map(tuple)),
        "dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    }
    small = st.integers(1, 4)
    if draw(st.booleans()):
        n_k, n_kv, d_h = draw(small), draw(small), 2 * draw(st.integers(1, 64))
        heads = n_k * n_kv
        return GQAConfig(
            **common, num_attention_heads=heads, head_dim=d_h, hidden_size=heads * d_h, num_key_value_heads=n_kv
        )
    n_k, n_c = draw(small), draw(small)
    n_q = math.lcm(n_k, n_c) * draw(small)
    heads_per_map, e, unit = draw(small), draw(small), draw(small)
    latent_dim = heads_per_map * unit
    return GTAConfig(
        **common,
        hidden_size=e * n_q * latent_dim,
        num_attention_heads=n_q * heads_per_map,
        head_dim=e * unit,
        num_query_heads=n_q,
        num_key_heads=n_k,
        key_dim=2 * draw(st.integers(1, 64)),
        num_latent_heads=n_c,
        latent_dim=latent_dim,
    )


@SETTINGS
@given(configs())
def test_round_trip(config):
    again = parse_config(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(again) is type(config)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_a_file(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset(name).to_dict()), encoding="utf-8")
    assert read_config(path) == preset(name)


def test_written_entries_have_the_published_names():
    entries = preset("gta4-500m").to_dict()
    assert entries["architectures"] == ["GTAForCausalLM"]
    assert entries["model_type"] == "llama"
    assert {key: entries[key] for key in GTA_SIZES} == {
        "num_query_heads": 10,
        "query_dim": 64,
        "num_key_heads": 1,
        "key_dim": 64,
        "num_value_heads": 2,
        "value_dim": 128,
    }
    assert preset("mha-500m").to_dict()["num_key_value_heads"] == 20


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, GTAConfig),
        ({"architectures": ["GLAForCausalLM"]}, GTAConfig),
        ({"architectures": None}, GTAConfig),
        ({"architectures": []}, GTAConfig),
        ({"attention_bias": True}, GTAConfig),  # the published configs' value says nothing either way
        ({"architectures": ["LlamaForCausalLM"]}, GQAConfig),
    ],
)
def test_the_architecture_decides_what_is_read(changes, kind):
    assert type(make(reference.gta_entries(**changes))) is kind


def test_without_an_architecture_a_llama_config_is_a_baseline():
    entries = reference.llama_entries()
    del entries["architectures"]
    assert make(entries) == make(reference.llama_entries())


def test_what_is_not_given_is_as_in_transformers():
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    entries = {key: reference.llama_entries()[key] for key in required}
    config = make({**entries, "architectures": ["LlamaForCausalLM"]})
    theirs = LlamaConfig(**entries)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == theirs.head_dim
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.rope_theta == 10000.0
    assert config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        *((None, ()), (2, (2,)), ([2], (2,)), ([2, 5], (2, 5)), ([], ()), (0, (0,)), (96, (96,))),
        *(([2, 97], (2,)), ([97, 96, 10**400], (96,))),  # what can never be produced ends nothing
        *((-1, ()), (-100, ()), ([-1], ()), ([2, -1, 5], (2, 5)), ([None, 2], (2,))),
    ],
)
def test_one_end_token_several_or_none(value, ids):
    assert make(reference.gta_entries(eos_token_id=value)).eos_token_ids == ids


@pytest.mark.parametrize(
    ("value", "token"), [(None, None), (-1, None), (-2, None), (0, 0), (3, 3), (97, None), (10**400, None)]
)
def test_a_first_token_or_none(value, token):
    assert make(reference.gta_entries(bos_token_id=value)).bos_token_id == token


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, "float16"),  # the new name counts, as in transformers
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "half"}, "float16"),
        ({"torch_dtype": "float64"}, "float32"),  # the tensors say themselves what they are stored in
        ({"torch_dtype": "torch.double"}, "float32"),
        ({"dtype": "float8_e5m2"}, "float32"),
        ({"torch_dtype": "auto"}, "float32"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_the_dtype_under_its_old_and_new_name(changes, dtype):
    assert make(reference.gta_entries(**changes)).dtype == dtype


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.rope_type)
def test_rope_under_its_old_and_new_name(scaling):
    old = reference.gta_entries(rope_theta=50000.0, rope_scaling=scaling.to_config())
    new = reference.gta_entries()
    del new["rope_theta"], new["rope_scaling"]
    new["rope_parameters"] = {"rope_type": "default", **(scaling.to_config() or {}), "rope_theta": 50000.0}
    assert make(old) == make(new)
    assert make(new).rope_theta == 50000.0
    assert make(new).rope_scaling == scaling


def test_transformers_own_config_is_read_back_with_every_value():
    theirs = LlamaConfig(
        **reference.llama_entries(
            rope_theta=50000.0, rope_scaling={"rope_type": "linear", "factor": 2.0}, eos_token_id=[2, 3]
        )
    )
    theirs.architectures = ["LlamaForCausalLM"]
    config = make(json.loads(theirs.to_json_string(use_diff=False)))
    assert config.rope_theta == 50000.0
    assert config.rope_scaling == RopeScaling("linear", {"factor": 2.0})
    assert config.eos_token_ids == (2, 3)
    assert config.rms_norm_eps == 1e-5


def test_replace_validates_anew():
    config = make(reference.gta_entries())
    assert config.replace(vocab_size=10).vocab_size == 10
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        config.replace(num_hidden_layers=0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
@pytest.mark.parametrize("key", COMMON_SIZES + GTA_SIZES)
def test_a_size_that_is_none_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        make(reference.gta_entries(**{key: value}))


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
@pytest.mark.parametrize("key", [*COMMON_SIZES, "num_key_value_heads"])
def test_a_size_of_a_baseline_that_is_none_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        make(reference.llama_entries(**{key: value}))


@pytest.mark.parametrize("value", [0, -1, True, "8", 2.0, None])
@pytest.mark.parametrize("key", ["num_query_heads", "num_key_heads", "key_dim", "num_latent_heads", "latent_dim"])
def test_a_constructed_config_is_validated_too(key, value):
    with pytest.raises(ConfigError, match=key):
        make(reference.gta_entries()).replace(**{key: value})


@pytest.mark.parametrize(
    "key",
    [key for key in COMMON_SIZES if key not in ("head_dim", "max_position_embeddings")] + list(GTA_SIZES),
)
@pytest.mark.parametrize("absent", [True, False])
def test_a_missing_key_is_named(key, absent):
    entries = reference.gta_entries(**{key: None})
    if absent:
        del entries[key]
    with pytest.raises(ConfigError, match=key):
        make(entries)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_query_heads": 3}, ["num_attention_heads 4", "num_query_heads 3"]),
        ({"num_query_heads": 4, "num_key_heads": 3, "value_dim": 16}, ["num_query_heads 4", "num_key_heads 3"]),
        ({"num_query_heads": 4, "num_value_heads": 3, "value_dim": 16}, ["num_query_heads 4", "num_latent_heads 3"]),
        ({"num_query_heads": 1, "num_key_heads": 2}, ["num_query_heads 1", "num_key_heads 2"]),
        ({"value_dim": 24}, ["hidden_size 64", "24"]),
        ({"value_dim": 64}, ["hidden_size 64", "64"]),
        ({"head_dim": 8}, ["head_dim 8", "hidden_size 64"]),
        ({"num_attention_heads": 6}, ["num_attention_heads 6", "hidden_size 64"]),
        ({"hidden_size": 62, "head_dim": None}, ["num_attention_heads 4", "hidden_size 62"]),
        ({"query_dim": 32}, ["query_dim is 32", "key_dim 16"]),
        ({"key_dim": 32}, ["query_dim is 16", "key_dim 32"]),
        ({"query_dim": 15, "key_dim": 15}, ["key width is 15"]),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_by_name(changes, names):
    with pytest.raises(ConfigError) as caught:
        make(reference.gta_entries(**changes))
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8"),
        ({"hidden_size": 60, "head_dim": 15}, "key width is 15"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused_by_name(changes, name):
    with pytest.raises(ConfigError, match=name):
        make(reference.llama_entries(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope_theta", value) for value in (math.nan, math.inf, -math.inf, 0, 1, -10000.0, "10000", True, [1e4])),
        pytest.param("rope_theta", 10**400, id="rope_theta-larger-than-any-float"),
        *(("rms_norm_eps", value) for value in (math.nan, math.inf, 0, 0.0, -1e-5, 1, "1e-5", True, None)),
        *(("eos_token_id", value) for value in (97, [97, 98], "2", 2.0, True, [2, True], [[2]], {"a": 2})),
        *(("bos_token_id", value) for value in ("1", 1.0, False)),
        *(("tie_word_embeddings", value) for value in ("true", 1, None)),
        *(("dtype", value) for value in ("float99", "int8", 5, ["bfloat16"], {"text": "bfloat16"})),
        *(("hidden_act", value) for value in ("gelu", None, ["silu"], "SiLU", "silu_and_mul")),
        *(("architectures", value) for value in (["GPT2LMHeadModel"], "GTAForCausalLM", [5], {"GTA": 1}, 7)),
        *(("rope_scaling", value) for value in ("linear", [2.0], 4)),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(key, value):
    entries = reference.gta_entries()
    if key == "dtype":
        del entries["torch_dtype"]
    with pytest.raises(ConfigError, match=re.escape(key).replace("_", "[_ ]")):
        make(entries | {key: value})


@pytest.mark.parametrize("architectures", [["MistralForCausalLM"], ["LlamaForSequenceClassification"], ["gta"]])
def test_an_unknown_architecture_is_refused_with_the_known_ones(architectures):
    with pytest.raises(ConfigError, match=rf"{architectures[0]}.*GTAForCausalLM.*LlamaForCausalLM"):
        make(reference.gta_entries(architectures=architectures))


def test_no_architecture_and_another_model_type_is_refused():
    entries = reference.llama_entries(model_type="mistral")
    with pytest.raises(ConfigError, match="mistral"):
        make(entries)  # transformers would make a Mistral of it, whatever the architecture says
    del entries["architectures"]
    with pytest.raises(ConfigError, match="gemma"):
        make(entries | {"model_type": "gemma"})


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": "llama"},
        {"architectures": ["LLaMAForCausalLM"], "model_type": "llama"},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["GTAForCausalLM", "LlamaForCausalLM"], "num_query_heads": None},
    ],
)
def test_spellings_of_an_architecture(changes):
    entries = reference.llama_entries(**changes)
    if "num_query_heads" in changes:
        with pytest.raises(ConfigError, match="num_query_heads"):
            make(entries)
    else:
        assert make(entries) == make(reference.llama_entries())


@pytest.mark.parametrize("content", [None, [], [1, 2], "text", 5, True])
def test_a_config_that_is_no_object_is_refused(content):
    with pytest.raises(ConfigError, match="expected a JSON object"):
        parse_config(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"{'vocab_size': 3}",
        b"[1, 2]",
        b"null",
        b'{"architectures": ["\xff"]}',
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"{}",
    ],
    ids=range(10),
)
def test_a_file_that_is_no_config_is_refused_with_its_path(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: ") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"config\.json: has 1099511627776 bytes; expected at most 1048576"):
        read_config(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_config(path)


@pytest.mark.parametrize("key", ["architectures", "hidden_act", "rope_scaling", "dtype", "eos_token_id", "layer_types"])
@pytest.mark.parametrize("value", ["x" * 10**6, ["\x1b[2J"] * 10**5, {"\x1b]0;t\x07": ["a\nb"] * 10**5}, 10**4000])
def test_what_is_found_is_quoted_in_one_short_printable_line(key, value):
    with pytest.raises(ConfigError, match=key.replace("_", "[_ ]")) as caught:
        make(reference.llama_entries(**{key: value}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_figures_of_absurdly_many_layers_are_computed_at_once():
    config = make(reference.gta_entries(num_hidden_layers=2**31 - 1))
    one, two = (config.replace(num_hidden_layers=layers) for layers in (1, 2))
    layers = config.num_hidden_layers
    assert config.parameters == one.parameters + (two.parameters - one.parameters) * (layers - 1)
    assert config.flops_per_token(7) == one.flops_per_token(7) + (two.flops_per_token(7) - one.flops_per_token(7)) * (
        layers - 1
    )


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: cannot be read"):
            read_config(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=5,
)
SCALING_KEYS = ("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "truncate")


@settings(SETTINGS, max_examples=300)
@given(
    st.sampled_from([reference.gta_entries(), reference.llama_entries()]),
    st.sampled_from([*reference.gta_entries(), "num_key_value_heads", "mlp_bias", "dtype", "rope_parameters"]),
    JSON,
)
def test_any_value_gives_a_config_or_a_config_error(entries, key, value):
    try:
        config = make(entries | {key: value})
    except ConfigError:
        return
    assert parse_config(config.to_dict()) == config


@settings(SETTINGS, max_examples=300)
@given(st.sampled_from(SCALINGS[1:]), st.sampled_from(SCALING_KEYS), JSON)
def test_any_rope_scaling_gives_a_config_or_a_config_error(scaling, key, value):
    try:
        config = make(reference.gta_entries(rope_scaling={**scaling.to_config(), key: value}))
    except ConfigError:
        return
    assert parse_config(config.to_dict()) == config
