"""What the compiler makes of the kernels, where the source does not tell: kinds of loads, numbers of instructions."""

import re
import shutil
from pathlib import Path
from typing import TypeAlias

import pytest

from gta_edge.cuda.compiler import compile_program
from gta_edge.plugins.attention import launches as attention
from gta_edge.plugins.attention.definition import NO_FEATURES, Features, Sizes
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.elementwise import launches as elementwise
from gta_edge.plugins.matmul import launches as matmul
from gta_edge.plugins.matmul import tiling as matmul_tiling
from tests.helpers.nvrtc import instructions, needs_nvrtc, ptx_of, reads

pytestmark = needs_nvrtc

Program: TypeAlias = "attention.Program | matmul.Program | elementwise.Program"

ARCHITECTURE = "sm_87"
GTA_1B = Sizes(5, 1, 1, 64, 128, 1280)

# What a step only reads. All else may be what a kernel before has written, or is about to.
CONSTANT = {"cos", "sin", "value_decoder", "weight", "scale", "bias"}


def parameters(kernel: str, program: Program) -> tuple[str, ...]:
    """The addresses that a kernel takes, in order."""
    if isinstance(program, attention.Program):
        return attention.signature(kernel, program.variant).addresses
    if isinstance(program, elementwise.Program):
        return elementwise.SIGNATURES[kernel].addresses
    return matmul.SIGNATURE.addresses


def attention_programs(cache: str, sizes: Sizes = GTA_1B, features: Features = NO_FEATURES) -> list[attention.Program]:
    programs = attention.programs_for(Variant(sizes, "bf16", cache, features), ARCHITECTURE)
    return [programs.decode, *programs.prefill[-1:]]


def matmul_programs(bits: int) -> list[matmul.Program]:
    programs = matmul.programs_for(matmul_tiling.Variant(bits, 32, "bf16"), ARCHITECTURE)
    return [programs.few, programs.many[-1]]


PROGRAMS = {
    "attention": attention_programs("bf16"),
    "attention without a value decoder": attention_programs("bf16", Sizes(8, 2, 2, 64, 64, 512, True, False)),
    "attention, int8 cache": attention_programs("int8"),
    "attention, int4 cache": attention_programs("int4"),
    "attention in a tree, observed": attention_programs("bf16", features=Features("mass", 2, True, True)),
    "attention, int8 cache, observed": attention_programs("int8", features=Features("last", 1, True, False)),
    "matmul, int4": matmul_programs(4),
    "matmul, int8": matmul_programs(8),
    "elementwise": [elementwise.Program("bf16")],
}
PRODUCED = {
    "gta_decode_split": {"query", "key", "latent", "key_cache", "latent_cache", "past_length"},
    "gta_decode_combine": {"mixes", "sums", "gate", "past_length"},
    "gta_append": {"key", "latent", "past_length"},
    "gta_prefill": {"query", "gate", "key_cache", "latent_cache", "past_length"},
    "gta_append_open": {"key", "latent", "past_length"},
    "gta_matmul": {"x"},
    "gta_matmul_8_rows": {"x"},
    "gta_matmul_16_rows": {"x"},
    "gta_add_norm": {"x", "addend"},
    "gta_silu_multiply": {"gate", "up"},
}
# The same of the inputs of a managed cache, which are there or not.
MANAGED = {kernel: set[str]() for kernel in PRODUCED} | {
    "gta_decode_split": {"token_positions", "row_bias", "branch_start", "branches", "query_weight"},
    "gta_decode_combine": {"query_weight", "scores", "received"},
    "gta_append": {"token_positions", "query_weight", "decay"},
    "gta_prefill": {"token_positions", "row_bias"},
}
# And what a cache in blocks has besides.
OPEN = {"key_open", "latent_open"}
BLOCKS = {kernel: set[str]() for kernel in PRODUCED} | {
    "gta_decode_split": {*OPEN, "key_scale", "latent_scale"},
    "gta_decode_combine": {"key", "latent"},
    "gta_append": OPEN,
    "gta_prefill": {*OPEN, "key", "latent", "key_scale", "latent_scale"},
}


def reads_of(program: Program, sources: Path) -> dict[tuple[str, str], set[bool]]:
    """By kernel and parameter, whether reads of it may be early, late, or either."""
    found: dict[tuple[str, str], set[bool]] = {}
    for kernel, place, early in reads(ptx_of(program, ARCHITECTURE, sources)):
        found.setdefault((kernel, parameters(kernel, program)[place]), set()).add(early)
    return found


@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_what_a_kernel_before_may_write_is_not_read_early(
    programs: list[Program],
) -> None:
    for program in programs:
        found = reads_of(program, KERNELS)
        early = {name for name, kinds in found.items() if True in kinds}
        assert {name for _, name in early} <= CONSTANT, early
        for kernel in program.kernels:
            late = {name for of, name in found if of == kernel} - CONSTANT
            given = set(parameters(kernel, program))
            in_blocks = isinstance(program, attention.Program) and program.variant.in_blocks
            assert late >= PRODUCED[kernel] | (BLOCKS if in_blocks else MANAGED)[kernel] & given, kernel


@pytest.mark.parametrize(
    ("source", "kernel", "parameter"),
    [
        ("combine.cuh", "gta_decode_combine", "mixes"),
        ("combine.cuh", "gta_decode_combine", "gate"),
        ("prefill.cu", "gta_prefill", "query"),
    ],
)
def test_a_promise_that_nobody_writes_is_seen(source: str, kernel: str, parameter: str, tmp_path: Path) -> None:
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    promise = rf"(\n{kernel}\([^{{]*?const [\w:]+\*) {parameter}\b"
    text, replaced = re.subn(promise, rf"\1 __restrict__ {parameter}", (KERNELS / source).read_text())
    assert replaced == 1
    (tmp_path / source).write_text(text)
    program = next(each for each in PROGRAMS["attention"] if kernel in each.kernels)
    assert True in reads_of(program, tmp_path)[kernel, parameter]


@pytest.mark.parametrize("rows", [8, 16])
def test_int8_weights_take_two_instructions_more_a_pair_in_bf16_than_in_fp16(rows: int) -> None:
    """One for each of two masks, which stay in registers; a lane makes 32 pairs of a unit."""
    counts = []
    for compute in ("fp16", "bf16"):
        program = matmul_tiling.few_program(matmul_tiling.Variant(8, 0, compute), ARCHITECTURE)
        code = compile_program(program, ARCHITECTURE, KERNELS).cubin
        counts.append(instructions(code)[f"gta_matmul_{rows}_rows"])
    fp16, bf16 = counts
    assert 0 < fp16 < bf16 <= fp16 + 2 * 32 + 16
