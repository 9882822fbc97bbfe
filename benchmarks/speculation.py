"""What guessing tokens ahead saves: tokens a step and time, beside plain decoding.

    python benchmarks/speculation.py [--models smollm2,gta-1b] [--new-tokens 160] [--rounds 3] [--json FILE] …

SmolLM2-135M-Instruct in int4 edits a function, summarises with quotes, and tells a story, greedily, without guesses
and with prompt lookup, in turns: guesses that are chains, and in a session loaded with trees guesses that may be trees.
Then GTA-1B with random weights in int4 is led along the same tokens, which shows what the same guesses save at its
sizes: its own logits say nothing.

The model comes from ``make real-model``; bundles are made once under the work directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from comparison import check_directories, errors_in_one_line, machine, place, positive
from random_bundles import make_bundles

import gta_edge
from gta_edge.model.config import ModelConfig
from gta_edge.runtime.cache_moves import Moves
from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.generation.steps import PlainSteps, StepCounts, Steps
from gta_edge.runtime.registry import BACKENDS
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.runtime.step_costs import WIDTHS, StepCosts
from gta_edge.runtime.tree_cache import TreeCache

ROOT = Path(__file__).parents[1]

FUNCTION = """def read_rows(path, separator=","):
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            fields = line.split(separator)
            if len(fields) != 3:
                raise ValueError(f"{path}: expected 3 fields and found {len(fields)}")
            name, count, price = fields
            rows.append({"name": name, "count": int(count), "price": float(price)})
    return rows
"""
ARTICLE = """The lighthouse on the northern cliff was built in 1871, after three ships had been lost in a single
winter. Its lamp burned whale oil at first, then paraffin, and from 1924 it ran on electric current from
the village. The keeper, Ann Marlow, kept a diary of every storm for thirty-one years, and it is the best
record of the weather of that coast that we have. When the light was made automatic in 1983, the diary
was given to the museum, where it was forgotten in a cupboard until a student found it last spring. She
has since shown that the winds of the coast have turned by eleven degrees in a century."""
PROMPTS = {
    "edit a function": f"Rename the variable rows to items. Answer with the function.\n\n```python\n{FUNCTION}```",
    "summarise with quotes": f"Summarise this text, and quote its two most important sentences.\n\n{ARTICLE}",
    "tell a story": "Write a short story about a fox who wants to learn the violin.",
}
NO_REPETITION = "random tokens"
"""Not a text: nothing comes again but by chance, so that what guessing costs shows alone."""

MODELS = ("smollm2", "gta-1b")
KINDS = ("chains", "trees")
TREES = tuple(name for name, backend in BACKENDS.items() if backend.has_trees)
SLOPES = (0.0, 0.05, 0.15)
"""Of a single token's time, what each further one of a call takes: nothing, where reading the weights is all of it."""

Row = dict[str, Any]


# --- speculation -----------------------------------------------------------------------------------------------------


def answers(session: Session, new_tokens: int) -> dict[str, tuple[Ids, int]]:
    """Return what the model says to each prompt, prompt included, and how long the prompt is."""
    found = {}
    for name, prompt in PROMPTS.items():
        messages = [{"role": "user", "content": prompt}]
        assert session.tokenizer is not None  # the model has one
        text = session.tokenizer.apply_chat_template(messages)
        ids = session.tokenizer.encode(text, add_special_tokens=False)
        generation = gta_edge.generate(session, ids, max_new_tokens=new_tokens)
        list(generation)
        found[name] = np.array([*ids, *generation.ids], np.int64), len(ids)
    rng = np.random.default_rng(0)
    found[NO_REPETITION] = rng.integers(0, session.config.vocab_size, 128 + new_tokens), 128
    return found


def led(steps: Steps, ids: Ids, prompt: int) -> tuple[float, Ids]:
    """Lead a model along a text; return the seconds after the prompt, and what it would have said itself."""
    said = [int(steps.after(ids[:prompt]).argmax())]
    start = time.perf_counter()
    said += [int(steps.after(ids[:count]).argmax()) for count in range(prompt + 1, len(ids))]
    return time.perf_counter() - start, np.array(said)


class Counting(Session):
    """A session that computes nothing: of guesses without a model the text alone says what is accepted."""

    backend = "none"

    def __init__(self, config: ModelConfig, *, trees: bool) -> None:
        super().__init__(config, TreeCache(config) if trees else None)
        self.widths: list[int] = []

    @property
    def cache_bytes(self) -> int:
        """Nothing is cached."""
        return 0

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        """Hold nothing."""

    def _move(self, moves: Moves) -> None:
        """Move nothing."""

    def _run(self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: Any = None) -> Logits:
        self.widths.append(input_ids.shape[1])
        return np.zeros((*logit_positions.shape, self.config.vocab_size), np.float32)


