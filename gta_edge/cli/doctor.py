"""``gta-edge doctor``: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import sys
from typing import Any

from gta_edge.cli import doctor_checks
from gta_edge.cli.output import FAILED, current
from gta_edge.machine import info as machine
from gta_edge.runtime.registry import BACKENDS
from gta_edge.version import __version__

__all__ = ["doctor"]


def doctor() -> None:
    """Show what this machine has for running models; the exit status is 1 when no backend works."""
    output = current()
    with output.progress() as progress:
        progress("trying backends", 0, 0)
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
        from gta_edge.cli.doctor_text import show

        show(output.console, report, driver)
    if not any(entry["works"] for entry in report["backends"].values()):
        print("error: no backend works here; the lines of the backends say what installs one", file=sys.stderr)
        sys.exit(FAILED)


def _without(answer: dict[str, Any], *found: str) -> dict[str, Any]:
    """Return what an answer says of the thing itself."""
    return {key: value for key, value in answer.items() if key not in found}
