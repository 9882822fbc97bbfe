"""The attention kernels on a GPU beside others': decode and prefill of one layer, and tokens per second of a model.

    python benchmarks/kernels.py [--json FILE] [--markdown FILE] [--plot FILE] [--only decode,prefill,model] [--quick]

First the static costs: bytes and FLOPs of each way to compute a layer's attention, by its definition. Then what was
measured: the rates at which the GPU copies, reads and multiplies, and times. Each contender is captured in a CUDA graph
over the caches of so many layers that together they are at least four times the L2, as in a model of many layers, and
replayed; contenders take turns in every round, and ratios are taken within a round. Of a peer's backends, each is
tried and the fastest counts. Before that, each result is compared with float32 on a small case.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.console
import rich.table
from floor import floor_ms
from kernels_peers import CONTENDERS, Contender, Layers, WrongResultError, candidates, check, layers_of, shortest

from gta_edge.cli.plot import colors, context_axis, new_figure, save
from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError, GtaEdgeError, InputError, OutputError
from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.decoder import Decoder
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import preset
from gta_edge.runtime.torch.session import TorchSession

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

Document = dict[str, Any]

PARTS = ("decode", "prefill", "model")
DECODE_BATCHES = (1, 8, 32)
DECODE_CONTEXTS = (1024, 4096, 8192, 32768, 131072)
PREFILL_TOKENS = (128, 512, 1024, 4096, 8192, 16384)
MODEL_CONTEXTS = (128, 2048, 8192, 32768)
MODELS = ("gta-1b", "gqa-1b")

L2_MULTIPLE = 4
MAX_LAYERS = 2048
MEMORY_FRACTION = 0.9
"""Of the free memory that a row's contenders may take together."""
ROUND_SECONDS, TRIAL_SECONDS = 0.2, 0.05
NEW_TOKENS = 64
_UNMEASURABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, BackendError)
"""What peers raise for what they cannot do; OutOfMemoryError is a RuntimeError."""


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


def all_of(layers: Layers) -> Callable[[], None]:
    """Return what runs each layer once, one after the other."""

    def run() -> None:
        for i in range(layers.count):
            layers.run(i)  # the next one may have the output's memory

    return run


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


# --- a layer's attention ---------------------------------------------------------------------------------------------


class Measured:
    """One contender with a size: its fastest way, captured.

    Args:
        contender: what is measured.
        ways: those that run here.
        sizes: batch, new tokens, and cached tokens after the call.
        l2_bytes: of the GPU.

    Raises:
        BackendError: no way works; the message has every reason.
    """

    def __init__(self, contender: Contender, ways: list[str], sizes: tuple[int, int, int], l2_bytes: int) -> None:
        self.contender, self.sizes = contender, sizes
        self.count = layer_count(contender.traffic_bytes(*self.sizes), l2_bytes)
        self.tried: dict[str, float | str] = {}
        self.won, self.layers, self.graph = "", None, None
        best = math.inf
        for way in ways:
            try:
                layers = layers_of(contender, way, *self.sizes, self.count)
                graph = captured(all_of(layers))
                time_s = seconds(graph.replay, TRIAL_SECONDS)
            except _UNMEASURABLE as error:
                self.tried[way] = brief(error)
                layers = graph = None
                free_memory()
                continue
            self.tried[way] = time_s / self.count
            if time_s < best:
                best, self.won, self.layers, self.graph = time_s, way, layers, graph
            layers = graph = None
        free_memory()
        if not self.won:
            reasons = "; ".join(f"{way}: {reason}" for way, reason in self.tried.items())
            raise BackendError(reasons or "no way of running it runs here")

    def time_s(self) -> float:
        """Return the seconds of one layer."""
        return seconds(self.graph.replay, ROUND_SECONDS) / self.count

    def overhead_s(self) -> float | None:
        """Return the seconds of one layer with next to no cache: launches, and all that does not grow with it.

        None for prompts, and where it does not run.
        """
        batch, tokens, _ = self.sizes
        if tokens > 1:
            return None
        past_length = self.layers.past_length
        if past_length is not None:
            kept = past_length.clone()
            past_length.zero_()
            found = self.time_s()
            past_length.copy_(kept)
            return found
        try:
            layers = layers_of(self.contender, self.won, batch, 1, shortest(self.contender), min(self.count, 256))
            graph = captured(all_of(layers))
            return seconds(graph.replay, ROUND_SECONDS) / layers.count
        except _UNMEASURABLE:  # some take no cache as short as that
            return None


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


