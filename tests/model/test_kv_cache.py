"""The cache's names, shapes and bytes, spelled out; graphs and sessions are compared with them in their own tests."""

import math

import pytest

from gta_edge.model.config import ModelConfig, parse_config
from gta_edge.model.kv_cache import (
    TREES,
    bytes_per_token,
    cache_bytes,
    cache_tensors,
    capacity_of,
    input_shapes,
    interface_names,
    is_open,
    is_scale,
    managed_shapes,
    open_name,
    scale_name,
    step_bytes,
)
from gta_edge.model.presets import preset
from gta_edge.numerics.dtypes import CACHES
from gta_edge.plugins.attention.definition import Features
from tests.helpers import reference

LAYERS = {"num_hidden_layers": 2}
GTA = parse_config(reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **LAYERS))
GQA = parse_config(reference.llama_entries(heads=4, n_kv=2, d_h=16, **LAYERS))


def shapes(config: ModelConfig, dtype: str) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape(3, 40) for tensor in cache_tensors(config, dtype)}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_layer_caches_a_key_and_a_latent_or_a_value(dtype: str) -> None:
    gta, gqa = shapes(GTA, dtype), shapes(GQA, dtype)
    assert list(gta.items()) == [
        ("key.0", (3, 2, 40, 16)),
        ("latent.0", (3, 1, 40, 8)),
        ("key.1", (3, 2, 40, 16)),
        ("latent.1", (3, 1, 40, 8)),
    ]
    assert gqa == dict.fromkeys(("key.0", "value.0", "key.1", "value.1"), (3, 2, 40, 16))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_scales_are_float32_and_behind_all_caches(dtype: str) -> None:
    tensors = cache_tensors(GTA, dtype)
    assert [tensor.dtype for tensor in tensors] == [dtype] * 4 + ["fp32"] * 4
    assert list(shapes(GTA, dtype).items())[4:] == [
        ("key_scale.0", (3, 2, 40)),
        ("latent_scale.0", (3, 1, 40)),
        ("key_scale.1", (3, 2, 40)),
        ("latent_scale.1", (3, 1, 40)),
    ]
    inputs, outputs = interface_names(GTA, dtype)
    assert inputs[3:] == [f"past_{tensor.name}" for tensor in tensors]
    assert outputs == ["logits", *(f"present_{tensor.name}" for tensor in tensors)]


@pytest.mark.parametrize(("dtype", "latent", "value"), [("int4", 4, 8), ("int4v2", 2, 4)])
def test_a_cache_in_blocks_has_codes_scales_and_open_blocks(dtype: str, latent: int, value: int) -> None:
    layer = {"num_hidden_layers": 1}
    for config, name, heads, width in ((GTA, "latent", 1, latent), (GQA, "value", 2, value)):
        tensors = cache_tensors(config.replace(**layer), dtype, compute="bf16")
        d_v = config.attention.latent_dim
        assert [(t.name, t.dtype, t.shape(3, 40)) for t in tensors] == [
            ("key.0", "uint8", (3, 2, 2, 16, 16)),
            (f"{name}.0", "uint8", (3, heads, 40, width)),
            ("key_scale.0", "fp16", (3, 2, 2, 2, 16)),
            (f"{name}_scale.0", "fp16", (3, heads, 40, 2)),
            ("key_open.0", "bf16", (3, 2, 32, 16)),
            (f"{name}_open.0", "bf16", (3, heads, 32, d_v)),
        ]
        assert [t.shape("b", "s")[2] for t in tensors] == ["s/32", "s", "s/32", "s", 32, 32]
    names = [tensor.name for tensor in cache_tensors(GTA, dtype)]
    assert names[:4] == ["key.0", "latent.0", "key.1", "latent.1"]
    assert list(filter(is_scale, names)) == names[4:8]
    assert list(filter(is_open, names)) == names[8:] == [open_name(name) for name in names[:4]]
    assert (capacity_of(dtype, 33), capacity_of(dtype, 64), capacity_of("int8", 33)) == (64, 64, 33)


def test_shapes_of_inputs_are_numbers_or_symbols() -> None:
    sizes = input_shapes(GQA, batch=2, tokens=5, positions=1, capacity=9)
    assert list(sizes) == interface_names(GQA)[0]
    assert [sizes[name] for name in ("input_ids", "past_length", "logit_positions")] == [(2, 5), (2,), (2, 1)]
    assert sizes["past_value.1"] == (2, 2, 9, 16)
    symbols = input_shapes(GTA, "int8", batch="b", tokens="t", positions="m", capacity="s")
    assert [symbols[name] for name in ("input_ids", "past_length", "logit_positions")] == [
        ("b", "t"),
        ("b",),
        ("b", "m"),
    ]
    assert symbols["past_latent.0"] == ("b", 1, "s", 8)
    assert symbols["past_latent_scale.1"] == ("b", 1, "s")


