"""Configs: what is read and written, and what is refused."""

import json
import math
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from gta_edge.errors import ConfigError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig, parse_config, read_config
from gta_edge.model.presets import PRESETS, preset
from gta_edge.model.rope import RopeScaling
from tests.helpers import reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


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