def measure_row(ways: dict[str, list[str]], sizes: tuple[int, int, int], place: Document, rounds: int) -> Document:
    """Return one row: all contenders with one size, in turns.

    Args:
        ways: which run here, by keys of ``CONTENDERS``.
        sizes: batch, new tokens, and cached tokens after the call.
        place: what is known of the GPU and its rates.
        rounds: how often each is timed.
    """
    batch, tokens, context = sizes
    say(f"batch {batch}, {tokens} new of {context} tokens")
    free_memory()
    row: Document = {"batch": batch, "tokens": tokens, "context": context, "contenders": {}, "ratios": {}}
    running: dict[str, Measured] = {}
    for key in ways:
        contender = CONTENDERS[key]
        bytes_, flops = contender.traffic_bytes(batch, tokens, context), contender.flops(batch, tokens, context)
        row["contenders"][key] = figures = {"bytes": bytes_, "flops": flops}
        copies = min(2, len(ways[key]))  # the best so far, and the one that is tried
        needed, free = copies * bytes_ * layer_count(bytes_, place["l2_bytes"]), torch.cuda.mem_get_info()[0]
        if needed > MEMORY_FRACTION * free:
            figures["failed"] = f"needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
            continue
        try:
            running[key] = Measured(contender, ways[key], sizes, place["l2_bytes"])
        except _UNMEASURABLE as error:
            figures["failed"] = str(error) if isinstance(error, BackendError) else brief(error)
            free_memory()
    times: dict[str, list[float]] = {key: [] for key in running}
    for _ in range(rounds):
        for key, measured in running.items():
            times[key].append(measured.time_s())
    for key, measured in running.items():
        row["contenders"][key] |= {
            "layers": measured.count,
            "won": measured.won,
            "tried": measured.tried,
            "time_s": spread(times[key]),
            "overhead_s": measured.overhead_s(),
        }
        add_fractions(row["contenders"][key], place)
    row["ratios"] = ratios(times)
    return row


def add_fractions(figures: Document, place: Document) -> None:
    """Add to one contender's figures how near it is to the rates that the GPU reaches."""
    time_s = figures["time_s"]["median"]
    figures["copy_fraction"] = figures["bytes"] / time_s / place["copy_bytes_per_s"]
    figures["matmul_fraction"] = figures["flops"] / time_s / place["matmul_flops_per_s"]


def ratios(times: dict[str, list[float]]) -> Document:
    """Return for each of ours the peers' times over its own, round by round: 2 is twice as fast."""
    return {
        own: {
            peer: spread([other / mine for other, mine in zip(times[peer], times[own], strict=True)])
            for peer in times
            if CONTENDERS[peer].engine != "ours"
        }
        for own in times
        if CONTENDERS[own].engine == "ours"
    }


def check_all(keys: list[str], tokens: int, context: int) -> tuple[dict[str, list[str]], list[str]]:
    """Compare every way of every contender with float32.

    Returns:
        The ways that run here, by contender, and a sentence for each that does not.

    Raises:
        WrongResultError: a result is wrong.
    """
    ways: dict[str, list[str]] = {key: [] for key in keys}
    notes = []
    for key in keys:
        contender = CONTENDERS[key]
        for way in candidates(contender, tokens):
            try:
                check(contender, way, tokens, context)
            except WrongResultError:
                raise
            except _UNMEASURABLE as error:
                if contender.engine == "ours":
                    raise
                kind = "decode" if tokens == 1 else "prefill"
                notes.append(f"{contender.label} by {way} does not run here ({kind}): {brief(error)}")
            else:
                ways[key].append(way)
    return ways, notes


# --- a model ---------------------------------------------------------------------------------------------------------


def measure_model(name: str, contexts: tuple[int, ...], new_tokens: int, place: Document) -> list[Document]:
    """Return per context the time of a token of a preset with random weights in bf16, through ``TorchSession``.

    The floor is all weights and the cache read once, at the rate that the GPU reads at.
    """
    config = preset(name)
    config = config.replace(max_position_embeddings=max(config.max_position_embeddings, max(contexts) + new_tokens))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Decoder(config)
    finally:
        torch.set_default_dtype(torch.float32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, max(contexts) + new_tokens))
    unread = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    rows = []
    with TorchSession(model, device="cuda", compute="bf16") as session:
        for context in contexts:
            say(f"{name}, context {context}")
            session.reset()
            session.forward(ids[:, :context])  # warm-up: kernels, and the growth of the cache
            session.forward(ids[:, context : context + 1])
            session.reset()
            start = time.perf_counter()
            session.forward(ids[:, :context])
            first = time.perf_counter() - start
            steps = []
            for i in range(context, context + new_tokens):
                start = time.perf_counter()
                logits = session.forward(ids[:, i : i + 1])
                steps.append(time.perf_counter() - start)
            if not np.isfinite(logits).all():
                raise BackendError(f"{name} at context {context} gives logits that are not finite")
            cache_bytes = context * bytes_per_token(config, "bf16")
            floor = floor_ms(2 * (config.parameters - unread), cache_bytes, place["read_bytes_per_s"])
            token = spread(steps)
            rows.append(
                {
                    "model": name,
                    "context": context,
                    "prefill_tokens_per_s": context / first,
                    "token_s": token,
                    "tokens_per_s": 1 / token["median"],
                    "floor_s": floor / 1e3,
                    "floor_fraction": floor / 1e3 / token["median"],
                }
            )
    return rows


