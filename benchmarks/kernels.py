"""The attention kernels on a GPU beside others': decode and prefill of one layer, and tokens per second of a model.

    python benchmarks/kernels.py [--json FILE] [--markdown FILE] [--plot FILE] [--only decode,prefill,model]
        [--models NAME,...] [--contexts N,...] [--rounds N] [--quick]

First the static costs: bytes and FLOPs of each way to compute a layer's attention, by its definition. Then what was
measured: the rates at which the GPU copies, reads and multiplies, and times. Each contender is captured in a CUDA graph
over the caches of so many layers that together they are at least four times the L2, as in a model of many layers, and
replayed; contenders take turns in every round, and ratios are taken within a round. Of a peer's backends, each is
tried and the fastest counts. Before that, each result is compared with float32 on a small case.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_models import measure, random_session
from gpu_timing import (
    ROUND_SECONDS,
    Document,
    brief,
    captured,
    check_outputs,
    chosen,
    count,
    counts,
    free_memory,
    gpu,
    layer_count,
    quiet,
    rates,
    save,
    say,
    seconds,
    show_table,
    spread,
    versions,
)
from kernels_peers import CONTENDERS, Contender, Layers, WrongResultError, candidates, check, layers_of, shortest
from kernels_report import markdown, plot, show, static_table

from gta_edge.errors import BackendError, GtaEdgeError
from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.presets import PRESETS, preset

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

PARTS = ("decode", "prefill", "model")
DECODE_BATCHES = (1, 8, 32)
DECODE_CONTEXTS = (1024, 4096, 8192, 32768, 131072)
PREFILL_TOKENS = (128, 512, 1024, 4096, 8192, 16384)
MODEL_CONTEXTS = (128, 2048, 8192, 32768)
MODELS = ("gta-1b", "gqa-1b")
ROUNDS, QUICK_ROUNDS = 7, 3
QUICK_BATCHES = (1, 8)
QUICK_CONTEXTS = {"decode": (4096,), "prefill": (512, 4096), "model": (128, 2048)}

MEMORY_FRACTION = 0.9
"""Of the free memory that a row's contenders may take together."""
TRIAL_SECONDS = 0.05
NEW_TOKENS = 64
_UNMEASURABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, BackendError)
"""What peers raise for what they cannot do; OutOfMemoryError is a RuntimeError."""


# --- a layer's attention ---------------------------------------------------------------------------------------------


def all_of(layers: Layers) -> Callable[[], None]:
    """Return what runs each layer once, one after the other."""

    def run() -> None:
        for i in range(layers.count):
            layers.run(i)  # the next one may have the output's memory

    return run


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
    """Return for each of ours the times of the others over its own, round by round: 2 is twice as fast.

    Others are the peers, and these kernels on the other model; not the same layer with another type of cache.
    """
    return {
        own: {
            peer: spread([other / mine for other, mine in zip(times[peer], times[own], strict=True)])
            for peer in times
            if CONTENDERS[peer].sizes != CONTENDERS[own].sizes
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


def measure_model(name: str, contexts: tuple[int, ...], new_tokens: int, place: Document) -> Iterator[Document]:
    """Yield per context the time of a token of a preset with random weights in bf16, beside the floor."""
    config = preset(name)
    longest = max(contexts) + new_tokens
    config = config.replace(max_position_embeddings=max(config.max_position_embeddings, longest))
    with random_session(config, "bf16") as (session, weight_bytes):
        figures = {"weight_bytes": weight_bytes, "read_bytes_per_s": place["read_bytes_per_s"]}
        yield from measure(session, contexts, new_tokens, name=name, **figures)


# --- the command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Document:
    """Print the static costs, measure, and return everything that was found; each row is written when it is there.

    Args:
        options: of the command line.

    Raises:
        BackendError: there is no GPU, or a result is wrong.
    """
    place = gpu()
    show_table(static_table())
    place |= rates(options.quick)
    keys, notes = list(CONTENDERS), []
    if find_spec("flashinfer") is None:
        keys = [key for key in keys if CONTENDERS[key].engine != "flashinfer"]
        notes.append("FlashInfer is not installed and was not measured")
    document: Document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": place,
        "versions": versions(),
        "rounds": options.rounds,
        "notes": notes,
    }
    batches = QUICK_BATCHES if options.quick else DECODE_BATCHES
    attention = {
        "decode": (1, 256, [(batch, 1, context) for batch in batches for context in options.contexts["decode"]]),
        "prefill": (96, 96, [(1, tokens, tokens) for tokens in options.contexts["prefill"]]),
    }
    for part, (tokens, context, sizes) in attention.items():
        if part in options.only:
            ways, failed = check_all(keys, tokens, context)
            notes += failed
            document[part] = []
            for size in sizes:
                document[part].append(measure_row(ways, size, place, options.rounds))
                save(document, options.json)
    if "model" in options.only:
        document["model"] = []
        for name in options.models:
            try:
                for row in measure_model(name, options.contexts["model"], 16 if options.quick else NEW_TOKENS, place):
                    document["model"].append(row)
                    save(document, options.json)
            except (RuntimeError, GtaEdgeError) as error:
                if not (isinstance(error, GtaEdgeError) or is_out_of_memory(error)):
                    raise
                notes.append(f"{name} does not run here: {brief(error)}")
            free_memory()
    return document


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, ``contexts`` by part.

    Raises:
        InputError: a value that none can be.
        OutputError: a result could not be written.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew with every row")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--only", default=",".join(PARTS), help="decode, prefill, model, separated by commas")
    parser.add_argument("--models", default=",".join(MODELS), help="presets, of the part model")
    parser.add_argument("--contexts", help="cached tokens, prompts' lengths: of all parts, separated by commas")
    parser.add_argument("--rounds", help="how often each is timed")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds, where these are not given")
    options = parser.parse_args(arguments)
    check_outputs(options.json, options.markdown, options.plot)
    options.only = chosen(options.only, "--only", PARTS)
    options.models = chosen(options.models, "--models", PRESETS)
    options.rounds = count(options.rounds, "--rounds", QUICK_ROUNDS if options.quick else ROUNDS)
    defaults = {"decode": DECODE_CONTEXTS, "prefill": PREFILL_TOKENS, "model": MODEL_CONTEXTS}
    contexts = QUICK_CONTEXTS if options.quick else defaults
    if options.contexts:
        contexts = dict.fromkeys(PARTS, counts(options.contexts, "--contexts"))
    options.contexts = contexts
    return options


def main() -> None:
    """Parse the arguments, measure, print."""
    try:
        options = parse()
        with quiet():
            document = run(options)
    except GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    show(document)
    save(document, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(document), encoding="utf-8")
    if options.plot:
        plot(document, options.plot)


if __name__ == "__main__":
    main()
