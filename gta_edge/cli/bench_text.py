"""How ``bench`` prints a report.

By default a table that fits 80 columns: what a user compares backends by. ``--wide`` has every figure: the floor first,
then what was measured, then the distance from the floor, then which backends are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rich.console
import rich.markup
import rich.table

from gta_edge.cli.output import fill
from gta_edge.evaluate.bench.report import UNSTEADY
from gta_edge.machine import info as machine
from gta_edge.runtime.registry import BACKENDS

__all__ = ["as_markdown", "how_wrong", "show", "show_all"]

Document = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

_MISSING = "n/a"
_WIDEST = 400
_BUSY_CORES = 0.2


def show(console: rich.console.Console, report: Document) -> None:
    """Print the short table of every bundle, and what there is to say of it."""
    for line in _machine(report):
        console.print(fill(line, console.width), markup=False, highlight=False, soft_wrap=True)
    marks = _marks(report)
    for bundle in dict.fromkeys(row["bundle"] for row in report["results"]):
        rows = [row for row in report["results"] if row["bundle"] == bundle]
        console.print(
            f"\n{bundle}, {rows[0]['precision']}", style="bold", markup=False, highlight=False, soft_wrap=True
        )
        wrong = [row["agrees"] is False for row in rows]
        console.print(_rich(_SHORT_HEADS, [_short(row, marks) for row in rows], wrong, numbers=(0, 2, 3, 4, 5)))
    notes = [f"{mark} {backend}" for backend, mark in marks.items() if mark]
    for line in (*notes, *_closing(report, "~")):
        shown = line if line in notes else fill(line, console.width, "  ", "- ")
        console.print(shown, markup=False, highlight=False, soft_wrap=True)


_SHORT_HEADS = ("context", "backend", "first token", "ms/token", "tokens/s", "memory", "answers")
_MAX_NAME = 16  # characters of the longest name of a backend


def _marks(report: Document) -> dict[str, str]:
    """Return the mark that stands for what would make a backend's name too long, an empty one where nothing does."""
    names = dict.fromkeys(row["backend"] for row in report["results"])
    long = [name for name in names if len(name) > _MAX_NAME]
    return {name: f"[{long.index(name) + 1}]" if name in long else "" for name in names}


def _short(row: Document, marks: dict[str, str]) -> tuple[str, ...]:
    mark = marks[row["backend"]]
    name = f"{row['backend'].partition('@')[0][: _MAX_NAME - len(mark)]}{mark}"
    key = (f"{row['context']:,}", name)
    if not row["tpot_ms"]:
        return (*key, "failed", *[""] * 4)
    peak = row["peak_memory_bytes"] if row["peak_gpu_bytes"] is None else row["peak_gpu_bytes"]
    answers = {None: "-", True: "same", False: "WRONG"}[row["agrees"]]
    unsteady = "~" if _unsettled(row) else ""
    return (
        *key,
        _ms(row["ttft_ms"]),
        f"{unsteady}{row['tpot_ms']['p50']:.2f}",
        f"{row['decode_tokens_per_s']:.1f}",
        _size(peak),
        "reference" if _is_reference(row) else answers,
    )


def _unsettled(row: Document) -> bool:
    return bool(row["spread"] and row["spread"]["tpot"] and "spread.tpot" in row["notes"])


def _is_reference(row: Document) -> bool:
    return bool(row["max_rel_error"] == 0 and row["reference"] == row["backend"])


def show_all(console: rich.console.Console, report: Document) -> None:
    """Print a report as tables, as wide as they are: files keep lines whole, terminals break them. Wrong is red."""
    console = rich.console.Console(file=console.file, width=max(console.width, _WIDEST), soft_wrap=True)
    _lines(console, _machine(report))
    several = _several_bundles(report)
    if report["backends"]:
        console.print(_rich(*_static(report, several)))
    for caption, table in (("measured", _measured(report, several)), ("distance", _distance(report, several))):
        if report["results"]:
            console.print(f"\n{caption}", style="bold")
            console.print(_rich(*table, wrong=[row["agrees"] is False for row in report["results"]]))
    if closing := [*_closing(report)]:
        console.print()
        _lines(console, closing)


def as_markdown(report: Document) -> str:
    """Return every table for a page of a documentation."""
    several = _several_bundles(report)
    parts = ["  \n".join(_machine(report))]
    if report["backends"]:
        parts.append(_markdown(*_static(report, several)))
    if report["results"]:
        parts += [_markdown(*_measured(report, several)), _markdown(*_distance(report, several))]
    parts += [f"- {line}" for line in _closing(report)]
    return "\n\n".join(parts)