def measure_models(quick: bool, place: Document) -> tuple[list[Document], list[str]]:
    """Return the rows of all models, and which did not run."""
    rows: list[Document] = []
    notes = []
    contexts = MODEL_CONTEXTS[:2] if quick else MODEL_CONTEXTS
    for name in MODELS:
        try:
            rows += measure_model(name, contexts, 16 if quick else NEW_TOKENS, place)
        except (RuntimeError, GtaEdgeError) as error:
            if not (isinstance(error, GtaEdgeError) or is_out_of_memory(error)):
                raise
            notes.append(f"{name} does not run here: {brief(error)}")
        free_memory()
    return rows, notes


# --- the report ------------------------------------------------------------------------------------------------------

Table = list[dict[str, str]]
"""Rows of cells by their headings."""


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


def ranged(values: dict[str, float], digits: int, unit: float = 1.0) -> str:
    """Write a spread, times ``unit``, as median (smallest..largest)."""
    middle, least, most = (f"{unit * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least}..{most})"


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


MISSING = "n/a"
_FIGURES = ("us", "us, empty cache", "MB moved", "GFLOP", "of copy rate", "of matmul rate", "by")


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


def show_table(table: Table) -> None:
    """Print a table."""
    console = rich.console.Console(width=max(160, shutil.get_terminal_size().columns), markup=False, highlight=False)
    drawn = rich.table.Table(*table[0], box=None)
    for row in table:
        drawn.add_row(*row.values())
    console.print(drawn)


def show(document: Document) -> None:
    """Print what was measured."""
    print(conditions(document))
    for table in tables(document):
        show_table(table)
    for sentence in failures(document):
        print(sentence)


def markdown(document: Document) -> str:
    """Return the tables for a page of the documentation, with what they were measured on."""
    parts = [conditions(document)]
    for table in [static_table(), *tables(document)]:
        lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
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


# --- the command -----------------------------------------------------------------------------------------------------


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
def quiet() -> Any:
    """Hide warnings: torch warns of each backend that cannot run, which the report lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(parts: tuple[str, ...], quick: bool) -> Document:
    """Print the static costs, measure, and return everything that was found."""
    place = gpu()
    show_table(static_table())
    place |= rates(quick)
    keys, notes = list(CONTENDERS), []
    if find_spec("flashinfer") is None:
        keys = [key for key in keys if CONTENDERS[key].engine != "flashinfer"]
        notes.append("FlashInfer is not installed and was not measured")
    document: Document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": place,
        "versions": versions(),
        "rounds": 3 if quick else 7,
        "notes": notes,
    }
    if "decode" in parts:
        ways, failed = check_all(keys, 1, 256)
        notes += failed
        sizes = [(b, 1, s) for b in DECODE_BATCHES for s in DECODE_CONTEXTS]
        sizes = [(1, 1, 4096), (8, 1, 4096)] if quick else sizes
        document["decode"] = [measure_row(ways, size, place, document["rounds"]) for size in sizes]
    if "prefill" in parts:
        ways, failed = check_all(keys, 96, 96)
        notes += failed
        lengths = PREFILL_TOKENS[1:4:2] if quick else PREFILL_TOKENS
        document["prefill"] = [measure_row(ways, (1, t, t), place, document["rounds"]) for t in lengths]
    if "model" in parts:
        document["model"], failed = measure_models(quick, place)
        notes += failed
    return document


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(f"--only got {', '.join(unknown)!r}; expected some of {', '.join(PARTS)}")
    return parts


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--only", default=",".join(PARTS), help="decode, prefill, model, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds")
    arguments = parser.parse_args()
    try:
        for path in (arguments.json, arguments.markdown, arguments.plot):
            if path and not os.access(path.parent, os.W_OK):  # now, not after minutes of measuring
                raise OutputError(f"{path} cannot be written; expected a directory that exists and may be written to")
        with quiet():
            document = run(_parts(arguments.only), arguments.quick)
    except GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    show(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(document), encoding="utf-8")
    if arguments.plot:
        plot(document, arguments.plot)


if __name__ == "__main__":
    main()
