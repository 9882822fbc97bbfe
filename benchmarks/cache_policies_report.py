"""What ``cache_policies.py`` found, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path

import rich.console
import rich.table
from comparison import Document, place, table

from gta_edge.cli.plot import MARKERS, colors, new_figure, save

__all__ = ["cell", "conditions", "markdown", "plot", "show"]


def cell(row: Document) -> str:
    """Return a result in a few words."""
    return f"{row['perplexity']:.3f} ({row['rise_percent']:+.2f}%), {100 * row['retrieved']:.0f}% retrieved"


def _by_label(document: Document) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for row in document["results"]:
        found.setdefault(row["label"], []).append(row)
    return found


def markdown(document: Document) -> str:
    """Return the tables for a page of the documentation, with what they were measured on."""
    fixed, own = [], []
    for label, rows in _by_label(document).items():
        if rows[0]["share"] is None:
            own.append({"policy": label, "rows": _percent(rows[0]["rows_share"])} | _values(rows[0]))
            continue
        by_share = {row["share"]: row for row in rows}
        shares = document["shares"]
        cells = {f"{share:.0%}": f"{by_share[share]['perplexity']:.3f}" for share in shares}
        fixed.append(
            {"policy": label} | cells | {f"retrieved, {share:.0%}": _retrieved(by_share[share]) for share in shares}
        )
    return "\n\n".join([table(part) for part in (fixed, own) if part] + [conditions(document)]) + "\n"


def conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    base = document["base"]
    gain = base["passage_loss_unseen"] - base["passage_loss"]
    return (
        f"{document['windows']} windows: a prompt of {document['prompt']} tokens, evicted from once, then the "
        f"perplexity of {document['following'] - 1}. All rows: {base['perplexity']:.3f}; nothing of the prompt: "
        f"{base['perplexity_forgotten']:.3f}. Retrieved is of what a passage of {document['passage']} tokens gains by "
        f"an earlier copy of it in the prompt, {gain:.3f} nats per token. {_budgets(document['budgets'])}"
        f"{place(document)}."
    )


def _budgets(found: Document | None) -> str:
    if found is None:
        return ""
    rows = ", ".join(map(str, found["budgets"]))
    return f"Measured budgets, at {found['share']:.0%} of {found['prompt']} rows: {rows}. "


def _values(row: Document) -> dict[str, str]:
    rise = f"{row['rise_percent']:+.2f}%"
    return {"perplexity": f"{row['perplexity']:.3f}", "rise": rise, "retrieved": _retrieved(row)}


def _retrieved(row: Document) -> str:
    return f"{100 * row['retrieved']:.0f}%"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def show(document: Document) -> None:
    """Print every result."""
    console = rich.console.Console(width=max(100, rich.console.Console().width), markup=False, highlight=False)
    shown = rich.table.Table("policy", "rows", "perplexity", "rise", "retrieved", box=None)
    for row in document["results"]:
        shown.add_row(row["label"], _percent(row["rows_share"]), *_values(row).values())
    console.print(shown)


def plot(document: Document, path: Path) -> None:
    """Draw perplexity and retrieval against the rows that stay."""
    figure, axes = new_figure(2)
    by_label = _by_label(document)
    corm = [rows[0] for rows in by_label.values() if rows[0]["share"] is None and "nothing" not in rows[0]["label"]]
    lines = {label: rows for label, rows in by_label.items() if rows[0]["share"] is not None} | {"CORM": corm}
    lines = {label: rows for label, rows in lines.items() if rows}
    chosen = colors(lines)
    panels = (("perplexity", "perplexity", 1.0), ("of a passage's gain retrieved, %", "retrieved", 100.0))
    for axis, (title, key, unit) in zip(axes, panels, strict=True):
        for i, (label, rows) in enumerate(lines.items()):
            ordered = sorted(rows, key=lambda row: row["rows_share"])
            shares = [100 * row["rows_share"] for row in ordered]
            values = [unit * row[key] for row in ordered]
            style = "--" if i >= len(set(chosen.values())) else "-"
            axis.plot(shares, values, style, color=chosen[label], marker=MARKERS[i % len(MARKERS)], label=label)
        axis.set_xlabel("rows that stay, %")
        axis.set_ylabel(title)
        axis.grid(visible=True, alpha=0.3)
    axes[0].axhline(document["base"]["perplexity"], color="#000000", linewidth=0.8, linestyle=":")
    axes[0].legend(fontsize=7)
    save(figure, path, force=True)
