"""Measures the models of the paper and their baselines, for ``docs/paper.md``.

    python -m benchmarks.paper.run [--sizes 160m 500m 1b] [--precision int4] [--backend onnxruntime] [--results DIR] …

Every model goes through our own pipeline: random weights, ``export``, ``bench``. All models of a size are given to one
``bench`` call, where they take turns, so that their ratios hold also on a machine that is not quiet. What it reports is
kept in a file for each size, precision and backend. Contexts that a file has are not measured again, so a run that was
ended goes on with the part that it was in, and a run with other options adds what it measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.paper.results import (
    LONGEST_SHORT,
    PHASES,
    RESULTS,
    SIZES,
    Document,
    Facts,
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
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import PRECISIONS
from gta_edge.runtime.registry import BACKENDS

COMMAND = "python -m benchmarks.paper.run"
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHORT_ROUNDS, LONG_ROUNDS = 3, 2  # up to LONGEST_SHORT, and above
NEW_TOKENS = 32  # steps that are timed after the prompt


@dataclass(frozen=True)
class Series:
    """The models that are measured together, and what they become.

    Attributes:
        size: of the models.
        models: by name.
        precision: what weights are stored in.
        backend: by name.
        command: what was asked for, in words.
    """

    size: str
    models: Mapping[str, ModelConfig]
    precision: str = "int4"
    backend: str = "onnxruntime"
    command: str = ""

    def path(self, results: Path) -> Path:
        """Return the file in which results are kept."""
        return results / file_name(self.size, self.precision, self.backend)


def calls(known: Collection[int], contexts: Collection[int], rounds: int | None) -> list[Settings]:
    """Return what to call ``bench`` with for the contexts that are not known yet: short ones together, then each long.

    Answers are compared, and prompts warmed up in full, where that takes seconds.
    """
    wanted = sorted(set(contexts) - set(known))
    short = tuple(context for context in wanted if context <= LONGEST_SHORT)
    found = [Settings(short, NEW_TOKENS, rounds=rounds or SHORT_ROUNDS)] if short else []
    long = {"rounds": rounds or LONG_ROUNDS, "compare": False, "warm_up": False}
    return found + [Settings((context,), NEW_TOKENS, **long) for context in wanted[len(short) :]]


def measure(series: Series, contexts: Collection[int], rounds: int | None, results: Path, work: Path) -> int:
    """Measure the contexts that the file does not have yet; return how many calls of ``bench`` that took.

    Args:
        series: what is measured.
        contexts: tokens of the prompt.
        rounds: repeats; by default as many as the context allows.
        results: where the files of results are.
        work: where bundles are kept.

    Raises:
        InputError: the file is damaged, or of another kind of device.
        BackendError: the backend cannot be used.
        OutputError: the disk is full.
    """
    path = series.path(results)
    for directory in (results, work):
        directory.mkdir(parents=True, exist_ok=True)
    wanted = calls(read_run(path).contexts if path.exists() else (), contexts, rounds)
    for place, settings in enumerate(wanted, start=1):
        say(f"{path.stem}, {place} of {len(wanted)}: {', '.join(map(str, settings.contexts))} tokens")
        with Output().progress() as progress:
            bundles = {
                name: make_bundles(work, name, None, [series.precision], config=config, progress=progress)
                for name, config in series.models.items()
            }
            paths = {name: made[series.precision] for name, made in bundles.items()}
            report = bench([*paths.values()], parse_targets(series.backend), settings, progress=progress)
        if not report["results"]:
            absence = report["absent"][0]
            raise BackendError(f"{absence['backend']}: {absence['reason']}", absence["remedy"])
        keep(path, series, report, paths)
    return len(wanted)


def keep(path: Path, series: Series, report: Document, bundles: Mapping[str, Path]) -> None:
    """Add to a file what ``bench`` has said.

    Raises:
        InputError: the file is of another kind of device.
        BundleError: the FLOPs of a graph cannot be counted.
        OutputError: the file cannot be written.
    """
    device = str(report["backends"][0]["device"])
    run = Run(series.size, series.precision, series.backend, device, None, {}, [])
    run = read_run(path) if path.exists() else run
    if run.device != device:
        problem = f"{path}: has figures of the {run.device.upper()}, and these are of the {device.upper()}"
        raise InputError(problem, "give another directory with --results")
    facts = dict(run.facts)
    for entry in report["backends"]:
        name = model_of(entry["bundle"])
        if name not in facts or facts[name].cache_bytes_per_token is None:
            bytes_ = entry["weight_bytes_per_step"], entry["cache_bytes_per_token"]
            facts[name] = Facts(*bytes_, *count_flops(bundles[name] / "model.onnx"))
    added = part(report, series.models, series.command)
    write_run(path, replace(run, facts=facts, parts=[*run.parts, added]))


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


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="where bundles are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept; those of the page")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="all by default")
    parser.add_argument("--precision", choices=[*PRECISIONS], default="int4", help="int4 by default")
    parser.add_argument("--backend", choices=[*BACKENDS], default="onnxruntime", help="onnxruntime by default")
    parser.add_argument("--contexts", nargs="+", type=_number, default=CONTEXTS, help="tokens of the prompt")
    parser.add_argument(
        "--rounds", type=_number, help=f"{SHORT_ROUNDS} up to {LONGEST_SHORT} tokens, then {LONG_ROUNDS}"
    )
    return parser.parse_args(words)


def main() -> None:
    """Measure what is missing."""
    found, models = parse(sys.argv[1:]), published_models()
    command = " ".join([COMMAND, *sys.argv[1:]])
    count = 0
    try:
        for size in found.sizes:
            series = Series(size, models[size], found.precision, found.backend, command)
            count += measure(series, found.contexts, found.rounds, found.results, found.work)
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    say(f"measured: {count} parts, into {found.results}; the page: python -m benchmarks.paper.page")


if __name__ == "__main__":
    main()
