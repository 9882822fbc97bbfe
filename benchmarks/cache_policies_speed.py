"""What cache policies save: time per token, prompts and memory at long contexts, beside a cache of every token.

    python benchmarks/cache_policies_speed.py [--whole] [--contexts 8192] [--rows 1024] [--rounds 1] [--json FILE] …

GTA-1B and GQA-1B with random weights in int4, on ONNX Runtime, in turns, each in a process of its own. Every prompt is
read in full, through the public session, since what it costs is part of the answer: without a policy one of 32,000
tokens takes a quarter of an hour with GQA. So by default it is GTA-1B with a ninth of its layers, at one context, with
ZSMerge beside every token: minutes. Layers are alike, so what a policy saves of them shows, and the head, which is
whole, hides some of it. ``--whole`` takes both models with all layers, all policies and two contexts: most of an hour
on two cores. Models are made once under the work directory.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparison import (
    Comparison,
    Document,
    Run,
    add_outputs,
    compare,
    context_list,
    machine,
    place,
    positive,
    ranged,
    spread,
    table,
)
from floor import token_bytes
from random_bundles import make_bundles

import gta_edge
from gta_edge.errors import InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.runtime.cache_policies import policy
from gta_edge.support.cores import usable_cores

PRESETS = {"gta-1b": "GTA-1B", "gqa-1b": "GQA-1B"}
POLICIES = {"none": "every token", "window": "window", "zsmerge": "ZSMerge"}


LAYERS = 54
SMALL: Document = {"contexts": [8192], "policies": ["none", "zsmerge"], "models": ["gta-1b"], "layers": LAYERS // 9}
WHOLE: Document = {"contexts": [8192, 32000], "policies": list(POLICIES), "models": list(PRESETS), "layers": LAYERS}


@dataclass(frozen=True)
class System:
    """A model with a policy.

    Attributes:
        preset: of the model.
        name: of ``POLICIES``.
    """

    preset: str
    name: str

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.preset}/{self.name}"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{PRESETS[self.preset]}, {POLICIES[self.name]}"


SYSTEMS = tuple(System(preset, name) for preset in PRESETS for name in POLICIES)


class Tables(Comparison):
    """Systems beside each other, a line each."""

    def markdown(self, rows: list[Document], conditions: str) -> str:
        cells = [self._line(row, key, figures) for row in rows for key, figures in row["systems"].items() if figures]
        return "\n\n".join([conditions, *([table(cells)] if cells else []), *self._failures(rows)]) + "\n"

    def show(self, rows: list[Document], conditions: str) -> None:
        print(self.markdown(rows, conditions), end="")

    def plot(self, rows: list[Document], path: Path) -> None:
        measured = {key: label for key, label in self.labels.items() if all(key in row["systems"] for row in rows)}
        Comparison(measured, {}).plot(rows, path)

    def _line(self, row: Document, key: str, figures: Document) -> dict[str, str]:
        ratios = row["ratios"].get(key)
        return {
            "context": f"{row['context']:,}",
            "model and cache": self.labels[key],
            "ms per token": ranged(figures["decode_ms"], 1),
            "longest token": ranged(figures["decode_max_ms"], 1),
            "prompt, tokens/s": ranged(figures["prefill_tokens_per_s"], 0),
            "peak GB": ranged(figures["peak_bytes"], 2, 1e-9),
            "tokens/s over every token's": ranged(ratios and ratios["decode"], 2),
            "prompt over every token's": ranged(ratios and ratios["prefill"], 2),
            "policy's share of a step": ranged(figures["policy_share"], 1, 100) + " %",
        }


COMPARISON = Tables(
    {system.key: system.label for system in SYSTEMS},
    {system.key: (system.key, f"{system.preset}/none") for system in SYSTEMS if system.name != "none"},
)


# --- measuring -------------------------------------------------------------------------------------------------------


def cache_options(system: System, rows: int) -> dict[str, Any] | None:
    """Return what the worker makes the policy of; None for a cache of every token."""
    return None if system.name == "none" else {"name": system.name, "rows": rows}


def static(bundle: Bundle, system: System, rows: int) -> Document:
    """Return the bytes that a token has to read, and those of the cache that grow with the context."""
    weights, cached = token_bytes(bundle), bytes_per_token(bundle.config)
    if system.name == "none":
        return {"token_bytes": weights, "cache_bytes_per_token": cached}
    return {"token_bytes": weights + rows * cached, "cache_bytes_per_token": 0}


def run(arguments: argparse.Namespace) -> Document:
    """Make what is missing, measure, and return everything that was found."""
    runs: dict[str, Run] = {}
    systems: dict[str, Document] = {}
    for system in SYSTEMS:
        if system.name not in arguments.policies or system.preset not in arguments.models:
            continue
        if system.name != "none":
            policy(system.name, rows=arguments.rows)  # refused now, and not after an hour
        path = make_bundles(arguments.work, system.preset, arguments.layers, ["int4"])["int4"]
        bundle = Bundle.open(path)
        _check(arguments, bundle)
        spec = {
            "engine": "ours",
            "model": str(path.resolve()),
            "threads": arguments.threads,
            "new_tokens": arguments.new_tokens,
            "vocab_size": bundle.config.vocab_size,
            "cache": cache_options(system, arguments.rows),
        }
        systems[system.key] = static(bundle, system, arguments.rows)
        runs[system.key] = Run(Path(sys.executable), spec)
        systems[system.key]["first_load"] = COMPARISON.first_load(system.key, runs[system.key])
    measured, rates = COMPARISON.rounds(arguments.contexts, arguments.rounds, runs)
    rate = spread([entry[when] for entry in rates for when in ("before", "after")])
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": _versions(),
        "options": {name: getattr(arguments, name) for name in ("rows", "rounds", "threads", "layers")},
        "systems": systems,
        "bandwidth_bytes_per_s": rate | {"values": rates},
        "rounds": measured,
        "summary": COMPARISON.summarise(measured, systems, rate["median"]),
    }


def _check(arguments: argparse.Namespace, bundle: Bundle) -> None:
    longest = max(arguments.contexts) + arguments.new_tokens + 1
    room = bundle.config.max_position_embeddings
    if longest > room:
        raise InputError(f"the longest context with its new tokens has {longest} positions; the models have {room}")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "gta-edge": gta_edge.__version__,
        "onnxruntime": version("onnxruntime"),
    }


def conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    options = document["options"]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"Random weights in int4, {options['layers']} of {LAYERS} layers, on ONNX Runtime, {options['threads']} "
        f"threads; policies keep {options['rows']} rows of each layer. Medians of {options['rounds']} rounds "
        f"(smallest..largest). {place(document)}; {versions}. "
        f"Memory reads at {ranged(document['bandwidth_bytes_per_s'], 1, 1e-9)} GB/s."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _command(arguments: argparse.Namespace) -> str:
    """Return the options that decide the figures, without this machine's paths."""
    defaults, words = parse(["--whole"] * arguments.whole), ["--whole"] * arguments.whole
    for name in ("contexts", "rows", "new_tokens", "rounds", "policies", "models", "layers", "threads"):
        value = getattr(arguments, name)
        if value != getattr(defaults, name):
            words.append(
                f"--{name.replace('_', '-')} {','.join(map(str, value)) if isinstance(value, list) else value}"
            )
    return " ".join(["python", f"benchmarks/{Path(__file__).name}", *words])


