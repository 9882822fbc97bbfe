"""This package on a CPU beside llama.cpp, the strongest engine there, on the same weights, in one run, interleaved.

    make real-model
    python benchmarks/llama_cpp.py [CHECKPOINT] [--contexts 128,1024,4096] [--rounds 3] [--environment DIR] …

Our int4 is compared with llama.cpp's Q4_0 and our int8 with its Q8_0, which it quantizes itself from the same bf16
weights; both run with the same threads. llama.cpp is built from PyPI's ``llama-cpp-python`` for this machine, once, in
an environment of its own, and runs with its own defaults: prompts in batches of 512, cache in fp16. Ours is in float32,
and in int8. ``llama_cpp_quality.py`` compares what the same files predict.
"""

from __future__ import annotations

import argparse
import platform
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
    place,
    positive,
    ranged,
    say,
    spread,
)
from comparison import machine as this_machine
from floor import token_bytes
from llama_cpp_engine import FLAGS, LlamaCpp

import gta_edge
from gta_edge.errors import InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.support.cores import usable_cores

WORK = Path("build/llama_cpp")
CHECKPOINT = Path("build/smollm2")


@dataclass(frozen=True)
class System:
    """An engine with the same model; ``weights`` are our precision or a type of GGUF, ``cache`` the cache's type."""

    key: str
    label: str
    ours: bool
    weights: str
    cache: str


SYSTEMS = (
    System("q4_0", "llama.cpp Q4_0", False, "Q4_0", "fp16"),
    System("int4", "gta-edge int4", True, "int4", "fp32"),
    System("int4-int8", "gta-edge int4, int8 cache", True, "int4", "int8"),
    System("q8_0", "llama.cpp Q8_0", False, "Q8_0", "fp16"),
    System("int8", "gta-edge int8", True, "int8", "fp32"),
    System("int8-int8", "gta-edge int8, int8 cache", True, "int8", "int8"),
)
COMPARISON = Comparison(
    {system.key: system.label for system in SYSTEMS},
    {
        "int4/q4_0": ("int4", "q4_0"),
        "int4-int8/q4_0": ("int4-int8", "q4_0"),
        "int8/q8_0": ("int8", "q8_0"),
        "int8-int8/q8_0": ("int8-int8", "q8_0"),
    },
)


def run(arguments: argparse.Namespace) -> Document:
    """Make what is missing, measure, and return everything that was found."""
    checkpoint = Checkpoint.open(arguments.checkpoint)
    _check_contexts(arguments, checkpoint)
    peer = LlamaCpp.prepare(arguments.environment or arguments.work / "environment")
    runs: dict[str, Run] = {}
    systems: dict[str, Document] = {}
    for system in SYSTEMS:
        spec, systems[system.key] = _made(system, checkpoint, peer, arguments)
        spec |= {"new_tokens": arguments.new_tokens, "threads": arguments.threads}
        spec |= {"vocab_size": checkpoint.config.vocab_size}
        runs[system.key] = Run(Path(sys.executable), spec) if system.ours else Run(peer.python, spec, FLAGS)
        systems[system.key]["first_load"] = COMPARISON.first_load(system.key, runs[system.key])
    measured, rates = COMPARISON.rounds(arguments.contexts, arguments.rounds, runs)
    rate = spread([entry[when] for entry in rates for when in ("before", "after")])
    own = {"python": platform.python_version(), "gta-edge": gta_edge.__version__, "onnxruntime": version("onnxruntime")}
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": this_machine(),
        "versions": own,
        "peer_versions": peer.versions,
        "model": checkpoint.directory.name,
        "parameters": checkpoint.config.parameters,
        "options": {name: getattr(arguments, name) for name in ("threads", "new_tokens", "rounds")},
        "systems": systems,
        "bandwidth_bytes_per_s": rate | {"values": rates},
        "rounds": measured,
        "summary": COMPARISON.summarise(measured, systems, rate["median"]),
    }


def _made(
    system: System, checkpoint: Checkpoint, peer: LlamaCpp, arguments: argparse.Namespace
) -> tuple[Document, Document]:
    """Make a system's model; return its part of the worker's spec, and its bytes."""
    per_token = bytes_per_token(checkpoint.config, system.cache)
    if system.ours:
        path = arguments.work / f"{checkpoint.directory.resolve().name}-{system.weights}"
        if system.key == system.weights:  # the first of those with these weights
            say(f"{path}: is being made")  # always: an older one would be measured for the code of today
            # verify=False: the check takes longer than the export, and each precision has tests of its own
            options = {"precision": system.weights, "calibrate": "none"}  # which changes no time
            gta_edge.export_model(checkpoint.directory, path, **options, verify=False, force=True)
        read, engine = token_bytes(Bundle.open(path)), "ours"
    else:
        path = peer.model(checkpoint, system.weights, arguments.work, threads=arguments.threads, fresh=arguments.fresh)
        read, engine = path.stat().st_size, "llama.cpp"
    static = {"label": system.label, "token_bytes": read, "cache_bytes_per_token": per_token}
    spec = {"engine": engine, "model": str(path.resolve())} | ({"cache_dtype": system.cache} if system.ours else {})
    return spec, static


def _check_contexts(arguments: argparse.Namespace, checkpoint: Checkpoint) -> None:
    longest = max(arguments.contexts) + arguments.new_tokens + 1
    room = checkpoint.config.max_position_embeddings
    if longest > room:
        raise InputError(
            f"the longest context with its new tokens has {longest} positions and the model has {room}",
            "give shorter --contexts",
        )


def conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    options, rate = document["options"], document["bandwidth_bytes_per_s"]
    versions = [f"{name} {number}" for name, number in document["versions"].items()]
    versions += [f"llama-cpp-python {document['peer_versions']['llama-cpp-python']}"]
    return (
        f"{document['model']} ({document['parameters'] / 1e6:.0f}M parameters) on llama.cpp and on this package (ONNX "
        f"Runtime), {options['threads']} threads, medians of {options['rounds']} rounds (smallest..largest). "
        f"{place(document)}; {', '.join(versions)}. Memory reads at {ranged(rate, 1, 1e-9)} GB/s."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _command(arguments: argparse.Namespace) -> str:
    """Return the options that decide the figures, without this machine's paths."""
    words = [] if arguments.checkpoint == CHECKPOINT else [arguments.checkpoint.name]
    words += [f"--contexts {','.join(map(str, arguments.contexts))}"]
    words += [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in ("new_tokens", "rounds", "threads")]
    return " ".join([f"python benchmarks/{Path(__file__).name}", *words])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT, help=f"{CHECKPOINT} by default")
    parser.add_argument("--work", type=Path, default=WORK, help="where models are made and kept")
    parser.add_argument(
        "--environment", type=Path, metavar="DIR", help="that has llama.cpp, or will; in WORK by default"
    )
    parser.add_argument("--contexts", type=context_list, default=[128, 1024, 4096], help="tokens of the prompts")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens that are timed after each prompt")
    parser.add_argument("--rounds", type=positive, default=5, help="times that every system is measured")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="of every system; one per core")
    parser.add_argument("--fresh", action="store_true", help="make llama.cpp's files anew")
    add_outputs(parser)
    return parser.parse_args(words)


def main() -> None:
    """Measure, print, write what was asked for."""
    compare(COMPARISON, parse(), run, conditions)


if __name__ == "__main__":
    main()
