"""This package on a CPU beside onnxruntime-genai, the strongest peer there: speed and memory, in one run, interleaved.

    python benchmarks/cpu_peer.py [--contexts 128,2048,8192] [--new-tokens 32] [--rounds 3] [--json FILE] …

Two gains are seen apart: GQA-1B on onnxruntime-genai and here (the engine), GQA-1B and GTA-1B here (the architecture).
The peer is measured as it comes, and tuned: built for the logits of the last position only, prompts in chunks, a thread
for every core; as it comes it takes half of the cores and computes logits for the whole prompt. Weights are random,
since speed does not depend on what a model has learned. The peer runs in an environment of its own, which is made under
the work directory unless ``--peer-python`` names one.
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
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from floor import bandwidth, floor_ms, table_bytes, token_bytes

import gta_edge
from gta_edge.cli.plot import colors, context_axis, new_figure, save
from gta_edge.errors import BackendError, GtaEdgeError, InputError, OutputError
from gta_edge.formats.bundle import MANIFEST, Bundle
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.libraries.install import install_command
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import preset
from gta_edge.support.cores import usable_cores

TORCH = ("torch==2.13.0",)
PEER_PACKAGES = ("onnxruntime-genai==0.18.0", "transformers", "onnx", "onnx-ir", "sentencepiece")

PEER_OPTIONS = ("hf_token=false",)
TUNED_OPTIONS = ("prune_lm_head=true",)  # logits of the last position only
PEER_INT4_OPTIONS = ("accuracy_level=4",)  # int8 activations
TUNED_CHUNK_SIZE = 512

WORKER = Path(__file__).with_name("cpu_peer_worker.py")


@dataclass(frozen=True)
class System:
    """An engine (``ours`` or ``peer``) with a model."""

    key: str
    label: str
    engine: str
    preset: str
    tuned: bool = True


SYSTEMS = (
    System("peer", "genai GQA", "peer", "gqa-1b", tuned=False),
    System("tuned", "genai GQA tuned", "peer", "gqa-1b"),
    System("gta", "gta-edge GTA", "ours", "gta-1b"),
    System("gqa", "gta-edge GQA", "ours", "gqa-1b"),
)
LABELS = {system.key: system.label for system in SYSTEMS}

RATIOS = {
    "gta/peer": ("gta", "peer"),
    "gta/tuned": ("gta", "tuned"),
    "gta/gqa": ("gta", "gqa"),
    "gqa/tuned": ("gqa", "tuned"),
}
"""What is divided by what; of speeds, so that 2 is twice as fast, and of peak memory, so that 0.5 is half."""

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
)
MISSING = "n/a"
RATIO_METRICS = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s", "memory": "peak_bytes"}

Document = dict[str, Any]


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The models to measure, made or found in the work directory."""

    work: Path
    precision: str
    block_size: int
    layers: int | None
    fresh: bool

    def config(self, system: System) -> ModelConfig:
        """Return the sizes of a system's model."""
        config = preset(system.preset)
        return config if self.layers is None else config.replace(num_hidden_layers=self.layers)

    def checkpoint(self, system: System) -> Path:
        """Return where the checkpoint lies: random weights in bf16."""
        return self.work / (system.preset + ("" if self.layers is None else f"-{self.layers}-layers"))

    def make_checkpoints(self) -> None:
        """Make what is missing; two systems share a checkpoint."""
        for path, config in {self.checkpoint(system): self.config(system) for system in SYSTEMS}.items():
            if not self._have(path, "config.json"):
                initialise(config, path, force=True)

    def bundle(self, system: System) -> Path:
        """Return our bundle of a checkpoint."""
        checkpoint = self.checkpoint(system)
        path = self._stored(checkpoint, "bundle")
        if not self._have(path, MANIFEST):
            block: Document = {"block_size": self.block_size} if self.precision == "int4" else {}
            # verify=False: the check takes longer than the export, and each precision has tests with smaller models
            gta_edge.export_model(checkpoint, path, precision=self.precision, verify=False, force=True, **block)
        return path

    def peer(self, system: System, python: Path) -> Path:
        """Return the peer's model of a checkpoint, made by its own builder."""
        checkpoint = self.checkpoint(system)
        path = self._stored(checkpoint, "genai-tuned" if system.tuned else "genai")
        if not self._have(path, "genai_config.json"):
            partial = path.with_name(f"{path.name}.partial")
            for left in (partial, path):
                shutil.rmtree(left, ignore_errors=True)
            options = [*PEER_OPTIONS, *(TUNED_OPTIONS if system.tuned else ())]
            if self.precision == "int4":
                options += [*PEER_INT4_OPTIONS, f"block_size={self.block_size}"]
            command = [str(python), "-E", "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
            command += ["-o", str(partial), "-p", self.precision, "-e", "cpu", "-c", str(self.work / "peer-cache")]
            logged([*command, "--extra_options", *options], path.with_suffix(".log"), "the peer's model builder")
            partial.rename(path)
        return path

    def _stored(self, checkpoint: Path, kind: str) -> Path:
        block = f"-{self.block_size}" if self.precision == "int4" else ""
        return checkpoint.with_name(f"{checkpoint.name}-{self.precision}{block}-{kind}")

    def _have(self, path: Path, proof: str) -> bool:
        have = (path / proof).exists() and not self.fresh
        say(f"{path}: {'reused' if have else 'is being made'}")
        return have


def logged(command: list[str], log: Path, what: str) -> None:
    """Run a command with its output in a log; where it fails, the error has the log's last lines."""
    with log.open("w", encoding="utf-8") as file:
        # everything it needs lies in the checkpoint, and nothing is told to anybody
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if result.returncode:
        last = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        status = f"{what} failed with status {result.returncode}"
        raise BackendError(f"{status} ({' | '.join(last[-3:])}); its output is in {log}")


def peer_python(given: Path | None, work: Path) -> tuple[Path, dict[str, str]]:
    """Return an interpreter that has the peer, installed now if none is given and none was before, and its versions."""
    python = given or work / "peer-env" / "bin" / "python"
    versions, reason = _peer_versions(python)
    if versions is None and given is not None:
        raise BackendError(f"{given} cannot import the peer ({reason}); without --peer-python it will be installed")
    if versions is None:
        _install(python, work)
        versions, reason = _peer_versions(python)
    if versions is None:
        raise BackendError(f"the peer was installed and cannot be imported ({reason}); remove {work / 'peer-env'}")
    return python, versions


def _install(python: Path, work: Path) -> None:
    environment, log = work / "peer-env", work / "peer-env.log"
    say(f"{environment}: is being made, with {', '.join(TORCH + PEER_PACKAGES)}; progress is in {log}")
    logged([sys.executable, "-m", "venv", "--clear", str(environment)], log, "making an environment for the peer")
    # torch first, so that what depends on it takes it as it is
    for packages in (TORCH, PEER_PACKAGES):
        logged([str(python), "-m", "pip", "install", *packages], log, f"pip install {' '.join(packages)}")


def _peer_versions(python: Path) -> tuple[dict[str, str] | None, str]:
    program = (
        "import json, platform, onnx, onnx_ir, onnxruntime_genai, torch, transformers\n"
        "from importlib.metadata import version\n"
        "names = 'onnxruntime-genai', 'onnxruntime', 'torch', 'transformers'\n"
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in names}))"
    )
    try:
        silent = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [str(python), "-E", "-c", program], env=silent, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return None, str(error.strerror)
    if result.returncode:
        return None, last_line(result.stderr)
    versions: dict[str, str] = json.loads(last_line(result.stdout))
    return versions, ""


