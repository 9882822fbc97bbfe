"""What ``kernels.py`` has measured, as tables and as a plot."""

from __future__ import annotations

from pathlib import Path

from gpu_timing import MISSING, Document, Table, markdown_table, ranged, show_table
from kernels_peers import CONTENDERS

from gta_edge.cli.plot import colors, context_axis, new_figure, save

__all__ = ["conditions", "failures", "markdown", "plot", "show", "static_table", "tables"]

_FIGURES = ("us", "us, empty cache", "MB moved", "GFLOP", "of copy rate", "of matmul rate", "by")


def static_table() -> Table:
    """Return what each contender costs by its definition."""
    return [
        {
            "attention of a layer": contender.label,
            "cached values per token": f"{contender.cached_values_per_token}",
            "cache bytes per token": f"{contender.cache_bytes_per_token}",
            "multiply-adds per pair": f"{contender.multiply_adds_per_pair}",
        }
        for contender in CONTENDERS.values()
    ]


def times_table(rows: list[Document]) -> Table:
    """Return what was measured of each contender, size by size."""
    table = []
    for row in rows:
        for key, figures in row["contenders"].items():
            cells = {"batch": f"{row['batch']}", "new": f"{row['tokens']}", "context": f"{row['context']}"}
            cells["attention of a layer"] = CONTENDERS[key].label
            if "failed" in figures:
                cells |= dict.fromkeys(_FIGURES, MISSING)
            else:
                overhead = figures["overhead_s"]
                values = (
                    ranged(figures["time_s"], 1, 1e6),
                    MISSING if overhead is None else f"{1e6 * overhead:.1f}",
                    f"{figures['bytes'] / 1e6:.2f}",
                    f"{figures['flops'] / 1e9:.3f}",
                    f"{figures['copy_fraction']:.2f}",
                    f"{figures['matmul_fraction']:.2f}",
                    figures["won"],
                )
                cells |= dict(zip(_FIGURES, values, strict=True))
            table.append(cells)
    return table


def ratios_table(rows: list[Document]) -> Table:
    """Return how many times the peers' time is ours, size by size."""
    peers = {peer: None for row in rows for found in row["ratios"].values() for peer in found}
    return [
        {"batch": f"{row['batch']}", "new": f"{row['tokens']}", "context": f"{row['context']}"}
        | {"time over that of": CONTENDERS[own].label}
        | {CONTENDERS[peer].label: ranged(found[peer], 2) if peer in found else MISSING for peer in peers}
        for row in rows
        for own, found in row["ratios"].items()
    ]


def model_table(rows: list[Document]) -> Table:
    """Return what was measured of whole models."""
    return [
        {
            "model": row["model"],
            "context": f"{row['context']}",
            "ms per token": ranged(row["token_s"], 2, 1e3),
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "floor, ms": f"{1e3 * row['floor_s']:.2f}",
            "floor / measured": f"{row['floor_fraction']:.2f}",
            "prefill tokens/s": f"{row['prefill_tokens_per_s']:.0f}",
        }
        for row in rows
    ]


def tables(document: Document) -> list[Table]:
    """Return the tables of what was measured; none is empty."""
    found = []
    for part in ("decode", "prefill"):
        found += [times_table(document.get(part, [])), ratios_table(document.get(part, []))]
    return [table for table in [*found, model_table(document.get("model", []))] if table]


def conditions(document: Document) -> str:
    """Say what was measured, with which command, where and when."""
    place, used = document["gpu"], ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"One layer's attention in bf16, medians of {document['rounds']} rounds (smallest..largest), and whole models "
        f"with random weights. `{document['command']}` on {place['name']} ({place['architecture']}, "
        f"{place['processors']} multiprocessors, {place['l2_bytes'] / 2**20:.0f} MiB L2, "
        f"{place['memory_bytes'] / 2**30:.0f} GiB), {document['date'][:10]}; {used}. It copies "
        f"{place['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written), reads {place['read_bytes_per_s'] / 1e9:.0f} "
        f"GB/s and multiplies {place['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s in bf16, as measured. The kernels' time "
        "includes RoPE, the append, the value decoder and the gate; the peers' is that of softmax attention alone."
    )


def failures(document: Document) -> list[str]:
    """Return one sentence for each thing that was not measured."""
    found = list(document["notes"])
    for part in ("decode", "prefill"):
        for row in document.get(part, []):
            size = f"batch {row['batch']}, {row['tokens']} new of {row['context']} tokens"
            for key, figures in row["contenders"].items():
                if "failed" in figures:
                    found.append(f"{CONTENDERS[key].label}, {size}: {figures['failed']}")
                else:
                    failed = {way: why for way, why in figures["tried"].items() if isinstance(why, str)}
                    found += [f"{CONTENDERS[key].label} by {way}, {size}: {why}" for way, why in failed.items()]
    return found


def show(document: Document) -> None:
    """Print what was measured."""
    print(conditions(document))
    for table in tables(document):
        show_table(table)
    for sentence in failures(document):
        print(sentence)


def markdown(document: Document) -> str:
    """Return the tables for a page of the documentation, with what they were measured on."""
    parts = [conditions(document), *map(markdown_table, [static_table(), *tables(document)])]
    return "\n\n".join([*parts, *failures(document)]) + "\n"


def plot(document: Document, path: Path) -> None:
    """Draw the time of a layer against context: decode at each batch, and prefill."""
    rows = document.get("decode", []) + document.get("prefill", [])
    titles = {(row["batch"], row["tokens"] == 1): None for row in rows}
    if not titles:
        return
    figure, axes = new_figure(len(titles))
    lines = colors(contender.label for contender in CONTENDERS.values())
    for axis, (batch, decode) in zip(axes, titles, strict=True):
        chosen = [row for row in rows if (row["batch"], row["tokens"] == 1) == (batch, decode)]
        for key, contender in CONTENDERS.items():
            found = [(row["context"], row["contenders"].get(key, {})) for row in chosen]
            points = [(context, 1e6 * figures["time_s"]["median"]) for context, figures in found if "time_s" in figures]
            if points:
                label = contender.label
                axis.plot(*zip(*points, strict=True), color=lines[label], label=label, marker="o")
        axis.set_yscale("log")
        context_axis(axis, [row["context"] for row in chosen], "microseconds per layer", from_zero=False)
        axis.set_title(f"{'one new token' if decode else 'prompt'}, batch {batch}")
    axes[0].legend(fontsize="small")
    save(figure, path, force=True)
