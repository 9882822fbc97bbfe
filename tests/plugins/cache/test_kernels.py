"""The kernels that move, fold and rotate rows of caches, on the host: the very sources, against float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gta_edge.plugins.cache.launches import FOLD, MOVE, ROTATE, Program, fold_starts, row_launch, turned_rows
from gta_edge.plugins.domain import KERNELS
from tests.helpers import cache_rows as rows
from tests.helpers.kernel_simulator import LaunchSpec, SimulationError, Simulator, Value, Words, available

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")

TYPES = [("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "int8"), ("bf16", "int8"), ("bf16", "fp8"), ("fp16", "fp8")]
CAPACITIES = (20, 33, 9)
BATCH = 3
every_type = pytest.mark.parametrize(("compute", "cache"), TYPES)


def table(layers: list[rows.Layer]) -> Words:
    """The addresses of all arrays, as ``address_table`` has them."""
    words: list[np.ndarray | int] = []
    for layer in layers:
        for name in ("key", "latent", "received"):
            array = layer.arrays.get(name)
            if array is None:
                words += [0] * 5
                continue
            heads, width = (1, 1) if name == "received" else (array.shape[1], array.shape[3])
            scales = layer.arrays.get(f"{name}_scale", 0)
            words += [array, scales, heads, width * array.itemsize, layer.capacity]
    return Words(words)


def run(
    kernel: str,
    layers: list[rows.Layer],
    count: int,
    *values: Value,
    types: tuple[str, str],
    sources: Path = KERNELS,
    seed: int = 0,
) -> None:
    program, launch = Program(*types), row_launch(kernel, count)
    simulator = Simulator(sources / program.source, program.kernels, program.defines(), [sources])
    spec = LaunchSpec(kernel, launch.grid, launch.threads, 0, [table(layers), *values, len(layers), BATCH])
    simulator.run([spec], seed)


def check_moves(types: tuple[str, str], dims: str, received: bool, seed: int = 0, sources: Path = KERNELS) -> None:
    layers = rows.layers(dims, *types, CAPACITIES, BATCH, received, seed)
    moves, _, _ = rows.lines(np.random.default_rng(seed), CAPACITIES, BATCH)
    expected = [rows.moved(layer, i, moves) for i, layer in enumerate(layers)]
    run(MOVE, layers, len(moves), moves, len(moves), types=types, sources=sources, seed=seed)
    for layer, wanted in zip(layers, expected, strict=True):
        for name, array in wanted.items():
            assert layer.arrays[name].tobytes() == array.tobytes(), name


def check_folds(types: tuple[str, str], dims: str, seed: int = 0, sources: Path = KERNELS) -> None:
    layers = rows.layers(dims, *types, CAPACITIES, BATCH, True, seed)
    _, folds, weights = rows.lines(np.random.default_rng(seed), CAPACITIES, BATCH)
    expected = [rows.folded(layer, i, folds, weights) for i, layer in enumerate(layers)]
    before = [{name: array.copy() for name, array in layer.arrays.items()} for layer in layers]
    starts = fold_starts(folds)
    count = len(starts) - 1
    run(FOLD, layers, count, folds, weights, starts, count, types=types, sources=sources, seed=seed)
    for layer, wanted, old in zip(layers, expected, before, strict=True):
        assert layer.arrays["received"].tobytes() == old["received"].tobytes()
        for name, values in wanted.items():
            target = ~np.isnan(values).any((1, 3))  # [B, S]
            for part in layer.arrays.keys() & {name, f"{name}_scale"}:
                found, was = (np.moveaxis(arrays[part], 1, 2)[~target] for arrays in (layer.arrays, old))
                assert found.tobytes() == was.tobytes(), part
            found, exact = (np.moveaxis(array, 1, 2)[target] for array in (layer.value(name), values))
            assert (np.abs(found - exact) <= rows.allowed(exact, *types)).all(), name


def check_rotation(types: tuple[str, str], dims: str, seed: int = 0, sources: Path = KERNELS) -> None:
    layers = rows.layers(dims, *types, CAPACITIES, BATCH, True, seed)
    rng = np.random.default_rng(seed)
    shifts = [rng.integers(-3, 4, (BATCH, capacity)) for capacity in CAPACITIES]
    lines, distinct = turned_rows(shifts)
    width = rows.DIMS[dims][0][1]
    angles = distinct[:, None] / 100.0 ** (np.arange(width // 2) / width)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    before = [{name: array.copy() for name, array in layer.arrays.items()} for layer in layers]
    old = [layer.value("key") for layer in layers]
    run(ROTATE, layers, len(lines), lines, cos, sin, len(lines), len(distinct), types=types, sources=sources, seed=seed)
    for layer, was, key, shift in zip(layers, before, old, shifts, strict=True):
        for name in layer.arrays.keys() - {"key", "key_scale"}:
            assert layer.arrays[name].tobytes() == was[name].tobytes(), name
        stays = shift == 0
        assert np.moveaxis(layer.arrays["key"], 1, 2)[stays].tobytes() == np.moveaxis(was["key"], 1, 2)[stays].tobytes()
        turn = (shift[:, None, :, None] / 100.0 ** (np.arange(width // 2) / width)).astype(np.float64)
        a, b = np.split(key, 2, axis=-1)
        exact = np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], -1)
        found, exact = (np.moveaxis(values, 1, 2)[~stays] for values in (layer.value("key"), exact))
        assert (np.abs(found - exact) <= rows.allowed(exact, *types) + 1e-6 * np.abs(exact).max()).all()


@every_type
@pytest.mark.parametrize("dims", rows.DIMS)
def test_moves_copy_every_bit_of_a_row(compute: str, cache: str, dims: str) -> None:
    for received in (True, False):
        check_moves((compute, cache), dims, received)


@every_type
@pytest.mark.parametrize("dims", rows.DIMS)
def test_folds_are_weighted_sums(compute: str, cache: str, dims: str) -> None:
    check_folds((compute, cache), dims)


@every_type
@pytest.mark.parametrize("dims", rows.DIMS)
def test_keys_are_rotated_as_if_they_stood_elsewhere(compute: str, cache: str, dims: str) -> None:
    check_rotation((compute, cache), dims)


@pytest.mark.parametrize(
    "line",
    [
        (3, 0, 1, 2),
        (-1, 0, 1, 2),
        (0, 3, 1, 2),
        (0, -1, 1, 2),
        (0, 0, 20, 2),
        (0, 0, 1, 20),
        (2, 0, -1, 2),
        (2, 0, 1, -7),
    ],
)
def test_lines_in_memory_are_not_trusted(line: tuple[int, int, int, int]) -> None:
    types = ("fp16", "int8")
    layers = rows.layers("gta", *types, CAPACITIES, BATCH, True)
    before = [{name: array.copy() for name, array in layer.arrays.items()} for layer in layers]
    lines, one = np.array([line], np.int32), np.ones((1, 32), np.float32)
    run(MOVE, layers, 1, lines, 1, types=types)
    if line[2] in range(CAPACITIES[min(max(line[0], 0), 2)]):  # a source that is none adds nothing
        run(FOLD, layers, 1, lines, one[0, :1], np.array([0, 1], np.int32), 1, types=types)
    if line[3] != 2:
        run(ROTATE, layers, 1, lines, one, one, 1, 1, types=types)
    for layer, was in zip(layers, before, strict=True):
        assert all(array.tobytes() == was[name].tobytes() for name, array in layer.arrays.items())


def test_a_row_of_which_nothing_stays_may_be_anything() -> None:
    layers = rows.layers("gta", "bf16", "bf16", CAPACITIES, BATCH, False)
    layers[1].arrays["key"][0, :, 4] = np.nan
    wanted = layers[1].arrays["key"][0, :, 9].copy()
    folds = np.array([[1, 0, 4, 4], [1, 0, 9, 4]], np.int32)
    weights = np.array([0, 1], np.float32)
    run(FOLD, layers, 1, folds, weights, fold_starts(folds), 1, types=("bf16", "bf16"))
    assert layers[1].arrays["key"][0, :, 4].tobytes() == wanted.tobytes()


FAULTS = {
    "another head": (MOVE, "(batch_row * heads + head) * capacity", "(batch_row * heads) * capacity"),
    "another sequence": (MOVE, "(batch_row * heads + head) * capacity", "head * capacity"),
    "the capacity of the first layer": (MOVE, "[line.layer * parts + blockIdx.y]", "[blockIdx.y]"),
    "scales stay": (MOVE, "if (part.scales != 0) {", "if (part.scales == 1) {"),
    "the source and the target change places": (
        MOVE,
        "lines[4 * i + 2]), target(lines[4 * i + 3])",
        "lines[4 * i + 3]), target(lines[4 * i + 2])",
    ),
    "the last fold is left out": (FOLD, "fold < end; ++fold", "fold < end - 1; ++fold"),
    "weights of other folds": (FOLD, "weights[fold];", "weights[fold - begin];"),
    "the largest of one lane only": (FOLD, "largest = other > largest ? other : largest;\n        }", "}"),
    "the scale is not written": (FOLD, "*part.scale(place) = scale;", ""),
    "the halves turn the other way": (ROTATE, "a * c - b * s : b * c + a * s", "a * c + b * s : b * c - a * s"),
    "written before all have read": (ROTATE, "warp_barrier();  // all have read the row, which is", "// which is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path: Path, fault: str) -> None:
    kernel, there, instead = FAULTS[fault]
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (sources / "cache_rows.cu").read_text()
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    (sources / "cache_rows.cu").write_text(text.replace(there, instead))
    for seed in range(10):
        try:
            if kernel == MOVE:
                check_moves(("fp16", "int8"), "gqa", True, seed, sources)
            elif kernel == FOLD:
                check_folds(("fp16", "int8"), "gqa", seed, sources)
            else:
                check_rotation(("bf16", "bf16"), "narrow", seed, sources)
        except (AssertionError, SimulationError):
            return
    pytest.fail("nothing shows it")
