"""The CUDA kernels' logic, on the host: the very sources, run by the simulation, against float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gta_edge.plugins.attention import launches as plan
from gta_edge.plugins.domain import KERNELS
from tests.helpers import attention_cases as cases
from tests.helpers import reference
from tests.helpers.attention_simulation import ARCHITECTURE, check, programs_of, simulate, simulator
from tests.helpers.kernel_simulator import LaunchSpec, SimulationError, Simulator, available, shared_directory

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")

# --- what is tried ----------------------------------------------------------------------------------------------------

# Heads, d_k, d_l, e. The presets' first; then d_k and d_l at their ends and at odd multiples of 16, heads that share
# keys and latents in different groups, groups of more than one tile of rows, and of more rows than a block takes.
SIZES = {
    "gta-1b": ((5, 1, 1), 64, 128, 2),
    "gta4-500m": ((10, 1, 2), 64, 128, 1),
    "gta1-160m": ((3, 1, 1), 64, 128, 2),
    "widest": ((4, 1, 1), 128, 256, 2),
    "narrowest": ((2, 2, 1), 16, 16, 1),
    "uneven": ((6, 2, 3), 48, 80, 2),
    "all own": ((4, 4, 4), 64, 64, 3),
    "two tiles of rows": ((40, 2, 2), 16, 32, 1),
    "many latents": ((12, 1, 12), 64, 64, 1),
    "more rows than a block": ((150, 1, 1), 16, 16, 1),
}
TYPES = [("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "int8"), ("bf16", "int8"), ("fp16", "fp8"), ("bf16", "fp8")]
EVERY_TYPE = ("gta-1b", "uneven")
VARIANTS = {
    f"{name}, {compute}, {cache} cache": cases.variant(*SIZES[name], compute, cache)
    for i, name in enumerate(SIZES)
    for j, (compute, cache) in enumerate(TYPES)
    if name in EVERY_TYPE or j in (i % 2, 2 + i % 4)  # of the others, one cache as computed and one of 8 bits
}
# Groups of 1, 3, 7, 8 and 16 query heads, and what has only one of gate and value decoder.
GQA, GQA_INT8, GATED = "9 heads of 64, 3 of keys", "14 heads of 64, 2 of keys, int8 cache", "16 gated heads, 1 of keys"
VARIANTS |= {
    GQA: cases.grouped_query(9, 3, 64, "bf16"),
    GQA_INT8: cases.grouped_query(14, 2, 64, "fp16", "int8"),
    "8 heads of 128, 1 of keys, fp8 cache": cases.grouped_query(8, 1, 128, "bf16", "fp8"),
    "3 heads of 96, 3 of keys": cases.grouped_query(3, 3, 96, "fp16"),
    GATED: cases.grouped_query(16, 1, 128, "bf16", "int8", gate=True),
    "gta-1b without a gate, fp8 cache": cases.ungated(cases.variant(*SIZES["gta-1b"], "fp16", "fp8")),
}


@pytest.fixture(scope="session")
def builds() -> Path:
    """Where the programs lie: all of them, since two compilers take half the time of one."""
    directory = shared_directory()
    programs = [program for variant in VARIANTS.values() for program in programs_of(variant).all]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda program: simulator(program).compile(directory), programs))
    return directory


# --- against float64 --------------------------------------------------------------------------------------------------


def test_the_expected_values_are_those_of_the_reference():
    of = cases.variant((6, 2, 3), 16, 32, 2, "fp16")
    case = cases.make(of, (0, 4), 3, 9)
    case.arrays = {name: np.nan_to_num(array.astype(np.float64)) for name, array in case.arrays.items()}
    present = cases.appended(case, {name: case.arrays[f"{name}_cache"] for name in ("key", "latent")})
    names = (
        "query",
        "key",
        "latent",
        "gate",
        "key_cache",
        "latent_cache",
        "past_length",
        "cos",
        "sin",
        "value_decoder",
    )
    heads = {"num_query_heads": 6, "num_key_heads": 2, "num_latent_heads": 3, "scale": case.scale}
    output, key, latent = reference.grouped_latent_attention(*(case.arrays[name] for name in names), **heads)
    for found, expected in (
        (present["key"], key),
        (present["latent"], latent),
        (cases.attended(case, present), output),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-12)


DECODES = [((0, 38, 99), 1, 100, 3), ((84,), 16, 100, 4), ((129,), 1, 130, 40), ((0, 60), 3, 75, 9)]


def decodes() -> Iterator[tuple[str, tuple[int, ...], int, int, int]]:
    """Each call in every type, with gta-1b; of each other variant one token and several, in turn."""
    for i, name in enumerate(VARIANTS):
        for j, call in enumerate(DECODES):
            if name.startswith("gta-1b") or i % 2 == j // 2:
                yield (name, *call)


@pytest.mark.parametrize(("name", "lengths", "tokens", "capacity", "processors"), [*decodes()])
def test_decode(builds, name, lengths, tokens, capacity, processors):
    check(cases.make(VARIANTS[name], lengths, tokens, capacity), builds, processors=processors)


def test_decode_with_the_splits_that_a_gpu_gets(builds):
    of = cases.variant(*SIZES["gta-1b"], "fp16")
    check(cases.make(of, (0, 255, 256, 699), 1, 700), builds, processors=8, min_tokens=None)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill(builds, name):
    """Each program with both calls, with gta-1b; of each other variant each with one."""
    calls = [((0, 61), 35, 97), ((70,), 1, 71)]
    for program in range(len(plan.programs_for(VARIANTS[name], ARCHITECTURE).prefill)):
        for lengths, tokens, capacity in calls if name.startswith("gta-1b") else [calls[program % 2]]:
            check(cases.make(VARIANTS[name], lengths, tokens, capacity), builds, prefill=program)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gta-1b")])
def test_prefill_of_several_tiles(builds, name):
    check(cases.make(VARIANTS[name], (0, 150), 131, 290), builds, processors=1)


@pytest.mark.parametrize("name", ["gta-1b, bf16, bf16 cache", "uneven, fp16, int8 cache"])
@pytest.mark.parametrize("tokens", [1, 16, 20])
def test_a_cache_of_one_row_and_one_that_is_just_full(builds, name, tokens):
    check(cases.make(VARIANTS[name], (0,), 1, 1), builds)
    check(cases.make(VARIANTS[name], (64 - tokens,), tokens, 64), builds)


@pytest.mark.parametrize("name", ["gta-1b, fp16, fp16 cache", "gta-1b, bf16, fp8 cache"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("length", [-(2**62), -1, 58, 60, 61, 2**31 + 7, 2**63 - 1])
def test_lengths_are_not_trusted(builds, name, tokens, length):
    """Lengths outside 0 to S count as those; what would lie past the capacity is dropped."""
    case = cases.make(VARIANTS[name], (length, 7), tokens, 60)
    if length < 0 or length + tokens <= 60:
        return check(case, builds)
    for part in ("key", "latent"):  # all of that row's cache is read: let it be numbers
        case.arrays[f"{part}_cache"][0] = 1
    return check(case, builds)


@pytest.mark.parametrize("name", ["gta-1b, fp16, fp16 cache", "gta-1b, fp16, fp8 cache"])
@pytest.mark.parametrize("tokens", [1, 18])
def test_scores_that_are_far_apart(builds, name, tokens):
    """One token takes nearly all the weight, and the largest score comes late or early."""
    case = cases.make(VARIANTS[name], (90,), tokens, 120, seed=1, sharpness=30.0)
    case.arrays["cos"][:], case.arrays["sin"][:] = 1, 0  # rounding a rotated query would move such scores a little
    check(case, builds)


@pytest.mark.parametrize("name", ["gta-1b, fp16, int8 cache", "uneven, bf16, fp8 cache"])
def test_tokens_of_zeros_and_of_very_different_sizes(builds, name):
    case = cases.make(VARIANTS[name], (40,), 5, 50)
    case.arrays["cos"][:], case.arrays["sin"][:] = 1, 0
    for part in ("key", "latent"):
        case.arrays[part][0, 1] = 0
        case.arrays[part][0, 2] *= 100
        case.arrays[part][0, 3] *= 1e-3
    check(case, builds)


@pytest.mark.parametrize("seed", range(8))
def test_sizes_at_random(builds, seed):
    rng = np.random.default_rng(seed)
    n_k, n_c = (int(n) for n in rng.choice([1, 2, 3], 2))
    n_q = int(np.lcm(n_k, n_c) * rng.integers(1, 4))
    compute, cache = TYPES[seed % len(TYPES)]
    widths = 16 * int(rng.integers(1, 9)), 16 * int(rng.integers(1, 17))
    of = cases.variant((n_q, n_k, n_c), *widths, int(rng.integers(1, 4)), compute, cache)
    if seed >= 6:
        of = cases.grouped_query(n_q, n_k, widths[0], compute, cache, gate=seed == 6)
    capacity = int(rng.integers(20, 150))
    for tokens in (1, int(rng.integers(2, 17)), int(rng.integers(17, 20))):
        lengths = tuple(int(n) for n in rng.integers(0, capacity - tokens + 1, 2))
        check(cases.make(of, lengths, tokens, capacity, seed), builds, processors=int(rng.integers(1, 30)))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gta-1b, fp16") and "8" in name])
@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_rows_of_zeros_do_not_drown_the_others(builds, name, tokens, scale):
    """Weight times scale is what meets the codes: a row that weighs nothing must not take the 16 bits' range."""
    of = VARIANTS[name]
    case = cases.make(of, (60,), tokens, 80)
    for part in ("key", "latent"):
        case.arrays[f"{part}_scale"][:, :, :60] *= np.float32(1e-3)
        case.arrays[part] *= np.array(1e-3, case.arrays[part].dtype)
        case.arrays[f"{part}_cache"][:, :, 7] = 0
        if scale is not None:  # as others may write it
            case.arrays[f"{part}_scale"][:, :, 7] = scale
    case.arrays["latent"][:, 0] = 0
    check(case, builds)


