"""Plans of launches, their arguments, and the launch itself with a stand-in for CUDA: none of it needs a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.cuda.gpu import Gpu, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import driver_cuda_version
from gta_edge.libraries.install import install_command
from gta_edge.plugins.attention import kernels as launch
from gta_edge.plugins.attention import launches, tiling
from gta_edge.plugins.attention.definition import Features, Sizes
from gta_edge.plugins.attention.kernels import AttentionKernels, Buffers, attention_kernels
from gta_edge.plugins.attention.launches import SIGNATURES, choose_prefill, plan_attention, programs_for, signature
from gta_edge.plugins.attention.tiling import DECODE_TOKENS, Variant
from tests.helpers.fake_cuda import ORIN, STREAM, FakeCuda, Stream, addresses, declared, plain
from tests.helpers.refusals import message

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = Sizes(5, 1, 1, 64, 128, 1280)
FP16, INT8 = Variant(SIZES, "fp16", "fp16"), Variant(SIZES, "bf16", "int8")
INT4 = Variant(SIZES, "bf16", "int4")

BUFFERS = Buffers(
    query=0x1000,
    key=0x2000,
    latent=0x3000,
    gate=0x4000,
    key_cache=0x5000,
    latent_cache=0x6000,
    key_scale=0,
    latent_scale=0,
    past_length=0x7008,
    cos=0x8000,
    sin=0x9000,
    value_decoder=0xA000,
    output=0xB000,
    workspace=0xC000,
)
SCALED = replace(BUFFERS, key_scale=0xD004, latent_scale=0xE008)
GQA = Variant(Sizes(8, 2, 2, 64, 64, 512, False, False), "fp16", "fp16")
PLAIN = replace(BUFFERS, gate=0, value_decoder=0)


# --- the order of the arguments --------------------------------------------------------------------------------------


FEATURES = (
    Features(),
    Features("mass", 3, True, True),
    Features("last", 8, False, False),
    Features(None, 1, True, False),
    Features(None, 0, False, True),
)


@pytest.mark.parametrize("features", FEATURES)
def test_the_parameters_stand_in_the_sources_as_they_are_passed(features: Features) -> None:
    numbers, found = {"scale": "float"}, declared(features)
    assert set(SIGNATURES) <= found.keys()
    for kernel in SIGNATURES:
        expected = signature(kernel, Variant(SIZES, "fp16", "fp16", features))
        assert found[kernel] == [("address", name) for name in expected.addresses] + [
            (numbers.get(name, "int"), name) for name in expected.numbers
        ]


def test_the_parameters_of_a_cache_in_blocks_stand_in_the_sources_as_they_are_passed() -> None:
    found, programs = declared(in_blocks=True), programs_for(INT4, "sm_87")
    kernels = {kernel for program in programs.all for kernel in program.kernels}
    assert len(kernels) == 5
    for kernel in kernels:
        expected = signature(kernel, INT4)
        types = [("float" if name == "scale" else "int", name) for name in expected.numbers]
        assert found[kernel] == [("address", name) for name in expected.addresses] + types


def test_what_is_not_given_leaves_no_parameter() -> None:
    assert {kernel: signature(kernel, FP16) for kernel in SIGNATURES} == SIGNATURES
    managed = {"token_positions", "row_bias", "branch_start", "branches", "query_weight", "decay", "received", "scores"}
    assert not managed & {name for each in SIGNATURES.values() for name in each.addresses}


@pytest.mark.parametrize("of", [FP16, INT8, Variant(replace(SIZES, latent_dim=256, hidden_size=1280), "fp16", "fp8")])
def test_every_kernel_of_every_program_has_a_signature_and_nothing_else_does(of: Variant) -> None:
    assert {kernel for program in programs_for(of, "sm_87").all for kernel in program.kernels} == set(SIGNATURES)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_few_tokens_are_split_and_combined() -> None:
    of = programs_for(FP16, "sm_87")
    made = plan_attention(of, 8, batch=2, tokens=3, capacity=4096)
    splits = tiling.decode_splits(of.decode, 8, 2, 3, 4096)
    assert [each.kernel for each in made.launches] == ["gta_decode_split", "gta_decode_combine"]
    assert made.launches[0].launch == tiling.decode_grid(of.decode, splits, 2, 3)
    assert made.launches[1].launch == tiling.combine_grid(of.decode, 8, 2, 3)
    assert made.numbers == {"tokens": 3, "capacity": 4096, "rows": 6, "splits": splits}
    assert made.offsets == {"mixes": 0, "sums": 6 * 5 * splits * 128 * 4}
    assert made.workspace_bytes == 6 * 5 * splits * 130 * 4


def test_many_tokens_are_appended_and_attended() -> None:
    of = programs_for(FP16, "sm_87")
    made = plan_attention(of, 8, batch=2, tokens=300, capacity=4096)
    assert [each.kernel for each in made.launches] == ["gta_append", "gta_prefill"]
    assert made.launches[0].program is made.launches[1].program
    assert made.launches[0].launch == tiling.append_grid(of.prefill[0], 2, 300)
    assert made.launches[1].launch == tiling.prefill_grid(of.prefill[0], 2, 300)
    assert (made.workspace_bytes, made.offsets) == (0, {})


MANAGED = replace(FP16, features=Features("mass", 2, True, True))


def test_an_observing_call_has_more_blocks_and_room_for_scores() -> None:
    of = programs_for(MANAGED, "sm_87")
    made = plan_attention(of, 8, batch=2, tokens=3, capacity=1000)
    splits, rows = made.numbers["splits"], 2 * 3 * 5
    mixes = made.launches[1].launch.grid[0] - made.numbers["mix_blocks"]
    assert mixes * 5 * 4 >= 2 * 4 > (mixes - 1) * 5 * 4  # 4 blocks of 256 rows of each sequence
    assert made.offsets == {"mixes": 0, "sums": rows * splits * 512, "scores": rows * splits * 520}
    assert made.workspace_bytes == rows * splits * 520 + rows * 1008 * 4
    assert all(offset % 16 == 0 for offset in made.offsets.values())


def test_rows_of_a_tree_share_one_reading_of_the_cache() -> None:
    of = programs_for(MANAGED, "sm_87")
    narrow, wide = of.decodes
    for tokens, program, blocks in ((3, narrow, 1), (4, wide, 1), (25, wide, 1), (64, wide, 3)):
        launch = plan_attention(of, 8, batch=1, tokens=tokens, capacity=1000).launches[0]
        assert (launch.program, launch.launch.grid[1]) == (program, blocks)
    assert plan_attention(of, 8, batch=1, tokens=20, capacity=4096).numbers["splits"] == 8  # one a multiprocessor


def test_more_new_tokens_than_a_word_has_bits_are_a_prompt() -> None:
    of = programs_for(MANAGED, "sm_87")
    launches = plan_attention(of, 8, batch=1, tokens=65, capacity=1000).launches
    assert [each.kernel for each in launches] == ["gta_append", "gta_prefill"]
    assert MANAGED.features.has_branches and not launches[1].program.variant.features.has_branches
    assert "branches" not in launches[1].signature.addresses


def test_the_border_between_the_two() -> None:
    of = programs_for(FP16, "sm_87")
    for tokens, kernel in ((DECODE_TOKENS, "gta_decode_split"), (DECODE_TOKENS + 1, "gta_append")):
        assert plan_attention(of, 8, batch=1, tokens=tokens, capacity=64).launches[0].kernel == kernel


@given(
    st.sampled_from([FP16, INT8]), st.integers(1, 200), st.integers(1, 64), st.integers(1, 3000), st.integers(1, 40000)
)
@SETTINGS
def test_every_plan_is_complete(of: Variant, processors: int, batch: int, tokens: int, capacity: int) -> None:
    made = plan_attention(programs_for(of, "sm_90"), processors, batch=batch, tokens=tokens, capacity=capacity)
    given_elsewhere = {"positions", "scale"}
    for each in made.launches:
        assert set(each.signature.numbers) <= set(made.numbers) | given_elsewhere
        assert set(each.signature.addresses) <= set(made.offsets) | set(vars(BUFFERS))
        assert min(each.launch.grid) >= 1
        assert each.kernel in each.program.kernels
    if made.workspace_bytes:
        rows = batch * tokens * of.sizes.num_query_heads * made.numbers["splits"]
        assert made.offsets["sums"] % 16 == 0
        assert made.workspace_bytes - made.offsets["sums"] == rows * 2 * 4


@given(st.integers(1, 200), st.integers(1, 16), st.integers(17, 3000))
@SETTINGS
def test_the_widest_tile_that_gives_every_processor_a_block_is_taken(processors: int, batch: int, tokens: int) -> None:
    candidates = programs_for(FP16, "sm_87").prefill
    blocks = [np.prod(tiling.prefill_grid(each, batch, tokens).grid) for each in candidates]
    expected = next((i for i, number in enumerate(blocks) if number >= processors), -1)
    assert choose_prefill(candidates, processors, batch, tokens) is candidates[expected]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"batch": 0}, "batch is 0; expected 1 to 65535"),
        ({"batch": 65536}, "batch is 65536; expected 1 to 65535"),
        ({"tokens": 0}, "tokens is 0; expected 1 to 2147483647"),
        ({"capacity": -1}, "capacity is -1; expected 1 to 1073741824"),
        ({"capacity": 2**30 + 1}, "capacity is 1073741825; expected 1 to 1073741824"),
        (
            {"batch": 65535, "tokens": 40000},
            "65535 sequences of 40000 new tokens are more than 2147483647; append smaller chunks",
        ),
        (
            {"tokens": 10_000_000},
            "10000000 new tokens of 1 sequences take a grid of (5, 78125, 1), whose last two numbers go up to 65535; "
            "append them in smaller chunks",
        ),
    ],
)
def test_sizes_that_are_refused(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(BackendError) as error:
        plan_attention(programs_for(FP16, "sm_87"), 8, **{"batch": 1, "tokens": 1, "capacity": 64, **sizes})
    assert str(error.value) == text


# --- what there is no GPU for ----------------------------------------------------------------------------------------


def test_importing_loads_nothing_of_cuda() -> None:
    script = "import sys, gta_edge.plugins.attention.kernels\n"
    script += "print([name for name in sys.modules if name.startswith('cuda')])"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


@pytest.mark.skipif(driver_cuda_version() is not None, reason="needs a machine without a driver")
def test_a_machine_without_a_driver() -> None:
    assert message(current_gpu) == (
        "there is no NVIDIA driver (libcuda.so.1 is not found); install it, in a container pass the GPU in "
        "(docker run --gpus all), or choose another backend"
    )


@pytest.fixture(autouse=True)
def gpus_are_asked_anew() -> Iterator[None]:
    current_gpu.cache_clear()
    yield
    current_gpu.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def test_the_gpu_is_read(cuda: FakeCuda) -> None:
    assert current_gpu() == Gpu(0, "Fake", "sm_87", 8)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda((7, 5)).install(monkeypatch)
    assert message(current_gpu) == (
        "Fake has compute capability 7.5; the kernels need 8.0 or later (Ampere, Jetson Orin): choose another backend"
    )


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(fails="device").install(monkeypatch)
    assert message(current_gpu, 3) == (
        "there is no usable CUDA device 3 (CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected); "
        "nvidia-smi lists those that there are"
    )


def test_a_driver_without_cuda_core(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    for call in (current_gpu, lambda: AttentionKernels(FP16, ORIN)):
        assert message(call) == (
            f"the Python module cuda.core is needed and not installed; run: {install_command('cuda13')}"
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def test_everything_is_loaded_at_construction_with_leave_for_its_shared_memory(cuda: FakeCuda) -> None:
    kernels = AttentionKernels(FP16, ORIN)
    decode, prefill = kernels.programs.decode, kernels.programs.prefill
    assert cuda.attributes == {
        "gta_decode_split": decode.shared_bytes,
        "gta_decode_combine": decode.tile("GTA_COMBINE_SHARED_BYTES"),
        "gta_append": 0,
        "gta_prefill": max(program.shared_bytes for program in prefill),
    }
    assert sorted(cuda.loaded) == sorted(name for program in kernels.programs.all for name in program.kernels)
    assert cuda.contexts[-1] == 0x77  # the caller's is current again


def test_where_no_context_was_current_the_gpus_stays(cuda: FakeCuda) -> None:
    cuda.contexts = [0]
    AttentionKernels(FP16, ORIN)
    assert cuda.contexts == [0, 0x99]


def test_kernels_that_cannot_be_loaded(cuda: FakeCuda) -> None:
    cuda.fails = "load"
    assert message(AttentionKernels, FP16, ORIN) == (
        "the attention kernels cannot be loaded on Orin (CUDA_ERROR_INVALID_IMAGE); its driver knows CUDA 13.0: "
        "update it, or run: pip install 'nvidia-cuda-nvrtc<13.1'"
    )
    assert cuda.contexts[-1] == 0x77


def test_the_kernels_of_a_variant_are_shared(cuda: FakeCuda) -> None:
    attention_kernels.cache_clear()
    try:
        first = attention_kernels(FP16, ORIN)
        assert attention_kernels(Variant(SIZES, "fp16", "fp16"), Gpu(0, "Orin", "sm_87", 8)) is first
        assert attention_kernels(INT8, ORIN) is not first
    finally:
        attention_kernels.cache_clear()


# --- launching -------------------------------------------------------------------------------------------------------

CALL = {"batch": 2, "tokens": 3, "capacity": 512, "positions": 1024, "scale": 0.125}


def test_a_decode_call(cuda: FakeCuda) -> None:
    kernels = AttentionKernels(FP16, ORIN)
    kernels.launch(STREAM, BUFFERS, **CALL)
    made = kernels.plan(2, 3, 512)
    sums, splits = 0xC000 + made.offsets["sums"], made.numbers["splits"]
    assert kernels.workspace_bytes(2, 3, 512) == made.workspace_bytes > 0
    split, combine = cuda.launches
    assert (split[0], split[2], combine[2]) == (STREAM, "gta_decode_split", "gta_decode_combine")
    grid = made.launches[0].launch
    assert split[1] == (grid.grid, grid.threads, kernels.programs.decode.shared_bytes)
    assert plain(split[3]) == [
        *addresses(0x1000, 0x2000, 0x3000, 0x5000, 0x6000, 0, 0, 0x7008, 0x8000, 0x9000, 0xC000, sums),
        *(("int32", value) for value in (3, 512, 1024)),
        ("float32", 0.125),
    ]
    assert plain(combine[3]) == [
        *addresses(0xC000, sums, 0x4000, 0xA000, 0x7008, 0xB000),
        *(("int32", value) for value in (6, 3, 512, splits)),
    ]


def test_a_call_without_a_gate_and_a_value_decoder(cuda: FakeCuda) -> None:
    kernels = AttentionKernels(GQA, ORIN)
    for tokens in (3, 300):
        kernels.launch(STREAM, PLAIN, **CALL | {"tokens": tokens})
    _, combine, _, prefill = cuda.launches
    sums = 0xC000 + kernels.plan(2, 3, 512).offsets["sums"]
    assert plain(combine[3])[:6] == addresses(0xC000, sums, 0, 0, 0x7008, 0xB000)
    assert plain(prefill[3])[:3] == addresses(0x1000, 0, 0)


def test_a_prefill_call(cuda: FakeCuda) -> None:
    kernels = AttentionKernels(INT8, ORIN)
    kernels.launch(STREAM, replace(SCALED, workspace=0), **{**CALL, "tokens": 300})
    assert kernels.workspace_bytes(2, 300, 512) == 0
    append, prefill = cuda.launches
    assert (append[2], prefill[2]) == ("gta_append", "gta_prefill")
    caches = (0x5000, 0x6000, 0xD004, 0xE008, 0x7008, 0x8000, 0x9000)
    assert plain(append[3]) == [
        *addresses(0x2000, 0x3000, *caches),
        *(("int32", value) for value in (300, 512, 1024)),
    ]
    assert plain(prefill[3]) == [
        *addresses(0x1000, 0x4000, 0xA000, *caches, 0xB000),
        *(("int32", value) for value in (300, 512, 1024)),
        ("float32", 0.125),
    ]


@pytest.mark.parametrize("stream", [7, SimpleNamespace(__cuda_stream__=lambda: (0, 7))])
def test_other_streams_and_handles_are_taken(stream: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "made", 0)
    kernels = AttentionKernels(FP16, ORIN)
    for _ in range(3):
        kernels.launch(stream, BUFFERS, **CALL)
    assert [(type(found), found.handle) for found, *_ in cuda.launches] == [(Stream, 7)] * 6
    assert Stream.made == 1


def test_calls_of_the_same_sizes_are_prepared_once(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = AttentionKernels(FP16, ORIN)
    planned = []
    monkeypatch.setattr(launch, "plan_attention", lambda *a, **o: planned.append(o) or launches.plan_attention(*a, **o))
    for _ in range(5):
        kernels.launch(STREAM, BUFFERS, **CALL)
        kernels.workspace_bytes(2, 3, 512)
    assert len(planned) == 1
    assert len(cuda.launches) == 10


@pytest.mark.parametrize(
    ("of", "buffers", "call", "text"),
    [
        (FP16, SCALED, {}, "key_scale is given; a cache of type fp16 has none"),
        (INT8, BUFFERS, {}, "key_scale is missing; a cache of type int8 has scales"),
        (INT8, replace(SCALED, latent_scale=0), {}, "latent_scale is missing; a cache of type int8 has scales"),
        (FP16, replace(BUFFERS, gate=0), {}, "gate is missing; the kernels are compiled with one"),
        (FP16, PLAIN, {}, "gate is missing; the kernels are compiled with one"),
        (FP16, replace(BUFFERS, value_decoder=0), {}, "value_decoder is missing; the kernels are compiled with one"),
        (GQA, BUFFERS, {}, "gate is given; the kernels are compiled without one"),
        (GQA, replace(BUFFERS, gate=0), {}, "value_decoder is given; the kernels are compiled without one"),
        (FP16, BUFFERS, {"tokens": 600}, "tokens is 600; expected at most the capacity, 512"),
        (FP16, BUFFERS, {"positions": 0}, "positions is 0; expected 1 to 2147483647"),
        (FP16, BUFFERS, {"positions": 2**31}, "positions is 2147483648; expected 1 to 2147483647"),
        *(
            (FP16, BUFFERS, {"scale": scale}, f"scale is {scale}; expected more than 0, and a number that float32 has")
            for scale in (0.0, -1.0, 1e-46, 1e39, float("inf"), float("nan"))
        ),
        (FP16, BUFFERS, {"batch": 0}, "batch is 0; expected 1 to 65535"),
        (MANAGED, BUFFERS, {}, "token_positions is missing; the kernels are compiled with one"),
        (FP16, replace(BUFFERS, decay=4), {}, "decay is given; the kernels are compiled without one"),
        (FP16, BUFFERS, {"branch_rows": -1}, "branches has words for -1 rows; expected 0 to 2147483647"),
    ],
)
def test_calls_that_are_refused(of: Variant, buffers: Buffers, call: dict[str, Any], text: str, cuda: FakeCuda) -> None:
    kernels = AttentionKernels(of, ORIN)
    assert message(kernels.launch, STREAM, buffers, **{**CALL, **call}) == text
    assert cuda.launches == []


def test_a_call_without_the_workspace_that_it_needs(cuda: FakeCuda) -> None:
    kernels = AttentionKernels(FP16, ORIN)
    size = kernels.workspace_bytes(2, 3, 512)
    assert message(kernels.launch, STREAM, replace(BUFFERS, workspace=0), **CALL) == (
        f"there is no workspace; expected {size} bytes of the GPU's memory"
    )


def test_a_launch_that_fails(cuda: FakeCuda) -> None:
    cuda.fails = "launch"
    assert message(AttentionKernels(FP16, ORIN).launch, STREAM, BUFFERS, **CALL) == (
        "the attention kernels could not be launched (CUDA_ERROR_INVALID_HANDLE); expected a stream of device 0, Orin"
    )


SIXTEEN = [name for name, alignment in ((n, launch._ALIGNMENTS.get(n, 16)) for n in vars(BUFFERS)) if alignment == 16]


@pytest.mark.parametrize("name", SIXTEEN)
def test_an_address_that_is_not_aligned(name: str) -> None:
    assert message(replace, BUFFERS, **{name: 0x1008}) == (
        f"{name} is at address 0x1008; expected a multiple of 16: copy it to memory that is aligned so"
    )


def test_numbers_in_memory_are_aligned_to_their_own_size() -> None:
    assert "a multiple of 8" in message(replace, BUFFERS, past_length=0x1004)
    assert "a multiple of 4" in message(replace, SCALED, key_scale=0x1002)


def test_an_address_that_is_missing() -> None:
    assert message(replace, BUFFERS, output=0) == "output is at address 0; expected memory of the GPU"
