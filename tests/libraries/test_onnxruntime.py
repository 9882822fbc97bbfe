"""ONNX Runtime on GPUs that a build of it holds no code for: what its first kernel says, and nothing else, tells."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gta_edge.cli import doctor_checks
from gta_edge.errors import BackendError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries import cuda
from gta_edge.libraries import onnxruntime as ort
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession

NO_CODE = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Add node. Name:'' Status Message: "
    "CUDA error cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device"
)


class Driver:
    """CUDA's driver with one GPU; ``fails`` is the function that does."""

    def __init__(self, capability: tuple[int, int] = (8, 7), fails: str = "") -> None:
        self._capability, self._fails = capability, fails

    def cuInit(self, flags: int) -> int:
        return self._status("cuInit")

    def cuDriverGetVersion(self, place: Any) -> int:
        place._obj.value = 13020
        return 0

    def cuDeviceGet(self, place: Any, device_id: int) -> int:
        place._obj.value = device_id + 5
        return self._status("cuDeviceGet")

    def cuDeviceGetAttribute(self, place: Any, attribute: int, device: Any) -> int:
        assert device.value == 5
        place._obj.value = self._capability[{75: 0, 76: 1}[attribute]]
        return self._status("cuDeviceGetAttribute")

    def _status(self, name: str) -> int:
        return 100 if name == self._fails else 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with what this machine is to have: its processor, its GPU, and what ONNX Runtime's kernel does there."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def give(machine: str, capability: tuple[int, int], raised: str | None, result: float = 2.0) -> None:
        class Session:
            def __init__(self, model: bytes, settings: Any, providers: list[Any]) -> None:
                assert providers == [("CUDAExecutionProvider", {"device_id": "0"})]

            def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
                if raised:
                    raise RuntimeError(raised)
                return [np.array([result], np.float32)]

        made = SimpleNamespace(ortvalue_from_shape_and_type=lambda *what: None)
        for name, value in {
            "get_available_providers": lambda: ["CUDAExecutionProvider"],
            "InferenceSession": Session,
            "OrtValue": made,
            "preload_dlls": lambda: None,
        }.items():
            monkeypatch.setattr(onnxruntime, name, value, raising=False)
        monkeypatch.setattr(ort.platform, "machine", lambda: machine)
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(capability))

    return give


REMEDY = "choose the backend tensorrt, or install a build of onnxruntime-gpu for this GPU"


@pytest.mark.parametrize(
    ("machine", "capability", "hint"),
    [
        ("aarch64", (8, 7), ", not PyPI's, which has none for Jetson"),
        ("aarch64", (11, 0), ", not PyPI's, which has none for Jetson"),
        ("aarch64", (8, 0), ""),
        ("x86_64", (6, 1), ""),
    ],
)
def test_a_build_without_code_for_the_gpu(
    gpu: Callable[..., None], tiny_bundle: Any, machine: str, capability: tuple[int, int], hint: str
) -> None:
    gpu(machine, capability, NO_CODE)
    reason = f"holds no code for this GPU of compute capability {capability[0]}.{capability[1]}"
    for opened in (ort.load_onnxruntime_cuda, lambda: OnnxRuntimeCudaSession(Bundle.open(tiny_bundle), compute="fp16")):
        with pytest.raises(BackendError) as caught:
            opened()
        assert caught.value.problem.endswith(reason)
        assert caught.value.remedy == REMEDY + hint
        assert len(str(caught.value).splitlines()) == 1
    found = doctor_checks.CHECKS["onnxruntime-cuda"]()
    assert (found["reason"].endswith(reason), found["remedy"]) == (True, REMEDY + hint)


@pytest.mark.parametrize(
    ("machine", "capability"), [("aarch64", (8, 7)), ("aarch64", (11, 0)), ("aarch64", (12, 1)), ("x86_64", (9, 0))]
)
def test_a_build_that_has_it_is_taken_wherever_it_is_from(
    gpu: Callable[..., None], machine: str, capability: tuple[int, int]
) -> None:
    gpu(machine, capability, None)
    assert ort.load_onnxruntime_cuda().get_available_providers() == ["CUDAExecutionProvider"]
    assert doctor_checks.CHECKS["onnxruntime-cuda"]()["works"]


def test_a_kernel_that_adds_wrongly_is_refused(gpu: Callable[..., None]) -> None:
    gpu("aarch64", (8, 7), None, result=0.0)
    with pytest.raises(BackendError, match=r"cannot use the GPU \(1 \+ 1 is \[0\.0\] there\)"):
        ort.load_onnxruntime_cuda()


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_a_driver_that_does_not_say_the_capability(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver((11, 0)))
    assert cuda.gpu_compute_capability() == (11, 0)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver((11, 0), fails))
    assert cuda.gpu_compute_capability() is None
    found = ort.why_no_gpu(SimpleNamespace(__version__="1.31.1"), RuntimeError(NO_CODE))
    assert str(found) == f"ONNX Runtime 1.31.1 holds no code for this GPU; {REMEDY}"


def test_the_model_that_is_run() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load_from_string(ort._SUM)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]
    ort.run_a_kernel(onnxruntime, "CPUExecutionProvider")
    with pytest.raises(Exception, match="Provider"):
        ort.run_a_kernel(onnxruntime, "NoExecutionProvider")
