"""Timing on a GPU by its own clock, replayed from CUDA graphs, and tables, for the benchmarks beside this file."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError, InputError, OutputError
from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

__all__ = [
    "MISSING",
    "ROUND_SECONDS",
    "Document",
    "Table",
    "brief",
    "captured",
    "check_outputs",
    "chosen",
    "count",
    "counts",
    "free_memory",
    "gpu",
    "layer_count",
    "markdown_table",
    "quiet",
    "ranged",
    "rates",
    "save",
    "say",
    "seconds",
    "show_table",
    "spread",
    "versions",
]

Document = dict[str, Any]
Table = list[dict[str, str]]
"""Rows of cells by their headings."""

MISSING = "n/a"
L2_MULTIPLE = 4
MAX_LAYERS = 2048
ROUND_SECONDS = 0.2


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- timing ----------------------------------------------------------------------------------------------------------


def captured(work: Callable[[], object]) -> Any:
    """Return a CUDA graph of what ``work`` launches; it runs once before, so that nothing is loaded in the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def seconds(replay: Callable[[], object], at_least: float) -> float:
    """Return the time of one replay, from as many as take ``at_least`` seconds, by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 1
    while True:
        start.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        if elapsed >= at_least:
            return elapsed / count
        count = max(2 * count, min(64 * count, math.ceil(1.2 * count * at_least / max(elapsed, 1e-6))))


def rates(quick: bool) -> dict[str, float]:
    """Return what the GPU reaches: bytes per second copied (read and written) and read, bf16 FLOPs per second."""
    free, _ = torch.cuda.mem_get_info()
    size = min(2**30, free // 8)
    source = torch.ones(size // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.float32, device="cuda")
    n = 4096 if quick else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(a)
    best = {
        "copy_bytes_per_s": (2 * source.nbytes, lambda: target.copy_(source)),
        "read_bytes_per_s": (source.nbytes, lambda: torch.sum(source, dim=0, out=total)),
        "matmul_flops_per_s": (2 * n**3, lambda: torch.mm(a, b, out=product)),
    }
    return {name: work / min(seconds(run, ROUND_SECONDS) for _ in range(3)) for name, (work, run) in best.items()}


def layer_count(layer_bytes: int, l2_bytes: int) -> int:
    """Return how many layers are together at least four times the L2."""
    return min(MAX_LAYERS, max(1, -(-L2_MULTIPLE * l2_bytes // layer_bytes)))


def brief(error: Exception) -> str:
    """Return an error's first line, not too long."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def free_memory() -> None:
    """Give back what torch keeps, so that the next contender's size is compared with what there is."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# --- tables ----------------------------------------------------------------------------------------------------------


def ranged(values: dict[str, float], digits: int, unit: float = 1.0) -> str:
    """Write a spread, times ``unit``, as median (smallest..largest)."""
    middle, least, most = (f"{unit * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least}..{most})"


def show_table(table: Table) -> None:
    """Print a table."""
    console = rich.console.Console(width=max(160, shutil.get_terminal_size().columns), markup=False, highlight=False)
    drawn = rich.table.Table(*table[0], box=None)
    for row in table:
        drawn.add_row(*row.values())
    console.print(drawn)


def markdown_table(table: Table) -> str:
    """Return a table in Markdown; it has a row at least."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(cells.values()) for cells in table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- files -----------------------------------------------------------------------------------------------------------


def check_outputs(*paths: Path | None) -> None:
    """See that results can be written, now and not after minutes of measuring.

    Raises:
        OutputError: one cannot.
    """
    for path in paths:
        if path and not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written", "expected a directory that exists and may be written to")


def save(document: Document, path: Path | None) -> None:
    """Write what has been measured so far in the place of what was written before, whole or not at all.

    Args:
        document: anything that is JSON.
        path: where it goes; nothing is written without one.
    """
    if path:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


# --- arguments -------------------------------------------------------------------------------------------------------


def counts(text: str, option: str) -> tuple[int, ...]:
    """Return numbers from 1 on, separated by commas.

    Raises:
        InputError: they are not.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(f"{option} got {text!r}", "expected numbers from 1 on, separated by commas")
    return found


def count(text: str | None, option: str, default: int) -> int:
    """Return a number from 1 on; the default without a text.

    Raises:
        InputError: it is none, or there are several.
    """
    found = counts(text, option) if text else (default,)
    if len(found) > 1:
        raise InputError(f"{option} got {text!r}", "expected one number")
    return found[0]


def chosen(text: str, option: str, known: Collection[str]) -> tuple[str, ...]:
    """Return names, separated by commas.

    Raises:
        InputError: one is unknown.
    """
    names = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{option} got {', '.join(unknown)!r}", f"expected some of {', '.join(known)}")
    return names


# --- the GPU ----------------------------------------------------------------------------------------------------------


def gpu() -> Document:
    """Return what is known of the GPU without measuring.

    Raises:
        BackendError: there is none that torch and the kernels can use.
    """
    if not torch.cuda.is_available():
        raise BackendError("torch finds no NVIDIA GPU here; the kernels can only be measured on one")
    device = torch.cuda.current_device()
    found, properties = current_gpu(device), torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "architecture": found.architecture,
        "processors": found.processors,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    found = {}
    for name in ("torch", "flashinfer-python", "cuda-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"CUDA of torch": str(torch.version.cuda)}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings: torch warns of each backend that cannot run, which the report lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
