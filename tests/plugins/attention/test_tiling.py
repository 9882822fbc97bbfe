"""Tiles, grids and the workspace: of any sizes that the kernels take, on any GPU that is known."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.cuda.architecture import ARCHITECTURES, KIB
from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, COMPUTE_TYPES, ROW_CACHE_TYPES
from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.definition import Features, Sizes
from gta_edge.plugins.attention.tiling import DECODE_TOKENS, ROWS, Program, Variant
from tests.helpers.shared_memory import BLOCK_RESERVE, shared_limits

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)

architectures = st.sampled_from([*ARCHITECTURES, "sm_999"])
processors = st.integers(1, 200)
batches = st.integers(1, 64)
capacities = st.integers(1, 65536)


@st.composite
def all_sizes(draw: st.DrawFn) -> Sizes:
    n_q = draw(st.integers(1, 40))
    divisors = st.sampled_from([d for d in range(1, n_q + 1) if n_q % d == 0])
    n_k, n_c = draw(divisors), draw(divisors)
    d_k, d_l = 16 * draw(st.integers(1, 8)), 16 * draw(st.integers(1, 16))
    if draw(st.booleans()):
        return Sizes(n_q, n_k, n_k, d_k, d_l, n_q * d_l, draw(st.booleans()), False)
    return Sizes(n_q, n_k, n_c, d_k, d_l, n_q * d_l * draw(st.integers(1, 4)), draw(st.booleans()))


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    compute = draw(st.sampled_from(COMPUTE_TYPES))
    return Variant(draw(all_sizes()), compute, draw(st.sampled_from([compute, "int8", "fp8"])))


# --- shared memory -------------------------------------------------------------------------------------------------


def check_shared(program: Program, architecture: str) -> None:
    per_processor, per_block = shared_limits(architecture)
    assert 0 < program.shared_bytes <= per_block
    assert program.shared_bytes % 16 == 0
    assert program.resident_blocks >= 1
    assert program.resident_blocks * (program.shared_bytes + BLOCK_RESERVE) <= per_processor
    assert program.threads % 32 == 0
    assert program.threads <= 1024


@given(variants(), architectures)
@SETTINGS
def test_decode_fits_the_shared_memory(variant: Variant, architecture: str) -> None:
    program = tiling.decode_program(variant, architecture)
    check_shared(program, architecture)
    assert program.tile("GTA_DECODE_SHARED_BYTES") == program.shared_bytes
    assert program.tile("GTA_DECODE_STAGES") >= 2
    # What needs no leave of the driver.
    assert tiling.combine_grid(program, 8, 1, 1).shared_bytes <= 48 * KIB


@given(variants(), architectures)
@SETTINGS
def test_prefill_fits_the_shared_memory(variant: Variant, architecture: str) -> None:
    programs = tiling.prefill_programs(variant, architecture)
    tiles = [program.tile("GTA_PREFILL_ROW_TILES") for program in programs]
    assert tiles == sorted(tiles, reverse=True)
    assert tiles[-1] == 1
    for program in programs:
        check_shared(program, architecture)
        assert program.tile("GTA_PREFILL_SHARED_BYTES") == program.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cache", ["fp16", "int8", "fp8"])
def test_the_published_sizes_have_two_decode_blocks_on_a_multiprocessor_where_shared_memory_is_large(
    architecture: str, cache: str
) -> None:
    program = tiling.decode_program(Variant(Sizes(5, 1, 1, 64, 128, 1280), "fp16", cache), architecture)
    per_processor, _ = shared_limits(architecture)
    assert program.resident_blocks >= (2 if per_processor >= 164 * KIB and cache != "fp16" else 1)


@given(variants(), architectures)
@SETTINGS
def test_without_a_value_decoder_less_memory_is_needed(variant: Variant, architecture: str) -> None:
    sizes = variant.sizes
    if sizes.has_value_decoder:
        return
    decoded = replace(variant, sizes=replace(sizes, has_value_decoder=True))
    with_one, without = (tiling.decode_program(each, architecture) for each in (decoded, variant))
    assert without.shared_bytes == with_one.shared_bytes
    assert without.tile("GTA_COMBINE_SHARED_BYTES") < with_one.tile("GTA_COMBINE_SHARED_BYTES")
    assert tiling.combine_grid(without, 8, 1, 1).grid[2] == 1
    for one, other in zip(*(tiling.prefill_programs(each, architecture) for each in (variant, decoded)), strict=True):
        assert one.tile("GTA_PREFILL_KEYS") >= other.tile("GTA_PREFILL_KEYS")


@pytest.mark.parametrize("groups", [1, 3, 7, 8, 16])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_each_group_of_query_heads_reads_the_rows_of_one_head(groups: int, width: int) -> None:
    """So every cached row is read once, by the blocks of its own key head."""
    sizes = Sizes(4 * groups, 4, 4, width, width, 4 * groups * width, False, False)
    for architecture in ARCHITECTURES:
        program = tiling.decode_program(Variant(sizes, "bf16", "bf16"), architecture)
        assert program.tile("GTA_DECODE_GROUPS") == sizes.num_key_heads
        assert tiling.decode_grid(program, 5, 2, 1).grid == (5, sizes.num_key_heads, 2)


# --- grids -----------------------------------------------------------------------------------------------------------


@given(variants(), architectures, processors, batches, st.integers(1, DECODE_TOKENS), capacities)
@SETTINGS
def test_decode_covers_every_row_and_no_more_blocks_than_are_of_use(
    variant: Variant, architecture: str, processors: int, batch: int, tokens: int, capacity: int
) -> None:
    program, sizes = tiling.decode_program(variant, architecture), variant.sizes
    splits = tiling.decode_splits(program, processors, batch, tokens, capacity)
    x, y, z = tiling.decode_grid(program, splits, batch, tokens).grid
    groups = program.tile("GTA_DECODE_GROUPS")
    assert (x, z) == (splits, batch)
    assert sizes.num_query_heads % groups == 0
    assert y % groups == 0
    rows, block_rows = sizes.num_query_heads // groups * tokens, ROWS * program.tile("GTA_DECODE_WARPS_M")
    assert (y // groups - 1) * block_rows < rows <= y // groups * block_rows

    # more blocks than run at once only where a split would be too long for the row of a batch that ends last
    resident, longest = processors * min(2, program.resident_blocks), tiling.MAX_SPLIT_TOKENS
    assert splits * y * z <= resident or (splits - 1) * longest < capacity
    assert splits >= 1
    assert (splits - 1) * program.tile("GTA_DECODE_MIN_TOKENS") < capacity  # a full cache leaves none without work


@given(variants(), processors, batches, st.integers(1, DECODE_TOKENS))
@SETTINGS
def test_combine_covers_every_column_and_has_no_block_without_a_row(
    variant: Variant, processors: int, batch: int, tokens: int
) -> None:
    program, sizes = tiling.decode_program(variant, "sm_90"), variant.sizes
    launch = tiling.combine_grid(program, processors, batch, tokens)
    x, y, z = launch.grid
    assert 1 <= x <= batch * tokens
    assert y == sizes.num_query_heads
    assert y * z * program.tile("GTA_COMBINE_COLUMNS") == sizes.hidden_size
    assert launch.threads == program.tile("GTA_COMBINE_THREADS")


@given(variants(), architectures, batches, st.integers(1, 40000))
@SETTINGS
def test_prefill_covers_every_token(variant: Variant, architecture: str, batch: int, tokens: int) -> None:
    sizes = variant.sizes
    for program in tiling.prefill_programs(variant, architecture):
        tile = ROWS * program.tile("GTA_PREFILL_ROW_TILES") * program.tile("GTA_PREFILL_WARPS")
        x, y, z = tiling.prefill_grid(program, batch, tokens).grid
        assert (x, z) == (sizes.num_query_heads, batch)
        assert (y - 1) * tile < tokens <= y * tile
        launch = tiling.append_grid(program, batch, tokens)
        x, y, z = launch.grid
        warps = program.tile("GTA_APPEND_WARPS")
        assert launch.threads == 32 * warps
        assert (x - 1) * warps < tokens <= x * warps
        assert (y, z) == (sizes.num_key_heads + sizes.num_latent_heads, batch)


@given(variants(), st.integers(1, 100), batches, st.integers(1, DECODE_TOKENS))
@SETTINGS
def test_the_workspace_holds_a_mix_and_two_numbers_per_row_and_split(
    variant: Variant, splits: int, batch: int, tokens: int
) -> None:
    program, sizes = tiling.decode_program(variant, "sm_90"), variant.sizes
    rows = batch * tokens * sizes.num_query_heads
    floats = rows * splits * sizes.latent_dim + rows * splits * 2
    assert sum(tiling.workspace_parts(program, splits, batch, tokens, 64).values()) == 4 * floats


def test_more_heads_than_shared_memory_can_observe_are_refused() -> None:
    sizes, features = Sizes(256, 1, 1, 16, 16, 256 * 16), Features("mass", 0, False, True)
    with pytest.raises(BackendError) as error:
        tiling.decode_program(Variant(sizes, "fp16", "fp16", features), "sm_86")
    assert str(error.value) == (
        "observing attention of 256 query heads takes 131072 bytes of shared memory; "
        "expected at most 101376: choose another backend"
    )


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 24, 130, 144])
def test_a_key_width_that_is_refused_lists_what_is_allowed(width: int) -> None:
    with pytest.raises(BackendError) as error:
        Variant(Sizes(1, 1, 1, width, 16, 16), "fp16", "fp16")
    assert str(error.value) == f"the kernels have no key width of {width}; expected a multiple of 16 from 16 to 128"


@pytest.mark.parametrize("width", [1, 8, 100, 272])
def test_a_latent_width_that_is_refused_lists_what_is_allowed(width: int) -> None:
    with pytest.raises(BackendError) as error:
        Variant(Sizes(1, 1, 1, 16, width, width), "fp16", "fp16")
    assert str(error.value) == f"the kernels have no latent width of {width}; expected a multiple of 16 from 16 to 256"


@pytest.mark.parametrize("compute", ["fp32", "int8", ""])
def test_a_compute_type_that_is_refused_lists_what_is_allowed(compute: str) -> None:
    with pytest.raises(BackendError, match="fp16 or bf16"):
        Variant(Sizes(1, 1, 1, 16, 16, 16), compute, compute)


@pytest.mark.parametrize(("compute", "cache"), [("fp16", "bf16"), ("bf16", "fp16"), ("fp16", "int2")])
def test_a_cache_type_that_is_refused_lists_what_is_allowed(compute: str, cache: str) -> None:
    with pytest.raises(BackendError, match=f"expected one of {compute}, int8, fp8, int4, int4v2"):
        Variant(Sizes(1, 1, 1, 16, 16, 16), compute, cache)


def test_every_width_that_is_listed_is_taken() -> None:
    for compute in COMPUTE_TYPES:
        for cache, step in {compute: 16, **dict.fromkeys(ROW_CACHE_TYPES, 16), "int4": 32, "int4v2": 64}.items():
            for d_k in range(16, 129, 16):
                for d_l in range(step, 257, step):
                    defines = Variant(Sizes(2, 1, 2, d_k, d_l, 6 * d_l), compute, cache).defines()
                    assert defines["GTA_EXPANSION"] == 3


@pytest.mark.parametrize(("cache", "width", "multiple"), [("int4", 48, 32), ("int4v2", 96, 64)])
def test_values_in_blocks_fill_units_of_16_bytes(cache: str, width: int, multiple: int) -> None:
    with pytest.raises(BackendError) as error:
        Variant(Sizes(1, 1, 1, 16, width, width), "fp16", cache)
    problem = f"a cache of type {cache} has no latent width of {width}"
    assert str(error.value) == f"{problem}; expected a multiple of {multiple}"


@pytest.mark.parametrize("cache", BLOCK_CACHE_TYPES)
def test_rows_of_a_cache_in_blocks_are_not_managed(cache: str) -> None:
    for features, names in (
        (Features(None, 0, True, False), "positions"),
        (Features("mass", 2, False, True), "row_bias, branch_start, branches, past_received, query_weight, decay"),
    ):
        with pytest.raises(BackendError) as error:
            Variant(Sizes(1, 1, 1, 16, 64, 64), "bf16", cache, features)
        problem = f"a cache of type {cache} takes no {names}: its rows cannot be managed"
        assert str(error.value) == f"{problem}; choose one of bf16, int8, fp8"
