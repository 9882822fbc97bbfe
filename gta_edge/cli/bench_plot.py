"""Draws what a benchmark measured against the context: time per token, and time to the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gta_edge.cli.plot import MARKERS, colors, context_axis, footnote, new_figure, save
from gta_edge.evaluate.bench.report import UNSTEADY

__all__ = ["draw"]

Document = dict[str, Any]


def draw(path: Path, report: Document, *, force: bool) -> None:
    """Draw a line for every bundle and backend, with the band from p50 to p90; wrong answers dashed.

    Points of rounds that did not settle are hollow, and a footnote says so.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, (steps, first) = new_figure(2)
    rows = sorted((row for row in report["results"] if row["tpot_ms"]), key=lambda row: row["context"])
    series = list(dict.fromkeys((row["bundle"], row["backend"]) for row in rows))
    of_backend = colors(_name(backend) for _, backend in series)
    for number, (bundle, backend) in enumerate(series):
        own = [row for row in rows if (row["bundle"], row["backend"]) == (bundle, backend)]
        wrong = any(row["agrees"] is False for row in own)
        style = {"linestyle": "--" if wrong else "-", "color": of_backend[_name(backend)]}
        label = f"{backend}, {Path(bundle).name}" if len({each for each, _ in series}) > 1 else backend
        _draw_times(steps, first, own, label + (" (wrong answers)" if wrong else ""), style, MARKERS[number % 6])
    contexts = [row["context"] for row in rows]
    context_axis(steps, contexts, "ms per token, p50 to p90")
    context_axis(first, contexts, "ms to the first token")
    if rows:
        steps.legend()
    figure.suptitle(_title(report, rows))
    if any(map(_unsettled, rows)):
        footnote(figure, f"Hollow: the rounds lay more than {UNSTEADY:.0%} apart and did not settle.")
    save(figure, path, force=force)


def _draw_times(steps: Any, first: Any, rows: list[Document], label: str, style: Document, marker: str) -> None:
    contexts, times = [row["context"] for row in rows], [row["tpot_ms"] for row in rows]
    median, high = [each["p50"] for each in times], [each["p90"] for each in times]
    steps.plot(contexts, median, marker=marker, label=label, **style)
    steps.fill_between(contexts, median, high, color=style["color"], alpha=0.2)
    hollow = [(row["context"], row["tpot_ms"]["p50"]) for row in rows if _unsettled(row)]
    if hollow:
        steps.plot(*zip(*hollow, strict=True), marker, markerfacecolor="white", color=style["color"])
    first.plot(contexts, [row["ttft_ms"] for row in rows], marker=marker, **style)


def _unsettled(row: Document) -> bool:
    return bool(row["spread"] and row["spread"]["tpot"] and "spread.tpot" in row["notes"])


def _name(backend: str) -> str:
    return backend.partition("@")[0]


def _title(report: Document, rows: list[Document]) -> str:
    found = report["machine"]
    title = found["board"] or f"{found['cpu'] or found['architecture']}, {found['usable_cores']} cores"
    return f"{title}, batch {rows[0]['batch'] if rows else 1}, {report['date'][:10]}"
