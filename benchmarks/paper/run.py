"""Measures the models of the paper and their baselines, for ``docs/paper.md``.

    python -m benchmarks.paper.run [--sizes 160m 500m 1b] [--precisions int4] [--backends onnxruntime] [--results DIR] …

Every model goes through our own pipeline: random weights, ``export``, ``bench``. All models of a size are given to one
``bench`` call, where they take turns, so that their ratios hold also on a machine that is not quiet. What it reports is
kept in a file for each size, precision and backend. Contexts that a file has are not measured again, so a run that was
ended goes on with the part that it was in, and a run with other options adds what it measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks.paper.results import (
    LONGEST_SHORT,
    PHASES,
    RESULTS,
    SIZES,
    Document,
    Facts,
    Models,
    Pair,
    Part,
    Ratio,
    Run,
    Times,
    file_name,
    pairs,
    published_models,
    read_run,
    write_run,
)
from benchmarks.paper.theory import count_flops
from benchmarks.random_bundles import make_bundles
from gta_edge.cli.output import Output
from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.evaluate.bench.run import Settings, bench
from gta_edge.evaluate.bench.targets import parse_targets
from gta_edge.formats.weights import PRECISIONS
from gta_edge.model.config import ModelConfig
from gta_edge.runtime.registry import BACKENDS

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        work: where bundles are kept.
        results: where the files of results are.
        models: by size; only these sizes.
        precisions: what weights are stored in.
        backends: by name.
        contexts: tokens of the prompt.
        rounds: repeats of contexts up to ``LONGEST_SHORT``.
        long_rounds: repeats of longer ones.
        new_tokens: steps that are timed after the prompt.
        command: what was asked for, in words.
    """

    work: Path
    results: Path
    models: Models
    precisions: Sequence[str] = ("int4",)
    backends: Sequence[str] = ("onnxruntime",)
    contexts: Sequence[int] = CONTEXTS
    rounds: int = 3
    long_rounds: int = 2
    new_tokens: int = 32
    command: str = ""


@dataclass(frozen=True)
class Call:
    """One call of ``bench``: the models of a size in one precision on one backend, at short contexts or a long one."""

    size: str
    precision: str
    backend: str
    path: Path
    settings: Settings


def calls(request: Request) -> Iterator[Call]:
    """Yield all that is asked for and that no file has yet, small models and short contexts first.

    Raises:
        InputError: a file is damaged.
    """
    contexts = sorted(set(request.contexts))
    short = [context for context in contexts if context <= LONGEST_SHORT]
    long = [[context] for context in contexts if context > LONGEST_SHORT]
    groups = product(request.models, [short, *long], request.precisions, request.backends)
    for size, group, precision, backend in groups:
        path = request.results / file_name(size, precision, backend)
        known = read_run(path).contexts if path.exists() else []
        if wanted := tuple(sorted(set(group) - set(known))):
            # answers are compared, and prompts warmed up in full, where that takes seconds
            whole = group is short
            rounds = request.rounds if whole else request.long_rounds
            settings = Settings(wanted, request.new_tokens, rounds=rounds, compare=whole, warm_up=whole)
            yield Call(size, precision, backend, path, settings)


def measure(request: Request) -> int:
    """Measure what no file has yet; return how many calls of ``bench`` that took.

    Raises:
        InputError: a file of results is damaged, or of another device.
        BackendError: a backend cannot be used.
        OutputError: the disk is full.
    """
    bundles = request.work / "bundles"
    for directory in (request.results, bundles):
        directory.mkdir(parents=True, exist_ok=True)
    wanted = [*calls(request)]
    for place, call in enumerate(wanted, start=1):
        say(f"[{place}/{len(wanted)}] {call.path.stem}: {', '.join(map(str, call.settings.contexts))} tokens")
        models = request.models[call.size]
        with Output().progress() as progress:
            of = [call.precision]
            paths = {
                name: make_bundles(bundles, name, None, of, config=config, progress=progress)[call.precision]
                for name, config in models.items()
            }
            report = bench([*paths.values()], parse_targets(call.backend), call.settings, progress=progress)
        if not report["results"]:
            absence = report["absent"][0]
            raise BackendError(f"{absence['backend']}: {absence['reason']}", absence["remedy"])
        keep(call, report, models, paths, request.command)
    return len(wanted)


def keep(
    call: Call, report: Document, models: Mapping[str, ModelConfig], bundles: Mapping[str, Path], command: str
) -> None:
    """Add to a file what ``bench`` has said.

    Raises:
        InputError: the file is of another kind of device.
        BundleError: the FLOPs of a graph cannot be counted.
        OutputError: the file cannot be written.
    """
    device = str(report["backends"][0]["device"])
    run = Run(call.size, call.precision, call.backend, device, None, {}, [])
    run = read_run(call.path) if call.path.exists() else run
    if run.device != device:
        raise InputError(
            f"{call.path}: has figures of the {run.device.upper()}, and these are of the {device.upper()}",
            "give another directory with --results",
        )
    facts = dict(run.facts)
    for entry in report["backends"]:
        name = model_of(entry["bundle"])
        if name not in facts or facts[name].cache_bytes_per_token is None:
            bytes_ = entry["weight_bytes_per_step"], entry["cache_bytes_per_token"]
            facts[name] = Facts(*bytes_, *count_flops(bundles[name] / "model.onnx"))
    write_run(call.path, replace(run, facts=facts, parts=[*run.parts, part(report, models, command)]))