def _several_bundles(report: Document) -> bool:
    return len({entry["bundle"] for key in ("backends", "absent") for entry in report[key]}) > 1


def _machine(report: Document) -> list[str]:
    """Return a line on what was measured where, one for every GPU, and the warnings."""
    found = report["machine"]
    memory = f", {found['memory_bytes'] / 1e9:.1f} GB" if found["memory_bytes"] else ""
    named = {"": found["board"], "JetPack ": found["jetpack"], "power mode ": found["power_mode"]}
    parts = [
        ", ".join(f"{name}{value}" for name, value in named.items() if value),  # of a board
        f"{found['cpu'] or found['architecture']}, {found['usable_cores']} cores{memory}",
        found["system"],
        f"gta-edge {report['gta_edge']}, {report['date'][:16].replace('T', ' ')} UTC",
    ]
    lines = ["; ".join(filter(None, parts))]
    if machine.is_jetson(found):
        lines.append(f"clocks: {machine.clocks_text(found['clocks_hz'])}")
    lines += ["GPU: " + ", ".join(gpu.values()) for gpu in found["gpus"]]
    for device, rates in found["bandwidth_bytes_per_s"].items():
        memory_of = {"cpu": "the CPU reads memory", "gpu": "the GPU copies memory"}[device]
        lines.append(f"{memory_of} at {', then '.join(f'{rate / 1e9:.1f}' for rate in rates)} GB/s")
    return lines + [f"warning: {text}" for text in found["warnings"]]


def _static(report: Document, several: bool) -> Table:
    """What a step must read, and the time that memory sets for it: what a token cannot be faster than."""
    floors = {(row["bundle"], row["backend"], row["context"]): row["floor_ms"] for row in report["results"]}
    contexts = sorted({context for _, _, context in floors})
    heads = ("weights", "backend", "computes in", "on", "weights read/token", "cache/token", "bandwidth")
    rows = []
    for entry in report["backends"]:
        least = [floors.get((entry["bundle"], entry["backend"], context)) for context in contexts]
        rate = entry["bandwidth_bytes_per_s"]
        rows.append(
            (
                *_bundle(entry, several),
                entry["precision"],
                entry["backend"],
                _computes(entry),
                entry["device"],
                _size(entry["weight_bytes_per_step"]),
                _MISSING if entry["cache_bytes_per_token"] is None else f"{entry['cache_bytes_per_token']:,} B",
                _MISSING if rate is None else f"{rate / 1e9:.1f} GB/s",
                *(_MISSING if floor is None else _ms(floor) for floor in least),
                _software(entry),
            )
        )
    return (*_bundle_head(several), *heads, *(f"floor at {context}" for context in contexts), "runs on"), rows


def _computes(entry: Document) -> str:
    graph = {True: ", CUDA graph", False: ", no CUDA graph", None: ""}[entry["cuda_graph"]]
    return f"{entry['compute']}{', int8 matmuls' if entry['rounds_activations'] else ''}{graph}"


def _software(entry: Document) -> str:
    backend = entry["backend"].partition("@")[0]
    name = BACKENDS[backend].distribution
    version = entry["versions"].get(name)
    return f"{f'{name} {version}, ' if version else ''}Python {entry['python']}"


def _measured(report: Document, several: bool) -> Table:
    heads = ("", "first token", "prefill", "token p50", "p90", "p99", "tokens/s", "spread", "memory", "cache")
    nothing = ("not measured", *[""] * 8)
    rows = [_key(row, several) + (_times(row) if row["tpot_ms"] else nothing) for row in report["results"]]
    return (*_bundle_head(several), "context", "backend", *heads[1:]), rows


def _times(row: Document) -> tuple[str, ...]:
    tpot = row["tpot_ms"]
    return (
        _ms(row["ttft_ms"]),
        f"{row['prefill_tokens_per_s']:.0f}/s",
        _ms(tpot["p50"]),
        _ms(tpot["p90"]),
        _ms(tpot["p99"]),
        f"{row['decode_tokens_per_s']:.1f}",
        _MISSING if row["spread"]["tpot"] is None else f"{row['spread']['tpot']:.0%}",
        _memory(row),
        _size(row["cache_bytes"]),
    )


def _memory(row: Document) -> str:
    if row["peak_gpu_bytes"] is not None:
        return f"{_size(row['peak_host_bytes'])} + GPU {_size(row['peak_gpu_bytes'])}"
    return _size(row["peak_memory_bytes"])


