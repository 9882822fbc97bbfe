"""One table to paste, of a campaign's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["table"]

Row = dict[str, Any]

_VERSIONS = ("python", "torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
_KERNELS_SHOWN = 12
_WRONG_SHOWN = 20


def table(rows: Sequence[Row], directory: Path | None = None) -> str:
    """Return the results in Markdown; of what was done several times, the last.

    Args:
        rows: of ``results.jsonl``, in any state: a campaign that was ended has some.
        directory: where benchmarks have left tables of their own (``*.md``).
    """
    parts = [*_head(rows), _stages(rows), _programs(rows), _exactness(rows), *_wrong(rows), _models(rows)]
    parts += [_widths(rows), _speculation(rows), _logits(rows), *_kernels(rows), _shipped(rows), _profile(rows)]
    for page in sorted(directory.glob("*.md")) if directory else ():
        if page.name != "table.md":
            parts.append(page.read_text(encoding="utf-8", errors="replace").strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _of(rows: Iterable[Row], what: str, *keys: str) -> list[Row]:
    """Return the figures of a kind, the last of each that are told apart by ``keys``."""
    found: dict[tuple[Any, ...], Row] = {}
    for i, row in enumerate(rows):
        if row.get("what") == what:
            found[tuple(str(row.get(key)) for key in keys) if keys else (i,)] = row
    return list(found.values())


def _grid(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    body = [[_cell(value) for value in line] for line in lines]
    rows = [list(heads), ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if body else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        value = " x ".join(map(str, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _picked(rows: Iterable[Row], *names: str) -> list[list[Any]]:
    return [list(map(row.get, names)) for row in rows]


def _head(rows: Sequence[Row]) -> list[str]:
    """Return sentences on when, where and with what, and the machine's constants."""
    found = [
        f"{'A rehearsal without a GPU. ' if row.get('rehearsal') else ''}{str(row.get('date'))[:10]}, "
        f"commit {row.get('commit')}."
        for row in _of(rows, "campaign")[-1:]
    ]
    found += [
        f"{row.get('name')} ({row.get('architecture')}, {row.get('processors')} multiprocessors, "
        f"{_cell(row.get('l2_MiB'))} MiB L2, {_cell(row.get('memory_GiB'))} GiB), driver {row.get('driver')}, "
        f"CUDA {'.'.join(map(str, row.get('driver_cuda') or []))}."
        for row in _of(rows, "gpu")[-1:]
    ]
    versions = _of(rows, "versions")[-1:]
    found += [", ".join(f"{name} {row[name]}" for name in _VERSIONS if row.get(name)) + "." for row in versions]
    constants = {key: value for row in _of(rows, "constants") for key, value in row.items() if isinstance(value, float)}
    return [*found, ", ".join(f"{key} {_cell(value)}" for key, value in constants.items())]


def _last(rows: Sequence[Row]) -> list[Row]:
    """Return how each stage ended, the last time that it ran."""
    return list({row["stage"]: row for row in rows if "outcome" in row and "stage" in row}.values())


def _stages(rows: Sequence[Row]) -> str:
    lines = []
    for row in _last(rows):
        counts = ", ".join(f"{n} {kind}" for kind, n in row.get("tests", {}).items() if isinstance(n, int))
        last = "" if row["outcome"] == "passed" else str(row.get("last", ""))[:100]
        lines.append((row["stage"], row["outcome"], row.get("seconds"), counts or last))
    return _grid(("stage", "outcome", "s", "tests, or last line"), lines)


def _programs(rows: Sequence[Row]) -> str:
    names = ("case", "kernel", "grid", "threads", "shared_bytes", "registers", "spill_bytes", "blocks_per_processor")
    heads = ("launch", *names[1:-1], "blocks per multiprocessor")
    return _grid(heads, _picked(_of(rows, "launch", "case", "kernel"), *names))


