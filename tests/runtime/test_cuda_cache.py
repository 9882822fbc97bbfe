"""Rows moved, folded and rotated in the memory of a GPU that is simulated, against loops over numpy arrays.

By the driver's copies, and for engines with plugins by the kernels, whose sources run on the host. Where there is a GPU
the same is asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest

from gta_edge.cuda import session as cuda_session
from gta_edge.cuda.gpu import current_gpu
from gta_edge.cuda.session import Cuda
from gta_edge.errors import BackendError
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import CacheTensor, cache_tensors, received_name
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.runtime.cache_moves import Moves
from gta_edge.runtime.cuda_cache import CudaCache, DeviceTensor
from gta_edge.runtime.tensorrt import kernel_rows
from gta_edge.runtime.tensorrt.kernel_rows import KernelRows
from tests.helpers import reference
from tests.helpers.cache_kernels import SimulatedCacheKernels
from tests.helpers.kernel_simulator import available
from tests.helpers.tensorrt_simulator import GPU, Driver

BATCH, CAPACITIES = 2, (11, 7)
CONFIG = parse_config(reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, num_hidden_layers=2))
LARGEST = {"int8": 127.0, "fp8": 448.0}
NOTHING = np.zeros((0, 4), np.int32), np.zeros(0, np.float32)


@dataclass
class Memory:
    """Tensors by name, [B, heads, S(, d)] or [B, S]: pinned arrays, and where they lie in the GPU's memory."""

    cuda: Cuda
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def upload(self) -> None:
        for name, array in self.arrays.items():
            self.cuda.copy_in(self.addresses[name], array)
        self.cuda.synchronize()

    def download(self) -> None:
        for name, array in self.arrays.items():
            self.cuda.copy_out(array, self.addresses[name])
        self.cuda.synchronize()


def why_not() -> str:
    try:
        current_gpu()
    except BackendError as error:
        return str(error)
    return ""


NO_GPU = why_not()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")]


