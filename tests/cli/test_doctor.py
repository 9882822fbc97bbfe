"""What ``doctor`` says of libraries that are broken, and of GPUs that cannot be used: it never dies, and never errs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gta_edge.cli import doctor_checks
from gta_edge.cuda import gpu as cuda_gpu
from gta_edge.cuda import session as cuda_session
from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError, GtaEdgeError
from gta_edge.libraries.install import install_command
from gta_edge.runtime.tensorrt import builder as tensorrt_builder
from tests.helpers.commands import COMMAND, Result, environment

NOT_INSTALLED = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"


def fake(directory: Path, name: str, source: str) -> None:
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(source)


def doctor(directory: Path, **variables: str) -> Result:
    """Run it with these modules before all others."""
    path = os.pathsep.join((str(directory), environment()["PYTHONPATH"]))
    changes = {"PYTHONPATH": path, "COLUMNS": "400", **variables}
    process = subprocess.run(
        [*COMMAND, "doctor", "--json"], env=environment() | changes, capture_output=True, text=True, check=False
    )
    return Result(process.returncode, process.stdout, process.stderr)


def test_libraries_that_cannot_be_imported(tmp_path: Path) -> None:
    fake(tmp_path, "onnxruntime", "import os; os.abort()")
    fake(tmp_path, "torch", "raise RuntimeError('made for another CPU')")
    fake(tmp_path, "onnxscript", NOT_INSTALLED)
    fake(tmp_path, "matplotlib", NOT_INSTALLED)
    fake(tmp_path, "tensorrt", "raise ImportError('libnvinfer.so.10: cannot open shared object file; searched /usr')")
    (tmp_path / "cuda.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this interpreter')")
    result = doctor(tmp_path)
    assert result.status == 1
    assert re.fullmatch(r"error: no backend works here; .*\n", result.err)
    found = Result(0, result.out.removeprefix("welcome to this interpreter\n"), "").document
    backends, features = found["backends"], found["features"]
    assert backends["onnxruntime"] == {
        "works": False,
        "reason": "importing onnxruntime ends the process with SIGABRT",
        "remedy": "pip install --upgrade --force-reinstall onnxruntime",
    }
    assert backends["onnxruntime-cuda"] == backends["onnxruntime"]
    assert found["onnxruntime_providers"] == []
    assert backends["torch"] == {
        "works": False,
        "reason": "the Python module torch is installed and cannot be loaded (RuntimeError: made for another CPU)",
        "remedy": "pip install --upgrade --force-reinstall torch",
    }
    assert features["export"] == backends["torch"]
    assert features["plot"] == {
        "works": False,
        "reason": "matplotlib not installed",
        "remedy": install_command("plot"),
    }
    assert backends["tensorrt"]["reason"] == (
        "the Python module tensorrt is installed and cannot be loaded (ImportError: libnvinfer.so.10: cannot open "
        "shared object file, searched /usr)"
    )
    if found["tensorrt"]["tensorrt-rtx"]:  # where it is installed, which CI's machines have
        hidden = f"is hidden by {tmp_path / 'cuda.py'}, which is something else of that name"
        assert backends["tensorrt-rtx"]["reason"] == f"the Python module cuda.bindings {hidden}"


def test_what_a_feature_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx", "onnx_ir"):
        fake(tmp_path, name, "__version__ = '99'")  # the real ones take a while
    fake(tmp_path, "onnxscript", NOT_INSTALLED)
    fake(tmp_path, "matplotlib", "import ctypes; ctypes.string_at(0)")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor_checks.run(["plot", "export"])
    assert found["export"] == {
        "works": False,
        "reason": "onnxscript not installed",
        "remedy": install_command("export"),
    }
    assert found["plot"]["reason"] == "importing matplotlib ends the process with SIGSEGV"


def test_a_check_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "matplotlib", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor_checks, "_TIMEOUT_S", 3.0)
    assert doctor_checks.run(["plot"])["plot"]["reason"] == "importing matplotlib did not end in 3 s"


@pytest.mark.parametrize("name", ["numpy", "safetensors", "rich"])
def test_a_library_that_is_always_needed(tmp_path: Path, name: str) -> None:
    fake(tmp_path, name, "raise ImportError('made for another Python')")
    message = doctor(tmp_path).error
    assert message.startswith("a library that gta-edge needs cannot be loaded (")
    assert "made for another Python" in message


def test_a_library_that_is_needed_for_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx_ir"):
        fake(tmp_path, name, "__version__ = '99'")
    fake(tmp_path, "tokenizers", "raise ImportError('made for another Python')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = "is installed and cannot be loaded (ImportError: made for another Python)"
    assert doctor_checks.run(["torch"])["torch"]["reason"] == f"the Python module tokenizers {reason}"


def test_torch_opens_no_bundle_with_a_library_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though torch itself works: onnx-ir reads the bundle's graph."""
    fake(tmp_path, "torch", "__version__ = '99'")
    fake(tmp_path, "onnx_ir", "__version__ = '1.0.0'")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor_checks.run(["torch"])["torch"] == {
        "works": False,
        "reason": "the Python module onnx_ir is of onnx-ir 1.0.0, which is too old; expected 1.1 or later",
        "remedy": "pip install 'onnx-ir>=1.1'",
    }


