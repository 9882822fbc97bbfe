"""What was measured for the page on the paper: reports of ``bench`` read back, ratios of two models, verdicts.

A ratio is how many times as fast a GTA model is as a baseline. It is taken within a round, in which the models ran one
after another, and then the median over the rounds: what the machine does meanwhile hits both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gta_edge.errors import InputError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.presets import PRESETS, preset

Document = dict[str, Any]
Models = Mapping[str, Mapping[str, ModelConfig]]
"""Sizes, and the models of each by name."""

NEW_TOKENS_END_TO_END = 128
SIZES = ("160m", "500m", "1b")
LONGEST_SHORT = 2048
"""The longest context whose prompts are warmed up in full, and at which answers are compared."""
MARGIN = 0.03
"""How far a median must lie from a bound, as a part of it, to be told from it."""
_OF_A_ROW = (
    *("precision", "batch", "ttft_ms", "tpot_ms", "new_tokens", "spread", "rounds", "others_busy_cores"),
    *("cache_bytes_per_step", "peak_memory_bytes", "per_round", "agrees", "notes"),
)
_OF_A_BACKEND = ("precision", "device", "weight_bytes_per_step", "cache_bytes_per_token", "python", "versions")
_OF_A_MACHINE = (
    *("cpu", "architecture", "usable_cores", "memory_bytes", "board", "gpus", "warnings"),
    "bandwidth_bytes_per_s",
)


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


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that was measured of one size in one precision on one backend of one kind of device.

    Attributes:
        size: a key of ``Models``.
        precision: what the weights are stored in.
        backend: as ``bench`` was given it.
        device: ``cpu`` or ``gpu``.
        models: of this size.
        rows: by model and context.
        statics: what the report says of each model beside times.
        reports: all that this is from, oldest first.
    """

    size: str
    precision: str
    backend: str
    device: str
    models: Mapping[str, ModelConfig]
    rows: dict[tuple[str, int], Document] = field(default_factory=dict)
    statics: dict[str, Document] = field(default_factory=dict)
    reports: list[Document] = field(default_factory=list)

    @property
    def contexts(self) -> list[int]:
        """Those that were measured, ascending."""
        return sorted({context for _, context in self.rows})

    @property
    def label(self) -> str:
        """For headings."""
        return f"{self.size}, {self.precision}, {self.backend} on the {self.device.upper()}"


def read_report(path: Path) -> Document:
    """Return a report of ``bench``.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        known = set()
        for entry in report["backends"]:
            _ = [entry[key] for key in _OF_A_BACKEND]
            known.add((entry["bundle"], entry["backend"]))
        for row in report["results"]:
            _ = [row[key] for key in _OF_A_ROW], int(row["context"])
            if (row["bundle"], row["backend"]) not in known:
                raise ValueError(f"results of {row['bundle']}, of which nothing else is said")
        _ = [report["machine"][key] for key in _OF_A_MACHINE], report["date"], report["absent"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: is no report of a benchmark ({type(error).__name__}: {error}); remove it, and run without "
            "--page-only to measure anew"
        ) from error
    return dict(report)


def read_runs(directory: Path, models: Models) -> list[Run]:
    """Return what a directory's reports hold, in the order of the sizes; where two have a row, the later counts.

    Raises:
        InputError: a file is no report, or is of a model that is not among ``models``.
    """
    found: dict[tuple[str, str, str, str], Run] = {}
    reports = [(path, read_report(path)) for path in sorted(directory.glob("*.json"))]
    for path, report in sorted(reports, key=lambda item: item[1]["date"]):
        touched = {}
        devices = {(entry["bundle"], entry["backend"]): str(entry["device"]) for entry in report["backends"]}
        for entry in (*report["results"], *report["backends"]):
            model = model_of(str(entry["bundle"]))
            size = next((size for size, names in models.items() if model in names), None)
            if size is None:
                raise InputError(f"{path}: has figures of {model}, which is no model of the page; remove the file")
            device = devices[entry["bundle"], entry["backend"]]
            key = (size, str(entry["precision"]), str(entry["backend"]), device)
            run = found.setdefault(key, Run(*key, models[size]))
            touched[key] = run
            if "context" in entry:
                run.rows[model, int(entry["context"])] = entry | {"report": path.name}
            elif model not in run.statics or entry["cache_bytes_per_token"] is not None:
                run.statics[model] = entry
        for run in touched.values():
            run.reports.append(report)
    order = [*models]
    return sorted(found.values(), key=lambda run: (order.index(run.size), run.device, run.backend, run.precision))


def model_of(bundle: str) -> str:
    """Return the model of a bundle's directory ``NAME-LAYERS-PRECISION``."""
    return Path(bundle).name.rsplit("-", 2)[0]


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median of the rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.rounds < 2:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


PHASES = {"prefill": (1, 0), "decode": (0, 1), "end_to_end": (1, NEW_TOKENS_END_TO_END)}
"""How many times the time to the first token and that of a token after it each phase takes."""


def ratio(run: Run, gta: str, baseline: str, context: int, phase: str) -> Ratio | None:
    """Return how many times as fast the GTA model was, None where they were not measured in turns or one is wrong."""
    rows = run.rows.get((gta, context)), run.rows.get((baseline, context))
    if rows[0] is None or rows[1] is None or rows[0]["report"] != rows[1]["report"]:
        return None
    first, later = PHASES[phase]
    own, base = ([first * ttft + later * tpot for ttft, tpot in times(row)] for row in rows)
    values = [theirs / ours for ours, theirs in zip(own, base, strict=False)]  # one may have failed later
    return Ratio(statistics.median(values), min(values), max(values), len(values)) if values else None


def is_wrong(row: Document) -> bool:
    """Tell whether a model's answers were compared and found wrong: then its times mean nothing."""
    return row["agrees"] is False


def times(row: Document) -> list[tuple[float, float]]:
    """Return times to the first token and of a token, in ms, round by round; none of a wrong answer."""
    if row["tpot_ms"] is None or is_wrong(row):
        return []
    return list(zip(row["per_round"]["ttft_ms"], row["per_round"]["tpot_ms"], strict=True))


# --- verdicts --------------------------------------------------------------------------------------------------------


def state(found: Ratio, least: float) -> str:
    """Tell whether a ratio is above ``least`` (``yes``), below (``no``), or cannot be told from it (``open``).

    It is above or below if every round says so and the median is ``MARGIN`` away: rounds are few.
    """
    if found.low > least and found.median > least * (1 + MARGIN):
        return "yes"
    return "no" if found.high <= least and found.median < least * (1 - MARGIN) else "open"


def verdict(states: Mapping[int, str]) -> str:
    """Return in words where a claim holds, of what ``state`` says at each context."""
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
    found = {context: ratio(run, gta, baseline, context, phase) for context in run.contexts}
    return verdict({context: state(each, least) for context, each in found.items() if each is not None})
