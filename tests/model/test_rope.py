"""Rotary embedding: frequencies and tables against transformers and against the formula."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gta_edge.errors import ConfigError
from gta_edge.model.config import parse_config
from gta_edge.model.rope import ROPE_TYPES, RopeScaling, check_table_size, inverse_frequencies, rope_tables
from tests.helpers import reference

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

DIMS = st.integers(1, 64).map(lambda half: 2 * half)
THETAS = st.floats(100.0, 1e6)
LENGTHS = st.integers(64, 131072)
FACTORS = st.floats(0.5, 64.0)


def transformers_frequencies(dim, theta, entry, max_length):
    """What transformers makes of the same parameters, as (frequencies, factor); it computes them in float32."""
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=max_length,
        rope_theta=theta,
        rope_scaling=None if entry is None else dict(entry),
    )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().numpy(), rotary.attention_scaling


def assert_agrees(dim, theta, entry, max_length):
    found, factor = inverse_frequencies(dim, theta, RopeScaling.from_config(entry), max_length)
    expected, expected_factor = transformers_frequencies(dim, theta, entry, max_length)
    assert found.dtype == np.float64
    assert found.shape == (dim // 2,)
    unscaled = theta ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_array_less(np.abs(found - expected) / unscaled, 1e-5)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@SETTINGS
@given(DIMS, THETAS, LENGTHS)
def test_default(dim, theta, max_length):
    assert_agrees(dim, theta, None, max_length)
    assert_agrees(dim, theta, {"rope_type": "default"}, max_length)


@SETTINGS
@given(DIMS, THETAS, FACTORS, LENGTHS)
def test_linear(dim, theta, factor, max_length):
    assert_agrees(dim, theta, {"rope_type": "linear", "factor": factor}, max_length)


@SETTINGS
@given(
    DIMS,
    THETAS,
    FACTORS,
    st.floats(0.25, 8.0),
    st.floats(2.0, 8.0),
    st.none() | st.integers(32, 16384),
    LENGTHS,
)
def test_llama3(dim, theta, factor, low, ratio, original, max_length):
    entry = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}
    if original is not None:
        entry["original_max_position_embeddings"] = original
    assert_agrees(dim, theta, entry, max_length)


@st.composite
def yarn_entries(draw):
    entry = {"rope_type": "yarn", "factor": draw(FACTORS)}
    optional = {
        "original_max_position_embeddings": st.integers(32, 16384),
        "attention_factor": st.floats(0.1, 2.0),
        "mscale": st.just(0.0) | st.floats(0.1, 2.0),
        "mscale_all_dim": st.just(0.0) | st.floats(0.1, 2.0),
        "truncate": st.booleans(),
        "beta_slow": st.floats(0.5, 4.0),
        "beta_fast": st.floats(8.0, 64.0),
    }
    for key, values in optional.items():
        if draw(st.booleans()):
            entry[key] = draw(values)
    return entry


@settings(SETTINGS, max_examples=150)
@given(DIMS, THETAS, yarn_entries(), LENGTHS)
def test_yarn(dim, theta, entry, max_length):
    assert_agrees(dim, theta, entry, max_length)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 1 + 0.1 * math.log(8)),
        ({"mscale": 2.0}, 1 + 0.1 * math.log(8)),
        ({"mscale": 2.0, "mscale_all_dim": 2.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (1 + 0.2 * math.log(8)) / (1 + 0.1 * math.log(8))),
        ({"mscale": 2.0, "mscale_all_dim": 1.0, "attention_factor": 0.7}, 0.7),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_factor_on_the_tables(changes, factor):
    entry = YARN | changes
    assert_agrees(64, 10000.0, entry, 2048)
    scaling = RopeScaling.from_config(entry)
    assert inverse_frequencies(64, 10000.0, scaling, 2048)[1] == pytest.approx(factor)
    cos, sin = rope_tables(64, 10000.0, scaling, 100)
    np.testing.assert_allclose(np.hypot(cos, sin), factor, rtol=1e-6)


DISTINCT = {
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn from a longer original": YARN | {"original_max_position_embeddings": 32768},
    "yarn with other betas": YARN | {"beta_fast": 4.0, "beta_slow": 2.0},
    "yarn as a step": YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "yarn from the whole length": {"rope_type": "yarn", "factor": 8.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "default": {"rope_type": "default"},
}


@pytest.mark.parametrize("name", DISTINCT)
def test_each_parameter_matters(name):
    """No two of these give the same frequencies, so agreement with transformers is no accident."""
    assert_agrees(64, 10000.0, DISTINCT[name], 4096)
    found, _ = inverse_frequencies(64, 10000.0, RopeScaling.from_config(DISTINCT[name]), 4096)
    for other in DISTINCT.keys() - {name}:
        theirs, _ = inverse_frequencies(64, 10000.0, RopeScaling.from_config(DISTINCT[other]), 4096)
        assert np.abs(found / theirs - 1).max() > 1e-3, other


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 4.0])
@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (16, 500000.0), (2, 100.0)])
def test_tables_follow_the_formula_to_float32(dim, theta, factor):
    scaling = RopeScaling() if factor is None else RopeScaling("linear", {"factor": factor})
    cos, sin = rope_tables(dim, theta, scaling, 300)
    expected_cos, expected_sin = reference.rope_tables(dim, 300, theta, factor or 1.0)
    for found, expected in ((cos, expected_cos), (sin, expected_sin)):
        assert found.dtype == np.float32
        assert found.shape == (300, dim // 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_tables_are_exact_at_far_positions_too():
    # one rounding at the end, where angles in float32 would be off by 1e-3
    cos, sin = rope_tables(64, 10000.0, RopeScaling(), 32768)
    for pair in (0, 1, 31):
        angle = 32767 / 10000.0 ** (2 * pair / 64)
        assert cos[32767, pair] == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[32767, pair] == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("entry", [DISTINCT["yarn"], DISTINCT["llama3"]], ids=["yarn", "llama3"])
def test_tables_against_transformers(entry):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=64, rope_scaling=dict(entry)
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    ours = rope_tables(32, 10000.0, RopeScaling.from_config(entry), 64)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected[0, :, :16].numpy(), atol=2e-5)
        np.testing.assert_allclose(found, expected[0, :, 16:].numpy(), atol=2e-5)


# --- reading and writing ---------------------------------------------------------------------------------------------


@SETTINGS
@given(yarn_entries())
def test_round_trip(entry):
    scaling = RopeScaling.from_config(entry)
    assert RopeScaling.from_config(json.loads(json.dumps(scaling.to_config()))) == scaling


def test_default_is_written_as_null():
    assert RopeScaling().to_config() is None
    assert RopeScaling.from_config(None) == RopeScaling()


def test_the_type_under_its_old_name():
    assert RopeScaling.from_config({"type": "linear", "factor": 2.0}) == RopeScaling("linear", {"factor": 2.0})


def test_parameters_that_are_null_are_absent():
    entry = YARN | {"attention_factor": None, "beta_fast": None, "mscale": None, "rope_type": None, "type": "yarn"}
    assert RopeScaling.from_config(entry) == RopeScaling.from_config(YARN)


def test_truncate_null_is_false_as_in_transformers():
    assert_agrees(64, 10000.0, YARN | {"truncate": None}, 2048)
    assert RopeScaling.from_config(YARN | {"truncate": None}).parameters["truncate"] is False


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("entry", [DISTINCT["yarn"], DISTINCT["llama3"]], ids=["yarn", "llama3"])
def test_a_config_gives_the_frequencies_that_transformers_gives_it(entry, spelling):
    entries = reference.llama_entries(d_h=32, max_position_embeddings=4096)
    del entries["rope_theta"], entries["rope_scaling"]
    if spelling == "rope_scaling":
        entries |= {"rope_theta": 70000.0, "rope_scaling": entry}
    else:
        entries |= {"rope_parameters": {**entry, "rope_theta": 70000.0}}
    config = parse_config(entries)
    found, factor = inverse_frequencies(32, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(entries))))
    np.testing.assert_allclose(found, rotary.inv_freq.double().numpy(), rtol=1e-5)
    assert factor == pytest.approx(rotary.attention_scaling)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": DISTINCT["llama3"], "original_max_position_embeddings": 64},
        {"rope_scaling": DISTINCT["yarn"] | {"factor": None}},
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": LINEAR, "partial_rotary_factor": 0.5},
        {"rope_scaling": LINEAR | {"rope_theta": 20000.0}, "rope_theta": 500.0},
        {"rope_scaling": {}},
    ],
    ids=str,
)
def test_an_unusual_spelling_is_read_as_transformers_reads_it_or_refused(changes):
    entries = reference.llama_entries(d_h=32, max_position_embeddings=2048) | changes
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(entries))))
    try:
        config = parse_config(entries)
    except ConfigError:
        return
    found, factor = inverse_frequencies(32, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    assert found.shape == tuple(theirs.inv_freq.shape)
    np.testing.assert_allclose(found, theirs.inv_freq.double().numpy(), rtol=1e-5)
    assert factor == pytest.approx(theirs.attention_scaling)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "su", "mrope", "proportional", "Linear", ""])
def test_other_types_are_refused_with_the_known_ones(rope_type):
    with pytest.raises(ConfigError, match=f"'{rope_type}'.*default, linear, llama3, yarn"):
        RopeScaling.from_config({"rope_type": rope_type, "factor": 2.0})


@pytest.mark.parametrize("rope_type", [5, True, ["linear"], {"linear": 1}])
def test_a_type_that_is_no_text_is_refused(rope_type):
    with pytest.raises(ConfigError, match="rope_type"):
        RopeScaling.from_config({"rope_type": rope_type, "factor": 2.0})


@pytest.mark.parametrize("entry", ["linear", ["linear", 2.0], 4.0, True])
def test_what_is_no_object_is_refused(entry):
    with pytest.raises(ConfigError, match="expected an object"):
        RopeScaling.from_config(entry)


COMPLETE = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 2.0},
}


@pytest.mark.parametrize(("rope_type", "name"), [(kind, name) for kind, all_of in COMPLETE.items() for name in all_of])
@pytest.mark.parametrize(
    "value",
    ["2", True, 0, -1.0, math.nan, math.inf, [2.0], pytest.param(10**400, id="larger than any float")],
)
def test_a_parameter_that_makes_no_sense_is_refused_by_name(rope_type, name, value):
    with pytest.raises(ConfigError, match=name):
        RopeScaling.from_config({"rope_type": rope_type, **COMPLETE[rope_type], name: value})


@pytest.mark.parametrize(("rope_type", "name"), [(kind, name) for kind, all_of in COMPLETE.items() for name in all_of])
def test_a_parameter_that_is_missing_is_named(rope_type, name):
    entry = {"rope_type": rope_type, **COMPLETE[rope_type]}
    del entry[name]
    with pytest.raises(ConfigError, match=name):
        RopeScaling.from_config(entry)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncate", 1),
        ("truncate", "false"),
        ("attention_factor", 0.0),
        ("attention_factor", "1.0"),
        ("mscale", -1.0),
        ("mscale_all_dim", math.nan),
        ("beta_fast", 0),
        ("beta_slow", -1.0),
        ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", "256"),
    ],
)
def test_an_optional_parameter_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        RopeScaling.from_config(YARN | {name: value})


@pytest.mark.parametrize(
    ("rope_type", "name", "value"),
    [
        ("yarn", "long_factor", 2.0),
        ("default", "long_factor", [1.0, 2.0]),
        ("linear", "short_factor", [1.0] * 100_000),
        ("default", "mrope_section", [16, 24, 24]),
        ("default", "full_attention", {"rope_type": "linear", "factor": 2.0}),
        ("linear", "factors", [2.0, 4.0]),
    ],
)
def test_what_no_supported_type_has_is_refused_by_name(rope_type, name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        RopeScaling.from_config({"rope_type": rope_type, **COMPLETE.get(rope_type, {}), name: value})
    assert len(str(caught.value)) < 600


def test_a_scaling_that_is_constructed_has_no_parameters_of_another_type():
    with pytest.raises(ConfigError, match="'linear' has the unknown parameter 'beta_fast'"):
        RopeScaling("linear", {"factor": 2.0, "beta_fast": 32.0})


def test_two_types_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="rope_type is 'linear' and type, its old name, is 'yarn'"):
        RopeScaling.from_config({"rope_type": "linear", "type": "yarn", "factor": 2.0})


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (2.0, 2.0)])
def test_llama3_needs_its_frequencies_in_order(low, high):
    with pytest.raises(ConfigError, match=r"high_freq_factor.*low_freq_factor"):
        RopeScaling("llama3", {"factor": 2.0, "low_freq_factor": low, "high_freq_factor": high})


@pytest.mark.parametrize("value", [0.5, 2.0, "1"])
def test_partial_rotation_is_refused(value):
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        RopeScaling.from_config({"rope_type": "default", "partial_rotary_factor": value})
    assert RopeScaling.from_config({"rope_type": "default", "partial_rotary_factor": 1.0}) == RopeScaling()
    assert RopeScaling.from_config({"rope_type": "default", "partial_rotary_factor": None}) == RopeScaling()


# --- values of any size ----------------------------------------------------------------------------------------------

EXTREMES = (1e308, 1e-320, 5e-324, 10**39, 10**300, 1e30, 1e-30, 1, 1.0000000000000002, 2**53)


@pytest.mark.parametrize("value", EXTREMES, ids=lambda value: f"{value:.1e}" if value < 1e300 else str(value)[:6])
@pytest.mark.parametrize(
    ("rope_type", "name"),
    [(kind, name) for kind, names in ROPE_TYPES.items() for name in names if name != "truncate"]
    + [("default", "rope_theta"), ("yarn", "rope_theta")],
)
def test_a_value_of_any_size_gives_finite_tables_or_is_refused(rope_type, name, value):
    entry = {"rope_type": rope_type, **COMPLETE.get(rope_type, {})}
    theta = 10000.0
    if name == "rope_theta":
        theta = value
    else:
        entry[name] = value
    try:
        config = parse_config(reference.llama_entries(rope_theta=theta, rope_scaling=entry))
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017 - either outcome is right
        return
    tables = rope_tables(config.key_width, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    assert all(np.isfinite(table).all() for table in tables)


@pytest.mark.parametrize(
    ("entry", "theta"),
    [
        (YARN | {"beta_fast": 1e308}, 10000.0),
        (YARN | {"beta_fast": 1e-320, "truncate": False}, 10000.0),
        (YARN | {"attention_factor": 1e300}, 10000.0),
        (YARN | {"mscale": 1e308, "mscale_all_dim": 1e-300}, 10000.0),
        ({"rope_type": "linear", "factor": 5e-324}, 10000.0),
    ],
)
def test_what_would_not_be_finite_is_refused_with_its_values(entry, theta):
    with pytest.raises(ConfigError, match=r"gives rotations that are not finite.*trained with") as caught:
        inverse_frequencies(64, theta, RopeScaling.from_config(entry), 2048)
    assert str(caught.value).isprintable()


def test_tables_of_absurd_sizes_are_refused_before_they_are_made():
    for dim, positions in ((128, 2**31 - 1), (2**16, 2**20), (2, 2**30)):
        with pytest.raises(ConfigError, match=r"tables of RoPE take .* GB; expected at most .*lower max_position"):
            rope_tables(dim, 10000.0, RopeScaling(), positions)
    with pytest.raises(ConfigError, match="at most 2097152"):
        check_table_size(128, 2097153)
    check_table_size(128, 2097152)
    with pytest.raises(ConfigError, match="the key width is 131072"):
        parse_config(reference.llama_entries(heads=2, n_kv=1, d_h=2**17))


def test_some_of_the_positions_are_the_first_of_all():
    scaling = RopeScaling.from_config({"rope_type": "yarn", "factor": 8.0})  # depends on how many there are
    whole = rope_tables(64, 10000.0, scaling, 40000)  # more than are computed at a time
    for table, part in zip(whole, rope_tables(64, 10000.0, scaling, 40000, positions=100), strict=True):
        assert part.shape == (100, 32)
        np.testing.assert_array_equal(table[:100], part)
