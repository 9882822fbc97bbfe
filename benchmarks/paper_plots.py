"""The plots of the page on the paper, as SVG that is the same from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_results import Document, Ratio, Run, kind, pairs, ratio, times

from gta_edge.libraries.optional import optional
from gta_edge.support.files import new_file

PHASE_TITLES = {"prefill": "prefill", "decode": "decode"}
MARKERS = "os^Dv"


def draw_ratios(path: Path, run: Run) -> None:
    """Draw how many times as fast each GTA model is as its baselines, against the context.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, axes = _figure(2)
    for axis, (phase, title) in zip(axes, PHASE_TITLES.items(), strict=True):
        for number, (gta, baseline) in enumerate(pairs(run.models)):
            found = [(context, ratio(run, gta, baseline, context, phase)) for context in run.contexts]
            points: list[tuple[int, Ratio]] = [(context, each) for context, each in found if each is not None]
            if not points:
                continue
            contexts = [context for context, _ in points]
            style = "-" if kind(run.models[baseline]) == "GQA" else "--"
            (line,) = axis.plot(
                contexts,
                [each.median for _, each in points],
                style,
                marker=MARKERS[number % len(MARKERS)],
                label=f"{baseline} / {gta}",
            )
            lows, highs = [each.low for _, each in points], [each.high for _, each in points]
            axis.fill_between(contexts, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.axhline(1, color="grey", linewidth=1)
        _label(axis, run.contexts, f"{title}: time of the baseline / time of GTA")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{run.label}: above 1 GTA is faster")
    _save(figure, path)


def draw_decode(path: Path, run: Run) -> None:
    """Draw milliseconds per token against the context for every model of a size.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, (axis,) = _figure(1)
    for number, name in enumerate(run.models):
        rows = [(context, run.rows.get((name, context))) for context in run.contexts]
        points = [(context, row["tpot_ms"]["p50"]) for context, row in rows if row and times(row)]
        if points:
            axis.plot(*zip(*points, strict=True), marker=MARKERS[number % len(MARKERS)], label=name)
    _label(axis, run.contexts, "time per token, ms")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.suptitle(run.label)
    _save(figure, path)


def draw_simulated(path: Path, rows: Sequence[Document], gpu: str) -> None:
    """Draw the ratios of the authors' simulation beside those of our roofline, as ``simulated`` returns them.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, axes = _figure(2)
    contexts = [row["tokens"] for row in rows]
    series = (
        ("simulated", "the authors' simulation", "o-"),
        ("written", "our roofline, scores in memory", "x--"),
        ("fused", "our roofline, fused attention", "s-"),
    )
    for axis, (phase, title) in zip(axes, PHASE_TITLES.items(), strict=True):
        for key, label, style in series:
            axis.plot(contexts, [row[key][phase] for row in rows], style, label=label)
        axis.axhline(1, color="grey", linewidth=1)
        _label(axis, contexts, f"{title}: time of GQA-1B / time of GTA-1B")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{gpu}, 16 bits, batch 1: above 1 GTA is faster")
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    figure = optional("matplotlib.figure", "plot").Figure(figsize=(5 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _label(axis: Any, contexts: Sequence[int], what: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(contexts), [f"{context:,}" for context in contexts], fontsize=8, rotation=30)
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(what)
    axis.grid(visible=True, alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    """Write it small, and without what differs from run to run: dates, versions, random names."""
    settings = {"svg.hashsalt": "gta-edge", "svg.fonttype": "none"}
    with optional("matplotlib", "plot").rc_context(settings), new_file(path, force=True) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None, "Creator": None})
