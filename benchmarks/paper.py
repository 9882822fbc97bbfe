"""What the GTA paper claims beside what we compute and measure: makes ``docs/paper.md``.

    python benchmarks/paper.py --work DIR [--sizes 160m,500m,1b] [--precisions int4] [--backend onnxruntime] …

Every model goes through our own pipeline: random weights, ``export``, ``bench``. All models of a size are given to one
``bench`` call, where they take turns, so that their ratios hold also on a machine that is not quiet. What it reports is
kept in ``DIR/results``, a file for each size, precision, backend and part of the contexts. What is there is not
measured again, so a run that was ended goes on with the part that it was in. ``--page-only`` writes the page from what
is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paper_flops import count
from paper_page import write_page
from paper_results import LONGEST_SHORT, SIZES, Document, Models, model_of, published_models, read_report
from random_bundles import make_bundles

from gta_edge.cli.output import Output
from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.evaluate.bench.run import Settings, bench
from gta_edge.evaluate.bench.targets import parse_targets
from gta_edge.formats.weights import PRECISIONS
from gta_edge.libraries.install import install_command
from gta_edge.runtime.registry import BACKENDS
from gta_edge.support.files import new_file
from gta_edge.support.progress import Progress

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FLOPS = "flops.json"
PAGE = Path(__file__).parents[1] / "docs" / "paper.md"


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        work: where bundles and results are kept.
        models: by size; only these sizes.
        precisions: what weights are stored in.
        backends: by name.
        contexts: tokens of the prompt.
        rounds: repeats of contexts up to ``LONGEST_SHORT``.
        long_rounds: repeats of longer ones.
        new_tokens: steps that are timed after the prompt.
    """

    work: Path
    models: Models
    precisions: Sequence[str] = ("int4",)
    backends: Sequence[str] = ("onnxruntime",)
    contexts: Sequence[int] = CONTEXTS
    rounds: int = 3
    long_rounds: int = 2
    new_tokens: int = 32


@dataclass(frozen=True)
class Part:
    """One call of ``bench``: the models of a size in one precision on one backend, at short contexts or a long one."""

    size: str
    precision: str
    backend: str
    name: str
    contexts: tuple[int, ...]
    settings: Settings

    @property
    def series(self) -> str:
        """What the files of all parts begin with whose figures may stand in one table."""
        return f"{self.size}-{self.precision}-{self.backend}"


def parts(request: Request) -> Iterator[Part]:
    """Yield all that is asked for, small models and short contexts first."""
    short = tuple(sorted(context for context in request.contexts if context <= LONGEST_SHORT))
    long = sorted(context for context in request.contexts if context > LONGEST_SHORT)
    groups = ([("short", short)] if short else []) + [(f"{context}", (context,)) for context in long]
    for size in request.models:
        for name, contexts in groups:
            for precision in request.precisions:
                for backend in request.backends:
                    # answers are compared, and prompts warmed up in full, where that takes seconds
                    whole = name == "short"
                    rounds = request.rounds if whole else request.long_rounds
                    settings = Settings(contexts, request.new_tokens, rounds=rounds, compare=whole, warm_up=whole)
                    yield Part(size, precision, backend, name, contexts, settings)


def missing(results: Path, part: Part, models: Sequence[str]) -> tuple[int, ...]:
    """Return the contexts of a part that no file has for all its models.

    Raises:
        InputError: a file is damaged.
    """
    have: dict[int, set[str]] = {}
    for path in results.glob(f"{part.series}-*.json"):
        for row in read_report(path)["results"]:
            have.setdefault(row["context"], set()).add(model_of(row["bundle"]))
    return tuple(context for context in part.contexts if not have.get(context, set()) >= set(models))


def measure(request: Request) -> int:
    """Measure what no file has yet; return how many parts that were.

    Raises:
        InputError: a file of results is damaged.
        BackendError: a backend cannot be used.
        OutputError: the disk is full.
    """
    results, bundles = request.work / "results", request.work / "bundles"
    for directory in (results, bundles):
        directory.mkdir(parents=True, exist_ok=True)
    todo = []
    for part in parts(request):
        contexts = missing(results, part, [*request.models[part.size]])
        if contexts:
            todo.append((part, contexts))
    for place, (part, contexts) in enumerate(todo, start=1):
        say(f"[{place}/{len(todo)}] {part.series}-{part.name}: {', '.join(map(str, contexts))} tokens")
        with Output().progress() as progress:
            report = run_part(part, contexts, request.models[part.size], bundles, request.work, progress)
        path = next(path for path in _names(results, f"{part.series}-{part.name}") if not path.exists())
        write_json(path, report)
    return len(todo)


