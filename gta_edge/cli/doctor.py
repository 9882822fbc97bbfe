"""``gta-edge doctor``: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from gta_edge import machine
from gta_edge.cli.output import FAILED, current, key_value_table
from gta_edge.errors import BackendError
from gta_edge.version import __version__

__all__ = ["doctor"]


def doctor() -> None:
    """Show what this machine has for running models; the exit status is 1 when no backend works."""
    output = current()
    kernels = _kernels()
    report: dict[str, Any] = {
        "gta_edge": __version__,
        "machine": machine.describe(),
        "gpu": {"devices": machine.gpus(), "cuda_driver": _cuda_driver(), "cuda_toolkit": machine.cuda_toolkit()},
        "packages": machine.package_versions(),
        "kernels": kernels,
        "tensorrt": {engine: _tensorrt(engine) for engine in ("tensorrt", "tensorrt-rtx")},
        "onnxruntime_providers": _providers(),
        "backends": {
            "tensorrt": _engine_backend("tensorrt", kernels),
            "tensorrt-rtx": _engine_backend("tensorrt-rtx", kernels),
            "onnxruntime-cuda": _onnxruntime_cuda(),
            "onnxruntime": _modules(("onnxruntime", "onnx_ir"), "ort", _load_onnxruntime),
            "torch": _modules(("torch", "onnx_ir"), "export"),
        },
        "features": {
            "export": _modules(("torch", "onnx", "onnx_ir", "onnxscript"), "export"),
            "plot": _modules(("matplotlib",), "plot"),
        },
    }
    if output.json:
        output.document(report)
    else:
        output.console.print(key_value_table(_for_people(report)))
    if not any(entry["works"] for entry in report["backends"].values()):
        print("error: no backend works here; the lines of the backends say what installs one", file=sys.stderr)
        sys.exit(FAILED)


def _state(reason: str | None = None, remedy: str | None = None) -> dict[str, Any]:
    return {"works": reason is None, "reason": reason, "remedy": remedy}


def _modules(modules: tuple[str, ...], extra: str, load: Callable[[], object] | None = None) -> dict[str, Any]:
    """Whether what a backend or feature imports is there; ``load`` imports what may be there and be of no use."""
    remedy = f"pip install 'gta-edge[{extra}]'"
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        if "onnxruntime" in missing and sys.version_info < (3, 11):
            remedy = "use Python 3.11 or later, which onnxruntime 1.25 needs"
        return _state(f"{', '.join(missing)} not installed", remedy)
    try:
        if load:
            load()
    except BackendError as error:
        return _state(str(error), remedy)
    return _state()


def _load_onnxruntime() -> object:
    from gta_edge.ort import load_onnxruntime

    return load_onnxruntime()


def _onnxruntime_cuda() -> dict[str, Any]:
    """Whether ONNX Runtime can use the GPU; an error says itself what to run."""
    from gta_edge.ort import load_onnxruntime_cuda

    missing = _modules(("onnxruntime", "onnx_ir"), "ort-gpu")
    if not missing["works"]:
        return missing
    try:
        load_onnxruntime_cuda()
    except BackendError as error:
        reason, _, remedy = str(error).partition("; ")
        return _state(reason, remedy.removeprefix("run: ") or None)
    return _state()


def _engine_backend(engine: str, kernels: dict[str, Any]) -> dict[str, Any]:
    """Whether engines of this kind run here: TensorRT, CUDA's bindings, and a GPU that the kernels run on."""
    from gta_edge.plugins.compiler import cuda_extra
    from gta_edge.trt import load

    try:
        load(engine)
    except BackendError as error:
        reason, _, remedy = str(error).partition("; ")
        return _state(reason, remedy)
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return _state("cuda.bindings not installed", f"pip install 'gta-edge[tensorrt,{cuda_extra()}]'")
    if not kernels["works"]:
        reason, _, remedy = kernels["reason"].partition("; ")
        return _state(reason, remedy or None)
    return _state()


def _tensorrt(engine: str) -> str | None:
    """Return the version of TensorRT that can be imported."""
    from gta_edge.trt import load

    try:
        return load(engine).version_text
    except BackendError:
        return None


def _kernels() -> dict[str, Any]:
    """Whether the CUDA kernels can run here, and on what."""
    from gta_edge.plugins.launch import current_gpu

    try:
        gpu = current_gpu()
    except BackendError as error:
        return {"works": False, "gpu": None, "reason": str(error)}
    return {"works": True, "gpu": f"{gpu.name}, {gpu.architecture}, {gpu.processors} multiprocessors", "reason": None}


def _cuda_driver() -> str | None:
    """Return the CUDA version that the driver knows."""
    from gta_edge.plugins.compiler import driver_cuda_version

    found = driver_cuda_version()
    return f"{found[0]}.{found[1]}" if found else None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _for_people(report: dict[str, Any]) -> dict[str, str]:
    found, gpu = dict(report["machine"]), report["gpu"]
    on_jetson = machine.is_jetson(found)
    memory, fixed, clocks = found.pop("memory_bytes"), found.pop("clocks_fixed"), found.pop("clocks_hz")
    rows = {"gta-edge": report["gta_edge"]}
    rows |= {key.replace("_", " "): str(value) for key, value in found.items() if value}
    if memory:
        rows["memory"] = f"{memory / 2**30:.1f} GiB"
    if on_jetson:
        rows["clocks"] = machine.clocks_text(clocks)
    if on_jetson and fixed is not None:
        rows["GPU clock"] = "fixed" if fixed else "varies; before measuring run: sudo jetson_clocks"
    devices = [", ".join(device.values()) for device in gpu["devices"]]
    rows["GPU"] = "; ".join(devices) or "none found (nvidia-smi lists none)"
    rows["CUDA"] = f"driver: {gpu['cuda_driver'] or 'none'}; toolkit: {gpu['cuda_toolkit'] or 'none, none is needed'}"
    rows["packages"] = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    rows["CUDA kernels"] = report["kernels"]["gpu"] or report["kernels"]["reason"]
    rows["TensorRT"] = ", ".join(f"{name} {v}" for name, v in report["tensorrt"].items() if v) or "none"
    rows["ONNX Runtime providers"] = ", ".join(report["onnxruntime_providers"]) or "none"
    for kind in ("backend", "feature"):
        for name, entry in report[f"{kind}s"].items():
            why = "; ".join(filter(None, (entry["reason"], entry["remedy"])))
            rows[f"{kind} {name}"] = "works" if entry["works"] else why
    return rows
