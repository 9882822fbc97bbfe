"""Draws what a benchmark measured against the context: time per token, and time to the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gta_edge.libraries.optional import optional
from gta_edge.support.files import new_file

__all__ = ["draw"]


def draw(path: Path, report: dict[str, Any], *, force: bool) -> None:
    """Draw a line for every bundle and backend, with the band from p50 to p90; wrong answers dashed.

    Raises:
        BackendError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = optional("matplotlib.figure", "plot").Figure(figsize=(10, 4), layout="constrained")
    steps, first = figure.subplots(1, 2)
    rows = sorted((row for row in report["results"] if row["tpot_ms"]), key=lambda row: row["context"])
    several = len({row["bundle"] for row in rows}) > 1
    for bundle, backend in dict.fromkeys((row["bundle"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["bundle"], row["backend"]) == (bundle, backend)]
        wrong = any(row["agrees"] is False for row in own)
        label = f"{backend}, {Path(bundle).name}" if several else backend
        contexts, style = [row["context"] for row in own], "--" if wrong else "-"
        times = [row["tpot_ms"] for row in own]
        (line,) = steps.plot(
            contexts, [t["p50"] for t in times], style, marker="o", label=f"{label} (wrong answers)" if wrong else label
        )
        color = line.get_color()
        steps.fill_between(contexts, [t["p50"] for t in times], [t["p90"] for t in times], color=color, alpha=0.2)
        first.plot(contexts, [row["ttft_ms"] for row in own], style, marker="o", color=color)
    steps.set_ylabel("ms per token, p50 to p90")
    first.set_ylabel("ms to the first token")
    for axis in (steps, first):
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
    if rows:
        steps.legend()
    found = report["machine"]
    batch = rows[0]["batch"] if rows else 1
    title = found["board"] or f"{found['cpu'] or found['architecture']}, {found['usable_cores']} cores"
    figure.suptitle(f"{title}, batch {batch}, {report['date'][:10]}")
    with new_file(path, force=force) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)
