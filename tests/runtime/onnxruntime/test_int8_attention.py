"""Attention on a cache of int8, in a graph of one layer: against a reference in float64 that rounds the same way."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from gta_edge.runtime.onnxruntime.int8_cache import MAX_ROWS, rows_for
from gta_edge.runtime.onnxruntime.passes import int8_attention
from gta_edge.runtime.onnxruntime.passes.expand_attention import ExpandAttentionPass
from tests.helpers import reference
from tests.helpers.attention_models import Sizes, all_sizes, arrays, managed_sizes, model
from tests.helpers.attention_models import attended as formula
from tests.helpers.int8_reference import Attended, Cache, attend
from tests.helpers.onnx_runs import run

TOLERANCE = (
    1e-4  # largest error over the standard deviation of the exact result: a weight may be one level of 65535 off
)
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
FEW = 4


@pytest.fixture(autouse=True, scope="module")
def small_limits() -> Iterator[None]:
    """A few more tokens are many, so that small models take both ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_attention, "MAX_FEW_TOKENS", FEW)
        yield


def graph_of(inputs: dict[str, np.ndarray], sizes: Sizes) -> ir.Model:
    """The op alone, its value decoder stored, on a cache of int8."""
    proto = model(sizes)
    if sizes.decoder:
        (declared,) = (value for value in proto.graph.input if value.name == "value_decoder")
        proto.graph.input.remove(declared)
        proto.graph.initializer.append(numpy_helper.from_array(inputs["value_decoder"], "value_decoder"))
    graph = ir.from_proto(proto)
    assert ExpandAttentionPass(int8=True)(graph).modified
    return graph


def caches_of(inputs: dict[str, np.ndarray]) -> tuple[Cache, Cache]:
    return Cache.of(inputs["past_key"]), Cache.of(inputs["past_latent"])


def feeds_of(inputs: dict[str, np.ndarray], past: tuple[Cache, Cache]) -> dict[str, np.ndarray]:
    key, latent = past
    own = {name: value for name, value in inputs.items() if name != "value_decoder"}
    return own | {
        "past_key": np.ascontiguousarray(key.codes.swapaxes(2, 3)).astype(np.int8),
        "past_latent": latent.codes.astype(np.int8),
        "past_key_scale": key.scales[:, :, None].astype(np.float32),
        "past_latent_scale": latent.scales[:, :, None].astype(np.float32),
    }


def attended(inputs: dict[str, np.ndarray], past: tuple[Cache, Cache], sizes: Sizes) -> Attended:
    """What the graph computes, rows in order."""
    feeds = feeds_of(inputs, past)
    found = run(graph_of(inputs, sizes), feeds)
    assert list(found) == ["output", "present_key", "present_latent", "present_key_scale", "present_latent_scale"]
    for name, value in list(found.items())[1:]:
        before = feeds[name.replace("present", "past")]
        assert (value.dtype, value.shape) == (before.dtype, before.shape)
    key = Cache(found["present_key"].swapaxes(2, 3).astype(np.float64), found["present_key_scale"][:, :, 0])
    latent = Cache(found["present_latent"].astype(np.float64), found["present_latent_scale"][:, :, 0])
    return Attended(found["output"], key, latent)


def assert_attends(inputs: dict[str, np.ndarray], sizes: Sizes) -> Attended:
    past = caches_of(inputs)
    found = attended(inputs, past, sizes)
    exact = attend(inputs, past, sizes, in_place=sizes.tokens <= FEW)
    assert reference.relative_error(found.output, exact.output) <= TOLERANCE
    for cache, expected, before in ((found.key, exact.key, past[0]), (found.latent, exact.latent, past[1])):
        np.testing.assert_array_equal(cache.codes, expected.codes)
        np.testing.assert_allclose(cache.scales, expected.scales, rtol=1e-6)
        for row, length in enumerate(sizes.past):  # no other row has changed by a bit
            new = slice(length, length + sizes.tokens)
            unchanged = before.scales[row].astype(np.float32)
            np.testing.assert_array_equal(np.delete(cache.scales[row], new, 1), np.delete(unchanged, new, 1))
    return found


@SETTINGS
@given(sizes=all_sizes())
def test_against_a_reference_that_rounds_the_same_way(sizes: Sizes) -> None:
    assert_attends(arrays(replace(sizes, garbage=0.0)), sizes)


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_rounding_is_all_that_it_costs(tokens: int) -> None:
    sizes = Sizes(tokens=tokens, past=(40, 3), capacity=50, positions=50)
    inputs = arrays(sizes)
    heads = dict(zip(("num_query_heads", "num_key_heads", "num_latent_heads"), sizes.heads, strict=True))
    exact = reference.grouped_latent_attention(**inputs, **heads, scale=sizes.scale)[0]
    error = reference.relative_error(attended(inputs, caches_of(inputs), sizes).output, exact)
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 2, 2), (6, 2, 3)], ids=str)
def test_what_stands_beyond_the_visible_rows_does_not_matter(heads: tuple[int, int, int], tokens: int) -> None:
    sizes = Sizes(*heads, past=(3, 0, 5), tokens=tokens, capacity=12)
    inputs = arrays(sizes)
    outputs = []
    for garbage in (0.0, 1e30):
        past = caches_of(inputs)
        for cache in past:
            for row, length in enumerate(sizes.past):
                cache.scales[row, :, length:] = garbage
                cache.codes[row, :, length:] = 127 if garbage else 0
        outputs.append(attended(inputs, past, sizes).output)
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("name", ["query", "key", "latent", "all"])
def test_rows_of_zeros(name: str, tokens: int) -> None:
    """Their largest magnitude is zero, and nothing is divided by it."""
    sizes = Sizes(tokens=tokens, past=(2, 0), capacity=8)
    inputs = arrays(sizes)
    for each in ("query", "key", "latent") if name == "all" else (name,):
        inputs[each][:, -1] = 0
        if each == "query":
            continue
        inputs[f"past_{each}"][:, :, 0] = 0
    found = assert_attends(inputs, sizes)
    assert np.isfinite(found.output).all()


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_magnitudes_far_apart(tokens: int) -> None:
    """A row's scale is its own: one of large values does not round another's to nothing."""
    sizes = Sizes(tokens=tokens, past=(6, 0), capacity=12)
    inputs = arrays(sizes)
    inputs["past_latent"][0, :, 2] *= 1e4
    inputs["past_latent"][0, :, 3] *= 1e-6
    inputs["past_key"][0, :, 4] *= 1e-5
    inputs["latent"] *= 1e-3
    assert_attends(inputs, sizes)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["query", "key", "all"])