def _chosen(known: Mapping[str, str]) -> Any:
    def parse_names(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= known.keys():
            raise argparse.ArgumentTypeError(f"{text!r} are none of {', '.join(known)}")
        return names

    return parse_names


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/cache_policies"), help="where models are kept")
    parser.add_argument("--whole", action="store_true", help="all models, layers, policies, and two contexts")
    parser.add_argument("--contexts", type=context_list, help="tokens of the prompts; 8192")
    parser.add_argument("--rows", type=positive, default=1024, help="of each layer, that policies keep")
    parser.add_argument("--new-tokens", type=positive, default=128, help="tokens timed after each prompt")
    parser.add_argument("--rounds", type=positive, default=1, help="times that every system is measured")
    parser.add_argument("--policies", type=_chosen(POLICIES), help=f"of {', '.join(POLICIES)}; none,zsmerge")
    parser.add_argument("--models", type=_chosen(PRESETS), help=f"of {', '.join(PRESETS)}; gta-1b")
    parser.add_argument("--layers", type=positive, help=f"of the models' {LAYERS}; {LAYERS // 9}")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="one per core")
    add_outputs(parser)
    arguments = parser.parse_args(words)
    for name, value in (WHOLE if arguments.whole else SMALL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Measure, print, write what was asked for."""
    compare(COMPARISON, parse(), run, conditions)


if __name__ == "__main__":
    main()
