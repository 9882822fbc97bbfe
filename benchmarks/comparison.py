"""Systems measured beside each other: in turns, each run in a process of its own, and divided within a round.

What the comparisons with other engines share: ``cpu_peer.py`` and ``llama_cpp.py`` say what they compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from floor import bandwidth, floor_ms

from gta_edge.cli.plot import colors, context_axis, new_figure, save
from gta_edge.errors import BackendError, GtaEdgeError, OutputError
from gta_edge.libraries.install import install_command
from gta_edge.support.cores import usable_cores

METRICS = (
    "load_s",
    "prefill_tokens_per_s",
    "decode_ms",
    "decode_p90_ms",
    "decode_max_ms",
    "decode_tokens_per_s",
    "peak_bytes",
    "end_bytes",
    "growth_bytes",
    "policy_share",
)
RATIO_METRICS = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s", "memory": "peak_bytes"}
MISSING = "n/a"

WORKER = Path(__file__).with_name("cpu_peer_worker.py")

Document = dict[str, Any]
Runner = Callable[[argparse.Namespace], Document]
Describer = Callable[[Document], str]


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def logged(command: list[str], log: Path, what: str, **variables: str) -> None:
    """Run a command with its output in a log; where it fails, the error has the log's last lines."""
    with log.open("w", encoding="utf-8") as file:
        # everything it needs is here, and nothing is told to anybody
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"} | variables
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if result.returncode:
        last = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        status = f"{what} failed with status {result.returncode}"
        raise BackendError(f"{status} ({' | '.join(last[-3:])}); its output is in {log}")


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How one system is measured.

    Attributes:
        python: interpreter that has its engine.
        flags: of that interpreter.
        spec: what ``cpu_peer_worker.measure`` takes, without the context.
    """

    python: Path
    spec: Document
    flags: tuple[str, ...] = ()

    def measure(self, **changes: int) -> tuple[Document | None, str | None]:
        """Measure in a process of its own; return the figures, or None with the reason why there are none."""
        command = [str(self.python), *self.flags, str(WORKER), json.dumps(self.spec | changes)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            figures: Document = json.loads(last_line(result.stdout))
            return figures, None
        if result.returncode < 0:
            hint = ", probably for lack of memory" if result.returncode == -signal.SIGKILL else ""
            return None, f"ended by {signal.Signals(-result.returncode).name}{hint}"
        return None, last_line(result.stderr)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ranged(values: dict[str, float] | None, digits: int, unit: float = 1.0) -> str:
    """Write a spread, times ``unit``, as median (smallest..largest)."""
    if values is None:
        return MISSING
    middle, least, most = (f"{unit * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least}..{most})"


@dataclass(frozen=True)
class Comparison:
    """Systems by their keys, and what is divided by what.

    Attributes:
        labels: what the tables call each system.
        ratios: pairs of keys; of speeds, so that 2 is twice as fast, and of peak memory, so that 0.5 is half.
    """

    labels: Mapping[str, str]
    ratios: Mapping[str, tuple[str, str]]

    def first_load(self, key: str, run: Run) -> Document:
        """Load a model before it is measured: what an engine keeps for later is made now. Return seconds and bytes."""
        figures, reason = run.measure(context=16, new_tokens=2)
        if figures is None:
            say(f"{self.labels[key]}: first load failed: {reason}")
            return {"load_s": None, "peak_bytes": None, "reason": reason}
        say(f"{self.labels[key]}: first load {figures['load_s']:.1f} s, {figures['peak_bytes'] / 1e9:.2f} GB")
        return {"load_s": figures["load_s"], "peak_bytes": figures["peak_bytes"], "reason": None}

    def rounds(
        self, contexts: list[int], rounds: int, runs: Mapping[str, Run]
    ) -> tuple[list[Document], list[Document]]:
        """Measure every system in turn, for each context and round; return what each gave, and bandwidths between."""
        measured, rates = [], []
        total, done = len(contexts) * rounds * len(runs), 0
        for context in contexts:
            for i in range(1, rounds + 1):
                before = bandwidth()
                for key, run in runs.items():
                    done += 1
                    figures, reason = run.measure(context=context)
                    measured.append(
                        {"context": context, "round": i, "system": key, "figures": figures, "reason": reason}
                    )
                    say(f"[{done}/{total}] context {context}, round {i}: {self.labels[key]}: {_brief(figures, reason)}")
                rates.append({"context": context, "round": i, "before": before, "after": bandwidth()})
        return measured, rates

    # --- summary -----------------------------------------------------------------------------------------------------

    def summarise(
        self, measured: list[Document], systems: Mapping[str, Document], bytes_per_s: float
    ) -> list[Document]:
        """Return for each context the systems' figures over the rounds, their floors, and their ratios.

        Args:
            measured: as ``rounds`` returns it.
            systems: ``token_bytes`` and ``cache_bytes_per_token`` of each system.
            bytes_per_s: read bandwidth.

        Returns:
            a document for each context; a system that failed in every round has None, with the reason under
            ``reasons``.
        """
        contexts = list(dict.fromkeys(entry["context"] for entry in measured))
        return [
            self._summary_of(
                [entry for entry in measured if entry["context"] == context], context, systems, bytes_per_s
            )
            for context in contexts
        ]

    def _summary_of(
        self, entries: list[Document], context: int, systems: Mapping[str, Document], bytes_per_s: float
    ) -> Document:
        figures: dict[str, Document | None] = {}
        for key, static in systems.items():
            ran = [entry["figures"] for entry in entries if entry["system"] == key and entry["figures"]]
            least = floor_ms(static["token_bytes"], context * static["cache_bytes_per_token"], bytes_per_s)
            figures[key] = _over_rounds(ran, least) if ran else None
        return {
            "context": context,
            "systems": figures,
            "ratios": {name: _ratios(entries, *pair) for name, pair in self.ratios.items()},
            "reasons": {entry["system"]: entry["reason"] for entry in entries if entry["reason"]},
        }

    # --- output ------------------------------------------------------------------------------------------------------

    def show(self, rows: list[Document], conditions: str) -> None:
        """Print the summary as tables."""
        width = max(120, shutil.get_terminal_size().columns)
        console = rich.console.Console(width=width, markup=False, highlight=False)
        console.print(conditions)
        table = rich.table.Table("context", "system", *_SHOWN, box=None)
        ratios = rich.table.Table("context", "ratio of", "tokens/s", "prefill tokens/s", "peak memory", box=None)
        for row in rows:
            context = f"{row['context']}"
            for key, figures in row["systems"].items():
                table.add_row(context, self.labels[key], *(_shown_cells(figures) if figures else ["failed"]))
            for name, values in row["ratios"].items():
                cells = (ranged(values and values[one], 2) for one in RATIO_METRICS)
                ratios.add_row(context, self._ratio_label(name), *cells)
        for part in (table, ratios, *self._failures(rows)):
            console.print(part)

    def markdown(self, rows: list[Document], conditions: str) -> str:
        """Return the summary as tables for a page of the documentation, with what they were measured on."""
        parts = [conditions, table([self._figure_cells(row) for row in rows])]
        parts.append(table([self._comparison_cells(row) for row in rows]))
        return "\n\n".join([*parts, *self._failures(rows)]) + "\n"

    def plot(self, rows: list[Document], path: Path) -> None:
        """Draw time per token and peak memory against context, a line for each system."""
        figure, axes = new_figure(2)
        lines = colors(self.labels.values())
        panels = (("ms per token", "decode_ms", 1.0), ("peak memory, GB", "peak_bytes", 1e-9))
        for axis, (title, metric, unit) in zip(axes, panels, strict=True):
            for key, label in self.labels.items():
                points = [(row["context"], row["systems"][key][metric]) for row in rows if row["systems"][key]]
                middle = [unit * values["median"] for _, values in points]
                errors = [
                    [unit * abs(values[end] - values["median"]) for _, values in points] for end in ("min", "max")
                ]
                contexts = [context for context, _ in points]
                axis.errorbar(contexts, middle, errors, color=lines[label], label=label, marker="o", capsize=3)
            context_axis(axis, [row["context"] for row in rows], title)
        axes[0].legend()
        save(figure, path, force=True)

    def _failures(self, rows: list[Document]) -> list[str]:
        return [
            f"{self.labels[key]} failed at {row['context']}: {reason}"
            for row in rows
            for key, reason in row["reasons"].items()
        ]

    def _figure_cells(self, row: Document) -> dict[str, str]:
        """Return the cells of one context by their headings: times, speed and memory of every system."""
        cells = {"context": f"{row['context']}"}
        for heading, metric, unit, digits in (
            ("ms per token", "decode_ms", 1.0, 1),
            ("prefill tokens/s", "prefill_tokens_per_s", 1.0, 0),
            ("peak GB", "peak_bytes", 1e-9, 2),
        ):
            for key, figures in row["systems"].items():
                cells[f"{heading}, {self.labels[key]}"] = ranged(figures and figures[metric], digits, unit)
        return cells

    def _comparison_cells(self, row: Document) -> dict[str, str]:
        """Return the cells of one context by their headings: ratios, and how near each system is to its floor."""
        cells = {"context": f"{row['context']}"}
        for metric, heading in (("decode", "tokens/s"), ("prefill", "prefill tokens/s"), ("memory", "peak memory")):
            for name, ratios in row["ratios"].items():
                cells[f"{heading}, {self._ratio_label(name)}"] = ranged(ratios and ratios[metric], 2)
        for key, figures in row["systems"].items():
            cells[f"floor / measured, {self.labels[key]}"] = f"{figures['floor_fraction']:.2f}" if figures else MISSING
        return cells

    def _ratio_label(self, name: str) -> str:
        """Say what is divided by what."""
        return " / ".join(self.labels[key] for key in self.ratios[name])


def _brief(figures: Document | None, reason: str | None) -> str:
    if figures is None:
        return f"failed: {reason}"
    return (
        f"{figures['decode_ms']:.1f} ms per token, prefill {figures['prefill_tokens_per_s']:.0f} tokens/s, "
        f"{figures['peak_bytes'] / 1e9:.2f} GB"
    )


def _over_rounds(ran: list[Document], least_ms: float) -> Document:
    spreads = {metric: spread([figures[metric] for figures in ran]) for metric in METRICS}
    return {**spreads, "floor_ms": least_ms, "floor_fraction": least_ms / spreads["decode_ms"]["median"]}


def _ratios(entries: list[Document], over: str, under: str) -> Document | None:
    """Divide within a round, where the machine was the same to both, and only then take the median."""
    rounds: dict[int, dict[str, Document]] = {}
    for entry in entries:
        if entry["figures"]:
            rounds.setdefault(entry["round"], {})[entry["system"]] = entry["figures"]
    pairs = [(figures[over], figures[under]) for figures in rounds.values() if {over, under} <= figures.keys()]
    if not pairs:
        return None
    return {name: spread([a[metric] / b[metric] for a, b in pairs]) for name, metric in RATIO_METRICS.items()}


_SHOWN = ("ms/token", "p90", "longest", "of floor", "prefill/s", "load s", "peak GB", "at end", "grew MiB")


def _shown_cells(figures: Document) -> list[str]:
    middle = {metric: figures[metric]["median"] for metric in METRICS}
    return [
        ranged(figures["decode_ms"], 1),
        f"{middle['decode_p90_ms']:.1f}",
        f"{middle['decode_max_ms']:.1f}",
        f"{figures['floor_fraction']:.2f}",
        f"{middle['prefill_tokens_per_s']:.0f}",
        f"{middle['load_s']:.1f}",
        f"{middle['peak_bytes'] / 1e9:.2f}",
        f"{middle['end_bytes'] / 1e9:.2f}",
        f"{middle['growth_bytes'] / 2**20:.0f}",
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Return rows of the same headings as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- the machine -----------------------------------------------------------------------------------------------------


def machine() -> Document:
    """Return what the figures depend on beside the software."""
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": int((_proc("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024,
        "os": f"{_distribution()}, Linux {platform.release()}",
    }


def place(document: Document) -> str:
    """Say with which command, on which machine, when."""
    where = document["machine"]
    return (
        f"`{document['command']}` on {where['cpu']}, {where['cores']} cores, "
        f"{where['memory_bytes'] / 2**30:.0f} GiB, {where['os']}, {document['date'][:10]}"
    )


def _proc(path: str, name: str) -> str | None:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, None)


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


# --- the command line ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def context_list(text: str) -> list[int]:
    """Read whole numbers with commas between; return them in order, each once."""
    return sorted({positive(part) for part in text.split(",")})


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that write what was found."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables for the documentation")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and memory against context")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before the long run what would fail after it."""
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise BackendError(f"--plot needs matplotlib: {install_command('plot')}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    check_directories(arguments.json, arguments.markdown, arguments.plot)


def check_directories(*outputs: Path | None) -> None:
    """Find out before the long run that a result could not be written.

    Raises:
        OutputError: the directory of one does not exist.
    """
    for path in outputs:
        if path and not path.resolve().parent.is_dir():
            raise OutputError(f"{path}: its directory does not exist", "make it, or choose another output path")


def write_outputs(arguments: argparse.Namespace, document: Document, markdown: str) -> None:
    """Write what was asked for of the figures and of the page."""
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown, encoding="utf-8")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End with what a user can do something about in one line, and silently on Ctrl-C."""
    try:
        yield
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def compare(comparison: Comparison, arguments: argparse.Namespace, run: Runner, conditions: Describer) -> None:
    """Measure, print, write what was asked for."""
    with errors_in_one_line():
        check_outputs(arguments)
        document = run(arguments)
        summary, said = document["summary"], conditions(document)
        comparison.show(summary, said)
        write_outputs(arguments, document, comparison.markdown(summary, said))
        if arguments.plot:
            comparison.plot(summary, arguments.plot)
