"""The kernels between matmuls on the host: the very source, run by the simulation, against float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gta_edge.cuda.compiler import compile_program
from gta_edge.errors import BackendError
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.elementwise.launches import (
    ADD_NORM,
    MAX_WIDTH,
    SIGNATURES,
    SILU_MULTIPLY,
    Program,
    add_norm_launch,
    silu_launch,
)
from tests.helpers import elementwise_cases as cases
from tests.helpers.fake_cuda import declared
from tests.helpers.kernel_simulator import LaunchSpec, SimulationError, Simulator, available, shared_directory
from tests.helpers.nvrtc import needs_nvrtc

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")
in_halves = pytest.mark.parametrize("compute", cases.TYPES)


@pytest.fixture(scope="session")
def builds() -> Path:
    return shared_directory()


def simulate(
    builds: Path, compute: str, kernel: str, launch: Any, arguments: list[Any], sources: Path = KERNELS
) -> None:
    program = Program(compute)
    simulator = Simulator(sources / program.source, program.kernels, program.defines(), [sources])
    simulator.compile(builds)
    simulator.run([LaunchSpec(kernel, launch.grid, launch.threads, launch.shared_bytes, arguments)], 1)


def bits(tensor: Tensor) -> np.ndarray:
    array = tensor.contiguous().view(torch.int16).numpy().copy()
    array.setflags(write=False)
    return array


def poisoned(tensor: Tensor) -> np.ndarray:
    return np.full(tensor.shape, -1, np.int16)  # NaN in both types


def tensor_of(array: np.ndarray, compute: str) -> Tensor:
    return torch.from_numpy(array).view(cases.TYPES[compute])


def add_norm(
    builds: Path, x: Tensor, addend: Tensor | None, weight: Tensor, compute: str, sources: Path = KERNELS
) -> tuple[Tensor, Tensor]:
    total, normed = poisoned(x), poisoned(x)
    arrays = [
        bits(x),
        None if addend is None else bits(addend),
        bits(weight),
        None if addend is None else total,
        normed,
    ]
    launch = add_norm_launch(*x.shape)
    simulate(builds, compute, ADD_NORM, launch, [*arrays, np.int32(x.shape[1]), np.float32(cases.EPSILON)], sources)
    return x if addend is None else tensor_of(total, compute), tensor_of(normed, compute)


def silu_multiply(builds: Path, gate: Tensor, up: Tensor, compute: str, sources: Path = KERNELS) -> Tensor:
    output = poisoned(gate)
    arguments = [bits(gate), bits(up), output, np.int32(gate.numel() // 8)]
    simulate(builds, compute, SILU_MULTIPLY, silu_launch(gate.numel()), arguments, sources)
    return tensor_of(output, compute)


@needs_compiler
@in_halves
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 8), (3, 256), (1, 264), (2, 1280), (1, 3584), (1, MAX_WIDTH)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("with_addend", [True, False], ids=["sum", "norm alone"])
def test_the_sum_is_torchs_and_the_norm_is_near(builds, compute, rows, width, with_addend):
    x = cases.values(rows, width, compute=compute, seed=width)
    addend = cases.values(rows, width, compute=compute, seed=1, scale=0.3) if with_addend else None
    weight = 1 + 0.2 * cases.values(width, compute=compute, seed=2)
    total, normed = add_norm(builds, x, addend, weight, compute)
    assert torch.equal(total, cases.added(x, addend))
    cases.assert_near(normed, cases.normed(total, weight), compute)


@needs_compiler
@in_halves
@pytest.mark.parametrize("scale", [0.0, 1e-4, 100.0])
def test_small_and_large_rows(builds, compute, scale):
    """Squares beyond fp16's range are summed in float32; of next to nothing, epsilon counts."""
    x = cases.values(2, 1280, compute=compute, seed=3, scale=scale)
    weight = cases.values(1280, compute=compute, seed=4)
    _, normed = add_norm(builds, x, None, weight, compute)
    cases.assert_near(normed, cases.normed(x, weight), compute)


@needs_compiler
@in_halves
def test_rows_know_nothing_of_each_other(builds, compute):
    x = cases.values(3, 264, compute=compute, seed=5)
    x[1] = torch.nan
    weight = cases.values(264, compute=compute, seed=6)
    total, normed = add_norm(builds, x, torch.zeros_like(x), weight, compute)
    assert total[1].isnan().all() and normed[1].isnan().all()
    for row in (0, 2):
        cases.assert_near(normed[row], cases.normed(x[row], weight), compute)


@needs_compiler
@in_halves
@pytest.mark.parametrize("count", [8, 504, 512, 520, 3584])
def test_silu_times_up(builds, compute, count):
    gate = cases.values(count, compute=compute, seed=count, scale=4.0)
    up = cases.values(count, compute=compute, seed=1)
    found = silu_multiply(builds, gate, up, compute)
    cases.assert_near(found, cases.silu_multiplied(gate, up), compute, roundings=2, factor=up)


