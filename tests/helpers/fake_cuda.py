"""A CUDA driver that keeps the launches it is given."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gta_edge.cuda import gpu
from gta_edge.cuda.compiler import Compilable, Compiled
from gta_edge.cuda.gpu import Gpu
from gta_edge.plugins.attention.definition import NO_FEATURES, Features
from gta_edge.plugins.domain import KERNELS

ORIN = Gpu(0, "Orin", "sm_87", 8)


def declared(features: Features = NO_FEATURES, in_blocks: bool = False) -> dict[str, list[tuple[str, str]]]:
    """Type and name of each parameter of each kernel of a build with these features, read off the sources."""
    conditions = {
        "POSITIONS": features.has_positions,
        "BIAS": features.bias_rows,
        "BRANCHES": features.has_branches,
        "OBSERVED": features.observe,
        "BLOCKS": in_blocks,
    }
    others = ("decode.cu", "prefill.cu") if in_blocks else ("decode_blocks.cu", "prefill_blocks.cu")
    found = {}
    for source in (*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")):
        if source.name in others:
            continue
        text, before = re.sub(r"//.*|/\*.*?\*/|^#.*", "", source.read_text(), flags=re.MULTILINE), ""
        while text != before:  # the innermost first
            before = text
            text = re.sub(r"\bGTA_IF_(\w+)\(([^()]*)\)", lambda match: match[2] if conditions[match[1]] else "", before)
        for name, parameters in re.findall(r"\bGTA_KERNEL\([^()]*\)\s*(\w+)\(([^()]*)\)\s*\{", text):
            words = [parameter.replace("*", " * ").split() for parameter in parameters.split(",")]
            found[name] = [
                ("address" if "*" in parameter else " ".join(parameter[:-1]), parameter[-1]) for parameter in words
            ]
    return found


class Status(int):
    """A status of the driver, which is a number with a name."""

    name = "CUDA_ERROR_INVALID_IMAGE"


class Stream:
    """cuda.core's own kind of stream."""

    made = 0

    def __init__(self, handle: int = 5) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    @staticmethod
    def from_handle(handle: int) -> "Stream":
        Stream.made += 1
        return Stream(handle)


class FakeCuda:
    """What of cuda.core and of the driver is used, writing down what is asked of it."""

    def __init__(self, capability: tuple[int, int] = (8, 7), fails: str = "") -> None:
        self.capability, self.fails = capability, fails
        self.attributes: dict[str, int] = {}
        self.launches: list[tuple[Any, ...]] = []
        self.loaded: list[str] = []
        self.contexts: list[int] = [0x77]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeCuda":
        core = SimpleNamespace(
            Device=self.device,
            ObjectCode=SimpleNamespace(from_cubin=self.code),
            LaunchConfig=lambda grid, block, shmem_size: (grid, block, shmem_size),
            Stream=Stream,
            launch=self.launch,
        )
        driver = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
            cuCtxGetCurrent=lambda: (0, self.contexts[-1]),
            cuCtxSetCurrent=lambda context: (self.contexts.append(context), (0,))[1],
            cuCtxGetDevice=lambda: (0, 0),
            cuDeviceGet=lambda number: (0, f"device {number}"),
            cuKernelSetAttribute=self.set_attribute,
            cuMemcpyDtoDAsync=self.copy,
            cuKernelGetFunction=lambda handle: (0, handle),
            cuFuncLoad=lambda function: (self.loaded.append(function), (0,))[1],
        )
        monkeypatch.setitem(sys.modules, "cuda.core", core)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        monkeypatch.setattr(gpu, "driver_cuda_version", lambda: (13, 0))
        monkeypatch.setattr(gpu, "cuda_extra", lambda: "cuda13")
        monkeypatch.setattr(gpu, "compile_program", self.compile)
        return self

    def compile(self, program: Compilable, architecture: str, sources: Path) -> Compiled:
        return Compiled(b"cubin", {}, "")

    def code(self, cubin: bytes, name: str) -> SimpleNamespace:
        return SimpleNamespace(get_kernel=self.kernel)

    def device(self, number: int) -> SimpleNamespace:
        if self.fails == "device":
            raise RuntimeError("CUDA_ERROR_NO_DEVICE:\n  no CUDA-capable device is detected")
        return SimpleNamespace(
            compute_capability=self.capability,
            name="Fake",
            properties=SimpleNamespace(multiprocessor_count=8),
            set_current=lambda: self.contexts.append(0x99),
        )

    def kernel(self, name: str) -> SimpleNamespace:
        assert self.contexts[-1] == 0x99
        return SimpleNamespace(handle=name)

    def set_attribute(self, attribute: str, value: int, kernel: str, device: str) -> tuple[int]:
        assert (attribute, device) == ("shared", "device 0")
        self.attributes[kernel] = max(value, self.attributes.get(kernel, 0))
        return (Status(200) if self.fails == "load" else 0,)

    def copy(self, *arguments: int) -> tuple[int]:
        self.launches.append(("copy", *arguments))
        return (int(self.fails == "copy"),)

    def launch(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        if self.fails == "launch":
            raise RuntimeError("CUDA_ERROR_INVALID_HANDLE")
        self.launches.append((stream, config, kernel.handle, arguments))


STREAM = Stream()


def plain(arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [(type(value).__name__, value) for value in arguments]


def addresses(*values: int) -> list[tuple[str, int]]:
    return [("int", value) for value in values]  # which cuda.core passes as 8 bytes
