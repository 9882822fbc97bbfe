"""Draws what a plan says against the context: memory, and time per token."""

from __future__ import annotations

from pathlib import Path

from gta_edge.cli.plot import colors, context_axis, footnote, new_figure, save
from gta_edge.plan.roofline import Plan

__all__ = ["draw"]

_SHORTEST = 128


def draw(path: Path, plans: list[Plan], *, force: bool) -> None:
    """Draw peak memory and milliseconds per token of every plan's model.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, (memory, times) = new_figure(2)
    device = plans[0].device
    of_model, shown = colors(plan.model.name for plan in plans), set()
    for plan in plans:
        contexts, color = _contexts(plan), of_model[plan.model.name]
        moved = [plan.at(context) for context in contexts]
        memory.plot(contexts, [entry.memory.peak / 1e9 for entry in moved], color=color, label=plan.model.name)
        times.plot(contexts, [1e3 * entry.decode.seconds for entry in moved], color=color)
        shown.update(contexts)
    memory.axhline(device.available_bytes / 1e9, linestyle="--", color="grey", label="beside the system")
    context_axis(memory, shown, "peak memory, GB")
    context_axis(times, shown, "ms per token")
    memory.legend()
    figure.suptitle(f"{device.title}, weights in {plans[0].model.precision}, batch {plans[0].batch}")
    footnote(figure, "A roofline's bound on sizes and speeds: nothing was measured.")
    save(figure, path, force=force)


def _contexts(plan: Plan) -> list[int]:
    """Return powers of two up to the model's max context, and that."""
    longest = plan.model.config.max_position_embeddings
    powers = [2**i for i in range(longest.bit_length()) if _SHORTEST <= 2**i < longest]
    return [*powers, longest]
