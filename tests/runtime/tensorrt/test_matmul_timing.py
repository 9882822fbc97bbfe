"""Matmuls timed on a GPU with full TensorRT: to run on a board (``make test-jetson``); no torch, no ONNX Runtime."""

from pathlib import Path

import pytest

from gta_edge.errors import BackendError
from gta_edge.runtime.tensorrt.builder import Target
from gta_edge.runtime.tensorrt.engine import IMPLEMENTATIONS, EngineSpec
from gta_edge.runtime.tensorrt.matmul_choice import PHASES, MatMulCall, choose
from gta_edge.runtime.tensorrt.matmul_timing import time_matmuls


def full_tensorrt() -> Target:
    """TensorRT with a builder, and the GPU here."""
    try:
        return Target.choose("tensorrt")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_on_a_gpu_both_are_timed(tmp_path: Path, compute: str) -> None:
    target = full_tensorrt()
    spec = EngineSpec("tensorrt", compute, compute, 512, 1, 128)
    calls = {MatMulCall(4, 32, 1280, (320, 64, 128, 1280), True): 54, MatMulCall(8, 0, 1280, (3584, 3584), False): 54}
    found = time_matmuls(calls, spec, target, tmp_path)
    assert [(each.call, each.phase) for each in found] == [(call, phase) for call in calls for phase in PHASES]
    for each in found:
        print(each)
        read = each.call.in_features * sum(each.call.output_sizes) * each.call.bits / 8
        for microseconds in each.microseconds.values():
            assert 0.05 < microseconds < 1e5
            assert each.phase == "prefill" or read / microseconds < 20e6  # bytes in 1 us: no GPU reads 20 TB/s
    assert choose(found).matmuls in IMPLEMENTATIONS
