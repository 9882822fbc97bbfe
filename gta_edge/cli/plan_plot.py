"""Draws what a plan says against the context: memory, and time per token."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from gta_edge.errors import BackendError, OutputError
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import optional
from gta_edge.plan.roofline import Plan
from gta_edge.support.files import check_new_file, new_file

__all__ = ["check", "draw"]

_SUFFIXES = (".png", ".svg", ".pdf")
_SHORTEST = 128


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


def draw(path: Path, plans: list[Plan], *, force: bool) -> None:
    """Draw peak memory and milliseconds per token of every plan's model.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = optional("matplotlib.figure", "plot").Figure(figsize=(10, 4), layout="constrained")
    memory, times = figure.subplots(1, 2)
    device = plans[0].device
    for plan in plans:
        contexts = _contexts(plan)
        moved = [plan.at(context) for context in contexts]
        (line,) = memory.plot(contexts, [entry.memory.peak / 1e9 for entry in moved], label=plan.model.name)
        times.plot(contexts, [1e3 * entry.decode.seconds for entry in moved], color=line.get_color())
    memory.axhline(device.available_bytes / 1e9, linestyle="--", color="grey", label="beside the system")
    memory.set_ylabel("peak memory, GB")
    times.set_ylabel("ms per token, as the roofline allows")
    for axis in (memory, times):
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
    memory.legend()
    figure.suptitle(f"{device.title}, weights in {plans[0].model.precision}, batch {plans[0].batch}")
    with new_file(path, force=force) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)


def _contexts(plan: Plan) -> list[int]:
    """Return powers of two up to the model's positions, and those."""
    longest = plan.model.config.max_position_embeddings
    powers = [2**i for i in range(longest.bit_length()) if _SHORTEST <= 2**i < longest]
    return [*powers, longest]