def test_what_is_no_number_is_not_made_one(name: str, value: float, tokens: int) -> None:
    """The output of the sequence that it is in is none either, and the other sequence's is as it was.

    A hidden state that is none makes all three so.
    """
    sizes = Sizes(n_q=2, n_k=1, n_c=1, tokens=tokens, past=(2, 3), capacity=9)
    clean = arrays(sizes)
    inputs = {key: array.copy() for key, array in clean.items()}
    for each in ("query", "key", "latent") if name == "all" else (name,):
        inputs[each][0, 0] = value
    past = caches_of(clean)
    found, expected = attended(inputs, past, sizes), attended(clean, past, sizes)
    assert not np.isfinite(found.output[0, 0]).any()
    np.testing.assert_array_equal(found.output[1], expected.output[1])


def test_sums_stay_within_32_bits() -> None:
    """The worst there may be: every weight and every code of the largest size."""
    assert MAX_ROWS * 255 * 127 < 2**31 <= (MAX_ROWS + 1) * 255 * 127
    rows = 4096
    sizes = Sizes(n_q=2, n_k=1, n_c=1, tokens=1, past=(rows - 1,), capacity=rows, positions=rows, gate=False)
    inputs = arrays(replace(sizes, past=(0,), capacity=1)) | {"past_length": np.array([rows - 1])}
    inputs["past_key"] = np.zeros((1, 1, rows, sizes.d_k), np.float32)
    inputs["past_latent"] = np.full((1, 1, rows, sizes.d_l), 2.0, np.float32)
    inputs["query"][...] = 0
    inputs["latent"][...] = 2
    past = caches_of(inputs)
    found = attended(inputs, past, sizes)
    decoder = inputs["value_decoder"].astype(np.float64)
    expected = 2 * (1 + decoder.sum(axis=1)).reshape(1, 1, -1)
    assert reference.relative_error(found.output, expected) <= TOLERANCE


@given(st.integers(1, MAX_ROWS))
def test_channels_of_a_key_do_not_lie_a_multiple_of_512_bytes_apart(capacity: int) -> None:
    assert 0 <= rows_for(capacity) - capacity <= 64
    assert rows_for(capacity) % 512


# --- a managed cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=managed_sizes())
def test_with_a_managed_cache_it_is_near_the_formula(in_place: bool, sizes: Sizes) -> None:
    """Off by what rounding costs; what observes is off by as little, and a query that sees no row gives zeros."""
    sizes = replace(sizes, garbage=0.0, tokens=min(sizes.tokens, FEW))
    inputs = arrays(sizes)
    past = caches_of(inputs)
    rounded = inputs | {"past_key": past[0].values, "past_latent": past[1].values}
    exact = formula(rounded, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_attention, "MAX_FEW_TOKENS", FEW if in_place else 0)
        found = run(graph_of(inputs, sizes), feeds_of(inputs, past))
    nothing = ~(exact.weights > 0).any(axis=-1)  # [B, T, n_q]
    by_head = found["output"].reshape(*nothing.shape, -1)
    assert (by_head[nothing] == 0).all()
    spread = max(float(exact.output.std()), 0.1)
    assert np.abs(found["output"] - exact.output).max() <= 0.15 * spread
    if sizes.features.observe == "mass":
        for row, length in enumerate(sizes.past):
            in_use = slice(length + sizes.tokens)
            difference = np.abs(found["present_received"][row, in_use] - exact.received[row, in_use])
            assert difference.max() <= 0.05 * max(1.0, float(np.abs(exact.received[row, in_use]).max()))
            got = found["present_received"][row, in_use].sum()
            assert abs(got - exact.received[row, in_use].sum()) <= 1e-3 * max(1.0, abs(got))
    elif sizes.features.observe == "last":
        assert set(np.unique(found["present_received"])) <= {
            *np.unique(inputs["past_received"]),
            -1.0,
            *_places(inputs),
        }


def _places(inputs: dict[str, np.ndarray]) -> set[float]:
    tokens = inputs["query"].shape[1]
    rows = inputs["past_length"][:, None] + np.arange(tokens)
    return {float(place) for place in np.ravel(inputs.get("positions", rows))}
