"""The CUDA kernels of a cache in blocks, on the host: the very sources, run by the simulation.

The cache is compared bit for bit, the output with float64.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.domain import KERNELS
from tests.helpers import attention_cases as cases
from tests.helpers import block_cases as blocks
from tests.helpers.attention_simulation import programs_of, simulate, simulator
from tests.helpers.kernel_simulator import SimulationError, available, shared_directory

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")

MIN_TOKENS = 128  # of a split: the least that 4 warps take
GTA_1B, GQA, UNEVEN, SMALL = "gta-1b, int4", "8 heads of 128, 2 of keys, int4v2", "uneven, int4v2", "small, int4"
VARIANTS = {
    GTA_1B: cases.variant((5, 1, 1), 64, 128, 2, "fp16", "int4"),
    GQA: cases.grouped_query(8, 2, 128, "bf16", "int4v2"),
    UNEVEN: cases.variant((6, 2, 3), 48, 64, 1, "fp16", "int4v2"),  # groups of several heads, keys of 3 steps of 16
    SMALL: cases.variant((2, 1, 1), 16, 32, 1, "bf16", "int4"),
}

PROMPTS = (GQA, UNEVEN, SMALL)


@pytest.fixture(scope="session")
def builds() -> Path:
    directory = shared_directory()
    programs = [programs_of(variant, MIN_TOKENS).decode for variant in VARIANTS.values()]
    programs += [program for name in PROMPTS for program in programs_of(VARIANTS[name], MIN_TOKENS).prefill]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda program: simulator(program).compile(directory), programs))
    return directory


def check(
    of: Variant, lengths: tuple[int, ...], tokens: int, capacity: int, builds: Path, *, seed: int = 0, **options: int
) -> None:
    case, history = blocks.make(of, lengths, tokens, capacity, seed)
    simulate(case, builds, seed=seed, min_tokens=MIN_TOKENS, **options)
    blocks.check(case, history)


# --- against the formulas ---------------------------------------------------------------------------------------------

DECODES = [
    ((0, 38, 99), 1, 128, 3),
    ((31, 63, 95), 1, 96, 4),  # the last row of a block, which the token fills
    ((32, 64, 1), 1, 96, 4),  # and the first of the next
    ((27, 60, 16), 9, 96, 40),  # across a border, just to it, and short of it
    ((300, 31), 16, 320, 9),
]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("lengths", "tokens", "capacity", "processors"), DECODES)
def test_decode(builds: Path, name: str, lengths: tuple[int, ...], tokens: int, capacity: int, processors: int) -> None:
    check(VARIANTS[name], lengths, tokens, capacity, builds, processors=processors)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("lengths", "tokens", "capacity"), [((0, 61), 35, 96), ((31,), 1, 64), ((5, 40), 86, 128)])
def test_prefill(builds: Path, name: str, lengths: tuple[int, ...], tokens: int, capacity: int) -> None:
    for program in range(len(programs_of(VARIANTS[name], MIN_TOKENS).prefill)):
        check(VARIANTS[name], lengths, tokens, capacity, builds, prefill=program)


def test_a_prompt_of_several_tiles(builds: Path) -> None:
    check(VARIANTS[GQA], (150, 3), 160, 320, builds, processors=1)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("length", [-1, 58, 64, 2**63 - 1])
def test_lengths_are_not_trusted(builds: Path, tokens: int, length: int) -> None:
    """Lengths outside 0 to S count as those; what would lie past the capacity is dropped, and fills no block."""
    check(VARIANTS[SMALL], (length, 7), tokens, 64, builds)


@pytest.mark.parametrize("cuts", [(4, 1, 1, 40, 16, 34), (96,), (16,) * 6, (31, 2, 63)])
def test_however_tokens_come_the_cache_has_the_same_bits(builds: Path, cuts: tuple[int, ...]) -> None:
    """Two sequences together or one alone, at once or in parts: the rows alone say what is read and written."""
    of, tokens, capacity = VARIANTS[SMALL], sum(cuts), 128
    whole, history = blocks.make(of, (20, 0), tokens, capacity)
    expected = blocks.attended(whole, history)
    shared = ("cos", "sin", "value_decoder")
    arrays = {name: a if name in shared else a[:1].copy() for name, a in whole.arrays.items()}
    done = 0
    for count in cuts:
        part = {
            name: np.ascontiguousarray(arrays[name][:, done : done + count])
            for name in ("query", "key", "latent", "gate", "output")
        }
        step = cases.Case(of, (20 + done,), count, capacity, whole.scale, arrays | part)
        step.arrays["past_length"] = np.array(step.lengths, np.int64)
        simulate(step, builds, min_tokens=MIN_TOKENS)
        error = cases.error(part["output"], expected[:1, done : done + count])
        assert error <= cases.TOLERANCE[of.compute], (done, error)
        done += count
    simulate(whole, builds, min_tokens=MIN_TOKENS)
    blocks.check(whole, history)
    for name, found in blocks.rows_of_cache(arrays).items():
        assert blocks.same(found, whole.arrays[name][:1]), name


@pytest.mark.parametrize("tokens", [12, 40])
def test_the_order_of_threads_and_blocks_changes_nothing(builds: Path, tokens: int) -> None:
    found = set()
    for seed in range(6):
        case, _ = blocks.make(VARIANTS[UNEVEN], (63, 150, 30), tokens, 192)
        simulate(case, builds, seed=seed, min_tokens=MIN_TOKENS)
        found.add(b"".join(case.arrays[name].tobytes() for name in ("output", *blocks.rows_of_cache(case.arrays))))
    assert len(found) == 1


# --- values that are unlike others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [UNEVEN, SMALL])
@pytest.mark.parametrize("tokens", [5, 45])
def test_groups_of_equal_values_and_of_zeros(builds: Path, name: str, tokens: int) -> None:
    case, history = blocks.make(VARIANTS[name], (59,), tokens, 128)
    history["key"][:, :, :, 1], history["key"][:, :, :, 2] = 0.75, 0
    history["latent"][:, :, 3::7], history["latent"][:, :, 5::7] = -1.25, 0
    history["latent"][:, :, 6::7] = np.float32(2.0**-20)
    case.arrays["latent"][:, 2] = 3
    history = blocks.with_new_rows(case, history)
    case.arrays |= blocks.stored(history, cases.held(case), case.variant)
    simulate(case, builds, min_tokens=MIN_TOKENS)
    blocks.check(case, history)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_no_number_stays_none(builds: Path, tokens: int, bad: float) -> None:
    """Never a wrong finite number: a group with such a value reads as NaN, and so does what it is part of."""
    for part in ("key", "latent"):
        case, history = blocks.make(VARIANTS[SMALL], (31,), tokens, 96)
        case.arrays[part][0, 0, 3] = bad
        with np.errstate(invalid="ignore"):
            history = blocks.with_new_rows(case, history)
            simulate(case, builds, min_tokens=MIN_TOKENS)
            for name, expected in blocks.stored(history, cases.held(case) + tokens, case.variant).items():
                assert blocks.same(case.arrays[name], expected), name
        if tokens > 1:  # the block that it is in is closed, and all others read it
            assert np.isnan(case.arrays["output"][0, 1:].astype(np.float32)).any(-1).all()


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GTA_1B, GQA])
@pytest.mark.parametrize("length", [33, 290])
def test_a_token_reads_each_code_once(builds: Path, name: str, length: int) -> None:
    """Bytes of a closed block: keys, their scales and minima, values and theirs. All else is a block of 16 bits."""
    of = VARIANTS[name]
    case, _ = blocks.make(of, (length,), 1, 320)
    sizes = of.sizes
    row = sizes.num_key_heads * sizes.key_dim * (4 / 8 + 4 / 32)
    row += sizes.num_latent_heads * (sizes.latent_dim * of.value_bits / 8 + 4)
    assert simulate(case, builds, min_tokens=MIN_TOKENS, processors=40) == length // 32 * 32 * row


# --- faults are seen --------------------------------------------------------------------------------------------------

# Where, what is there, what a fault makes of it, and the tokens before and in the call that show it.
Fault = tuple[str, str, str, int, int]
FAULTS: dict[str, Fault] = {
    "no barrier between a block's closing and its reading": (
        "decode_blocks.cu",
        "block_barrier();\n                slices.end",
        "slices.end",
        30,
        4,
    ),
    "the closed block is not waited for": ("decode_blocks.cu", "wait_for_copies<0>();", "", 30, 4),
    "the closed block is seen from within": ("blocks.cuh", "row >= limit - limit % block_tokens", "row > limit", 30, 4),
    "a block is closed a token late": (
        "decode_blocks.cu",
        "if (present / block_tokens > open_block",
        "if ((present - 1) / block_tokens > open_block",
        31,
        1,
    ),
    "the first row of a block is not its own": (
        "tiles.cuh",
        "row < limit - limit % block_tokens",
        "row <= limit - limit % block_tokens",
        40,
        1,
    ),
    "rows of the block before are seen in 16 bits": (
        "tiles.cuh",
        " || (in_blocks && row < limit - limit % block_tokens)",
        "",
        30,
        4,
    ),
    "a split too few": ("combine.cuh", "block_splits(past, splits)", "block_splits(past, splits) - 1", 40, 1),
    "nibbles change places where they are written": (
        "blocks.cuh",
        "groups[1][j].code(values[1][j]) << 4 * n",
        "groups[1][j].code(values[1][j]) << 4 * (n ^ 1)",
        31,
        1,
    ),
    "nibbles change places where they are read": (
        "blocks.cuh",
        "block % 2 * 2 + half)",
        "block % 2 * 2 + 1 - half)",
        40,
        1,
    ),
    "a row's minimum is its scale": ("blocks.cuh", "pair.x[1], 0x7632)", "pair.x[1], 0x5410)", 40, 1),
    "rounded down": ("blocks.cuh", "- minimum) * inverse)", "- minimum) * inverse - 0.4f)", 31, 1),
    "new rows are taken for old ones": ("blocks.cuh", "if (row < past) {", "if (row <= past) {", 40, 1),
    "a block is closed too early": (
        "prefill_blocks.cu",
        "block >= present / block_tokens",
        "block > present / block_tokens",
        10,
        40,
    ),
    "codes of one's own block are seen": (
        "blocks.cuh",
        "row >= limit - limit % block_tokens",
        "row > limit - limit % block_tokens",
        10,
        40,
    ),
    "no barrier before rows of 16 bits come": (
        "prefill_blocks.cu",
        "block_barrier();  // the tile before",
        "// the tile before",
        40,
        40,
    ),
    "no barrier before rows of 16 bits are read": (
        "prefill_blocks.cu",
        "block_barrier();\n        if (first <",
        "if (first <",
        40,
        40,
    ),
    "the open block keeps rows too long": (
        "prefill_blocks.cu",
        "past > present - block_tokens ?",
        "true ?",
        10,
        40,
    ),
    "all tiles are seen whole": ("prefill_blocks.cu", "first + keys <= first_block", "true", 40, 40),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(builds: Path, tmp_path: Path, fault: str) -> None:
    file, there, instead, past, tokens = FAULTS[fault]
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (sources / file).read_text()
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    (sources / file).write_text(text.replace(there, instead))
    for seed in range(10):
        case, history = blocks.make(VARIANTS[SMALL], (past, 70), tokens, 128, seed)
        try:
            simulate(case, builds, seed=seed, min_tokens=MIN_TOKENS, processors=1, sources=sources)
            blocks.check(case, history)
        except (AssertionError, SimulationError):
            return
    pytest.fail("the kernels are right in spite of it")
