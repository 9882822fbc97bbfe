"""What a machine measures of itself where its GPU cannot be used, or its memory is nearly full."""

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError
from gta_edge.machine import probe
from gta_edge.machine.devices import Device
from gta_edge.machine.probe import measure, measure_cpu, measure_gpu
from tests.helpers.commands import Result


class Status(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with what CUDA says of the GPU that this machine is to have."""

    def give(
        free: int = 2**33,
        status: int = 0,
        clock_khz: int = 1_000_000,
        unavailable: str = "",
        architecture: str = "sm_87",
    ) -> None:
        def set_current() -> None:
            if unavailable:
                raise RuntimeError(unavailable)

        def allocate(size: int, stream: Any) -> None:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed")

        properties = SimpleNamespace(clock_rate=clock_khz, integrated=False)
        device = SimpleNamespace(
            set_current=set_current, properties=properties, create_stream=lambda: None, allocate=allocate
        )
        core, driver = ModuleType("cuda.core"), ModuleType("cuda.bindings.driver")
        core.Device = lambda number: device
        core.__version__ = "99"
        answer = (Status(status), free, 2**33) if not status else (Status(status),)
        driver.cuMemGetInfo = lambda: answer
        monkeypatch.setitem(sys.modules, "cuda.core", core)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        monkeypatch.setattr(probe, "current_gpu", lambda: Gpu(0, "a GPU", architecture, 8))

    return give


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"free": 0}, r"the memory of a GPU is full \(0 MB free\); close other programs, or name a --device"),
        ({"free": 2**26 - 1}, r"the memory of a GPU is full \(67 MB free\); .*"),
        (
            {"status": 2},
            r"a GPU cannot be used \(CUDA_ERROR_OUT_OF_MEMORY\); end the programs that .*",
        ),
        (
            {"unavailable": "CUDA_ERROR_DEVICE_UNAVAILABLE:\n the device is in exclusive mode"},
            r"a GPU cannot be used \(CUDA_ERROR_DEVICE_UNAVAILABLE: the device is in exclusive mode\); .*",
        ),
        ({}, r"a GPU cannot be used \(CUDA_ERROR_OUT_OF_MEMORY: The API call failed\); .*"),
        ({"clock_khz": 0}, "a GPU does not say its clock; name a --device"),
        ({"architecture": "sm_999"}, "a GPU is sm_999; rates are known of .*: name a --device"),
    ],
)
def test_a_gpu_that_cannot_be_measured(gpu: Callable[..., None], found: dict[str, Any], reason: str) -> None:
    gpu(**found)
    with pytest.raises(BackendError) as caught:
        measure_gpu()
    assert re.fullmatch(reason, str(caught.value)), caught.value


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(probe, "_READ_BYTES", 2**23)


@pytest.mark.usefixtures("quick")
def test_the_cpu_says_why_it_is_not_the_gpu(gpu: Callable[..., None]) -> None:
    gpu(free=0)
    found = measure("this")
    assert (found.kind, found.name) == ("cpu", "this")
    assert found.fallback_reason
    assert found.fallback_reason.startswith("the memory of a GPU is full (0 MB free)")
    assert measure("this-cpu").fallback_reason is None


@pytest.mark.usefixtures("quick")
def test_a_plan_says_why_it_is_not_for_the_gpu(command: Callable[..., Result], gpu: Callable[..., None]) -> None:
    gpu(free=0)
    said = "the memory of a GPU is full (0 MB free)"
    assert command("plan", "gta1-160m", "--json").document["fallback_reason"].startswith(said)
    for presets in (["gta1-160m"], ["gta1-160m", "gqa-160m"]):
        printed = " ".join(command("plan", *presets).out.split())  # wrapped for the terminal
    assert f"This is the CPU; the GPU cannot be used: {said}" in printed
    assert command("plan", "gta1-160m", "--device", "orin-nano-8gb", "--json").document["fallback_reason"] is None


@pytest.mark.usefixtures("quick")
def test_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "total_bytes", lambda: 300_000_000)
    monkeypatch.setattr(probe, "available_bytes", lambda: 200_000_000)
    found = measure_cpu()
    assert (found.memory_bytes, found.system_bytes, found.available_bytes) == (300_000_000, 100_000_000, 200_000_000)


def test_reading_takes_at_most_half_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "available_bytes", lambda: 2**26)
    sizes = []
    monkeypatch.setattr(probe, "_best", lambda work, amount: sizes.append(amount) or 1.0)
    probe._read_bandwidth(2)
    assert sizes == [2**25]
    monkeypatch.setattr(probe, "available_bytes", lambda: 2**24)
    with pytest.raises(BackendError, match="17 MB of memory are available, too little to measure with; close other"):
        probe._read_bandwidth(2)


def test_a_system_that_does_not_say_what_memory_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "total_bytes", lambda: None)
    with pytest.raises(BackendError, match="does not say how much memory there is"):
        measure_cpu()


def test_a_device_of_the_table_is_no_fallback() -> None:
    assert {field: value.default for field, value in Device.__dataclass_fields__.items()}["fallback_reason"] is None
