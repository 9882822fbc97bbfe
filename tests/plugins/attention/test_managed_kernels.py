"""The inputs of a managed cache in the CUDA kernels, on the host: against float64, and by what must hold of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gta_edge.plugins.attention import launches as plan
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.domain import KERNELS
from tests.helpers import attention_cases as cases
from tests.helpers.attention_simulation import ARCHITECTURE, simulate
from tests.helpers.kernel_simulator import SimulationError, available, shared_directory
from tests.helpers.managed_cases import check, make, managed

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")

GTA_1B = ((5, 1, 1), 64, 128, 2)
UNEVEN = ((6, 2, 3), 48, 80, 2)
VARIANTS = {
    "all, mass": managed(cases.variant(*GTA_1B, "bf16"), "mass", 3, True, True),
    "last, int8": managed(cases.variant(*GTA_1B, "fp16", "int8"), "last", 8, True, False),
    "mass, fp8, uneven heads": managed(cases.variant(*UNEVEN, "fp16", "fp8"), "mass", 0, False, True),
    "last in branches, grouped queries": managed(cases.grouped_query(9, 3, 64, "bf16"), "last", 2, False, True),
    "mass, int8, grouped queries": managed(cases.grouped_query(14, 2, 64, "fp16", "int8"), "mass", 1, True, False),
    "positions alone": managed(cases.variant(*GTA_1B, "fp16"), None, 0, True, False),
    "bias alone": managed(cases.grouped_query(9, 3, 64, "bf16"), None, 5, False, False),
}


@pytest.fixture(scope="session")
def builds() -> Path:
    return shared_directory()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("lengths", "tokens", "capacity", "processors"),
    [((0, 38, 99), 1, 100, 3), ((5, 0, 60), 3, 75, 9), ((84,), 16, 100, 4)],
)
def test_decode(builds, name, lengths, tokens, capacity, processors):
    check(make(VARIANTS[name], lengths, tokens, capacity), builds, processors=processors)


@pytest.mark.parametrize("name", [name for name, of in VARIANTS.items() if of.features.has_branches])
@pytest.mark.parametrize(("lengths", "tokens", "capacity"), [((33, 0), 20, 70), ((40,), 64, 110)])
def test_trees_of_more_tokens_than_causal_ones(builds, name, lengths, tokens, capacity):
    check(make(VARIANTS[name], lengths, tokens, capacity), builds)


@pytest.mark.parametrize("name", [name for name, of in VARIANTS.items() if not of.features.has_branches])
@pytest.mark.parametrize(("lengths", "tokens", "capacity"), [((0, 61), 35, 97), ((70,), 1, 71)])
def test_prefill(builds, name, lengths, tokens, capacity):
    for program in range(len(plan.programs_for(VARIANTS[name], ARCHITECTURE).prefill)):
        case = make(VARIANTS[name], lengths, tokens, capacity)
        if "query_weight" in case.arrays:
            case.arrays["query_weight"][:], case.arrays["decay"][:] = 0, 1
        check(case, builds, prefill=program)


def test_prefill_gives_no_number_where_attention_would_have_to_be_observed(builds):
    case = make(VARIANTS["mass, int8, grouped queries"], (4, 9, 0), 20, 40)
    case.arrays["query_weight"][:], case.arrays["decay"][:] = 0, 1
    case.arrays["query_weight"][0, 7], case.arrays["decay"][1] = 1, 0.5
    before = case.arrays["received"].copy()
    simulate(case, builds)
    found = case.arrays["received"]
    assert np.isnan(found[0, 11]) and (np.delete(found[0, 4:24], 7) == 0).all()
    assert np.isnan(found[1, 9:29]).all() and (found[2, :20] == 0).all()
    assert found[0, :4].tobytes() == before[0, :4].tobytes()


@pytest.mark.parametrize("value", [-(2**63), -1, 2**31 + 5, 2**63 - 1])
def test_numbers_in_memory_are_not_trusted(builds, value):
    """Positions outside the tables count as the nearest inside; a start beyond the cache leaves all rows shared."""
    case = make(VARIANTS["all, mass"], (30, 7), 3, 60)
    case.arrays["token_positions"][0, 1] = value
    case.arrays["branch_start"][1] = value
    check(case, builds)


@pytest.mark.parametrize("tokens", [1, 7])
def test_tokens_that_the_cache_has_no_room_for_are_dropped(builds, tokens):
    case = make(VARIANTS["last, int8"], (60, 58, -3, 2**40), tokens, 60)
    for part in ("key", "latent"):  # of the last, all of the cache is read
        case.arrays[f"{part}_cache"][0] = case.arrays[f"{part}_cache"][3] = 1
    check(case, builds)


@pytest.mark.parametrize("seed", range(6))
def test_sizes_and_features_at_random(builds, seed):
    rng = np.random.default_rng(seed)
    n_k, n_c = (int(n) for n in rng.choice([1, 2, 3], 2))
    n_q = int(np.lcm(n_k, n_c) * rng.integers(1, 4))
    compute = ("bf16", "fp16")[seed % 2]
    cache = (compute, "int8", "fp8")[seed % 3]
    of = cases.variant((n_q, n_k, n_c), *(16 * int(n) for n in rng.integers(1, 9, 2)), 1, compute, cache)
    of = managed(
        of, ("mass", "last", None)[seed // 2], int(rng.integers(0, 9)), bool(rng.random() < 0.5), seed % 3 != 1
    )
    capacity = int(rng.integers(20, 150))
    for tokens in (1, int(rng.integers(2, 17))):
        lengths = tuple(int(n) for n in rng.integers(0, capacity - tokens + 1, 2))
        check(make(of, lengths, tokens, capacity, seed), builds, processors=int(rng.integers(1, 30)))


# --- what must hold ---------------------------------------------------------------------------------------------------


def permuted(case: cases.Case, order: np.ndarray) -> None:
    """Let the cache's rows stand in another order, [S]."""
    for name in case.arrays.keys() & {"key_cache", "latent_cache", "key_scale", "latent_scale"}:
        case.arrays[name] = np.ascontiguousarray(case.arrays[name][:, :, order])
    for name in case.arrays.keys() & {"received"}:
        case.arrays[name] = np.ascontiguousarray(case.arrays[name][:, order])