# --- measuring -------------------------------------------------------------------------------------------------------


def run_worker(python: Path, spec: Document) -> tuple[Document | None, str | None]:
    """Measure in a process of its own; return the figures, or None with the reason why there are none."""
    # -E keeps a PYTHONPATH that is meant for this interpreter out of the peer's
    flags = ["-E"] if spec["engine"] == "peer" else []
    command = [str(python), *flags, str(WORKER), json.dumps(spec)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        figures: Document = json.loads(last_line(result.stdout))
        return figures, None
    if result.returncode < 0:
        hint = ", probably for lack of memory" if result.returncode == -signal.SIGKILL else ""
        return None, f"ended by {signal.Signals(-result.returncode).name}{hint}"
    return None, last_line(result.stderr)


def first_load(system: System, python: Path, spec: Document) -> Document:
    """Load a model once before it is measured: what an engine keeps for later is made now. Return seconds and bytes."""
    figures, reason = run_worker(python, spec | {"context": 16, "new_tokens": 2})
    if figures is None:
        say(f"{system.label}: first load failed: {reason}")
        return {"load_s": None, "peak_bytes": None, "reason": reason}
    say(f"{system.label}: first load {figures['load_s']:.1f} s, {figures['peak_bytes'] / 1e9:.2f} GB")
    return {"load_s": figures["load_s"], "peak_bytes": figures["peak_bytes"], "reason": None}


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def run_rounds(
    contexts: list[int], rounds: int, specs: dict[str, tuple[Path, Document]]
) -> tuple[list[Document], list[Document]]:
    """Measure every system in turn, for each context and round; return what each gave, and the bandwidths between."""
    measured, rates = [], []
    total, done = len(contexts) * rounds * len(specs), 0
    for context in contexts:
        for i in range(1, rounds + 1):
            before = bandwidth()
            for key, (python, spec) in specs.items():
                done += 1
                figures, reason = run_worker(python, spec | {"context": context})
                measured.append({"context": context, "round": i, "system": key, "figures": figures, "reason": reason})
                say(f"[{done}/{total}] context {context}, round {i}: {LABELS[key]}: {_brief(figures, reason)}")
            rates.append({"context": context, "round": i, "before": before, "after": bandwidth()})
    return measured, rates


def _brief(figures: Document | None, reason: str | None) -> str:
    if figures is None:
        return f"failed: {reason}"
    return (
        f"{figures['decode_ms']:.1f} ms per token, prefill {figures['prefill_tokens_per_s']:.0f} tokens/s, "
        f"{figures['peak_bytes'] / 1e9:.2f} GB"
    )


# --- summary ---------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measured: list[Document], systems: dict[str, Document], bytes_per_s: float) -> list[Document]:
    """Return for each context the systems' figures over the rounds, their floors, and their ratios.

    Args:
        measured: as ``run_rounds`` returns it.
        systems: ``token_bytes`` and ``cache_bytes_per_token`` of each system.
        bytes_per_s: read bandwidth.

    Returns:
        a document for each context; a system that failed in every round has None, with the reason under ``reasons``.
    """
    contexts = list(dict.fromkeys(entry["context"] for entry in measured))
    return [
        _summary_of([entry for entry in measured if entry["context"] == context], context, systems, bytes_per_s)
        for context in contexts
    ]


def _summary_of(entries: list[Document], context: int, systems: dict[str, Document], bytes_per_s: float) -> Document:
    figures: dict[str, Document | None] = {}
    for key, static in systems.items():
        ran = [entry["figures"] for entry in entries if entry["system"] == key and entry["figures"]]
        least = floor_ms(static["token_bytes"], context * static["cache_bytes_per_token"], bytes_per_s)
        figures[key] = _over_rounds(ran, least) if ran else None
    return {
        "context": context,
        "systems": figures,
        "ratios": {name: _ratios(entries, *pair) for name, pair in RATIOS.items()},
        "reasons": {entry["system"]: entry["reason"] for entry in entries if entry["reason"]},
    }


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


# --- the machine -----------------------------------------------------------------------------------------------------


def machine() -> Document:
    """Return what the figures depend on beside the software."""
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": int((_proc("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024,
        "os": f"{_distribution()}, Linux {platform.release()}",
    }


