"""One style for all pictures: where they may be written, how contexts are labelled, which colour a name has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gta_edge.errors import BackendError, OutputError
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import optional
from gta_edge.support.files import check_new_file, new_file

__all__ = ["MARKERS", "check", "colors", "context_axis", "footnote", "new_figure", "save"]

MARKERS = "os^Dvp"
_SUFFIXES = (".png", ".svg", ".pdf")

# Colours that most people tell apart (Okabe and Ito's, and Tol's where those end): GTA is cool, baselines are warm.
_FIXED = {
    "tensorrt": "#009e73",
    "tensorrt-rtx": "#cc79a7",
    "onnxruntime-cuda": "#56b4e9",
    "onnxruntime": "#0072b2",
    "torch": "#d55e00",
    "gta1-160m": "#56b4e9",
    "gta2-160m": "#009e73",
    "gta3-500m": "#332288",
    "gta4-500m": "#44aa99",
    "gta-1b": "#0072b2",
    "gqa-160m": "#e69f00",
    "gqa-500m": "#aa4499",
    "gqa-1b": "#d55e00",
    "mha-160m": "#cc79a7",
    "mha-500m": "#882255",
}
_OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def check(path: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Find out before any work what would fail after it.

    Args:
        path: the picture.
        force: replace a file that is there.
        inputs: what the command reads, which is not drawn over.

    Raises:
        OutputError: the file cannot be written there, or its name says no format.
        BackendError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: its directory does not exist", "make it, or choose another")
    if path.is_dir():
        raise OutputError(f"{path}: is a directory", "give the name of a file")
    check_new_file(path, force=force, inputs=inputs)
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError(
            "the Python module matplotlib is needed and not installed", f"run: {install_command('plot')}"
        )


def new_figure(panels: int) -> tuple[Any, Any]:
    """Return a figure and its panels, side by side.

    Raises:
        BackendError: matplotlib is not installed.
    """
    figure = optional("matplotlib.figure", "plot").Figure(figsize=(5 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def colors(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: backends and presets have the same one in every picture."""
    asked = list(dict.fromkeys(names))
    found = {name: _FIXED[name] for name in asked if name in _FIXED}
    free = [color for color in _OTHERS if color not in found.values()] or list(_OTHERS)
    for number, name in enumerate(name for name in asked if name not in _FIXED):
        found[name] = free[number % len(free)]
    return found


def context_axis(axis: Any, contexts: Iterable[int], what: str, *, from_zero: bool = True) -> None:
    """Label an axis of times or sizes against contexts: 128, 1,024, … as they were asked for."""
    ticks = sorted(set(contexts))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{context:,}" for context in ticks], fontsize=8, rotation=30)
    axis.minorticks_off()
    if from_zero:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(what)
    axis.grid(visible=True, alpha=0.3)


def footnote(figure: Any, text: str) -> None:
    """Write a line below everything."""
    figure.supxlabel(text, fontsize=8, x=0.01, horizontalalignment="left")


def save(figure: Any, path: Path, *, force: bool) -> None:
    """Write a figure in the format that its name says; an SVG is the same from run to run.

    Raises:
        OutputError: the file cannot be written.
    """
    kind = path.suffix[1:].lower()
    settings = {"svg.hashsalt": "gta-edge", "svg.fonttype": "none"}
    changing = {"Date": None, "Creator": None} if kind == "svg" else None
    with optional("matplotlib", "plot").rc_context(settings), new_file(path, force=force) as partial:
        figure.savefig(partial, format=kind, dpi=150, metadata=changing)