@needs_compiler
@in_halves
def test_silu_where_the_exponential_leaves_float32(builds, compute):
    gate = torch.tensor([-6e4, -200.0, -90.0, 200.0, 6e4, 0.0, -0.0, torch.inf], dtype=cases.TYPES[compute])
    up = torch.full_like(gate, 0.5)
    found = silu_multiply(builds, gate, up, compute)
    assert torch.equal(found, torch.nn.functional.silu(gate) * up)
    nan = torch.tensor([torch.nan, -torch.inf, *[1.0] * 6], dtype=cases.TYPES[compute])
    assert silu_multiply(builds, nan, up, compute).isnan().tolist() == [True, True, *[False] * 6]


FAULTS = {
    "no barrier": ("    block_barrier();\n", ""),
    "one warp's sum": ("sum += sums[warp];", "sum = sums[warp];"),
    "half a warp": ("mask = warp_size / 2", "mask = warp_size / 4"),
    "the row's neighbour": ("i64{blockIdx.x} * width + first", "i64{blockIdx.x} * (width + 8) + first"),
    "beyond the row": ("const bool used = first < width;", "const bool used = true;"),
    "the sum of what was not rounded": ("squares += low * low + high * high;", "squares += low * low;"),
    "no epsilon": ("static_cast<float>(width) + epsilon)", "static_cast<float>(width))"),
    "the weight of another place": ("read(weight + first)", "read(weight)"),
    "beyond the last vector": ("if (vector >= vectors)", "if (vector > vectors)"),
    "no rounding of SiLU": ("unpack_low(rounded)", "silu(unpack_low(values.word[i]))"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(builds, tmp_path, fault):
    sources = tmp_path / "kernels"
    shutil.copytree(KERNELS, sources)
    path = sources / Program("bf16").source
    text, (there, planted) = path.read_text(), FAULTS[fault]
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    path.write_text(text.replace(there, planted))
    x, addend = (cases.values(2, 264, compute="bf16", seed=seed, scale=0.01) for seed in (7, 8))
    weight = 1 + 0.2 * cases.values(264, compute="bf16", seed=9)
    gate, up = (cases.values(520, compute="bf16", seed=seed, scale=2.0) for seed in (10, 11))

    def check() -> None:
        total, normed = add_norm(builds, x, addend, weight, "bf16", sources)
        assert torch.equal(total, cases.added(x, addend))
        cases.assert_near(normed, cases.normed(total, weight), "bf16")
        assert torch.equal(silu_multiply(builds, gate, up, "bf16", sources), torch.nn.functional.silu(gate) * up)

    with pytest.raises((AssertionError, SimulationError)):
        check()


# --- launches --------------------------------------------------------------------------------------------------------


def test_the_parameters_stand_in_the_source_as_they_are_passed() -> None:
    kinds = {"epsilon": "float"}
    for kernel, signature in SIGNATURES.items():
        expected = [("address", name) for name in signature.addresses]
        expected += [(kinds.get(name, "int"), name) for name in signature.numbers]
        assert [(kind.removeprefix("const "), name) for kind, name in declared()[kernel]] == expected


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (2**31, 8), (1, 0), (1, 12), (1, MAX_WIDTH + 8)])
def test_sizes_that_no_block_takes_are_refused(rows, width):
    with pytest.raises(BackendError, match="expected"):
        add_norm_launch(rows, width)


@pytest.mark.parametrize("values", [0, 4, 12, 2**35])
def test_numbers_of_values_that_no_grid_takes_are_refused(values):
    with pytest.raises(BackendError, match="expected a multiple of 8"):
        silu_launch(values)


def test_every_value_has_a_thread():
    for width in range(8, MAX_WIDTH + 1, 8):
        launch = add_norm_launch(3, width)
        assert width <= 8 * launch.threads < width + 8 * 32
        assert launch.shared_bytes == 4 * launch.threads // 32
    for values in (8, 512, 520, 7168 * 512):
        launch = silu_launch(values)
        assert values <= 8 * launch.threads * launch.grid[0] < values + 8 * launch.threads


def test_types_that_the_kernels_do_not_compute_in_are_refused():
    with pytest.raises(BackendError, match="not in fp32"):
        Program("fp32")


@needs_nvrtc
@in_halves
@pytest.mark.parametrize("architecture", ["sm_80", "sm_87", "sm_90", "sm_110", "sm_120"])
def test_no_thread_spills_and_a_full_block_fits(compute, architecture):
    program = Program(compute)
    for kernel, found in compile_program(program, architecture, KERNELS).resources.items():
        assert kernel in program.kernels
        assert found.spill_bytes == 0
        assert found.registers * 1024 <= 65536