def test_which_names_are_scales() -> None:
    assert scale_name("past_key.12") == "past_key_scale.12"
    inputs, outputs = interface_names(GTA, "int8")
    names = [*inputs, *outputs]
    assert [name for name in names if is_scale(name)] == [name for name in names if "_scale." in name]
    assert not any(is_scale(name) for side in interface_names(GTA) for name in side)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_the_paper() -> None:
    gta, gqa = preset("gta-1b"), preset("gqa-1b")
    assert bytes_per_token(gta, "bf16") == cache_bytes(gta, "bf16", 1) == 54 * (64 + 128) * 2 == 20_736
    assert bytes_per_token(gqa, "fp16") == cache_bytes(gqa, "fp16", 1) == 54 * 2 * 5 * 64 * 2 == 69_120
    assert bytes_per_token(gta) == 2 * 20_736  # float32 unless said otherwise
    assert cache_bytes(gta, "fp32", 1000, batch=3) == 3000 * 41472


def test_a_cache_of_8_bits_has_scales() -> None:
    # 192 values, and a float32 for the key head and one for the latent head
    assert cache_bytes(preset("gta-1b"), "int8", 1) == cache_bytes(preset("gta-1b"), "fp8", 1) == 54 * (192 + 8)


def test_a_cache_in_blocks_has_an_open_block_beside_what_tokens_take() -> None:
    gta, gqa = preset("gta-1b"), preset("gqa-1b")
    # half a byte or a quarter per value; of keys a scale and a minimum per channel and block, of values per token
    assert step_bytes(gta, "bf16", 54 * 40, 3) == 3 * cache_bytes(gta, "bf16", 40)
    assert step_bytes(gta, "int4", 54 * 64, 3) == 3 * cache_bytes(gta, "int4", 64)  # open blocks included
    assert bytes_per_token(gta, "int4") == 54 * ((64 * 20) // 32 + 128 // 2 + 4)
    assert bytes_per_token(gqa, "int4v2") == 54 * 5 * ((64 * 20) // 32 + 64 // 4 + 4)
    assert cache_bytes(gta, "int4", 40) == 64 * bytes_per_token(gta, "int4") + 32 * bytes_per_token(gta, "fp16")
    wide = cache_bytes(gta, "int4", 40, 2, compute="fp32")
    assert wide == 2 * (64 * bytes_per_token(gta, "int4") + 32 * bytes_per_token(gta, "fp32"))


@pytest.mark.parametrize("config", [GTA, GQA], ids=["gta", "gqa"])
@pytest.mark.parametrize("dtype", CACHES)
def test_bytes_are_those_of_all_tensors(config: ModelConfig, dtype: str) -> None:
    tensors, room = cache_tensors(config, dtype), capacity_of(dtype, 40)
    width = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "uint8": 1}
    expected = sum(math.prod(tensor.shape(3, room)) * width[tensor.dtype] for tensor in tensors)
    assert sum(tensor.nbytes(3, room) for tensor in tensors) == cache_bytes(config, dtype, 40, batch=3) == expected


def test_shapes_of_a_managed_cache() -> None:
    sizes = {"batch": 2, "tokens": 5, "capacities": (64, 96), "words": 9}
    positions = {"past_length": (2, 2), "positions": (2, 5)}
    assert managed_shapes(Features(has_positions=True), **sizes) == positions
    every = managed_shapes(Features("mass", 3, has_positions=True, has_branches=True), **sizes)
    assert every == positions | {
        "row_bias": (2, 2, 3),
        "branch_start": (2, 2),
        "branches": (2, 9),
        "query_weight": (2, 5),
        "decay": (2,),
        "past_received.0": (2, 64),
        "past_received.1": (2, 96),
    }
    shared = {"past_length": (2,), "positions": (2, 5), "branch_start": (2,), "branches": (2, 9)}
    assert managed_shapes(TREES, **sizes) == shared
    symbols = {"batch": "batch", "tokens": "tokens", "capacities": ("s0",)}
    assert managed_shapes(Features("last"), **symbols)["past_received.0"] == ("batch", "s0")