# --- the same by other ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gta-1b, bf16, bf16 cache", "gta-1b, fp16, int8 cache", "uneven, fp16, fp8 cache", GQA_INT8]
)
def test_a_prompt_at_once_and_token_by_token(builds, name):
    of, tokens = VARIANTS[name], 19
    whole = cases.make(of, (5, 0), tokens, 30)
    parts = {part: whole.arrays[part].copy() for part in whole.arrays}
    simulate(whole, builds)
    for t in range(tokens):
        names = {"query", "key", "latent", "gate"} & set(parts)
        arrays = {part: np.ascontiguousarray(parts[part][:, t : t + 1]) for part in names}
        arrays["past_length"] = parts["past_length"] + t
        arrays["output"] = np.ascontiguousarray(parts["output"][:, t : t + 1])
        step = cases.Case(of, tuple(arrays["past_length"]), 1, 30, whole.scale, parts | arrays)
        simulate(step, builds)
        error = cases.error(arrays["output"], whole.arrays["output"][:, t : t + 1].astype(np.float64))
        assert error <= 2 * cases.TOLERANCE[of.compute], (t, error)
    for part in parts:
        if "cache" in part or "scale" in part:  # appended by other kernels, and the same bits
            assert parts[part].tobytes() == whole.arrays[part].tobytes(), part


