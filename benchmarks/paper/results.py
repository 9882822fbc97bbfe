"""What was measured for the page on the paper: one file in ``results/`` for each size, precision and backend.

A ratio is how many times as fast a GTA model is as a baseline. It is taken within a round, in which the models ran one
after another, and then the median over the rounds: what the machine does meanwhile hits both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gta_edge.errors import InputError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.support.files import new_file

Document = dict[str, Any]
Models = Mapping[str, Mapping[str, ModelConfig]]
"""Sizes, and the models of each by name."""

RESULTS = Path(__file__).with_name("results")
NEW_TOKENS_END_TO_END = 128
SIZES = ("160m", "500m", "1b")
LONGEST_SHORT = 2048
"""The longest context whose prompts are warmed up in full, and at which answers are compared."""
PHASES = {"prefill": (1, 0), "decode": (0, 1), "end_to_end": (1, NEW_TOKENS_END_TO_END)}
"""How many times the time to the first token and that of a token after it each phase takes."""
EXTENTS = ("rounds", "new_tokens", "spread_ttft", "spread_tpot", "others_busy_cores", "bandwidth_gb_per_s")
"""What is kept of all rows of a call together; a spread is (largest - smallest) / median of the rounds."""
MARGIN = 0.03
"""How far a median must lie from a bound, as a part of it, to be told from it."""


# --- models ----------------------------------------------------------------------------------------------------------


def published_models() -> Models:
    """Return the paper's models and their baselines by size."""
    return {size: {name: preset(name) for name in PRESETS if name.endswith(f"-{size}")} for size in SIZES}


def kind(config: ModelConfig) -> str:
    """Return ``GTA``, ``GQA`` or ``MHA``."""
    if isinstance(config, GTAConfig):
        return "GTA"
    assert isinstance(config, GQAConfig)
    return "MHA" if config.num_key_value_heads == config.num_attention_heads else "GQA"


def pairs(models: Mapping[str, ModelConfig], *baselines: str) -> list[tuple[str, str]]:
    """Return each GTA model of a size with each baseline of these kinds, GQA first; all kinds by default."""
    wanted = baselines or ("GQA", "MHA")
    own = [name for name, config in models.items() if kind(config) == "GTA"]
    return [(g, b) for g in own for label in wanted for b, config in models.items() if kind(config) == label]


# --- what a file holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a model's bundle and session say of it, beside times.

    Attributes:
        weight_bytes_per_step: that a token reads, as the backend holds them.
        cache_bytes_per_token: of the session's buffers; None where nothing was measured.
        flops_per_pair: of all layers, counted in the graph, for a new token and a cached one.
        flops_per_token: of all layers beside that.
    """

    weight_bytes_per_step: int
    cache_bytes_per_token: int | None
    flops_per_pair: int
    flops_per_token: int


@dataclass(frozen=True)
class Times:
    """Medians of one model at one context; without figures where there is a problem.

    Attributes:
        peak_memory_gb: of the process, in 10⁹ bytes.
        problem: why nothing was measured, or why it means nothing.
    """

    model: str
    context: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    peak_memory_gb: float | None = None
    problem: str | None = None


class Ratio(NamedTuple):
    """How many times as fast: the median of the rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    def state(self, least: float) -> str:
        """Tell whether a ratio is above ``least`` (``yes``), below (``no``), or cannot be told from it (``open``).

        It is above or below if every round says so and the median is ``MARGIN`` away: rounds are few.
        """
        if self.low > least and self.median > least * (1 + MARGIN):
            return "yes"
        return "no" if self.high <= least and self.median < least * (1 - MARGIN) else "open"


@dataclass(frozen=True)
class Pair:
    """The ratios of two models at one context: a field for each of ``PHASES``."""

    gta: str
    baseline: str
    context: int
    rounds: int
    prefill: Ratio
    decode: Ratio
    end_to_end: Ratio


@dataclass(frozen=True)
class Part:
    """One call of ``bench``, in which the models of a size took turns.

    Attributes:
        versions: of Python and of the packages that the backend is made of.
        warnings: of the machine.
        absent: what was asked for and could not be opened, and why.
        extents: the lowest and the highest of each of ``EXTENTS``; None where nothing was measured.
    """

    command: str
    date: str
    machine: str
    versions: Mapping[str, str]
    warnings: Sequence[str]
    absent: Sequence[str]
    extents: Mapping[str, tuple[float, float] | None]
    times: Sequence[Times]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Run:
    """All that was measured of one size in one precision on one backend: one file.

    Attributes:
        note: what is to be known of the figures.
        facts: by model.
    """

    size: str
    precision: str
    backend: str
    device: str
    note: str | None
    facts: Mapping[str, Facts]
    parts: Sequence[Part]

    @property
    def file(self) -> str:
        """The name of the file."""
        return file_name(self.size, self.precision, self.backend)

    @property
    def place(self) -> str:
        """How and where the models ran."""
        return f"{self.precision}, {self.backend} on the {self.device.upper()}"

    @property
    def label(self) -> str:
        """For headings."""
        return f"{self.size}, {self.place}"

    @property
    def times(self) -> dict[tuple[str, int], Times]:
        """By model and context."""
        return {(each.model, each.context): each for part in self.parts for each in part.times}

    @property
    def contexts(self) -> list[int]:
        """Those that were measured, ascending."""
        return sorted({context for _, context in self.times})

    def pair(self, gta: str, baseline: str) -> dict[int, Pair]:
        """Return the ratios of two models by context."""
        found = [each for part in self.parts for each in part.pairs if (each.gta, each.baseline) == (gta, baseline)]
        return {each.context: each for each in sorted(found, key=lambda each: each.context)}