def run_part(
    part: Part,
    contexts: tuple[int, ...],
    models: Mapping[str, Any],
    bundles: Path,
    work: Path,
    progress: Progress,
) -> Document:
    """Make the bundles that are missing, count their FLOPs, and return what ``bench`` says of them."""
    found = {
        name: make_bundles(bundles, name, None, [part.precision], config=config, progress=progress)[part.precision]
        for name, config in models.items()
    }
    keep_flops(work / FLOPS, found)
    settings = replace(part.settings, contexts=contexts)
    report = bench([*found.values()], parse_targets(part.backend), settings, progress=progress)
    if not report["results"]:
        absence = report["absent"][0]
        raise BackendError(f"{absence['backend']}: {absence['reason']}; {absence['remedy']}")
    return report


def keep_flops(path: Path, bundles: Mapping[str, Path]) -> None:
    """Add to a file the FLOPs counted in the graphs of bundles that it does not have yet."""
    known = read_flops(path)
    for name, bundle in bundles.items():
        if name not in known:
            counted = count(bundle / "model.onnx")
            known[name] = {"per_pair": counted.per_pair, "per_token": counted.per_token}
    write_json(path, known)


def read_flops(path: Path) -> dict[str, dict[str, int]]:
    """Return what ``keep_flops`` wrote: FLOPs of all layers by model; nothing where there is no file.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: int(entry[key]) for key in ("per_pair", "per_token")} for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: is no list of FLOPs ({type(error).__name__}: {error}); remove it") from error


def write_json(path: Path, content: Document) -> None:
    """Write a file that is complete or not there."""
    with new_file(path, force=True) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def _names(directory: Path, stem: str) -> Iterator[Path]:
    yield directory / f"{stem}.json"
    number = 2
    while True:
        yield directory / f"{stem}-{number}.json"
        number += 1


# --- the command -----------------------------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected whole numbers above 0 with commas between, such as 128,2048"
        )
    return tuple(sorted({int(word) for word in words}))


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _among(allowed: Sequence[str]) -> Any:
    def read(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r}; expected some of {','.join(allowed)}")
        return words

    return read


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="where bundles and results are kept")
    parser.add_argument("--sizes", type=_among(SIZES), default=SIZES, help=f"of {','.join(SIZES)}; all by default")
    parser.add_argument("--precisions", type=_among([*PRECISIONS]), default=("int4",), help="int4 by default")
    parser.add_argument("--backend", type=_among(BACKENDS), default=("onnxruntime",), help="with commas between")
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS, help="tokens of the prompt")
    parser.add_argument("--rounds", type=_number, default=3, help=f"up to {LONGEST_SHORT} tokens; 3 by default")
    parser.add_argument("--long-rounds", type=_number, default=2, help="above; 2 by default")
    parser.add_argument("--new-tokens", type=_number, default=32, help="steps that are timed; 32 by default")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page; its plots go into a directory beside it")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    return parser.parse_args(words)


def main() -> None:
    """Measure what is missing, write the page."""
    arguments = parse()
    models = published_models()
    try:
        if not arguments.output.resolve().parent.is_dir():  # before the long run, and not after it
            raise InputError(f"{arguments.output}: its directory does not exist; make it, or choose another")
        if not arguments.page_only:
            if importlib.util.find_spec("matplotlib") is None:
                raise BackendError(f"the Python module matplotlib is needed to draw; run: {install_command('plot')}")
            request = Request(
                arguments.work,
                {size: models[size] for size in arguments.sizes},
                arguments.precisions,
                arguments.backend,
                arguments.contexts,
                arguments.rounds,
                arguments.long_rounds,
                arguments.new_tokens,
            )
            measure(request)
        elif not any((arguments.work / "results").glob("*.json")):
            raise InputError(f"{arguments.work / 'results'} has no results; run without --page-only")
        write_page(arguments.output, arguments.work / "results", read_flops(arguments.work / FLOPS), models)
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    say(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