class Slope(StepCosts):
    """Costs of which each token of a call beyond the first takes a fraction of it."""

    known = True

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def seconds(self, width: int, *, tree: bool = False) -> float:
        """Return them, a single token's as 1."""
        return 1 + self.slope * (width - 1)


def counted(config: ModelConfig, texts: dict[str, tuple[Ids, int]]) -> list[Row]:
    """Return what guesses save on texts by what a wider call costs, counted: no model runs, and nothing is timed."""
    found = []
    for (name, (ids, prompt)), slope in itertools.product(texts.items(), SLOPES):
        row: Row = {"text": name, "slope": slope}
        for kind in KINDS:
            session, tokens = Counting(config, trees=kind == "trees"), len(ids) - prompt - 1
            session.step_costs = costs = Slope(slope)
            led(SpeculativeSteps(session, PromptLookup(), len(ids) + 1), ids, prompt)
            calls = session.widths[1:]  # the first reads the prompt
            row[kind] = {"tokens_per_step": tokens / len(calls), "speed": tokens / sum(map(costs.seconds, calls))}
        found.append(row)
    return found


def speculation(
    session: Session, trees: Session, texts: dict[str, tuple[Ids, int]], rounds: int, *, own: bool
) -> list[Row]:
    """Return a row for each text: plain decoding and prompt lookup in turns, ratios within a round.

    Args:
        session: runs the model.
        trees: likewise, and was loaded with trees.
        texts: to be led along, and how long their prompts are.
        rounds: repeats, beside a first one that warms up.
        own: whether the texts are the model's own: then it must say them in all ways.
    """
    found, sessions = [], dict(zip(KINDS, (session, trees), strict=True))
    for name, (ids, prompt) in texts.items():
        tokens = len(ids) - prompt - 1
        times: dict[str, list[float]] = {kind: [] for kind in ("plain", *KINDS)}
        counts: dict[str, StepCounts] = {}

        def steps(kind: str, ids: Ids = ids, counts: dict[str, StepCounts] = counts) -> Steps:
            made = SpeculativeSteps(sessions[kind], PromptLookup(), len(ids) + 1)
            assert made.counts is not None  # of speculative steps
            counts[kind] = made.counts
            return made

        for each in sessions.values():
            each.step_costs = StepCosts()
        for _ in range(rounds + 1):
            for kind, taken in times.items():
                seconds, said = led(PlainSteps(session.claim) if kind == "plain" else steps(kind), ids, prompt)
                if own and name != NO_REPETITION and not np.array_equal(said, ids[prompt:]):
                    raise SystemExit(f"{name}: another text than without speculation, of {kind}")
                taken.append(1e3 * seconds / tokens)
        row: Row = {"text": name, "tokens": tokens, "plain_ms": statistics.median(times["plain"][1:])}
        for kind in sessions:
            ratios = [a / b for a, b in zip(times["plain"][1:], times[kind][1:], strict=True)]
            row[kind] = {
                "drafted": counts[kind].drafted,
                "accepted": counts[kind].accepted,
                "tokens_per_step": tokens / counts[kind].calls,
                "ms": statistics.median(times[kind][1:]),
                "speed": statistics.median(ratios),
                "speeds": ratios,
            }
        found.append(row)
    return found


def measured(session: Session, trees: Session, texts: dict[str, tuple[Ids, int]], rounds: int, *, own: bool) -> Row:
    """Return what calls cost by their width, and what speculation saves on each text."""
    return {
        "widths_ms": widths(session, 512, rounds),
        "widths_ms_with_trees": widths(trees, 512, rounds),
        "texts": speculation(session, trees, texts, rounds, own=own),
        "counted": counted(session.config, texts),
    }


def widths(session: Session, context: int, rounds: int) -> dict[int, float]:
    """Return the milliseconds of a call of each width at a context, medians of rounds."""
    rng, times = np.random.default_rng(1), {width: list[float]() for width in WIDTHS}
    session.reset()
    session.forward(rng.integers(0, session.config.vocab_size, (1, context)))
    for _ in range(rounds):
        for width in WIDTHS:
            ids = rng.integers(0, session.config.vocab_size, (1, width))
            for timed in (False, True):  # the first binds memory
                start = time.perf_counter()
                session.forward(ids, all_logits=True)
                if timed:
                    times[width].append(1e3 * (time.perf_counter() - start))
                session.truncate(context)
    return {width: statistics.median(each) for width, each in times.items()}