@pytest.mark.parametrize("tokens", [1, 4, 21])
def test_a_batch_and_its_rows_one_at_a_time(builds, tokens):
    batch = cases.make(VARIANTS["gta-1b, bf16, int8 cache"], (0, 30, 77), tokens, 100)
    shared = ("cos", "sin", "value_decoder")
    rows = [{n: a.copy() if n in shared else a[i : i + 1].copy() for n, a in batch.arrays.items()} for i in range(3)]
    simulate(batch, builds, processors=1, prefill=None if tokens < 17 else 1)
    for i, arrays in enumerate(rows):
        row = cases.Case(batch.variant, batch.lengths[i : i + 1], tokens, 100, batch.scale, arrays)
        simulate(row, builds, processors=1, prefill=None if tokens < 17 else 1)
        expected = batch.arrays["output"][i : i + 1].astype(np.float64)
        assert cases.error(arrays["output"], expected) <= 2 * cases.TOLERANCE["bf16"]


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_larger_capacity_changes_nothing(builds, tokens):
    """One plan serves every length: its splits follow from the capacity, their extents from the lengths."""
    of, outputs = VARIANTS["gta-1b, fp16, fp16 cache"], []
    for capacity in (60, 500):
        case = cases.make(of, (40,), tokens, 500)
        for part in ("key_cache", "latent_cache"):
            case.arrays[part] = np.ascontiguousarray(case.arrays[part][:, :, :capacity])
        case.capacity = capacity
        simulate(case, builds)
        outputs.append(case.arrays["output"])
    assert cases.error(outputs[0], outputs[1].astype(np.float64)) <= cases.TOLERANCE["fp16"]


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_the_order_of_threads_and_blocks_changes_nothing(builds, tokens):
    outputs = set()
    for seed in range(8):
        case = cases.make(VARIANTS["gta-1b, fp16, fp8 cache"], (50, 3), tokens, 90)
        simulate(case, builds, seed=seed)
        outputs.add(case.arrays["output"].tobytes())
    assert len(outputs) == 1