def _distance(report: Document, several: bool) -> Table:
    heads = ("times floor", "of bandwidth", "same answers", "rank", "times rank 1")
    rows = []
    for row in report["results"]:
        if row["floor_ms"] is None:
            far: tuple[str, ...] = (_MISSING,) * 2
        else:
            far = (f"{row['times_floor']:.2f}", f"{row['bandwidth_fraction']:.2f}")
        rows.append((*_key(row, several), *far, _answers(row), f"{row['rank'] or '-'}", _times_first(row)))
    return (*_bundle_head(several), "context", "backend", *heads), rows


def _answers(row: Document) -> str:
    if row["agrees"] is None:
        return "not compared"
    if _is_reference(row):
        return "reference"
    error = row["max_rel_error"]
    shown = "not finite" if error == float("inf") else f"error {error:.1e}"
    return f"{'yes' if row['agrees'] else 'WRONG'}, {shown}, {row['same_tokens']}/{row['compared_tokens']} tokens"


def _times_first(row: Document) -> str:
    found = row["times_first"] and row["times_first"]["tpot"]
    if found is None:
        return _MISSING
    if row["rank"] == 1:
        return "1"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _key(row: Document, several: bool) -> tuple[str, ...]:
    return (*_bundle(row, several), f"{row['context']}", row["backend"])


def _bundle(entry: Document, several: bool) -> tuple[str, ...]:
    return (entry["bundle"],) if several else ()


def _bundle_head(several: bool) -> tuple[str, ...]:
    return ("bundle",) if several else ()


def _closing(report: Document, mark: str = "spread") -> Iterator[str]:
    """Yield what failed, what is wrong, and which backends are not there, each with its reason.

    Args:
        report: as ``--json`` prints it.
        mark: what shows a row whose rounds have not settled.
    """
    said = set()
    yield from _beside(report)
    for row in report["results"]:
        reason = row["notes"].get("ttft_ms") or row["notes"].get("rounds")
        if reason:
            yield f"{row['backend']} at {row['context']}: {reason}"
        if row["agrees"] is False:
            yield how_wrong(row)
    unsteady = [row for row in report["results"] if _unsettled(row)]
    if unsteady:
        yield (
            f"the rounds lie more than {UNSTEADY:.0%} apart ({mark}) and have not settled in {len(unsteady)} of "
            f"{len(report['results'])} rows; run again before ranking by these"
        )
    busy = max((row["others_busy_cores"] or 0 for row in report["results"]), default=0)
    if busy > _BUSY_CORES:
        yield f"other programs kept up to {busy:.1f} cores busy while a backend was measured, which slows it"
    if any("can pass 1" in row["notes"].get("bandwidth_fraction", "") for row in report["results"]):
        yield "what a token reads fits the CPU's cache, so the floor of its memory is not a bound"
    for entry in report["absent"]:
        line = f"not there: {entry['backend']}: {entry['reason']}; {entry['remedy']}"
        if line not in said:  # the same for every bundle, mostly
            said.add(line)
            yield line


def _beside(report: Document) -> Iterator[str]:
    """Yield what was timed beside plain decoding."""
    for row in report["results"]:
        where = f"{row['backend']} at {row['context']}"
        if found := row.get("speculation"):
            yield (
                f"{where}: with prompt lookup {found['tokens_per_step']:.2f} tokens a step, "
                f"{found['tpot_ms']:.2f} ms per token, {found['speed']:.2f} times as fast"
            )
        if found := row.get("answers"):
            yield (
                f"{where}: {found['n']} answers to one prompt, {found['tokens_per_s']:.1f} tokens/s in all, "
                f"{found['speed']:.2f} times as fast as one after another, cache {_size(found['cache_bytes'])}"
            )


def how_wrong(row: Document) -> str:
    """Say how far a result's answers are from the reference's, and how far they may be."""
    which, error, allowed = "", row["max_rel_error"], row["bound"]
    if error <= allowed:  # so it is their mean
        which, error, allowed = "on average ", row["mean_error"], row["mean_bound"]
    return (
        f"{row['backend']} at {row['context']} answers wrongly: its logits are {which}{error:.2g} of "
        f"their spread away from those of {row['reference']}; allowed are {allowed:.2g}"
    )


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def _size(value: int | None) -> str:
    if value is None:
        return _MISSING
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _lines(console: rich.console.Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rich(
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    wrong: list[bool] | None = None,
    numbers: tuple[int, ...] = (),
) -> rich.table.Table:
    """Return a plain table; the columns of these ``numbers`` are aligned on the right."""
    table = rich.table.Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="right" if i in numbers else "left")
    for i, row in enumerate(rows):
        table.add_row(*map(rich.markup.escape, row), style="red" if wrong and wrong[i] else "")
    return table


def _markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
