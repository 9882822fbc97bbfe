"""The launch of the matmuls with quantised weights, with a stand-in for CUDA: no GPU is needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from gta_edge.cuda.gpu import Gpu
from gta_edge.plugins.matmul.kernels import MatMulKernels, matmul_kernels
from gta_edge.plugins.matmul.launches import SIGNATURE, plan_matmul
from gta_edge.plugins.matmul.tiling import Variant
from tests.helpers.fake_cuda import ORIN, STREAM, FakeCuda, Stream, addresses, declared, plain
from tests.helpers.refusals import message

INT4, INT8 = Variant(4, 32, "fp16"), Variant(8, 0, "bf16")
CALL: dict[str, Any] = {
    "x": 0x1000,
    "weight": 0x2000,
    "scale": 0x3000,
    "bias": 0x4002,
    "outputs": (0x5000, 0x6000),
    "rows": 3,
    "in_features": 1280,
    "output_sizes": (320, 50),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def test_importing_loads_nothing_of_cuda() -> None:
    script = "import sys, gta_edge.plugins.matmul.kernels; print([n for n in sys.modules if n.startswith('cuda')])"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_the_parameters_stand_in_the_sources_as_they_are_passed() -> None:
    expected = [("address", name) for name in SIGNATURE.addresses]
    expected += [("int", name) for name in SIGNATURE.numbers]
    found = {name: parameters for name, parameters in declared().items() if name.startswith("gta_matmul")}
    assert found == dict.fromkeys(("gta_matmul", "gta_matmul_8_rows", "gta_matmul_16_rows"), expected)


def test_everything_is_loaded_at_construction_with_leave_for_its_shared_memory(cuda: FakeCuda) -> None:
    kernels = MatMulKernels(INT4, ORIN)
    assert cuda.attributes == {
        "gta_matmul_8_rows": 163 * 1024,  # what a block may have, since x's size is a call's
        "gta_matmul_16_rows": 163 * 1024,
        "gta_matmul": max(program.shared_bytes for program in kernels.programs.many),
    }
    assert sorted(cuda.loaded) == ["gta_matmul"] * 3 + ["gta_matmul_16_rows", "gta_matmul_8_rows"]
    assert cuda.contexts[-1] == 0x77  # the caller's is current again


def test_kernels_that_cannot_be_loaded(cuda: FakeCuda) -> None:
    cuda.fails = "load"
    assert message(MatMulKernels, INT4, ORIN) == (
        "the quantised matmul kernels cannot be loaded on Orin (CUDA_ERROR_INVALID_IMAGE); its driver knows CUDA "
        "13.0: update it, or run: pip install 'nvidia-cuda-nvrtc<13.1'"
    )


def test_the_kernels_of_a_variant_are_shared(cuda: FakeCuda) -> None:
    matmul_kernels.cache_clear()
    try:
        first = matmul_kernels(INT4, ORIN)
        assert matmul_kernels(Variant(4, 32, "fp16"), Gpu(0, "Orin", "sm_87", 8)) is first
        assert matmul_kernels(INT8, ORIN) is not first
    finally:
        matmul_kernels.cache_clear()


@pytest.mark.parametrize(("rows", "kernel"), [(3, "gta_matmul_8_rows"), (300, "gta_matmul")])
def test_a_call(cuda: FakeCuda, rows: int, kernel: str) -> None:
    kernels = MatMulKernels(INT4, ORIN)
    kernels.launch(STREAM, **CALL | {"rows": rows})
    ((stream, config, name, arguments),) = cuda.launches
    made = plan_matmul(kernels.programs, 8, rows, 1280, (320, 50))
    assert (stream, name) == (STREAM, kernel)
    assert config == (made.launch.grid, made.launch.threads, made.launch.shared_bytes)
    assert plain(arguments) == [
        *addresses(0x1000, 0x2000, 0x3000, 0x4002, 0x5000, 0x6000, 0, 0),
        *(("int32", value) for value in (rows, 1280, 320, 50, 0, 0)),
    ]


def test_sizes_may_be_a_list_and_the_bias_absent(cuda: FakeCuda) -> None:
    call = {name: value for name, value in CALL.items() if name != "bias"}
    MatMulKernels(INT8, ORIN).launch(STREAM, **call | {"output_sizes": [320, 50], "outputs": [0x5000, 0x6000]})
    assert cuda.launches[0][3][3] == 0


def test_streams_and_handles_are_taken(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "made", 0)
    kernels = MatMulKernels(INT4, ORIN)
    for _ in range(3):
        kernels.launch(7, **CALL)
    assert [(type(found), found.handle) for found, *_ in cuda.launches] == [(Stream, 7)] * 3
    assert Stream.made == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"rows": 0}, "x has 0 rows; expected 1 to 1073741824"),
        ({"in_features": 1284}, "in_features is 1284; expected a multiple of 8"),
        ({"output_sizes": (50, 320)}, "output_sizes is (50, 320); expected multiples of 16, but for the last one"),
        ({"outputs": (0x5000,)}, "there are 1 outputs; expected 2, one for each size"),
        ({"x": 0x1008}, "x is at address 0x1008; expected a multiple of 16: copy it to memory that is aligned so"),
        ({"bias": 0x4001}, "bias is at address 0x4001; expected a multiple of 2"),
        ({"outputs": (0x5000, 0x6002)}, "output_1 is at address 0x6002; expected a multiple of 16"),
        ({"scale": 0}, "scale is at address 0; expected memory of the GPU"),
    ],
)
def test_calls_that_are_refused(cuda: FakeCuda, call: dict[str, Any], text: str) -> None:
    assert text in message(MatMulKernels(INT4, ORIN).launch, STREAM, **CALL | call)
    assert cuda.launches == []


def test_a_launch_that_fails(cuda: FakeCuda) -> None:
    cuda.fails = "launch"
    assert message(MatMulKernels(INT4, ORIN).launch, STREAM, **CALL) == (
        "the quantised matmul kernels could not be launched (CUDA_ERROR_INVALID_HANDLE); expected a stream of device "
        "0, Orin"
    )
