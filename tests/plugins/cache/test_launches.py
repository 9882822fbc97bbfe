"""Tables, lines and launches of the cache's kernels: none of it needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError
from gta_edge.plugins.cache.kernels import CacheKernels
from gta_edge.plugins.cache.launches import (
    FOLD,
    MOVE,
    ROTATE,
    SIGNATURES,
    LayerRows,
    Part,
    Program,
    address_table,
    check_lines,
    fold_starts,
    row_launch,
    turned_rows,
)
from tests.helpers.fake_cuda import ORIN, STREAM, FakeCuda, addresses, declared, plain
from tests.helpers.refusals import message


def lines(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 4)


def test_the_parameters_stand_in_the_sources_as_they_are_passed() -> None:
    found = declared()
    for kernel, signature in SIGNATURES.items():
        expected = [("address", name) for name in signature.addresses] + [("int", name) for name in signature.numbers]
        assert found[kernel] == expected


def test_the_table_has_what_a_layer_has() -> None:
    key, latent = Part(0x100, 2, 64, 30, 0x204), Part(0x300, 1, 128, 30, 0x404)
    table = address_table([LayerRows(key, latent), LayerRows(key, latent, Part(0x504, 1, 4, 30))])
    assert table.dtype == np.int64
    assert table.tolist() == [
        [[0x100, 0x204, 2, 64, 30], [0x300, 0x404, 1, 128, 30], [0] * 5],
        [[0x100, 0x204, 2, 64, 30], [0x300, 0x404, 1, 128, 30], [0x504, 0, 1, 4, 30]],
    ]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ((0x108, 1, 64, 30), "a cache is at address 0x108, its scales at 0x0; expected multiples of 16 and of 4"),
        ((0x100, 1, 64, 30, 2), "a cache is at address 0x100, its scales at 0x2; expected multiples of 16 and of 4"),
        (
            (0x100, 1, 66, 30),
            "a cache has 1 heads of 30 rows of 66 bytes; expected at least one of each, and a multiple of 4 bytes",
        ),
    ],
)
def test_memory_that_the_kernels_cannot_take(part: tuple[int, ...], text: str) -> None:
    assert message(Part, *part) == text


def test_folds_of_one_target_are_neighbours() -> None:
    folds = lines((0, 0, 5, 1), (0, 0, 1, 1), (0, 1, 7, 1), (2, 1, 7, 1), (2, 1, 8, 1), (2, 1, 8, 0))
    assert fold_starts(folds).tolist() == [0, 2, 3, 5, 6]
    assert fold_starts(lines()).tolist() == [0]
    assert message(fold_starts, folds[[0, 2, 1]]) == (
        "the folds of one target are apart; expected them one after another"
    )


def test_each_row_that_turns_knows_its_angle() -> None:
    shifts = [np.array([[0, -3], [5, 0]]), np.array([[0, 0, 5], [0, 0, 0]]), np.zeros((2, 1), np.int64)]
    found, distinct = turned_rows(shifts)
    assert distinct.tolist() == [-3, 5]
    assert found.tolist() == [[0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 2, 1]]
    assert turned_rows([])[0].shape == (0, 4)


@pytest.mark.parametrize("line", [(2, 0, 1, 1), (-1, 0, 1, 1), (0, 2, 1, 1), (0, 0, 9, 1), (1, 0, 1, 5), (1, 1, -1, 2)])
def test_lines_that_name_no_row(line: tuple[int, ...]) -> None:
    good = lines((0, 1, 8, 0), (1, 0, 4, 2))
    check_lines("moves", good, (9, 5), 2)
    with pytest.raises(
        BackendError, match=r"moves have a line .*; expected a layer below 2, a sequence below 2"
    ) as error:
        check_lines("moves", np.concatenate([good, lines(line)]), (9, 5), 2)
    assert str(list(line)) in str(error.value)


def test_the_last_column_of_a_rotation_is_no_row() -> None:
    check_lines("rotated rows", lines((0, 0, 1, 77)), (9,), 1, targets=False)
    with pytest.raises(BackendError, match=r"moves are int64 \[1, 4\]; expected int32 \[N, 4\]"):
        check_lines("moves", np.zeros((1, 4), np.int64), (9,), 1)


@pytest.mark.parametrize("types", [("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "int4")])
def test_types_that_there_are_no_kernels_for(types: tuple[str, str]) -> None:
    assert "the kernels have no cache of type" in message(Program, *types)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    current_gpu.cache_clear()
    cuda = FakeCuda().install(monkeypatch)
    kernels = CacheKernels(Program("bf16", "int8"), ORIN)
    common = {"table": 0x10, "layers": 7, "batch": 2}
    kernels.move(STREAM, moves=0x24, count=9, **common)
    kernels.fold(STREAM, folds=0x24, weights=0x34, starts=0x44, count=5, **common)
    kernels.rotate(STREAM, rows=0x24, cos=0x34, sin=0x44, count=4, angles=3, **common)
    grids = {name: config for _, config, name, _ in cuda.launches}
    assert grids == {MOVE: ((3, 3, 1), 128, 0), FOLD: ((2, 2, 1), 128, 0), ROTATE: ((1, 1, 1), 128, 0)}
    assert plain(cuda.launches[0][3]) == [*addresses(0x10, 0x24), *(("int32", n) for n in (9, 7, 2))]
    assert plain(cuda.launches[2][3]) == [*addresses(0x10, 0x24, 0x34, 0x44), *(("int32", n) for n in (4, 3, 7, 2))]
    assert message(row_launch, MOVE, 0) == "there are 0 rows; expected 1 to 536870911"
    with pytest.raises(BackendError, match="table is at address 0x4; expected a multiple of 8"):
        kernels.move(STREAM, moves=0x24, count=9, **common | {"table": 4})