# --- GPUs that cannot be used ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a driver that starts with the status of a variable, as the real ones do."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, to make a library that says what a driver would")
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text("""
#include <stdlib.h>
static int status(void) { const char *text = getenv("DRIVER_STATUS"); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { return status(); }
int cuDriverGetVersion(int *version) { *version = 13000; return status() == 34 ? 34 : 0; }
""")
    command = [compiler, "-shared", "-fPIC", "-o", directory / "libcuda.so.1", directory / "driver.c"]
    subprocess.run(command, check=True)
    return directory


PROBLEM = "from gta_edge.libraries.cuda import driver_cuda_version as v, driver_problem as p; print(v(), p())"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "(13, 0) None"),
        (34, "None the libcuda.so.1 that is found is CUDA's stub, which .* and which drives no GPU"),
        (100, "(13, 0) the NVIDIA driver finds no GPU that it can use"),
        (803, "(13, 0) the NVIDIA driver's library and kernel module are of different releases"),
        (999, "(13, 0) the NVIDIA driver does not start"),
    ],
)
def test_a_driver_that_does_not_start(driver: Path, status: int, said: str) -> None:
    variables = environment(LD_LIBRARY_PATH=str(driver), DRIVER_STATUS=str(status))
    result = subprocess.run([sys.executable, "-c", PROBLEM], env=variables, capture_output=True, text=True, check=True)
    ending = rf" \(CUDA error {status}\); \S.*" if status else ""
    pattern = re.escape(said).replace(r"\.\*", ".*") + ending
    assert re.fullmatch(pattern, result.stdout.strip()), result.stdout


def test_a_library_that_is_no_driver(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    variables = environment(LD_LIBRARY_PATH=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", PROBLEM], env=variables, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"None the NVIDIA driver's libcuda.so.1 cannot be loaded \(.*\); install the driver again\n", result.stdout
    )


def test_a_stub_in_place_of_the_driver(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("DRIVER_STATUS", "34")
    found = doctor_checks.run(["driver", "kernels"])
    stub = "the libcuda.so.1 that is found is CUDA's stub, which programs are linked with and which drives no GPU"
    for name in ("driver", "kernels"):
        assert found[name]["reason"] == f"{stub} (CUDA error 34)"
        assert "LD_LIBRARY_PATH" in found[name]["remedy"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it with the architecture of the GPU that this machine is to have."""

    def give(architecture: str) -> None:
        found = Gpu(0, "a GPU", architecture, 8)
        for module in (cuda_gpu, tensorrt_builder):
            monkeypatch.setattr(module, "current_gpu", lambda device_id=0: found)
        monkeypatch.setattr(cuda_session, "check_usable", lambda: None)

    return give


def nvrtc(monkeypatch: pytest.MonkeyPatch, *architectures: int) -> None:
    functions = {"nvrtcVersion": lambda: (0, 12, 9), "nvrtcGetSupportedArchs": lambda: (0, list(architectures))}
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(**functions))


def asked(name: str) -> dict[str, Any]:
    try:
        return doctor_checks.CHECKS[name]()
    except GtaEdgeError as error:
        return doctor_checks._refused(error)


def test_a_gpu_that_the_compiler_does_not_know(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_110")
    nvrtc(monkeypatch, 80, 87)
    assert asked("kernels")["reason"] == "NVRTC 12.9 does not compile for sm_110, but for sm_80, sm_87"
    nvrtc(monkeypatch, 80, 87, 110)
    assert asked("kernels") == {
        "works": True,
        "reason": None,
        "remedy": None,
        "gpu": "a GPU, sm_110, 8 multiprocessors",
    }
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert "cuda.bindings.nvrtc is needed and not installed" in asked("kernels")["reason"]


@pytest.mark.parametrize(("architecture", "capability"), [("sm_87", "8.7"), ("sm_90", "9.0"), ("sm_110", "11.0")])
def test_a_gpu_that_tensorrt_rtx_does_not_build_for(
    gpu: Callable[[str], None], architecture: str, capability: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    pytest.importorskip("cuda.bindings", reason="needs CUDA's bindings")
    gpu(architecture)
    found = asked("tensorrt-rtx")
    assert re.fullmatch(
        rf"tensorrt-rtx \S+ does not build for compute capability '{re.escape(capability)}'", found["reason"]
    )
    assert found["remedy"].startswith("expected 8.")
    assert found["version"]


def test_a_gpu_that_is_anothers(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_87")
    nvrtc(monkeypatch, 87)

    def taken() -> None:
        raise BackendError("the GPU cannot be used (CUDA_ERROR_DEVICE_UNAVAILABLE)", "end the program that has it")

    monkeypatch.setattr(cuda_session, "check_usable", taken)
    assert asked("kernels")["reason"] == "the GPU cannot be used (CUDA_ERROR_DEVICE_UNAVAILABLE)"