def file_name(size: str, precision: str, backend: str) -> str:
    """Return what the file of a run is called."""
    return f"{size}-{precision}-{backend}.json"


# --- reading and writing ---------------------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """Return what a file holds.

    Raises:
        InputError: it cannot be read, or is no such file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        facts = {name: Facts(**entry) for name, entry in document.pop("facts").items()}
        run = Run(**document | {"facts": facts, "parts": [_part(dict(entry)) for entry in document.pop("parts")]})
        assert run.file == path.name, f"holds what belongs into {run.file}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        raise InputError(
            f"{path}: is no file of results ({type(error).__name__}: {error})", "remove it, and measure anew"
        ) from error
    return run


def _part(entry: Document) -> Part:
    times = [Times(**row) for row in entry.pop("times")]
    pairs = [Pair(**row | {phase: Ratio(*row[phase]) for phase in PHASES}) for row in entry.pop("pairs")]
    extents = {name: entry["extents"][name] for name in EXTENTS}
    return Part(**entry | {"extents": extents, "times": times, "pairs": pairs})


def read_runs(directory: Path, models: Models) -> list[Run]:
    """Return what a directory's files hold, in the order of the sizes.

    Raises:
        InputError: a file is damaged, or is of a model that is not among ``models``.
    """
    runs = [read_run(path) for path in sorted(directory.glob("*.json"))]
    for run in runs:
        for name in {*run.facts, *(model for model, _ in run.times)}:
            if name not in models.get(run.size, {}) or name not in run.facts:
                path = directory / run.file
                raise InputError(f"{path}: has {name}, which is no model of the page", "remove the file")
    order = [*models]
    return sorted(runs, key=lambda run: (order.index(run.size), run.device, run.backend, run.precision))


def write_run(path: Path, run: Run) -> None:
    """Write a file, a model at a context and a pair at a context to the line; it is complete or not there.

    Raises:
        OutputError: it cannot be written.
    """
    document = asdict(run)
    for part in document["parts"]:
        part["times"] = [{key: value for key, value in row.items() if value is not None} for row in part["times"]]
    with new_file(path, force=True) as partial:
        partial.write_text(_text(document) + "\n", encoding="utf-8")


def _text(value: Any, depth: int = 0) -> str:
    """Return JSON in which what lies deep stands in one line."""
    if not isinstance(value, dict | list) or depth > 3:
        return json.dumps(value)
    named = isinstance(value, dict)
    items = [
        (f"{json.dumps(each)}: " if named else "") + _text(value[each] if named else each, depth + 1) for each in value
    ]
    indent = "\n" + " " * (depth + 1)
    body = indent + ("," + indent).join(items) + indent[:-1] if items else ""
    return f"{{{body}}}" if named else f"[{body}]"


# --- verdicts --------------------------------------------------------------------------------------------------------


def verdict(states: Mapping[int, str]) -> str:
    """Return in words where a claim holds, of what ``Ratio.state`` says at each context."""
    words = {"yes": "yes", "no": "no", "open": "too close to tell"}
    spans: list[list[int]] = []
    contexts = sorted(states)
    for before, context in zip([None, *contexts], contexts, strict=False):
        if before is not None and states[before] == states[context]:
            spans[-1].append(context)
        else:
            spans.append([context])
    if len(spans) <= 1:
        return words[states[spans[0][0]]] if spans else "not measured"
    return "; ".join(f"{words[states[span[0]]]} {_span(span, contexts)}" for span in spans)


def _span(span: Sequence[int], contexts: Sequence[int]) -> str:
    """Name neighbouring contexts among all that there are."""
    if span[-1] == contexts[-1]:
        return f"from {span[0]:,}"
    if span[0] == contexts[0]:
        return f"up to {span[-1]:,}"
    return f"at {span[0]:,}" if len(span) == 1 else f"from {span[0]:,} to {span[-1]:,}"


def judge(run: Run, gta: str, baseline: str, phase: str, least: float) -> str:
    """Return in words where the GTA model is more than ``least`` times as fast."""
    found = run.pair(gta, baseline)
    return verdict({context: getattr(each, phase).state(least) for context, each in found.items()})