def _exactness(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in _of(rows, "exact", "group", "case"):
        groups.setdefault(str(row.get("group")), []).append(row)
    lines = []
    for name, found in groups.items():
        errors = [row["error"] for row in found if isinstance(row.get("error"), float)]
        wrong = sum(not row.get("ok") for row in found)
        lines.append((name, len(found), max(errors, default=None), found[0].get("bound"), wrong))
    return _grid(("kernels against float64", "cases", "largest error", "bound", "wrong"), lines)


def _wrong(rows: Sequence[Row]) -> list[str]:
    wrong = [row for row in _of(rows, "exact", "group", "case") if not row.get("ok")]
    found = [f"wrong: {row.get('case')}: {row.get('why') or row.get('error')}" for row in wrong[:_WRONG_SHOWN]]
    turns = [row for row in _of(rows, "liveness", "turn") if not row.get("ok")]
    found += [f"wrong: turn {row.get('turn')} of liveness differs by {row.get('difference')}" for row in turns]
    found += [f"{row.get('stage')}: {row.get('why')}" for row in _of(rows, "problem")]
    failures = [name for row in _last(rows) for name in row.get("tests", {}).get("failures", ())]
    return found + [f"failed: {name}" for name in failures[:_WRONG_SHOWN]]


def _models(rows: Sequence[Row]) -> str:
    names = ("model", "context", "ms_per_token", "gpu_ms", "floor_ms", "floor_fraction", "prefill_tokens_per_s")
    heads = ("model", "context", "ms per token", "GPU ms", "floor ms", "floor / measured", "prefill tokens/s")
    found = _picked(_of(rows, "model", "model", "context"), *names, "peak_GiB")
    return _grid((*heads, "peak GiB"), found)


def _widths(rows: Sequence[Row]) -> str:
    names = ("model", "context", "width", "ms", "of_single", "ms_eager", "graph_MiB")
    heads = ("model", "context", "tokens of a call", "ms", "of a single one's", "ms without a graph", "graph MiB")
    return _grid(heads, _picked(_of(rows, "width", "model", "width"), *names))


def _speculation(rows: Sequence[Row]) -> str:
    names = ("model", "speculate", "ms_per_token", "tokens_per_step")
    return _grid(
        ("model", "speculate", "ms per token", "tokens per step"),
        _picked(_of(rows, "speculation", "model", "speculate"), *names),
    )


def _logits(rows: Sequence[Row]) -> str:
    heads = ("logits against float32", "largest error / standard deviation", "the same of torch", "bound")
    found = _picked(_of(rows, "logits", "model"), "model", "error", "torch_error", "bound", "top1", "ok")
    return _grid((*heads, "same likeliest token", "right"), found)


def _kernels(rows: Sequence[Row]) -> list[str]:
    found = []
    for kind in ("token", "prompt"):
        for total in _of(rows, kind, "model", "context"):
            own = [
                row
                for row in _of(rows, "kernel", "model", "of", "context", "name")
                if (row.get("model"), row.get("of"), row.get("context"))
                == (total.get("model"), kind, total.get("context"))
            ]
            own.sort(key=lambda row: -row.get("us", 0))
            lines = _picked(own, "name", "launches", "us_each", "us")
            whole = total.get("gpu_ms") or total.get("wall_ms")
            found.append(
                f"A {kind} of {total.get('model')} at context {total.get('context')}: {_cell(total.get('launches'))} "
                f"launches, {_cell(total.get('busy_us'))} us busy of {_cell(whole and 1e3 * whole)} us."
            )
            found.append(_grid(("kernel", "launches", "us each", "us"), lines[:_KERNELS_SHOWN]))
    return found


def _shipped(rows: Sequence[Row]) -> str:
    found = _picked(_of(rows, "shipped", "precision"), "precision", "error", "ttft_ms", "tpot_ms", "text")
    return _grid(("shipped model", "max_rel_error", "first token, ms", "ms per token", "text"), found)


def _profile(rows: Sequence[Row]) -> str:
    found = _of(rows, "profile", "id")
    metrics = list(dict.fromkeys(name for row in found for name in row.get("metrics", {})))
    lines = [(row.get("kernel"), *(row.get("metrics", {}).get(name) for name in metrics)) for row in found]
    return _grid(("Nsight Compute", *metrics), lines)