@pytest.fixture(params=["simulated", pytest.param("gpu", marks=ON_GPU)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    if request.param == "gpu":
        made = Cuda()
    else:
        with patch.object(cuda_session, "optional", lambda *_: Driver()):
            made = Cuda()
    yield made
    made.close()


COPIES = [("copies", dtype) for dtype in ("fp32", "fp16", "bf16", "int8", "fp8")]
KERNELS = [
    pytest.param(
        ("kernels", dtype), marks=pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")
    )
    for dtype in ("fp16", "bf16", "int8", "fp8")
]
every_way = pytest.mark.parametrize("way", [*COPIES, *KERNELS], ids=lambda way: "-".join(way))


def filled(cuda: Cuda, dtype: str, by: str = "copies") -> tuple[CudaCache | KernelRows, Memory]:
    """A cache of random values, and its memory."""
    rng, tensors, memory = np.random.default_rng(0), [], Memory(cuda)
    caches = cache_tensors(CONFIG, dtype)
    caches += [CacheTensor(received_name(i), 1, None, "fp32") for i in range(2)]
    for tensor in caches:
        capacity = CAPACITIES[tensor.layer]
        shape, kind = tensor.shape(BATCH, capacity), DTYPES[tensor.dtype].numpy
        array = memory.arrays[tensor.name] = cuda.host_array(shape, kind)
        drawn = rng.uniform(0.5, 2, shape) if tensor.width is None else rng.standard_normal(shape) * 40
        array[...] = drawn.astype(kind)
        address = memory.addresses[tensor.name] = cuda.allocate(array.nbytes, tensor.name)
        tensors.append(DeviceTensor(tensor, address, capacity))
    cuda.synchronize()
    memory.upload()
    if by == "copies":
        return CudaCache(cuda, CONFIG, tensors), memory
    compute = dtype if dtype in ("fp16", "bf16") else "fp16"
    if not isinstance(cuda._driver, Driver):
        return KernelRows(cuda, current_gpu(), CONFIG, compute, BATCH, tensors), memory
    with patch.object(kernel_rows, "cache_kernels", lambda program, gpu: SimulatedCacheKernels(cuda._driver, program)):
        return KernelRows(cuda, GPU, CONFIG, compute, BATCH, tensors), memory


def values(memory: Memory, name: str, dtype: str) -> np.ndarray:
    """A key or latent, float64 [B, n, S, d]."""
    kind, _, layer = name.partition(".")
    found = memory[name].astype(np.float64)
    return found * memory[f"{kind}_scale.{layer}"].astype(np.float64)[..., None] if dtype in LARGEST else found


def rounding(dtype: str, exact: np.ndarray) -> np.ndarray:
    """How far a row may be from its exact values [..., d]."""
    if dtype == "int8":
        return np.abs(exact).max(-1, keepdims=True) / 127 * 0.51
    if dtype == "fp32":  # of the sum's terms
        return np.abs(exact).max(-1, keepdims=True) * 2.0**-21
    steps = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp8": 2.0**-4}
    return np.maximum(np.abs(exact), np.abs(exact).max(-1, keepdims=True) * 2.0**-8) * steps[dtype]


@every_way
def test_rows_are_copied_in_every_tensor_of_their_layer(cuda: Cuda, way: tuple[str, str]) -> None:
    by, dtype = way
    cache, memory = filled(cuda, dtype, by)
    pairs = [(0, 0, 8, 1), (0, 0, 9, 2), (0, 0, 10, 5), (0, 1, 7, 0), (1, 1, 6, 3), (1, 1, 5, 0)]
    before = {name: view.copy() for name, view in memory.arrays.items()}
    cache.move(Moves(np.array(pairs, np.int32), *NOTHING))
    memory.download()
    for name, view in memory.arrays.items():
        expected = before[name].copy()
        for layer, sequence, source, target in pairs:
            if name.endswith(f".{layer}"):
                index = (sequence, slice(None), target), (sequence, slice(None), source)
                expected[index[0]] = before[name][index[1]]
        np.testing.assert_array_equal(view.view(np.uint8), expected.view(np.uint8), err_msg=name)


def test_rows_that_move_together_are_one_copy(cuda: Cuda) -> None:
    if not isinstance(cuda._driver, Driver):
        pytest.skip("calls are counted by the simulation")
    cache, _ = filled(cuda, "fp16")
    calls = cuda._driver.calls
    before = len(calls)
    pairs = np.array([(0, 0, 8, 3), (0, 0, 6, 1), (0, 0, 7, 2)], np.int32)  # a window that moves down, in any order
    cache.move(Moves(pairs, *NOTHING))
    assert calls[before:] == ["copy device to device"] * 4  # two heads of keys, a latent, what was received


@every_way
def test_a_fold_is_the_weighted_mean_and_comes_before_moves(cuda: Cuda, way: tuple[str, str]) -> None:
    by, dtype = way
    cache, memory = filled(cuda, dtype, by)
    before = {name: values(memory, name, dtype) for name in ("key.0", "latent.0", "key.1", "latent.1")}
    received = {name: memory[name].copy() for name in ("received.0", "received.1")}
    folds = [(0, 1, 0, 0), (0, 1, 4, 0), (0, 1, 6, 0), (0, 1, 1, 1), (0, 1, 5, 1), (1, 0, 2, 0), (1, 0, 0, 0)]
    weights = np.array([0.5, 0.25, 0.25, 0.75, 0.25, 1.0, 0.0], np.float32)
    moves = np.array([(0, 1, 10, 4), (0, 1, 0, 9)], np.int32)  # of a row that was folded into, too
    cache.move(Moves(moves, np.array(folds, np.int32), weights))
    memory.download()
    expected = {name: array.copy() for name, array in before.items()}
    for name, array in expected.items():
        for layer, sequence, target in {(layer, b, target) for layer, b, _, target in folds}:
            if name.endswith(f".{layer}"):
                parts = [
                    weight * before[name][sequence, :, source]
                    for (i, b, source, to), weight in zip(folds, weights, strict=True)
                    if (i, b, to) == (layer, sequence, target)
                ]
                array[sequence, :, target] = np.sum(parts, axis=0)
    for name in ("key.0", "latent.0"):
        expected[name][1, :, [4, 9]] = expected[name][1, :, [10, 0]]
    for name, array in expected.items():
        found = values(memory, name, dtype)
        assert (np.abs(found - array) <= rounding(dtype, array) + 1e-9).all(), name
    received["received.0"][1, 0, [4, 9]] = received["received.0"][1, 0, [10, 0]]
    for name, array in received.items():
        np.testing.assert_array_equal(memory[name], array)


def test_an_8_bit_row_that_is_all_zero_stays_so(cuda: Cuda) -> None:
    cache, memory = filled(cuda, "int8")
    memory["key.0"][0, :, [2, 3]] = 0
    memory.upload()
    cache.move(Moves(NOTHING[0], np.array([(0, 0, 2, 2), (0, 0, 3, 2)], np.int32), np.array([0.5, 0.5], np.float32)))
    memory.download()
    assert not values(memory, "key.0", "int8")[0, :, 2].any()


@every_way
def test_keys_are_rotated_and_nothing_else(cuda: Cuda, way: tuple[str, str]) -> None:
    by, dtype = way
    cache, memory = filled(cuda, dtype, by)
    before = {name: values(memory, name, dtype) for name in ("key.0", "latent.0", "key.1", "latent.1")}
    shifts = [np.zeros((BATCH, capacity - 1), np.int64) for capacity in CAPACITIES]  # of fewer rows than there are
    shifts[0][1, [0, 4]], shifts[1][0, 2] = (-3, 200), 17
    cache.rotate(shifts)
    memory.download()
    half = CONFIG.key_width // 2
    frequencies = CONFIG.rope_theta ** (-np.arange(half) / half)
    for layer, shift in enumerate(shifts):
        name = f"key.{layer}"
        expected = before[name].copy()
        for b, row in np.argwhere(shift):
            angle = shift[b, row] * frequencies
            a, c = np.split(before[name][b, :, row], 2, axis=-1)
            turned = [a * np.cos(angle) - c * np.sin(angle), c * np.cos(angle) + a * np.sin(angle)]
            expected[b, :, row] = np.concatenate(turned, axis=-1)
        found = values(memory, name, dtype)
        bound = np.where((np.pad(shift, ((0, 0), (0, 1))) != 0)[:, None, :, None], rounding(dtype, expected), 0)
        assert (np.abs(found - expected) <= bound + 1e-4 * (bound > 0)).all()
        np.testing.assert_array_equal(values(memory, f"latent.{layer}", dtype), before[f"latent.{layer}"])
