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
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from comparison import (
    Comparison,
    Document,
    Run,
    add_outputs,
    compare,
    context_list,
    last_line,
    logged,
    machine,
    place,
    positive,
    ranged,
    say,
    spread,
)
from floor import table_bytes, token_bytes

import gta_edge
from gta_edge.errors import BackendError, InputError
from gta_edge.formats.bundle import MANIFEST, Bundle
from gta_edge.formats.random_checkpoint import initialise
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
COMPARISON = Comparison(
    {system.key: system.label for system in SYSTEMS},
    {
        "gta/peer": ("gta", "peer"),
        "gta/tuned": ("gta", "tuned"),
        "gta/gqa": ("gta", "gqa"),
        "gqa/tuned": ("gqa", "tuned"),
    },
)


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


# --- output ---------------------------------------------------------------------------------------------------------

_MODELS = "GQA-1B on onnxruntime-genai (genai) and on this package, and GTA-1B on this package."


def conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    options, rate = document["options"], document["bandwidth_bytes_per_s"]
    blocks = f" in blocks of {options['block_size']}" if options["block_size"] else ""
    own, peers = document["versions"], document["peer_versions"]
    versions = [f"{name} {number}" for name, number in own.items()]
    versions += [f"onnxruntime-genai {peers['onnxruntime-genai']}"]
    versions += [f"{name} {peers[name]} under it" for name in own if peers.get(name, own[name]) != own[name]]
    return (
        f"{_MODELS} Random weights in {options['precision']}{blocks}, {options['threads']} threads, medians of "
        f"{options['rounds']} rounds (smallest..largest). {place(document)}; {', '.join(versions)}. "
        f"Memory reads at {ranged(rate, 1, 1e-9)} GB/s."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> Document:
    """Make what is missing, measure, and return everything that was found."""
    block_size = arguments.block_size if arguments.precision == "int4" else None
    models = Models(arguments.work, arguments.precision, arguments.block_size, arguments.layers, arguments.fresh)
    _check_contexts(arguments, models)
    python, peer_versions = peer_python(arguments.peer_python, arguments.work)
    models.make_checkpoints()
    runs: dict[str, Run] = {}
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
        # -E keeps a PYTHONPATH that is meant for this interpreter out of the peer's
        runs[system.key] = Run(Path(sys.executable), spec) if ours else Run(python, spec, ("-E",))
        systems[system.key]["first_load"] = COMPARISON.first_load(system.key, runs[system.key])
    measured, rates = COMPARISON.rounds(arguments.contexts, arguments.rounds, runs)
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
        "summary": COMPARISON.summarise(measured, systems, rate["median"]),
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


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/cpu_peer"), help="where models are made and kept")
    parser.add_argument("--contexts", type=context_list, default=[128, 2048, 8192], help="tokens of the prompts")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens that are timed after each prompt")
    parser.add_argument("--rounds", type=positive, default=3, help="times that every system is measured")
    parser.add_argument("--precision", choices=["int4", "fp32"], default="int4", help="of the weights")
    parser.add_argument("--block-size", type=int, choices=[16, 32, 64, 128], default=32, help="for int4")
    parser.add_argument("--layers", type=positive, help="layers, instead of the models' own 54")
    # the same for all but the peer as it comes, which takes half of the cores
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="one per core")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has onnxruntime-genai and its builder")
    parser.add_argument("--fresh", action="store_true", help="make the models anew")
    add_outputs(parser)
    return parser.parse_args(words)


def main() -> None:
    """Measure, print, write what was asked for."""
    compare(COMPARISON, parse(), run, conditions)


if __name__ == "__main__":
    main()
