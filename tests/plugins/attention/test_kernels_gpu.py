"""The attention kernels on a GPU, launched on raw addresses, against the formula in float64.

Every buffer lies between guards; output and workspace start as NaN, and so do the cache rows that hold no token yet.
The formula is written here once more, for whole heads at once, so that long caches take no longer than the kernels'
compilation; that it is the same formula is checked against ``tests/helpers/reference.py``, without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.cuda.gpu import current_gpu
from gta_edge.model.config import GTAConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import AttentionKernels, attention_kernels
from gta_edge.plugins.attention.tiling import DECODE_TOKENS, Variant
from tests.helpers import reference
from tests.helpers.gpu_calls import (
    GQA,
    GTA_1B,
    TOLERANCE,
    VARIANTS,
    Call,
    bits,
    exact_output,
    on_gpu,
    rotated,
    sizes_of,
    split_heads,
    synchronize,
    with_new_rows,
)


def _preset_sizes() -> dict[str, Sizes]:
    found: dict[Sizes, str] = {}
    for name in PRESETS:
        config = preset(name)
        if isinstance(config, GTAConfig):
            heads = (config.num_query_heads, config.num_key_heads, config.num_latent_heads)
            found.setdefault(Sizes(*heads, config.key_dim, config.latent_dim, config.hidden_size), name)
    return {name: sizes for sizes, name in found.items()}


SIZES = {
    **_preset_sizes(),
    "6-2-3-heads": sizes_of(6, 2, 3, 48, 80, 1),
    "widest": sizes_of(4, 1, 2, 128, 256, 1),
    "widest-e3": sizes_of(2, 1, 1, 128, 256, 3),
    "narrowest": sizes_of(4, 2, 1, 16, 16, 1),
    "narrowest-e3": sizes_of(4, 2, 1, 16, 16, 3),
    "32-query-heads": sizes_of(32, 1, 1, 64, 128, 1),
    "12-1-4-heads": sizes_of(12, 1, 4, 64, 64, 1),
    "gqa-9-3": GQA,
    "gqa-16-1-gated": Sizes(16, 1, 1, 128, 128, 2048, has_value_decoder=False),
}

every_variant = pytest.mark.parametrize(("compute", "cache"), VARIANTS, ids=lambda name: name)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


# --- memory ----------------------------------------------------------------------------------------------------------


# --- the formula -----------------------------------------------------------------------------------------------------


def test_the_formula_is_that_of_the_reference():
    n_q, n_k, n_c, d_k, d_l, e, tokens, capacity = 4, 2, 1, 6, 4, 2, 3, 9
    rng = np.random.default_rng(0)
    past = np.array([5, 0, 6])
    shapes = {
        "query": (3, tokens, n_q * d_k),
        "key": (3, tokens, n_k * d_k),
        "latent": (3, tokens, n_c * d_l),
        "gate": (3, tokens, n_q * d_l * e),
        "past_key": (3, n_k, capacity, d_k),
        "past_latent": (3, n_c, capacity, d_l),
        "value_decoder": (n_q, d_l, e * d_l),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["cos"], arrays["sin"] = reference.rope_tables(d_k, capacity)
    heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
    expected, present_key, present_latent = reference.grouped_latent_attention(
        **arrays, past_length=past, scale=0.3, **heads
    )

    x = {name: torch.from_numpy(array) for name, array in arrays.items()}
    lengths, tables = torch.from_numpy(past), (x["cos"], x["sin"])
    key = with_new_rows(x["past_key"], rotated(split_heads(x["key"], n_k), lengths, *tables), past.tolist())
    latent = with_new_rows(x["past_latent"], split_heads(x["latent"], n_c), past.tolist())
    for row, length in enumerate(past):
        held = slice(None), slice(0, length + tokens)
        np.testing.assert_allclose(key[row][held].numpy(), present_key[row][held], rtol=0, atol=1e-12)
        np.testing.assert_allclose(latent[row][held].numpy(), present_latent[row][held], rtol=0, atol=1e-12)
    query = rotated(split_heads(x["query"], n_q), lengths, *tables)
    found = exact_output(query, x["gate"], key, latent, lengths, x["value_decoder"], 0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_without_gate_and_value_decoder_the_formula_is_that_of_grouped_query_attention():
    n_q, n_kv, d, tokens, capacity = 6, 2, 4, 3, 9
    rng = np.random.default_rng(0)
    past = np.array([5, 0, 6])
    shapes = {
        "query": (3, tokens, n_q * d),
        "key": (3, tokens, n_kv * d),
        "value": (3, tokens, n_kv * d),
        "past_key": (3, n_kv, capacity, d),
        "past_value": (3, n_kv, capacity, d),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["cos"], arrays["sin"] = reference.rope_tables(d, capacity)
    expected, *_ = reference.grouped_query_attention(
        **arrays, past_length=past, num_heads=n_q, num_key_value_heads=n_kv, scale=0.3
    )
    x, lengths = {name: torch.from_numpy(array) for name, array in arrays.items()}, torch.from_numpy(past)
    key = rotated(split_heads(x["key"], n_kv), lengths, x["cos"], x["sin"])
    key = with_new_rows(x["past_key"], key, past.tolist())
    value = with_new_rows(x["past_value"], split_heads(x["value"], n_kv), past.tolist())
    query = rotated(split_heads(x["query"], n_q), lengths, x["cos"], x["sin"])
    found = exact_output(query, None, key, value, lengths, None, 0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


# --- one call --------------------------------------------------------------------------------------------------------


# --- every variant, every size ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    past: tuple[int, ...]
    capacity: int


DECODE = {
    1: [Shape((0,), 1), Shape((0, 4999, 2500, 17), 5000), Shape((4095,), 5000), Shape((15, 16, 31, 32, 33, 0), 34)],
    3: [Shape((0, 330, 17, 100), 333), Shape((1021,), 5000)],
    16: [Shape((0,), 16), Shape((0, 1984, 15, 16, 1000), 2000)],
}
PREFILL = {
    17: [Shape((0,), 17), Shape((0, 23, 5), 40)],
    100: [Shape((0, 300, 129), 400)],
    300: [Shape((0,), 300), Shape((700, 1), 1000)],
    1000: [Shape((0,), 1000), Shape((537, 64), 1537)],
}
assert max(DECODE) <= DECODE_TOKENS < min(PREFILL)


@on_gpu
@every_variant
@every_size
@pytest.mark.parametrize("tokens", DECODE)
def test_decode_is_exact(sizes, compute, cache, tokens):
    for seed, shape in enumerate(DECODE[tokens]):
        Call(Variant(sizes, compute, cache), shape.past, tokens, shape.capacity, seed=seed).run().check()


@on_gpu
@every_variant
@every_size
@pytest.mark.parametrize("tokens", PREFILL)
def test_prefill_is_exact(sizes, compute, cache, tokens):
    for seed, shape in enumerate(PREFILL[tokens]):
        Call(Variant(sizes, compute, cache), shape.past, tokens, shape.capacity, seed=seed).run().check()


@on_gpu
@every_variant
def test_a_large_batch(compute, cache):
    past = tuple(13 * row % 250 for row in range(70))
    for tokens in (1, 5, 20):
        Call(Variant(GTA_1B, compute, cache), past, tokens, 270).run().check()


# --- what is beyond the cache ----------------------------------------------------------------------------------------


@on_gpu
@every_variant
@pytest.mark.parametrize(("tokens", "capacity"), [(1, 20), (4, 20), (16, 20), (20, 20), (100, 130)])
def test_tokens_that_the_cache_has_no_room_for_are_dropped(compute, cache, tokens, capacity):
    past = (0, capacity, capacity - 1, capacity - tokens // 2, capacity - tokens)
    Call(Variant(GTA_1B, compute, cache), past, tokens, capacity).run().check()


GARBAGE = (-1, -(2**63), 2**63 - 1, 2**31, 2**32, 2**33 + 7, -(2**31) - 1)


@on_gpu
@every_variant
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_lengths_that_make_no_sense_do_no_harm(compute, cache, tokens):
    """They count as the nearest that do: an empty or a full cache."""
    Call(Variant(GTA_1B, compute, cache), (*GARBAGE, 9), tokens, 64).run().check()


@on_gpu
@pytest.mark.parametrize("cache", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_a_row_of_zeros_is_stored_as_zeros(cache, tokens):
    call = Call(Variant(GTA_1B, "bf16", cache), (3, 0), tokens, 64)
    call["key"].zero_()
    call["latent"].zero_()
    call.run()
    for name in ("key", "latent"):
        for row, length in enumerate(call.past):
            assert (call.stored(name)[row, :, length : length + tokens] == 0).all()
    assert max(call.output_errors()[:1]) <= TOLERANCE["bf16"]
    assert (call["output"][1] == 0).all()  # nothing but latents of zero
    call.memory.check_guards()


# --- streams, graphs, and several at a time --------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_two_streams(tokens):
    calls = [Call(Variant(GTA_1B, "bf16", "bf16"), (900, 1000 + i), tokens, 1100, seed=i) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in calls]
    for call, stream in zip(calls, streams, strict=True):
        call.launch(stream.cuda_stream)
    synchronize()
    for call in calls:
        call.check()


@on_gpu
@pytest.mark.parametrize("kind", ["torch", "cuda.core"])
def test_a_stream_may_be_an_object(kind):
    call = Call(Variant(GTA_1B, "bf16", "int8"), (100, 0), 2, 128)
    if kind == "torch":
        stream: Any = torch.cuda.Stream()
    else:
        from cuda.core import Device

        device = Device(0)
        device.set_current()
        stream = device.create_stream()
    call.launch(stream)
    synchronize()
    call.check()


@on_gpu
@every_variant
@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_a_replayed_graph_follows_the_lengths_in_memory(compute, cache, tokens):
    """Two copies of a call append from length to length, one by launches and one by a graph that was captured once."""
    capacity = 1300  # all of it holds tokens: rows beyond a length are those of a sequence that was longer
    eager, graphed = (Call(Variant(GTA_1B, compute, cache), (capacity,) * 2, tokens, capacity) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graphed.launch(stream.cuda_stream)
    synchronize()
    assert torch.equal(graphed.memory.bytes_of("output"), graphed.before["output"])  # captured, not run
    for past in ((0, 700), (tokens, 701), (2 * tokens, 3), (1, capacity - tokens), (17, 64)):
        for call in (eager, graphed):
            call.set_past(past)
        eager.launch()
        graph.replay()
        synchronize()
        for name in ("output", "key_cache", "latent_cache"):
            assert torch.equal(bits(eager[name]), bits(graphed[name])), (name, past)
        assert max(graphed.output_errors()) <= TOLERANCE[compute], past
        graphed.memory.check_guards()


@on_gpu
def test_variants_take_turns():
    kinds = [("bf16", "bf16"), ("fp16", "int8"), ("bf16", "fp8")]
    calls = [
        Call(Variant(sizes, *kind), (200, 31), tokens, 240, seed=seed)
        for seed, (kind, sizes, tokens) in enumerate(product(kinds, (GTA_1B, SIZES["6-2-3-heads"]), (1, 20)))
    ]
    for _ in range(3):  # the same tokens to the same places: nothing changes after the first time
        for call in calls:
            call.launch()
    synchronize()
    for call in calls:
        call.check()


@on_gpu
def test_the_kernels_may_be_loaded_twice():
    variant = Variant(GTA_1B, "bf16", "bf16")
    calls = [Call(variant, (77,), tokens, 128) for tokens in (1, 30) for _ in range(2)]
    again = AttentionKernels(variant, current_gpu())
    assert attention_kernels(variant, current_gpu()) is attention_kernels(variant, current_gpu()) is not again
    for call in calls[::2]:
        call.kernels = again
    for call in calls:
        call.run().check()
    for one, other in ((0, 1), (2, 3)):
        assert torch.equal(bits(calls[one]["output"]), bits(calls[other]["output"]))


@on_gpu
@every_variant
@pytest.mark.parametrize("tokens", [2, 90])
def test_the_same_call_gives_the_same_bits(compute, cache, tokens):
    outputs = [Call(Variant(GTA_1B, compute, cache), (1000, 3, 511), tokens, 1200).run()["output"] for _ in range(3)]
    assert torch.equal(bits(outputs[0]), bits(outputs[1]))
    assert torch.equal(bits(outputs[0]), bits(outputs[2]))
