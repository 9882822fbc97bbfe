"""What is reported of a benchmark: a document whose every missing figure has its reason beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from gta_edge.evaluate.bench.beside import summarise_beside
from gta_edge.evaluate.bench.case import Case
from gta_edge.evaluate.bench.floor import floor_ms, step_weight_bytes
from gta_edge.evaluate.bench.statistics import relative, settled, summarise
from gta_edge.formats.bundle import Bundle
from gta_edge.machine import info as machine
from gta_edge.model.kv_cache import step_bytes
from gta_edge.version import __version__

__all__ = ["UNSTEADY", "Comparison", "describe_machine", "report"]

Document = dict[str, Any]

UNSTEADY = 0.2
"""Rounds that lie further apart than this, as a part of their median, and have not settled (``figures.settled``), say
more of the machine than of a backend."""

_MEASURED = (
    "ttft_ms",
    "prefill_tokens_per_s",
    "tpot_ms",
    "decode_tokens_per_s",
    "spread",
    "per_round",
    "rounds",
    "steps",
    "others_busy_cores",
    "peak_memory_bytes",
    "peak_host_bytes",
    "peak_gpu_bytes",
    "cache_bytes",
    "cache_bytes_per_step",
    "floor_ms",
    "times_floor",
    "bandwidth_fraction",
)
_COMPARED = ("agrees", "max_rel_error", "bound", "mean_error", "mean_bound", "same_tokens", "compared_tokens")


@dataclass(frozen=True)
class Comparison:
    """How an case's answers compare with the reference's.

    Attributes:
        reference: who that was.
        is_reference: whether it was this case itself.
        has_peer: whether anybody else answered.
        exact: whether the reference rounds nothing below float32.
        found: as ``agreement`` returns it.
        in_exact_arithmetic: the same, of an case that rounds activations and is asked once not to; why it could not
            be asked; None if it does not round, or is itself what others are compared with.
    """

    reference: str
    is_reference: bool
    has_peer: bool
    exact: bool
    found: Document
    in_exact_arithmetic: Document | str | None = None


def report(
    *,
    cases: Sequence[Case],
    contexts: Mapping[str, Sequence[int]],
    comparisons: Mapping[tuple[int, int], Comparison],
    absent: Sequence[Document],
    bandwidths: Mapping[str, Sequence[float]],
    bandwidth_notes: Mapping[str, str],
    batch: int,
    new_tokens: Callable[[int, Bundle], int],
    described: Document,
) -> Document:
    """Return the whole report; results by context, the fastest first, wrong answers and what failed last."""
    rates = {device: max(values) for device, values in bandwidths.items()}
    static = [_static(case, batch, rates, bandwidth_notes) for case in cases]
    results = []
    for place, case in enumerate(cases):
        for context in contexts[case.name]:
            tokens = new_tokens(context, case.bundle)
            row = _row(case, static[place], context, batch, tokens, described)
            results.append(_compared(row, comparisons.get((place, context))))
    return {
        "gta_edge": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": described | {"bandwidth_bytes_per_s": {name: list(values) for name, values in bandwidths.items()}},
        "backends": static,
        "absent": list(absent),
        "results": _ranked(results),
    }


def describe_machine() -> Document:
    """Return what the figures depend on beside the software; to be asked before anything runs."""
    found = machine.describe()
    return found | {
        "cpu_cache_bytes": machine.cpu_cache_bytes(),
        "gpus": machine.gpus(),
        "warnings": machine.timing_warnings(found),
    }


def _static(case: Case, batch: int, rates: Mapping[str, float], bandwidth_notes: Mapping[str, str]) -> Document:
    """Return what is known of an case beside times: what a step must read, and how fast that can be."""
    opened = case.opened
    assert opened is not None  # who could not be opened is absent
    device = opened["device"]
    notes = {}
    if device not in rates:
        notes["bandwidth_bytes_per_s"] = bandwidth_notes.get(device, "the bandwidth was not measured")
    cache_dtype = opened.get("cache_dtype")
    if cache_dtype is None:
        notes["cache_dtype"] = "that interpreter's release does not say"
    per_token = next((r["cache_bytes_per_token"] for rounds in case.rounds.values() for r in rounds), None)
    if per_token is None:
        notes["cache_bytes_per_token"] = case.failure or "nothing was measured"
    return {
        "bundle": case.name,
        "backend": case.target.label,
        "precision": case.bundle.precision,
        "compute": opened["compute"],
        "cache_dtype": cache_dtype,
        "device": device,
        "rounds_activations": opened["rounds_activations"],
        "weight_bytes_per_step": step_weight_bytes(case.bundle, opened, batch),
        "cache_bytes_per_token": per_token,
        "bandwidth_bytes_per_s": rates.get(device),
        "cuda_graph": _replays(case, notes),
        "load_s": opened["load_s"],
        "python": opened["python"],
        "versions": opened["versions"],
        "notes": notes,
    }


def _replays(case: Case, notes: dict[str, str]) -> bool | None:
    """Return whether single tokens are replays of a CUDA graph, as the worker said last."""
    # another interpreter's worker may be of a version that does not say
    said = [r["cuda_graph"] for rounds in case.rounds.values() for r in rounds if "cuda_graph" in r]
    told: list[bool] = [value for value in said if value is not None]
    if told:
        return told[-1]
    notes["cuda_graph"] = "no CUDA graph on this backend" if said else case.failure or "not measured"
    return None


def _row(case: Case, static: Document, context: int, batch: int, new_tokens: int, described: Document) -> Document:
    row: Document = {
        "bundle": case.name,
        "backend": case.target.label,
        "precision": case.bundle.precision,
        "context": context,
        "batch": batch,
        "new_tokens": new_tokens,
    }
    rounds = case.rounds.get(context, [])
    if not rounds:
        reason = case.failure or "it was not measured"
        return row | dict.fromkeys(_MEASURED) | {"notes": dict.fromkeys(_MEASURED, reason)}
    notes = {}
    if case.failure is not None and case.rounds and context == max(case.rounds):
        notes["rounds"] = f"it failed later: {case.failure}"
    row |= summarise(rounds, context, batch)
    row["new_tokens"] = len(rounds[0]["steps_ms"])
    row |= summarise_beside(rounds, row["new_tokens"], case.answers)
    row["others_busy_cores"] = _mean_busy(rounds)
    if row["others_busy_cores"] is None:
        notes["others_busy_cores"] = "the system does not say (no /proc/stat)"
    row |= _memory(rounds, static["device"], notes)
    # a policy leaves fewer rows than there were tokens; another interpreter's worker may be of a version without any
    rows = min(context, rounds[-1].get("cache_rows", context))
    config, compute = case.bundle.config, static["compute"]
    of_layers = int(rows) * config.num_hidden_layers
    cache = step_bytes(config, static["cache_dtype"] or compute, of_layers, batch, compute=compute)
    row |= _floor(row, static, cache, notes, described)
    for name, value in row["spread"].items():
        if value is None:
            notes[f"spread.{name}"] = "one round has no spread"
        elif value > UNSTEADY and not settled(row["per_round"][f"{name}_ms"]):
            notes[f"spread.{name}"] = (
                f"the rounds lie {value:.0%} apart, and their median has not settled: do not rank by it, and run again "
                "on a quiet machine"
            )
    return row | {"notes": notes}


def _mean_busy(rounds: Sequence[Document]) -> float | None:
    """Return how many cores other programs kept busy while this was measured, warming up included."""
    known = [r["others_busy_s"] for r in rounds if r["others_busy_s"] is not None]
    if not known:
        return None
    return float(max(0.0, sum(busy for busy, _ in known) / sum(wall for _, wall in known)))


def _memory(rounds: Sequence[Document], device: str, notes: dict[str, str]) -> Document:
    """Return peaks over the rounds; where CPU and GPU share memory one figure is all there is."""
    host = max((r["peak_host_bytes"] for r in rounds if r["peak_host_bytes"] is not None), default=None)
    gpu = max((r["gpu_bytes"] for r in rounds if r["gpu_bytes"] is not None), default=None)
    both = None if host is None else host + (gpu or 0)
    if rounds[0]["shares_memory"]:
        both, gpu = max(host or 0, gpu or 0) or None, None
        notes["peak_gpu_bytes"] = "CPU and GPU share memory: peak_memory_bytes is what the system has less of"
    elif device == "cpu":
        notes["peak_gpu_bytes"] = "it runs on the CPU"
    elif gpu is None:
        both = None
        notes["peak_gpu_bytes"] = notes["peak_memory_bytes"] = "the driver did not say what memory is free"
    if host is None:
        notes["peak_host_bytes"] = "the system does not say (no /proc/self/status)"
        notes.setdefault("peak_memory_bytes", notes["peak_host_bytes"])
    return {
        "peak_memory_bytes": both,
        "peak_host_bytes": host,
        "peak_gpu_bytes": gpu,
        "cache_bytes": max(r["cache_bytes"] for r in rounds),
    }


def _floor(row: Document, static: Document, cache: int, notes: dict[str, str], described: Document) -> Document:
    """Return the time that memory sets for a step over so many bytes of cache, and how far from it the median is."""
    rate = static["bandwidth_bytes_per_s"]
    if rate is None:
        reason = static["notes"]["bandwidth_bytes_per_s"]
        notes |= dict.fromkeys(("floor_ms", "times_floor", "bandwidth_fraction"), reason)
        return {"cache_bytes_per_step": cache, "floor_ms": None, "times_floor": None, "bandwidth_fraction": None}
    weights, middle = static["weight_bytes_per_step"], row["tpot_ms"]["p50"]
    least = floor_ms(weights, cache, rate)
    counted = (
        f"counted: {weights} bytes of weights as the backend holds them and {cache} of cache, each read once, at "
        f"{rate / 1e9:.1f} GB/s, the best that was measured"
    )
    if static["device"] == "cpu" and weights + cache < (described.get("cpu_cache_bytes") or 0):
        counted += "; they fit the CPU's cache, which is faster than its memory: the fraction can pass 1"
    notes["bandwidth_fraction"] = counted
    return {
        "cache_bytes_per_step": cache,
        "floor_ms": least,
        "times_floor": middle / least,
        "bandwidth_fraction": least / middle,
    }


def _compared(row: Document, comparison: Comparison | None) -> Document:
    notes = row["notes"]
    if comparison is None or not comparison.has_peer:
        reason = notes.get("ttft_ms") or (
            "answers were not asked for" if comparison is None else "no other backend answered to compare with"
        )
        notes |= dict.fromkeys((*_COMPARED, "reference"), reason)
        return row | dict.fromkeys(_COMPARED) | {"reference": None}
    found = comparison.found
    if comparison.is_reference:
        notes["agrees"] = "the others are compared with it, as the most exact of them"
    elif not comparison.exact:
        notes["agrees"] = f"compared with {comparison.reference}, which rounds too: no backend here is exact"
    once = comparison.in_exact_arithmetic
    if isinstance(once, str):
        notes["max_rel_error"] = f"only as it rounds activations: in exact arithmetic it could not be asked ({once})"
    elif once is not None and not once["agrees"]:  # rounding hid it
        found = found | {key: once[key] for key in ("agrees", "max_rel_error", "bound", "mean_error", "mean_bound")}
        notes["max_rel_error"] = "in exact arithmetic, without rounding activations"
    return row | {key: found[key] for key in _COMPARED} | {"reference": comparison.reference}


def _ranked(results: list[Document]) -> list[Document]:
    """Sort by context and time per token; give places to those whose answers are not known to be wrong."""

    def order(row: Document) -> tuple[int, bool, bool, float]:
        measured = row["tpot_ms"] is not None
        return row["context"], not measured, row["agrees"] is False, row["tpot_ms"]["p50"] if measured else 0.0

    ranked, places = [], dict.fromkeys((row["context"] for row in results), 0)
    for row in sorted(results, key=order):
        place = None
        if row["tpot_ms"] is None:
            row["notes"]["rank"] = "not measured"
        elif row["agrees"] is False:
            row["notes"]["rank"] = f"its answers are not those of {row['reference']}"
        else:
            places[row["context"]] += 1
            place = places[row["context"]]
        ranked.append(row | {"rank": place})
    first = {row["context"]: row for row in ranked if row["rank"] == 1}
    return [row | _relative(row, first.get(row["context"])) for row in ranked]


def _relative(row: Document, first: Document | None) -> Document:
    """Return how many times the time of the first in rank a row took, round by round, since rounds are run in turns."""
    if row["tpot_ms"] is None or first is None:
        row["notes"]["times_first"] = "not measured" if row["tpot_ms"] is None else "nobody has a rank here"
        return {"times_first": None}
    names = {"ttft": "ttft_ms", "tpot": "tpot_ms"}
    return {
        "times_first": {key: relative(row["per_round"][name], first["per_round"][name]) for key, name in names.items()}
    }
