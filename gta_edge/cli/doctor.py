"""``gta-edge doctor``: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gta_edge.cli.output import FAILED, current, key_value_table
from gta_edge.version import __version__

__all__ = ["doctor"]

# Backend, the modules it needs, and the line that brings them.
_BACKENDS = {
    "onnxruntime": (("onnxruntime", "onnx_ir"), "pip install 'gta-edge[ort]'"),
    "torch": (("torch", "onnx_ir"), "pip install 'gta-edge[export]'"),
}
_PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
)


def doctor() -> None:
    """Show what this machine has for running models; the exit status is 1 when no backend works."""
    output = current()
    report: dict[str, Any] = {
        "gta_edge": __version__,
        "machine": _machine(),
        "gpu": _gpu(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "kernels": _kernels(),
        "onnxruntime_providers": _providers(),
        "backends": {name: _backend(*entry) for name, entry in _BACKENDS.items()},
    }
    if output.json:
        output.document(report)
    else:
        output.console.print(key_value_table(_for_people(report)))
    if not any(entry["works"] for entry in report["backends"].values()):
        print("error: no backend works here; the lines of the backends say what installs one", file=sys.stderr)
        sys.exit(FAILED)


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "board": _line(Path("/proc/device-tree/model")),
        "jetson_linux": _line(Path("/etc/nv_tegra_release")),
        "power_mode": _run("nvpmodel", "-q"),
    }


def _gpu() -> dict[str, Any]:
    found = _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    cuda = _line(Path("/usr/local/cuda/version.json"))
    return {
        "devices": found.splitlines() if found else [],
        "cuda_toolkit": bool(cuda) or shutil.which("nvcc") is not None,
    }


def _kernels() -> dict[str, Any]:
    """Whether the CUDA kernels can run here, and on what."""
    from gta_edge.errors import BackendError
    from gta_edge.plugins.launch import current_gpu

    try:
        gpu = current_gpu()
    except BackendError as error:
        return {"works": False, "gpu": None, "reason": str(error)}
    return {"works": True, "gpu": f"{gpu.name}, {gpu.architecture}, {gpu.processors} multiprocessors", "reason": None}


def _backend(modules: tuple[str, ...], remedy: str) -> dict[str, Any]:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        if modules[0] == "onnxruntime" and sys.version_info < (3, 11):
            remedy = "use Python 3.11 or later, which onnxruntime 1.25 needs"
        return {"works": False, "reason": f"{', '.join(missing)} not installed", "remedy": remedy}
    if modules[0] == "onnxruntime":
        from gta_edge.errors import BackendError
        from gta_edge.ort import load_onnxruntime

        try:
            load_onnxruntime()
        except BackendError as error:
            return {"works": False, "reason": str(error), "remedy": remedy}
    return {"works": True, "reason": None, "remedy": None}


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ").splitlines()[0]
    except (OSError, IndexError):
        return None


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _for_people(report: dict[str, Any]) -> dict[str, str]:
    rows = {"gta-edge": report["gta_edge"]}
    machine = report["machine"]
    rows |= {key.replace("_", " "): str(value) for key, value in machine.items() if value and key != "memory_bytes"}
    if machine["memory_bytes"]:
        rows["memory"] = f"{machine['memory_bytes'] / 2**30:.1f} GiB"
    rows["GPU"] = "; ".join(report["gpu"]["devices"]) or "none found (nvidia-smi lists none)"
    rows["packages"] = ", ".join(f"{name} {found}" for name, found in report["packages"].items())
    rows["CUDA kernels"] = report["kernels"]["gpu"] or report["kernels"]["reason"]
    rows["ONNX Runtime providers"] = ", ".join(report["onnxruntime_providers"]) or "none"
    for name, entry in report["backends"].items():
        rows[f"backend {name}"] = "works" if entry["works"] else f"{entry['reason']}; {entry['remedy']}"
    return rows