# --- the whole -------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Row:
    """Measure what was asked for."""
    words = [
        f"--{name.replace('_', '-')} {','.join(value) if name == 'models' else value}"
        for name in ("models", "new_tokens", "rounds", "backend", "threads", "layers", "calibrate")
        if (value := getattr(options, name)) is not None
    ]
    found: Row = {
        "command": " ".join(["python", f"benchmarks/{Path(__file__).name}", *words]),
        "machine": machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "threads": options.threads,
    }
    small = options.work / "smollm2-int4"
    if not small.exists():
        calibrate = {"calibrate": options.calibrate} if options.calibrate else {}
        gta_edge.export_model(options.model, small, precision="int4", verify=False, **calibrate)
    with loaded(small, options.backend, options.threads) as (session, trees):
        texts = answers(session, options.new_tokens)
        if "smollm2" in options.models:
            found["SmolLM2-135M"] = measured(session, trees, texts, options.rounds, own=session.device == "cpu")
    if "gta-1b" in options.models:
        large = make_bundles(options.work, "gta-1b", options.layers, ["int4"])["int4"]
        with loaded(large, options.backend, options.threads) as (session, trees):
            found["GTA-1B"] = measured(session, trees, texts, options.rounds, own=False)
    return found


@contextmanager
def loaded(bundle: Path, backend: str, threads: int | None) -> Iterator[tuple[Session, Session]]:
    """Load a bundle, without trees and with them."""
    with (
        gta_edge.load(bundle, backend, threads=threads) as session,
        gta_edge.load(bundle, backend, threads=threads, trees=True) as trees,
    ):
        yield session, trees


def markdown(found: Row) -> str:
    """Return the figures as tables."""
    lines = [f"{place(found)}.", ""]
    for label in ("SmolLM2-135M", "GTA-1B"):
        if label not in found:
            continue
        costs, with_trees = found[label]["widths_ms"], found[label]["widths_ms_with_trees"]
        lines += [f"{label}, int4", "", _row("tokens of a call", *costs), _rule(len(costs) + 1)]
        lines += [_row("ms", *(f"{ms:.1f}" for ms in costs.values()))]
        lines += [_row("ms, loaded with trees", *(f"{ms:.1f}" for ms in with_trees.values())), ""]
        names = "text", "guesses", "tokens a step", "drafted, accepted", "plain ms", "ms", "speed"
        lines += [_row(*names), _rule(len(names))]
        for each in found[label]["texts"]:
            for kind in KINDS:
                one = each[kind]
                guesses = f"{one['drafted']}, {one['accepted']} of {each['tokens']}"
                times = f"{each['plain_ms']:.1f}", f"{one['ms']:.1f}", f"{one['speed']:.2f}"
                lines.append(_row(each["text"], kind, f"{one['tokens_per_step']:.2f}", guesses, *times))
        names = "text", "each further token takes", "tokens a step: chains", "trees", "counted speed: chains", "trees"
        lines += ["", _row(*names), _rule(len(names))]
        for each in found[label]["counted"]:
            figures = [f"{each[kind][name]:.2f}" for name in ("tokens_per_step", "speed") for kind in KINDS]
            lines.append(_row(each["text"], f"{100 * each['slope']:.0f}%", *figures))
        lines.append("")
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def _of(*allowed: str) -> Callable[[str], Sequence[str]]:
    def parse(text: str) -> Sequence[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(allowed):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, with commas between")
        return chosen

    return parse


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="where models are kept")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2", help="the checkpoint of SmolLM2")
    parser.add_argument("--calibrate", choices=("none", "self"), default=None, help="as of export; self by default")
    parser.add_argument("--models", type=_of(*MODELS), default=MODELS)
    parser.add_argument("--new-tokens", type=positive, default=160, help="of each text")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--backend", choices=TREES, default="onnxruntime", help="those that hold trees of tokens")
    parser.add_argument("--threads", type=positive, default=None, help="one per core by default")
    parser.add_argument("--layers", type=positive, default=None, help="of GTA-1B, instead of its own")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    options = parser.parse_args()
    with errors_in_one_line():
        check_directories(options.json)
        found = run(options)
        print(markdown(found))
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
