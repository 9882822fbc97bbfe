"""When a cache grows, and what is left of it where growing fails; what sessions do is in tests/runtime/sessions."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import CapacityError, InputError
from gta_edge.model.config import parse_config
from gta_edge.numerics.dtypes import CACHE_TYPES
from gta_edge.runtime.cache_state import CacheState
from tests.helpers import reference

P = 100
CONFIG = parse_config(
    reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, max_position_embeddings=P)
)


class Buffers:
    """Memory of a backend that has none: the sizes that it was asked for."""

    def __init__(self, cache: CacheState, fails: BaseException | None = None) -> None:
        self.cache, self.fails = cache, fails
        self.calls: list[tuple[int, int] | str] = []

    def resize(self, batch: int, capacities: Sequence[int]) -> None:
        with self.cache.replacing(batch, self.clear):
            assert capacities == (capacities[0],) * CONFIG.num_hidden_layers
            self.calls.append((batch, capacities[0]))
            if self.fails:
                raise self.fails

    def clear(self) -> None:
        self.calls.append("cleared")


@pytest.fixture
def cache() -> CacheState:
    return CacheState(CONFIG, capacity_step=8)


def hold(cache: CacheState, lengths: list[int], resize: Callable[[int, Sequence[int]], None]) -> None:
    """Make room for rows of these lengths, and fill it."""
    cache.reserve(len(lengths), max(lengths), resize)
    cache.length = np.array(lengths)


# --- capacity --------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(step=st.integers(1, 300), positions=st.integers(1, 10**5), data=st.data())
def test_capacity_follows_length_in_steps(step: int, positions: int, data: st.DataObject) -> None:
    cache = CacheState(CONFIG, capacity_step=step, max_length=positions)
    tokens = data.draw(st.integers(1, positions))
    found = cache.capacity_for(tokens)
    assert tokens <= found <= positions
    assert found % step == 0 or found == positions
    assert found - tokens < max(step, tokens / 8)  # a sixteenth, in whole steps
    if tokens < 32 * step:
        assert found == min(step * -(-tokens // step), positions)


def test_it_grows_when_it_has_to_and_not_before(cache: CacheState) -> None:
    buffers = Buffers(cache)
    for tokens in range(1, P + 1):
        hold(cache, [tokens, 1], buffers.resize)
    first, *grown = [call for call in buffers.calls if call != "cleared"]
    assert first == (2, 8)
    assert grown == [(2, n) for n in (*range(16, P, 8), P)]
    cache.reset()
    hold(cache, [P, P], buffers.resize)
    assert buffers.calls[-1] == grown[-1]
    assert len(buffers.calls) == 2 + len(grown)  # cleared once, for two rows instead of one


def test_another_number_of_rows_begins_anew(cache: CacheState) -> None:
    buffers = Buffers(cache)
    hold(cache, [30], buffers.resize)
    with pytest.raises(InputError, match=r"ids have 2 rows and the cache holds 1; call reset\(\)"):
        cache.past_for(2)
    cache.truncate(np.array(0), 0)
    assert cache.past_for(2).tolist() == [0, 0]
    assert cache.length.tolist() == [0]  # asking changes nothing
    cache.reserve(2, 3, buffers.resize)
    assert buffers.calls == [(1, 32), "cleared", (2, 8)]
    assert (cache.length.tolist(), cache.capacity) == ([0, 0], 8)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), CapacityError("no", "give less")], ids=repr)
@pytest.mark.parametrize("rows", [1, 2])
def test_where_growing_fails_nothing_is_left(cache: CacheState, error: BaseException, rows: int) -> None:
    buffers = Buffers(cache)
    hold(cache, [5], buffers.resize)
    if rows > 1:
        cache.reset()
    buffers.fails = error
    with pytest.raises(type(error)):
        cache.reserve(rows, 20, buffers.resize)
    assert buffers.calls[-1] == "cleared"
    assert (cache.length.tolist(), cache.capacity) == ([0] * rows, 0)
    buffers.fails = None
    cache.reserve(rows, 5, buffers.resize)
    assert buffers.calls[-1] == (rows, 8)


def test_a_backend_that_refuses_before_it_begins_has_lost_nothing(cache: CacheState) -> None:
    hold(cache, [5], Buffers(cache).resize)
    cache.truncate(np.array([0]), [0])

    def refuse(batch: int, capacities: Sequence[int]) -> None:
        raise InputError(f"{batch} rows", "give fewer")

    with pytest.raises(InputError):
        cache.reserve(7, 1, refuse)
    assert (cache.length.tolist(), cache.capacity) == ([0], 8)


def test_the_bound_is_the_models_or_an_engines() -> None:
    lengths = np.array([P - 1])
    with pytest.raises(CapacityError, match=rf"would reach {P + 1} .*; the model has {P} positions: truncate, reset"):
        CacheState(CONFIG).plan(lengths, np.array([2]), 2, 0)
    assert [(part.start, part.stop) for part in CacheState(CONFIG).plan(lengths, np.array([1]), 1, 0)] == [(0, 1)]
    engine = CacheState(CONFIG, max_length=20, limit="the engine was built with --max-length 20")
    with pytest.raises(CapacityError, match=r"would reach 21 .*; the engine was built with --max-length 20: "):
        engine.plan(np.array([0]), np.array([21]), 21, 0)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", *CACHE_TYPES])
def test_bytes_are_those_of_its_tensors(dtype: str) -> None:
    cache = CacheState(CONFIG, dtype)
    assert cache.nbytes(3, (17,) * CONFIG.num_hidden_layers) == sum(tensor.nbytes(3, 17) for tensor in cache.tensors)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_cache_on_the_host_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch, on_host: bool) -> None:
    cache = CacheState(CONFIG, "fp16", on_host=on_host, capacity_step=8)
    bytes_of_64 = 2 * 64 * CONFIG.num_hidden_layers * (2 * 16 + 8) * 2
    monkeypatch.setattr("gta_edge.runtime.cache_state.available_bytes", lambda: bytes_of_64)
    if on_host:
        with pytest.raises(CapacityError, match=r"2 rows of 64 tokens take .* more of memory than the session has"):
            cache.check_memory(2, 64, 1, 0)  # with what the step itself takes
    else:
        cache.check_memory(2, 64, 1, 0)
    with pytest.raises(CapacityError):
        cache.check_memory(2, 64, 1, bytes_of_64 + 1)