# --- numbers of 8 bits ------------------------------------------------------------------------------------------------

CODES = """
#include "elements.cuh"
GTA_KERNEL(32) every_code(gta::u32* pairs) {
    for (gta::u32 code = threadIdx.x; code < 256; code += 32) { pairs[code] = gta::widen(code | (255 - code) << 16); }
}
GTA_KERNEL(32) to_codes(const float* values, gta::u32* codes, int count) {
    for (int i = threadIdx.x; i < count; i += 32) { codes[i] = gta::to_code(values[i]); }
}
"""


@pytest.mark.parametrize(("compute", "cache"), [types for types in TYPES if types[0] != types[1]])
def test_every_code_is_read_exactly_and_written_to_the_nearest(tmp_path, compute, cache):
    source = tmp_path / "codes.cu"
    source.write_text(CODES)
    defines = cases.variant((1, 1, 1), 16, 16, 1, compute, cache).defines()
    codes = Simulator(source, ["every_code", "to_codes"], defines, [KERNELS])
    pairs = np.zeros(256, np.uint32)
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1, 1, 3000) * 2.0 ** rng.integers(-12, 9, 3000), [0, 448, -448, 127.4, 1e-9]])
    values = np.clip(values, -127, 127) if cache == "int8" else np.clip(values, -448, 448)
    values, found = values.astype(np.float32), np.zeros(len(values), np.uint32)
    grid = LaunchSpec("every_code", (1,), 32, 0, [pairs])
    codes.run([grid, LaunchSpec("to_codes", (1,), 32, 0, [values, found, len(values)])], 0)

    every = np.arange(256, dtype=np.uint8).view(cases.CODES[cache]).astype(np.float64)
    halves = pairs.view(np.uint16).reshape(256, 2).view(cases.TYPES[compute]).astype(np.float64)
    finite = np.isfinite(every) & np.isfinite(every[::-1])  # e4m3's two NaN codes are never written
    assert np.array_equal(halves[finite, 0], every[finite])
    assert np.array_equal(halves[finite, 1], every[::-1][finite])
    expected = np.rint(values).astype(np.int8) if cache == "int8" else values.astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(found.astype(np.uint8), expected.view(np.uint8))


# --- faults are seen --------------------------------------------------------------------------------------------------