@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_the_order_of_rows_changes_nothing(builds, cache):
    of = managed(cases.variant(*GTA_1B, "bf16", cache), "mass", 3, True, False)
    one, other = (make(of, (50,), 4, 60) for _ in range(2))
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(3), 3 + rng.permutation(47), np.arange(50, 60)])
    permuted(other, order)
    other.arrays["row_bias"] = np.ascontiguousarray(one.arrays["row_bias"][:, order[:3]])
    for case in (one, other):
        simulate(case, builds)
    error = cases.error(other.arrays["output"], one.arrays["output"].astype(np.float64))
    assert error <= cases.TOLERANCE["bf16"]
    np.testing.assert_allclose(other.arrays["received"][0, :54], one.arrays["received"][0, order[:54]], rtol=1e-4)


@pytest.mark.parametrize("cache", ["fp16", "fp8"])
def test_rows_evicted_from_the_middle_are_rows_that_are_masked(builds, cache):
    of = managed(cases.variant(*GTA_1B, "fp16", cache), None, 0, True, True)
    masked = make(of, (50,), 1, 60)
    gone = np.arange(13, 31)
    masked.arrays["branch_start"][:] = 0
    masked.arrays["branches"] = np.full((1, 60), -1, np.int64)
    masked.arrays["branches"][0, gone] = 0
    evicted = make(of, (50 - len(gone),), 1, 60)
    for name in masked.arrays.keys() - {"past_length", "branches"}:
        evicted.arrays[name] = masked.arrays[name].copy()
    permuted(evicted, np.concatenate([np.delete(np.arange(60), gone), gone]))
    evicted.arrays["branches"] = np.full((1, 60), -1, np.int64)
    for case in (masked, evicted):
        simulate(case, builds)
    error = cases.error(evicted.arrays["output"], masked.arrays["output"].astype(np.float64))
    assert error <= cases.TOLERANCE["fp16"] / 2


@pytest.mark.parametrize("cache", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("copies", [2, 7])
def test_copies_of_a_row_are_that_row_with_the_logarithm_of_their_number(builds, cache, copies):
    of = managed(cases.variant(*GTA_1B, "fp16", cache), "mass", 2, True, False)
    several, single = make(of, (30 + copies - 1,), 2, 60), make(of, (30,), 2, 60)
    several.arrays["row_bias"][:], single.arrays["row_bias"][:] = 0, [[0, np.log(copies)]]
    order = np.concatenate([[0], [1] * copies, np.arange(2, 30), np.arange(30, 61 - copies)])
    for name in single.arrays.keys() - {"past_length", "row_bias"}:
        several.arrays[name] = single.arrays[name].copy()
    permuted(several, order)
    for case in (several, single):
        case.arrays["received"][:, : case.lengths[0]] = 0
        simulate(case, builds)
    error = cases.error(several.arrays["output"], single.arrays["output"].astype(np.float64))
    assert error <= cases.TOLERANCE["fp16"] / 2
    of_copies = several.arrays["received"][0, 1 : 1 + copies].sum()
    np.testing.assert_allclose(of_copies, single.arrays["received"][0, 1], rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 16])