def _proc(path: str, name: str) -> str | None:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, None)


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


# --- output ----------------------------------------------------------------------------------------------------------


def show(document: Document) -> None:
    """Print the summary as tables."""
    width = max(120, shutil.get_terminal_size().columns)
    console = rich.console.Console(width=width, markup=False, highlight=False)
    console.print(_conditions(document))
    table = rich.table.Table("context", "system", *_SHOWN, box=None)
    ratios = rich.table.Table("context", "ratio of", "tokens/s", "prefill tokens/s", "peak memory", box=None)
    for row in document["summary"]:
        context = f"{row['context']}"
        for key, figures in row["systems"].items():
            table.add_row(context, LABELS[key], *(_shown_cells(figures) if figures else ["failed"]))
        for name, values in row["ratios"].items():
            ratios.add_row(context, ratio_label(name), *(ranged(values and values[one], 2) for one in RATIO_METRICS))
    for part in (table, ratios, *_failures(document)):
        console.print(part)


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


def _failures(document: Document) -> list[str]:
    return [
        f"{LABELS[key]} failed at {row['context']}: {reason}"
        for row in document["summary"]
        for key, reason in row["reasons"].items()
    ]


def markdown(document: Document) -> str:
    """Return the summary as tables for a page of the documentation, with what they were measured on."""
    rows = document["summary"]
    parts = [_conditions(document), _table([_figure_cells(row) for row in rows])]
    parts.append(_table([_comparison_cells(row) for row in rows]))
    return "\n\n".join([*parts, *_failures(document)]) + "\n"