# Where, what is there, what a fault makes of it, and the new tokens that show it.
Fault = tuple[str, str, str, int]
FAULTS: dict[str, Fault] = {
    "no barrier between the append and the read": (
        "decode.cu",
        "block_barrier();\n                appended",
        "appended",
        1,
    ),
    "no barrier before the query is read": (
        "decode.cu",
        "block_barrier();\n\n    const int row =",
        "const int row =",
        1,
    ),
    "no barrier before memory is used anew": ("attention.cuh", "block_barrier();  // the slices'", "// the slices'", 1),
    "no barrier between the warps' parts": (
        "attention.cuh",
        "block_barrier();\n        constexpr int units",
        "constexpr int units",
        1,
    ),
    "a slice is not waited for": ("decode.cu", "wait_for_copies<stages - 2>();", "", 1),
    "no barrier of the warp": ("decode.cu", "warp_barrier();", "", 1),
    "one stage too few is waited for": ("decode.cu", "wait_for_copies<stages - 2>", "wait_for_copies<stages - 1>", 1),
    "no barrier before parts of the mix are read": (
        "combine.cuh",
        "block_barrier();\n    float total",
        "float total",
        1,
    ),
    "no barrier before the mix is read": (
        "combine.cuh",
        "block_barrier();\n            const float decoded",
        "const float decoded",
        1,
    ),
    "no barrier before products are read": ("combine.cuh", "block_barrier();\n        float total", "float total", 1),
    "a row too many is copied": ("tiles.cuh", "min_of(end - first, count)", "min_of(end - first + 1, count)", 1),
    "a token past the capacity is seen": (
        "decode.cu",
        "end - 1);\n    }\n    Attention",
        "end);\n    }\n    Attention",
        1,
    ),
    "keys are not waited for": ("prefill.cu", "wait_for_copies<1>();  // for", "// for", 40),
    "latents are not waited for": (
        "prefill.cu",
        "wait_for_copies<1>();\n                     block_barrier();",
        "",
        40,
    ),
    "no barrier before the next keys": ("prefill.cu", "block_barrier();\n        copy_keys", "copy_keys", 40),
    "the decoder comes too early": ("rows.cuh", "block_barrier();  // the cache's", "// the cache's", 40),
    "the decoder is not waited for": ("rows.cuh", "wait_for_copies<0>();\n                block_barrier();", "", 40),
    "the diagonal is not masked": ("rows.cuh", "tile.hides(first + token,", "tile.hides(first + token - 1,", 40),
    "a row past the capacity is written": ("prefill.cu", "|| token >= capacity - past", "", 40),
}


# The same of what has no value decoder.
PLAIN_FAULTS: dict[str, tuple[str, Fault]] = {
    "the next row is too early": (GQA, ("combine.cuh", "block_barrier();  // the next row", "// the next row", 1)),
    "all groups have the first keys": (GQA, ("decode.cu", "group * key_heads / groups", "0", 1)),
    "all groups have the first values": (GQA, ("prefill.cu", "{batch_row} * latent_heads + latent_head", "{0}", 40)),
    "a row past the tokens is written": (GQA, ("rows.cuh", "if (token < tokens) {", "if (token <= tokens) {", 40)),
    "columns of 8 bits stay as they are": (
        GQA_INT8,
        ("rows.cuh", "block + 4 * pair, a[0], b[0]", "block + 4 * pair, a[0], a[1]", 40),
    ),
    "the gate of one is forgotten": (GATED, ("output.cuh", "value *= opening", "value += 0 * opening", 1)),
    "the gates of two change places": (
        GATED,
        ("output.cuh", "low *= opening(unpack_low(gates))", "low *= opening(unpack_high(gates))", 40),
    ),
}


def is_seen(name: str, fault: Fault, capacity: int, builds: Path, directory: Path) -> bool:
    """Whether any of ten runs of a variant shows a fault in the sources."""
    file, there, instead, tokens = fault
    sources = shutil.copytree(KERNELS, directory / "kernels")
    text = (sources / file).read_text()
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    (sources / file).write_text(text.replace(there, instead))
    for seed in range(10):
        lengths = (200 - tokens, 77, 0) if capacity == 200 else (11, 3)
        case = cases.make(VARIANTS[name], lengths, tokens, capacity, seed)
        try:
            check(case, builds, seed=seed, processors=1, sources=sources)
        except (AssertionError, SimulationError):
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(builds: Path, tmp_path: Path, fault: str) -> None:
    capacity = FAULTS[fault][3] + 10 if "capacity" in fault else 200
    assert is_seen("gta-1b, bf16, bf16 cache", FAULTS[fault], capacity, builds, tmp_path)


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
def test_a_planted_fault_without_a_value_decoder_is_seen(builds: Path, tmp_path: Path, fault: str) -> None:
    assert is_seen(*PLAIN_FAULTS[fault], 200, builds, tmp_path)
