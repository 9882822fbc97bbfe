"""How ``doctor`` looks on a terminal: a mark and a line for each thing, each reason once, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rich.console
import rich.text

from gta_edge.cli.output import fill
from gta_edge.machine import info as machine
from gta_edge.support.text import printable

__all__ = ["show"]

Document = dict[str, Any]

_WORKS, _FAILS, _PLAIN = "✓", "✗", "·"
_ASCII = {_WORKS: "+", _FAILS: "x", _PLAIN: "-"}
_STYLES = {_WORKS: "green", _FAILS: "red", _PLAIN: "dim"}
_COMMANDS = ("pip ", "gta-edge ", "sudo ", "make ")
_INDENT = 4


def show(console: rich.console.Console, report: Document, driver: Document) -> None:
    """Print a report of ``doctor``.

    Args:
        console: where to.
        report: as ``--json`` prints it.
        driver: what the check of the NVIDIA driver answered.
    """
    lines = _Lines(console)
    lines.heading(f"gta-edge {report['gta_edge']}")
    for label, text in _machine(dict(report["machine"])):
        lines.found(label, text)
    _gpu(lines, report, driver)
    lines.heading("\nBackends, the fastest first")
    for name, entry in report["backends"].items():
        lines.state(name, entry, _version(report, name))
    lines.heading("\nFeatures")
    for name, entry in report["features"].items():
        lines.state(name, entry)
    best = next((name for name, entry in report["backends"].items() if entry["works"]), None)
    if best:
        console.print(f"\nBest backend here: {best}. Next: {_next(report, best)}", highlight=False, soft_wrap=True)


class _Lines:
    """Prints lines; what was said once is referred to."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._said: dict[str, str] = {}

    def heading(self, text: str) -> None:
        self._console.print(text, style="bold", highlight=False)

    def found(self, label: str, text: str) -> None:
        self._print(_PLAIN, label, text)

    def state(self, label: str, entry: Document, found: str = "") -> None:
        """Print whether something works: what was found of it, or the reason why it does not, and the remedy."""
        if entry["works"]:
            self._print(_WORKS, label, found)
        elif entry["reason"] in self._said:
            self._print(_FAILS, label, f"as {self._said[entry['reason']]}")
        else:
            self._said[entry["reason"]] = label
            self._print(_FAILS, label, entry["reason"])
            if entry["remedy"]:
                self._remedy(entry["remedy"])

    def _print(self, mark: str, label: str, text: str) -> None:
        width = self._console.width
        head = f"{self._mark(mark)} {label:<17}"
        lines = fill(printable(text), width, " " * len(head), head) if text else head.rstrip()
        shown = rich.text.Text(lines)
        shown.stylize(_STYLES[mark], 0, 1)
        self._console.print(shown, soft_wrap=True)

    def _remedy(self, text: str) -> None:
        """Print what helps; a command stays on one line, so that it can be copied."""
        indent = " " * _INDENT
        whole = text.startswith(_COMMANDS) and not any(pause in text for pause in (", ", "; "))
        lines = indent + printable(text) if whole else fill(printable(text), self._console.width, indent)
        self._console.print(rich.text.Text(lines), style="cyan", soft_wrap=True)

    def _mark(self, mark: str) -> str:
        try:
            mark.encode(self._console.encoding)
        except (UnicodeEncodeError, LookupError):
            return _ASCII[mark]
        return mark


def _machine(found: Document) -> Iterator[tuple[str, str]]:
    """Yield what is known of the machine, without what is not."""
    on_jetson = machine.is_jetson(found)
    yield "system", f"{found['system']}, {found['architecture']}, Python {found['python']}"
    names = {"board": "", "jetpack": "JetPack ", "jetson_linux": "Jetson Linux ", "power_mode": "power mode "}
    if board := ", ".join(f"{name}{found[key]}" for key, name in names.items() if found[key]):
        yield "board", board
    usable = "" if found["usable_cores"] == found["cores"] else f", {found['usable_cores']} of them usable"
    governor = f", governor {found['cpu_governor']}" if found["cpu_governor"] else ""
    yield "CPU", f"{found['cpu'] or 'not known'}, {found['cores']} cores{usable}{governor}"
    memory, available, installed = (found[f"{name}_bytes"] for name in ("memory", "available", "installed"))
    if memory:
        limited = f" of the machine's {installed / 2**30:.1f}" if installed and memory < installed else ""
        yield "memory", f"{memory / 2**30:.1f} GiB{limited}, {(available or 0) / 2**30:.1f} available"
    if on_jetson:
        yield "clocks", machine.clocks_text(found["clocks_hz"])
        if found["clocks_fixed"] is not None:
            yield "GPU clock", "fixed" if found["clocks_fixed"] else "varies; before measuring run: sudo jetson_clocks"


def _gpu(lines: _Lines, report: Document, driver: Document) -> None:
    gpu = report["gpu"]
    devices = [", ".join(device.values()) for device in gpu["devices"]]
    lines.found("GPU", "; ".join(devices) or "none found (nvidia-smi lists none)")
    lines.state("CUDA driver", driver, gpu["cuda_driver"] or "")
    lines.found("CUDA toolkit", gpu["cuda_toolkit"] or "none, none is needed")
    lines.state("CUDA kernels", report["kernels"], report["kernels"]["gpu"] or "")
    lines.found("packages", ", ".join(f"{name} {version}" for name, version in report["packages"].items()))


def _version(report: Document, backend: str) -> str:
    name = "onnxruntime-gpu" if backend == "onnxruntime-cuda" else backend
    return report["tensorrt"].get(backend) or report["packages"].get(name) or ""


def _next(report: Document, best: str) -> str:
    if best.startswith("tensorrt"):
        return f"gta-edge build BUNDLE --engine {best}"
    if report["features"]["export"]["works"]:
        return "gta-edge export CHECKPOINT BUNDLE"
    return 'gta-edge generate BUNDLE --prompt "…"'