def test_what_is_received_is_what_is_given(builds, tokens):
    case = make(VARIANTS["mass, int8, grouped queries"], (40, 0, 3), tokens, 60)
    case.arrays["decay"][:] = 0
    simulate(case, builds)
    n_q = case.variant.sizes.num_query_heads
    for row, length in enumerate(case.lengths):
        found = case.arrays["received"][row, : length + tokens].sum(dtype=np.float64)
        assert found == pytest.approx(n_q * case.arrays["query_weight"][row].sum(dtype=np.float64), rel=1e-4)


def test_a_call_that_does_not_observe_changes_nothing_of_what_was_received(builds):
    for name, fresh in (("all, mass", 0.0), ("last, int8", -1.0)):
        case = make(VARIANTS[name], (40, 0), 5, 60)
        case.arrays["query_weight"][:], case.arrays["decay"][:] = 0, 1
        before = case.arrays["received"].copy()
        simulate(case, builds)
        for row, length in enumerate(case.lengths):
            assert case.arrays["received"][row, :length].tobytes() == before[row, :length].tobytes()
            assert (case.arrays["received"][row, length : length + 5] == fresh).all()


def test_a_row_that_alone_is_seen_is_important_at_the_border(builds):
    """Its weight is 1 and so is what is asked for: neither may be lost to rounding. So with copies of one row."""
    of = VARIANTS["last, int8"]
    case = make(of, (0,), 1, 20)
    case.arrays["query_weight"][:] = 1
    simulate(case, builds)
    assert case.arrays["received"][0, 0] == case.arrays["token_positions"][0, 0]
    case = make(of, (9,), 1, 20)
    case.arrays["cos"][:], case.arrays["sin"][:] = 1, 0
    case.arrays["row_bias"][:] = 0
    case.arrays["key"][:] = 0
    case.arrays["key_cache"][:] = 0
    case.arrays["query_weight"][:] = 10
    simulate(case, builds)
    assert (case.arrays["received"][0, :10] >= case.arrays["token_positions"][0, 0]).all()


def tree(parents: list[int]) -> np.ndarray:
    """Words of a tree's tokens: bit t of word i, whether token t has token i among its ancestors or is it."""
    words = np.zeros(len(parents), np.int64)
    for t in range(len(parents)):
        i = t
        while i >= 0:
            words[i] |= np.int64(1) << np.int64(t)
            i = parents[i]
    return words


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_each_leaf_of_a_tree_is_what_its_path_alone_gives(builds, cache):
    of = managed(cases.variant(*GTA_1B, "fp16", cache), "mass", 0, True, True)
    parents, past = [-1, 0, 0, 1, 1, 2, 4], 37
    whole = make(of, (past,), len(parents), 60)
    words = tree(parents)
    depth = np.array([sum(int(word) >> t & 1 for word in words) - 1 for t in range(len(parents))])
    whole.arrays["token_positions"][:] = past + depth
    whole.arrays["branch_start"][:], whole.arrays["branches"] = past, words[None]
    simulate(whole, builds)
    for leaf in (3, 5, 6):
        path = [t for t in range(len(parents)) if int(words[t]) >> leaf & 1]
        alone = make(of, (past,), len(path), 60)
        for name in whole.arrays.keys() & alone.arrays.keys():
            if name in ("query", "key", "latent", "gate", "token_positions", "query_weight"):
                alone.arrays[name] = np.ascontiguousarray(whole.arrays[name][:, path])
            elif name not in ("output", "branches"):
                alone.arrays[name] = make(of, (past,), len(parents), 60).arrays[name]
        alone.arrays["branch_start"][:] = past
        alone.arrays["branches"] = tree(list(range(-1, len(path) - 1)))[None]
        simulate(alone, builds)
        error = cases.error(alone.arrays["output"], whole.arrays["output"][:, path].astype(np.float64))
        assert error <= cases.TOLERANCE["fp16"] / 2, leaf
        for part in alone.arrays.keys() & {"key_cache", "latent_cache", "key_scale", "latent_scale"}:
            kept = [*range(past), *(past + t for t in path)]  # an accepted path is moved to the cache's end
            found = whole.arrays[part][:, :, kept]
            assert found.tobytes() == alone.arrays[part][:, :, : past + len(path)].tobytes(), part