def _figure_cells(row: Document) -> dict[str, str]:
    """Return the cells of one context by their headings: times, speed and memory of every system."""
    cells = {"context": f"{row['context']}"}
    for heading, metric, unit, digits in (
        ("ms per token", "decode_ms", 1.0, 1),
        ("prefill tokens/s", "prefill_tokens_per_s", 1.0, 0),
        ("peak GB", "peak_bytes", 1e-9, 2),
    ):
        for key, figures in row["systems"].items():
            cells[f"{heading}, {LABELS[key]}"] = ranged(figures and figures[metric], digits, unit)
    return cells


def _comparison_cells(row: Document) -> dict[str, str]:
    """Return the cells of one context by their headings: ratios, and how near each system is to its floor."""
    cells = {"context": f"{row['context']}"}
    for metric, heading in (("decode", "tokens/s"), ("prefill", "prefill tokens/s"), ("memory", "peak memory")):
        for name, ratios in row["ratios"].items():
            cells[f"{heading}, {ratio_label(name)}"] = ranged(ratios and ratios[metric], 2)
    for key, figures in row["systems"].items():
        cells[f"floor / measured, {LABELS[key]}"] = f"{figures['floor_fraction']:.2f}" if figures else MISSING
    return cells


def ranged(values: dict[str, float] | None, digits: int, unit: float = 1.0) -> str:
    """Write a spread, times ``unit``, as median (smallest..largest)."""
    if values is None:
        return MISSING
    middle, least, most = (f"{unit * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least}..{most})"


def ratio_label(name: str) -> str:
    """Say what is divided by what."""
    return " / ".join(LABELS[key] for key in RATIOS[name])


def _table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_MODELS = "GQA-1B on onnxruntime-genai (genai) and on this package, and GTA-1B on this package."


def _conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    options, place, rate = document["options"], document["machine"], document["bandwidth_bytes_per_s"]
    blocks = f" in blocks of {options['block_size']}" if options["block_size"] else ""
    own, peers = document["versions"], document["peer_versions"]
    versions = [f"{name} {number}" for name, number in own.items()]
    versions += [f"onnxruntime-genai {peers['onnxruntime-genai']}"]
    versions += [f"{name} {peers[name]} under it" for name in own if peers.get(name, own[name]) != own[name]]
    return (
        f"{_MODELS} Random weights in {options['precision']}{blocks}, {options['threads']} threads, medians of "
        f"{options['rounds']} rounds (smallest..largest). `{document['command']}` on {place['cpu']}, "
        f"{place['cores']} cores, {place['memory_bytes'] / 2**30:.0f} GiB, {place['os']}, {document['date'][:10]}; "
        f"{', '.join(versions)}. Memory reads at {ranged(rate, 1, 1e-9)} GB/s."
    )


def plot(document: Document, path: Path) -> None:
    """Draw time per token and peak memory against context, a line for each system."""
    figure, axes = new_figure(2)
    lines = colors(LABELS.values())
    panels = (("ms per token", "decode_ms", 1.0), ("peak memory, GB", "peak_bytes", 1e-9))
    for axis, (title, metric, unit) in zip(axes, panels, strict=True):
        for key, label in LABELS.items():
            rows = [(row["context"], row["systems"][key][metric]) for row in document["summary"] if row["systems"][key]]
            middle = [unit * values["median"] for _, values in rows]
            errors = [[unit * abs(values[end] - values["median"]) for _, values in rows] for end in ("min", "max")]
            contexts = [context for context, _ in rows]
            axis.errorbar(contexts, middle, errors, color=lines[label], label=label, marker="o", capsize=3)
        context_axis(axis, [row["context"] for row in document["summary"]], title)
    axes[0].legend()
    save(figure, path, force=True)


# --- the command -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> Document:
    """Make what is missing, measure, and return everything that was found."""
    block_size = arguments.block_size if arguments.precision == "int4" else None
    models = Models(arguments.work, arguments.precision, arguments.block_size, arguments.layers, arguments.fresh)
    _check_contexts(arguments, models)
    python, peer_versions = peer_python(arguments.peer_python, arguments.work)
    models.make_checkpoints()
    specs: dict[str, tuple[Path, Document]] = {}
    systems: dict[str, Document] = {}
    for system in SYSTEMS:
        config, ours = models.config(system), system.engine == "ours"
        path = models.bundle(system) if ours else models.peer(system, python)
        # the peer reads its one table of embedding and head as a whole
        read = token_bytes(Bundle.open(path)) if ours else _data_bytes(path) - table_bytes(config)
        systems[system.key] = {
            "label": system.label,
            "model": system.preset,
            "parameters": config.parameters,
            "token_bytes": read,
            "cache_bytes_per_token": bytes_per_token(config),
        }
        spec = {"engine": system.engine, "model": str(path.resolve()), "new_tokens": arguments.new_tokens}
        spec |= {"vocab_size": config.vocab_size}
        spec |= {"threads": arguments.threads, "chunk_size": TUNED_CHUNK_SIZE} if system.tuned else {}
        specs[system.key] = (Path(sys.executable) if ours else python, spec)
        systems[system.key]["first_load"] = first_load(system, *specs[system.key])
    measured, rates = run_rounds(arguments.contexts, arguments.rounds, specs)
    rate = spread([entry[when] for entry in rates for when in ("before", "after")])
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": _versions(),
        "peer_versions": peer_versions,
        "options": {
            "precision": arguments.precision,
            "block_size": block_size,
            "layers": arguments.layers,
            "threads": arguments.threads,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "peer_builder": [*PEER_OPTIONS, *(PEER_INT4_OPTIONS if block_size else ())],
            "tuned_builder": [*TUNED_OPTIONS],
            "tuned_chunk_size": TUNED_CHUNK_SIZE,
        },
        "systems": systems,
        "bandwidth_bytes_per_s": rate | {"values": rates},
        "rounds": measured,
        "summary": summarise(measured, systems, rate["median"]),
    }


