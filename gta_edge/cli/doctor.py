"""``gta-edge doctor``: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import sys
from typing import Any

from gta_edge.cli import doctor_checks
from gta_edge.cli.output import FAILED, current, key_value_table
from gta_edge.machine import info as machine
from gta_edge.runtime.registry import BACKENDS
from gta_edge.version import __version__

__all__ = ["doctor"]


def doctor() -> None:
    """Show what this machine has for running models; the exit status is 1 when no backend works."""
    output = current()
    answers = doctor_checks.run(list(doctor_checks.CHECKS))
    driver, kernels = answers["driver"], answers["kernels"]
    report: dict[str, Any] = {
        "gta_edge": __version__,
        "machine": machine.describe(),
        "gpu": {
            "devices": machine.gpus(),
            "cuda_driver": driver.get("cuda"),
            "cuda_problem": driver["reason"],
            "cuda_toolkit": machine.cuda_toolkit(),
        },
        "packages": machine.package_versions(),
        "kernels": {"gpu": None} | kernels,
        "tensorrt": {name: answers[name].get("version") for name, each in BACKENDS.items() if each.builds_engine},
        "onnxruntime_providers": next((each["providers"] for each in answers.values() if "providers" in each), []),
        "backends": {name: _without(answers[name], "version", "providers") for name in BACKENDS},
        "features": {name: answers[name] for name in ("export", "plot")},
    }
    if output.json:
        output.document(report)
    else:
        output.console.print(key_value_table(_for_people(report)))
    if not any(entry["works"] for entry in report["backends"].values()):
        print("error: no backend works here; the lines of the backends say what installs one", file=sys.stderr)
        sys.exit(FAILED)


def _without(answer: dict[str, Any], *found: str) -> dict[str, Any]:
    """Return what an answer says of the thing itself."""
    return {key: value for key, value in answer.items() if key not in found}


def _for_people(report: dict[str, Any]) -> dict[str, str]:
    found, gpu = dict(report["machine"]), report["gpu"]
    on_jetson = machine.is_jetson(found)
    fixed, clocks = found.pop("clocks_fixed"), found.pop("clocks_hz")
    memory, available, installed = (found.pop(f"{name}_bytes") for name in ("memory", "available", "installed"))
    limited = f", of the machine's {installed / 2**30:.1f}" if memory and installed and memory < installed else ""
    rows = {"gta-edge": report["gta_edge"]}
    rows |= {key.replace("_", " "): str(value) for key, value in found.items() if value}
    if memory:
        rows["memory"] = f"{memory / 2**30:.1f} GiB{limited}; {(available or 0) / 2**30:.1f} available"
    if on_jetson:
        rows["clocks"] = machine.clocks_text(clocks)
    if on_jetson and fixed is not None:
        rows["GPU clock"] = "fixed" if fixed else "varies; before measuring run: sudo jetson_clocks"
    devices = [", ".join(device.values()) for device in gpu["devices"]]
    rows["GPU"] = "; ".join(devices) or "none found (nvidia-smi lists none)"
    driver = " but ".join(filter(None, (gpu["cuda_driver"], gpu["cuda_problem"])))
    rows["CUDA"] = f"driver: {driver}; toolkit: {gpu['cuda_toolkit'] or 'none, none is needed'}"
    rows["packages"] = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    rows["CUDA kernels"] = report["kernels"]["gpu"] or _why(report["kernels"])
    rows["TensorRT"] = ", ".join(f"{name} {v}" for name, v in report["tensorrt"].items() if v) or "none"
    rows["ONNX Runtime providers"] = ", ".join(report["onnxruntime_providers"]) or "none"
    for kind in ("backend", "feature"):
        for name, entry in report[f"{kind}s"].items():
            rows[f"{kind} {name}"] = "works" if entry["works"] else _why(entry)
    return rows


def _why(entry: dict[str, Any]) -> str:
    return "; ".join(filter(None, (entry["reason"], entry["remedy"])))