# --- what of a report is kept ----------------------------------------------------------------------------------------


def part(report: Document, models: Mapping[str, ModelConfig], command: str) -> Part:
    """Return what the page needs of a report of ``bench`` on the models of a size."""
    rows = {(model_of(row["bundle"]), int(row["context"])): row for row in report["results"]}
    timed = [row for row in rows.values() if row["ttft_ms"] is not None]
    static, machine = report["backends"][0], report["machine"]
    figures: dict[str, list[float | None]] = {
        **{name: [row[name] for row in timed] for name in ("rounds", "new_tokens", "others_busy_cores")},
        **{f"spread_{name}": [row["spread"][name] for row in timed] for name in ("ttft", "tpot")},
        "bandwidth_gb_per_s": [rate / 1e9 for rates in machine["bandwidth_bytes_per_s"].values() for rate in rates],
    }
    return Part(
        command=command,
        date=report["date"][:10],
        machine=machine_in_words(machine),
        versions={"Python": static["python"], **static["versions"]},
        warnings=machine["warnings"],
        absent=[f"{Path(each['bundle']).name} on {each['backend']}: {each['reason']}" for each in report["absent"]],
        extents={name: extent(values) for name, values in figures.items()},
        times=[times(model, context, row) for (model, context), row in rows.items()],
        pairs=[
            found
            for gta, baseline in pairs(models)
            for context in sorted({context for _, context in rows})
            if (found := pair(rows, gta, baseline, context)) is not None
        ],
    )


def times(model: str, context: int, row: Document) -> Times:
    """Return a row's medians; those of a wrong answer mean nothing."""
    if row["agrees"] is False:
        return Times(model, context, problem="its answers are wrong, so its times count in no ratio")
    if row["ttft_ms"] is None or row["tpot_ms"] is None:
        return Times(model, context, problem=row["notes"].get("ttft_ms", "it was not measured"))
    memory = row["peak_memory_bytes"]
    figures = row["ttft_ms"], row["tpot_ms"]["p50"], None if memory is None else memory / 1e9
    return Times(model, context, *(None if figure is None else round(figure, 3) for figure in figures))


def pair(rows: Mapping[tuple[str, int], Document], gta: str, baseline: str, context: int) -> Pair | None:
    """Return how many times as fast the GTA model was, in the rounds that both models have; None without one."""
    own, base = (per_round(rows.get((name, context))) for name in (gta, baseline))
    if not (count := min(len(own), len(base))):  # one may have failed later
        return None
    ratios = {}
    for phase, (first, later) in PHASES.items():
        totals = [[first * ttft + later * tpot for ttft, tpot in found[:count]] for found in (own, base)]
        values = [theirs / ours for ours, theirs in zip(*totals, strict=True)]
        ratios[phase] = Ratio(*(round(of(values), 4) for of in (statistics.median, min, max)))
    return Pair(gta, baseline, context, count, **ratios)


def per_round(row: Document | None) -> list[tuple[float, float]]:
    """Return times to the first token and of a token, in ms, round by round; none of a wrong answer."""
    if row is None or row["tpot_ms"] is None or row["agrees"] is False:
        return []
    return list(zip(row["per_round"]["ttft_ms"], row["per_round"]["tpot_ms"], strict=True))


def extent(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Return the lowest and the highest of the values that are known."""
    known = [value for value in values if value is not None]
    return (round(min(known), 4), round(max(known), 4)) if known else None


def machine_in_words(machine: Document) -> str:
    """Return board, cores, memory and GPUs."""
    gpus = "".join(f", {entry['name']}" for entry in machine["gpus"])
    board = f"{machine['board']}, " if machine["board"] else ""
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    return f"{board}{machine['usable_cores']} cores of {machine['cpu'] or machine['architecture']}{memory}{gpus}"


def model_of(bundle: str) -> str:
    """Return the model of a bundle's directory ``NAME-LAYERS-PRECISION``."""
    return Path(bundle).name.rsplit("-", 2)[0]


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


# --- the command -----------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parse(words: Sequence[str]) -> Request:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="where bundles are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept; those of the page")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="all by default")
    parser.add_argument("--precisions", nargs="+", choices=[*PRECISIONS], default=["int4"], help="int4 by default")
    parser.add_argument("--backends", nargs="+", choices=[*BACKENDS], default=["onnxruntime"])
    parser.add_argument("--contexts", nargs="+", type=_number, default=CONTEXTS, help="tokens of the prompt")
    parser.add_argument("--rounds", type=_number, default=3, help=f"up to {LONGEST_SHORT} tokens; 3 by default")
    parser.add_argument("--long-rounds", type=_number, default=2, help="above; 2 by default")
    parser.add_argument("--new-tokens", type=_number, default=32, help="steps that are timed; 32 by default")
    found = vars(parser.parse_args(words))
    models = published_models()
    sizes = {size: models[size] for size in found.pop("sizes")}
    return Request(**found, models=sizes, command=" ".join([parser.prog, *words]))


def main() -> None:
    """Measure what is missing."""
    request = parse(sys.argv[1:])
    try:
        count = measure(request)
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    say(f"measured: {count} parts, into {request.results}; the page: python -m benchmarks.paper.page")


if __name__ == "__main__":
    main()