def _check_contexts(arguments: argparse.Namespace, models: Models) -> None:
    longest = max(arguments.contexts) + arguments.new_tokens + 1
    room = models.config(SYSTEMS[0]).max_position_embeddings
    if longest > room:
        raise InputError(f"the longest context with its new tokens has {longest} positions; the models have {room}")


def _data_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.onnx.data"))


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "gta-edge": gta_edge.__version__}
    return own | {"onnxruntime": version("onnxruntime")}


def _command(arguments: argparse.Namespace) -> str:
    """Return the options that decide the figures, without this machine's paths."""
    names = ("contexts", "new_tokens", "rounds", "precision", "block_size", "layers", "threads")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.precision != "int4":
        given["block_size"] = None
    given["contexts"] = ",".join(map(str, arguments.contexts))
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None]
    return f"python benchmarks/{Path(__file__).name} {' '.join(words)}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _contexts(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peer"), help="where models are made and kept")
    parser.add_argument("--contexts", type=_contexts, default=[128, 2048, 8192], help="tokens of the prompts")
    parser.add_argument("--new-tokens", type=_positive, default=32, help="tokens that are timed after each prompt")
    parser.add_argument("--rounds", type=_positive, default=3, help="times that every system is measured")
    parser.add_argument("--precision", choices=["int4", "fp32"], default="int4", help="of the weights")
    parser.add_argument("--block-size", type=int, choices=[16, 32, 64, 128], default=32, help="for int4")
    parser.add_argument("--layers", type=_positive, help="layers, instead of the models' own 54")
    # the same for all but the peer as it comes, which takes half of the cores
    parser.add_argument("--threads", type=_positive, default=usable_cores(), help="one per core")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has onnxruntime-genai and its builder")
    parser.add_argument("--fresh", action="store_true", help="make the models anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables for the documentation")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and memory against context")
    return parser.parse_args(words)


def _prepare_outputs(arguments: argparse.Namespace) -> None:
    """Find out before the long run what would fail after it."""
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise BackendError(f"--plot needs matplotlib: {install_command('plot')}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    for path in (arguments.json, arguments.markdown, arguments.plot):
        if path and not path.resolve().parent.is_dir():
            raise OutputError(f"{path}: its directory does not exist")


def main() -> None:
    """Measure, print, write what was asked for."""
    arguments = parse()
    try:
        _prepare_outputs(arguments)
        document = run(arguments)
        show(document)
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if arguments.markdown:
            arguments.markdown.write_text(markdown(document), encoding="utf-8")
        if arguments.plot:
            plot(document, arguments.plot)
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