@pytest.mark.parametrize("cache", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_query_that_sees_nothing_gives_zeros_and_nothing_is_received_of_it(builds, cache, tokens):
    of = managed(cases.variant(*GTA_1B, "bf16", cache), "mass", 0, False, True)
    case = make(of, (20,), tokens, 40)
    case.arrays["branch_start"][:], case.arrays["branches"] = 0, np.full((1, 40), ~1, np.int64)  # bit 0 is nowhere
    case.arrays["query_weight"][:] = 1
    case.arrays["decay"][:] = 0
    simulate(case, builds)
    assert (case.arrays["output"][0, 0] == 0).all()
    if tokens > 1:
        assert (case.arrays["output"][0, 1] != 0).any()
    found = case.arrays["received"][0, : 20 + tokens].sum()
    assert found == pytest.approx(5 * (tokens - 1), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_ragged_batch_is_its_sequences_one_at_a_time(builds, tokens):
    batch = make(VARIANTS["all, mass"], (0, 30, 77), tokens, 100)
    shared = ("cos", "sin", "value_decoder")
    rows = [{n: a.copy() if n in shared else a[i : i + 1].copy() for n, a in batch.arrays.items()} for i in range(3)]
    simulate(batch, builds, processors=1)
    for i, arrays in enumerate(rows):
        row = cases.Case(batch.variant, batch.lengths[i : i + 1], tokens, 100, batch.scale, arrays)
        simulate(row, builds, processors=1)
        expected = batch.arrays["output"][i : i + 1].astype(np.float64)
        assert cases.error(arrays["output"], expected) <= 2 * cases.TOLERANCE["bf16"]
        used = batch.lengths[i] + tokens
        np.testing.assert_allclose(arrays["received"][0, :used], batch.arrays["received"][i, :used], rtol=1e-4)


# --- bytes ------------------------------------------------------------------------------------------------------------


def row_bytes(of: Variant) -> int:
    """Bytes of all heads of a cached row."""
    sizes, scales = of.sizes, 4 * of.quantised
    keys = sizes.num_key_heads * (sizes.key_dim * of.cache_itemsize + scales)
    return keys + sizes.num_latent_heads * (sizes.latent_dim * of.cache_itemsize + scales)


@pytest.mark.parametrize("cache", ["bf16", "int8"])
@pytest.mark.parametrize("model", ["gta-1b", "gqa-1b"])
def test_a_tree_of_20_branches_reads_the_prompt_once(builds, model, cache):
    """Branches of 4 tokens and a new one each, over a prompt of 1,024: of all of it, each row is read once."""
    of = cases.variant(*GTA_1B, "bf16", cache) if model == "gta-1b" else cases.grouped_query(20, 5, 64, "bf16", cache)
    past, leaves = 1024 + 20 * 4, np.arange(20)
    case = make(managed(of, None, 0, True, True), (past,), 20, past + 20)
    case.arrays["branch_start"][:] = 1024
    case.arrays["branches"] = (np.int64(1) << np.concatenate([leaves.repeat(4), leaves]))[None]
    read = simulate(case, builds, processors=8, min_tokens=None)
    assert read == (past + 20) * row_bytes(of)
    once_each = sum(cases.visible(case, 0).sum(-1)) * row_bytes(of)  # as 20 sequences of their own read it
    assert read < once_each / 15


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_who_observes_reads_the_cache_once(builds, tokens):
    case = make(VARIANTS["last, int8"], (500,), tokens, 600)
    assert simulate(case, builds, processors=8) == (500 + tokens) * row_bytes(case.variant)


# --- faults are seen --------------------------------------------------------------------------------------------------

# Where, what is there, what a fault makes of it, the variant and the new tokens that show it.
FAULTS = {
    "the bias of another row": ("features.cuh", "bias_rows + first + i]", "bias_rows + first]", "all, mass", 1),
    "the bias of another sequence": ("features.cuh", "batch_row * bias_rows + first", "first", "all, mass", 1),
    "a bias too few": ("features.cuh", "first + i < bias_rows", "first + i < bias_rows - 1", "all, mass", 1),
    "a bias in every slice": ("attention.cuh", "score += n == 0 && first == 0 ?", "score += n == 0 ?", "last, int8", 1),
    "a bias in natural units": ("decode.cu", "batch_row, log2_e)", "batch_row, 1.0f)", "all, mass", 1),
    "a bias in every tile of a prompt": ("rows.cuh", "first == 0 ? bias", "true ? bias", "bias alone", 30),
    "the next query's bit": ("features.cuh", "word >> query[1] & 1", "word >> query[0] & 1", "all, mass", 3),
    "words that start a row early": ("features.cuh", "i - start;", "i - start + 1;", "all, mass", 3),
    "words that are not looked at in the first slice": (
        "features.cuh",
        "first + 16 > start",
        "first > start",
        "all, mass",
        3,
    ),
    "words past the last are read": (
        "features.cuh",
        "place < width ? words[place] : 0",
        "words[place]",
        "all, mass",
        3,
    ),
    "another sequence's words": ("decode.cu", "branches + i64{batch_row} * branch_rows", "branches", "all, mass", 3),
    "a tree that is causal": ("decode.cu", "has_branches ? end - 1 : ", "", "all, mass", 9),
    "a query that sees nothing": ("combine.cuh", "sum > 0.0f ? total", "true ? total", "all, mass", 1),
    "the query's position is its row": (
        "decode.cu",
        "position = rope_position(token_positions, batch_row, token, tokens, positions);",
        "",
        "last, int8",
        2,
    ),
    "the key's position is its row": (
        "cache.cuh",
        "position = rope_position(token_positions, row, token, tokens, positions);",
        "",
        "last, int8",
        2,
    ),
    "received of reused rows": ("observe.cuh", "row < past ? *place : absent_received", "*place", "last, int8", 2),
    "a row that is new counts as old": ("observe.cuh", "row < past ?", "row <= past ?", "all, mass", 2),
    "the decay of the first sequence": ("observe.cuh", "decay[batch_row]", "decay[0]", "all, mass", 2),
    "the weight of another query": ("observe.cuh", "tokens + i / query_heads];", "tokens];", "all, mass", 2),
    "the last row is left out": ("observe.cuh", "if (row < present)", "if (row < present - 1)", "all, mass", 1),
    "a row past the last": ("observe.cuh", "if (row < present)", "if (row <= present)", "all, mass", 1),
    "no barrier before the totals are read": (
        "observe.cuh",
        "block_barrier();\n                const int row",
        "const int row",
        "all, mass",
        3,
    ),
    "no barrier before the next totals": (
        "observe.cuh",
        "block_barrier();  // the next",
        "// the next",
        "all, mass",
        3,
    ),
    "scores with the latents' scales": (
        "attention.cuh",
        "seen[n][i] = visible ? score : -infinity",
        "seen[n][i] = visible ? score + logarithm_2(scale) : -infinity",
        "last, int8",
        3,
    ),
    "scores of rows that are not seen": (
        "attention.cuh",
        "visible ? scores[n][i] : -infinity;)",
        "scores[n][i];)",
        "all, mass",
        3,
    ),
    "scores past the last slice": ("features.cuh", "&& first < end", "", "all, mass", 1),
    "a position that is a token's number": (
        "observe.cuh",
        ": token_positions[i64{batch_row} * tokens + token]",
        ": i64{token}",
        "last, int8",
        3,
    ),
    "blocks that mix do not know their number": ("combine.cuh", "row_blocks = mix_blocks;", "", "all, mass", 16),
    "prefill forgets what new rows have received": (
        "prefill.cu",
        "if (head == 0 && lane",
        "if (head < 0 && lane",
        "last, int8",
        30,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(builds: Path, tmp_path: Path, fault: str) -> None:
    file, there, instead, name, tokens = FAULTS[fault]
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (sources / file).read_text()
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    (sources / file).write_text(text.replace(there, instead))
    for seed in range(10):
        many = "next totals" in fault  # sequences: then a block observes several
        lengths, capacity = ((9,) * 24, 30) if many else ((200 - tokens, 77, 0), 200)
        case = make(VARIANTS[name], lengths, tokens, capacity, seed)
        if tokens > 16 and "decay" in case.arrays:
            case.arrays["query_weight"][:], case.arrays["decay"][:] = 0, 1
        try:
            check(case, builds, seed=seed, processors=1, sources=sources)
        except (AssertionError, SimulationError):
            return
    pytest.fail("nothing shows it")
