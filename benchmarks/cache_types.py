"""What storing the KV cache in another type costs on a CPU: perplexity, bytes per token, and speed.

    python benchmarks/cache_types.py [CHECKPOINT] [--backend torch] [--caches int4,…] [--length 1024] [--windows 16] …
    python benchmarks/cache_types.py --speed gta-1b,gqa-1b [--contexts 128,2048,8192] [--rounds 3] …

Perplexity is of a text that was not calibrated for, in windows that begin with an empty cache. ``onnxruntime`` runs it
in exact arithmetic and reads each type of the cache twice: the window as a prompt, which dequantises the cache, and
token by token, which multiplies by its codes. ``torch`` has every type, in float32 on the CPU, and it is the same there
either way. Windows are paired with the same windows on the float32 cache, so that the standard error of the rise is
that of the difference. Without arguments it is the example model.

Speed is of random weights in int4, measured in turns, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.console
import rich.table
import texts
from comparison import (
    Comparison,
    Document,
    Run,
    check_directories,
    context_list,
    errors_in_one_line,
    place,
    positive,
    ranged,
    say,
    spread,
    write_outputs,
)
from comparison import machine as this_machine
from floor import token_bytes
from random_bundles import make_bundles

import gta_edge
from gta_edge.errors import InputError
from gta_edge.evaluate.perplexity import negative_log_likelihood
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.rotated_checkpoint import RotatedCheckpoint
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import gqa_like, preset
from gta_edge.numerics.dtypes import QUANTIZED_CACHE_TYPES
from gta_edge.runtime.session import Session
from gta_edge.support.cores import usable_cores
from gta_edge.support.text_files import read_text

EXAMPLES = Path(__file__).parents[1] / "examples"
WORK = Path("build/cache_types")
BACKEND = "onnxruntime"
PACKAGES = {"onnxruntime": ("onnxruntime", "numpy"), "torch": ("torch", "numpy")}
CACHE_TYPES = ("fp32", "int8")
PRECISION = "int4"
_LOGITS = 2**26  # values of logits at a time

Ids = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]


# --- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A cache: its type, whether values were rotated, and whether it is read token by token, if that matters."""

    cache_dtype: str
    rotated: bool
    by_token: bool | None = None

    @property
    def label(self) -> str:
        """What the table calls it."""
        read = {None: "", True: ", read token by token", False: ", read as a prompt"}[self.by_token]
        return f"{self.cache_dtype}{', values rotated' if self.rotated else ''}{read}"


VARIANTS = {
    "onnxruntime": (
        Variant("fp32", rotated=False, by_token=False),
        *(Variant("int8", rotated, by_token) for rotated in (False, True) for by_token in (False, True)),
    ),
    "torch": (
        Variant("fp32", rotated=False),
        *(Variant(name, rotated) for name in QUANTIZED_CACHE_TYPES for rotated in (False, True)),
    ),
}
"""What each backend is asked for; the first is what the others are compared with."""


def losses(session: Session, windows: Ids, *, by_token: bool | None, rows: int) -> Losses:
    """Return the mean loss of each window [N, L], its first token given."""
    found: list[float] = []
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        total = np.zeros(len(part))
        session.reset()
        step = 1 if by_token else max(1, min(session.chunk_size, _LOGITS // (rows * session.config.vocab_size)))
        for at in range(0, part.shape[1] - 1, step):
            end = min(at + step, part.shape[1] - 1)
            logits = session.forward(part[:, at:end], all_logits=True)
            for row, ids in enumerate(part):
                total[row] += negative_log_likelihood(logits[row], ids[at + 1 : end + 1])
        found += list(total / (part.shape[1] - 1))
        say(f"  {len(found)} of {len(windows)} windows")
    return np.array(found)


def quality(arguments: argparse.Namespace) -> Document:
    """Measure every variant and return what was found."""
    source = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(source.directory)
    if tokenizer is None:
        raise InputError(f"{source.directory} has no tokenizer to read a text with; take a checkpoint that has one")
    windows = _windows(tokenizer, arguments)
    base, *others = VARIANTS[arguments.backend]
    variants = [base, *(each for each in others if each.cache_dtype in (arguments.caches or QUANTIZED_CACHE_TYPES))]
    measured: dict[Variant, Losses] = {}
    for rotated in sorted({variant.rotated for variant in variants}):
        chosen = [variant for variant in variants if variant.rotated == rotated]
        for variant, session in SESSIONS[arguments.backend](source, rotated, chosen, arguments.threads):
            with session:
                measured[variant] = losses(session, windows, by_token=variant.by_token, rows=arguments.rows)
            cells = _row(variant, measured[variant], measured[base], source)
            say(f"{variant.label}: perplexity {cells['perplexity']:.4f}, {_rise(cells)}")
    rows = [_row(variant, measured[variant], measured[base], source) for variant in variants]
    return _document(arguments) | {
        "model": source.directory.resolve().name,
        "parameters": source.config.parameters,
        "windows": len(windows),
        "length": windows.shape[1],
        "variants": rows,
    }


def _exported(
    source: Checkpoint, rotated: bool, variants: Sequence[Variant], threads: int
) -> Iterator[tuple[Variant, Session]]:
    """Yield sessions of ONNX Runtime over a bundle of the checkpoint."""
    with tempfile.TemporaryDirectory(prefix="gta-edge-cache-types-") as name:
        bundle = Path(name) / "bundle"
        # verify=False: it takes longer than the export, and perplexity finds damage too
        gta_edge.export_model(source.directory, bundle, verify=False, rotate_values=rotated)
        for variant in variants:
            options: dict[str, Any] = {"exact": True, "cache_dtype": variant.cache_dtype}
            yield variant, gta_edge.load(bundle, BACKEND, threads=threads, **options)


def _in_torch(
    source: Checkpoint, rotated: bool, variants: Sequence[Variant], threads: int
) -> Iterator[tuple[Variant, Session]]:
    """Yield sessions of PyTorch over the checkpoint itself."""
    from gta_edge.accuracy.reference import build_decoder
    from gta_edge.runtime.torch.session import TorchSession

    checkpoint = RotatedCheckpoint.of(source) if rotated else source
    for variant in variants:
        model = build_decoder(checkpoint.config, ((name, checkpoint.read(name)) for name in checkpoint.names))
        yield variant, TorchSession(model, cache_dtype=variant.cache_dtype, threads=threads)


SESSIONS = {"onnxruntime": _exported, "torch": _in_torch}


def _windows(tokenizer: Tokenizer, arguments: argparse.Namespace) -> Ids:
    """Return windows of a text, spread evenly over it."""
    text = read_text(arguments.text) if arguments.text else {"code": texts.code, "prose": texts.prose}[arguments.kind]()
    ids = np.asarray(tokenizer.encode(text), np.int64)
    length, count = arguments.length, min(arguments.windows, len(ids) // arguments.length)
    if not count:
        raise InputError(f"the text has {len(ids)} tokens, and a window {length}", "give a longer text or --length")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def _row(variant: Variant, found: Losses, base: Losses, source: Checkpoint) -> Document:
    """Return a variant's figures; the rise of perplexity is paired, window by window."""
    difference = found - base
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    rise = math.exp(float(difference.mean()))
    size, half = (bytes_per_token(source.config, dtype) for dtype in (variant.cache_dtype, "fp16"))
    grouped = bytes_per_token(gqa_like(source.config) or source.config, "fp16")
    return {
        "label": variant.label,
        "cache_dtype": variant.cache_dtype,
        "rotated": variant.rotated,
        "by_token": variant.by_token,
        "perplexity": math.exp(float(found.mean())),
        "rise_percent": 100 * (rise - 1),
        "standard_error_percent": 100 * rise * error,
        "bytes_per_token": size,
        "of_fp16": size / half,
        "of_gqa_fp16": size / grouped,
    }


def _quality_cells(document: Document) -> Iterator[list[str]]:
    yield ["cache", "bytes per token", "of fp16", "of GQA in fp16", "perplexity", "rise"]
    for row in document["variants"]:
        shares = (f"{row[name]:.0%}" for name in ("of_fp16", "of_gqa_fp16"))
        cells = [f"{row['bytes_per_token']:,}", *shares, f"{row['perplexity']:.4f}"]
        yield [row["label"], *cells, "" if row["cache_dtype"] == "fp32" else _rise(row)]


def _rise(row: Document) -> str:
    return f"{row['rise_percent']:+.2f}% ± {row['standard_error_percent']:.2f}"


def _quality_conditions(document: Document) -> str:
    return (
        f"{document['model']} ({document['parameters'] / 1e6:.1f}M parameters), {document['windows']} windows of "
        f"{document['length']} tokens, exact arithmetic; ± is the standard error over windows. {_where(document)}."
    )


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> tuple[Comparison, Document]:
    """Measure each model with each type of the cache, in turns."""
    labels, ratios, runs, systems = {}, {}, {}, {}
    for name in arguments.speed:
        config = preset(name)
        path = make_bundles(arguments.work, name, arguments.layers, [PRECISION])[PRECISION]
        bundle = Bundle.open(path)
        for cache_dtype in CACHE_TYPES:
            key = f"{name}-{cache_dtype}"
            labels[key] = f"{name} {PRECISION}, {cache_dtype} cache"
            static = {"label": labels[key], "token_bytes": token_bytes(bundle)}
            systems[key] = static | {"cache_bytes_per_token": bytes_per_token(bundle.config, cache_dtype)}
            spec = {"engine": "ours", "model": str(path.resolve()), "cache_dtype": cache_dtype}
            spec |= {"new_tokens": arguments.new_tokens, "threads": arguments.threads, "vocab_size": config.vocab_size}
            runs[key] = Run(Path(sys.executable), spec)
        ratios[name] = (f"{name}-int8", f"{name}-fp32")
    comparison = Comparison(labels, ratios)
    for key, run in runs.items():
        systems[key]["first_load"] = comparison.first_load(key, run)
    measured, rates = comparison.rounds(arguments.contexts, arguments.rounds, runs)
    rate = spread([entry[when] for entry in rates for when in ("before", "after")])
    return comparison, _document(arguments) | {
        "options": {name: getattr(arguments, name) for name in ("threads", "new_tokens", "rounds", "layers")},
        "systems": systems,
        "bandwidth_bytes_per_s": rate | {"values": rates},
        "rounds": measured,
        "summary": comparison.summarise(measured, systems, rate["median"]),
    }


def _speed_conditions(document: Document) -> str:
    options, rate = document["options"], document["bandwidth_bytes_per_s"]
    return (
        f"Random weights in {PRECISION}, {options['threads']} threads, medians of {options['rounds']} rounds "
        f"(smallest..largest). {_where(document)}. Memory reads at {ranged(rate, 1, 1e-9)} GB/s."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _document(arguments: argparse.Namespace) -> Document:
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": this_machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES[arguments.backend]},
    }


def _where(document: Document) -> str:
    return f"{place(document)}; {', '.join(f'{name} {number}' for name, number in document['versions'].items())}"


def _command(arguments: argparse.Namespace) -> str:
    """Return the options that decide the figures, without this machine's paths."""
    words = ["python", f"benchmarks/{Path(__file__).name}"]
    if arguments.speed:
        words += ["--speed", ",".join(arguments.speed), "--contexts", ",".join(map(str, arguments.contexts))]
        words += ["--new-tokens", f"{arguments.new_tokens}", "--rounds", f"{arguments.rounds}"]
        words += ["--layers", f"{arguments.layers}"] if arguments.layers else []
        return " ".join([*words, "--threads", f"{arguments.threads}"])
    words += [] if arguments.checkpoint == _DEFAULT else [arguments.checkpoint.name]
    words += [] if arguments.backend == BACKEND else ["--backend", arguments.backend]
    words += ["--caches", ",".join(arguments.caches)] if arguments.caches else []
    words += ["--text", arguments.text.name] if arguments.text else ["--kind", arguments.kind]
    return " ".join([*words, "--length", f"{arguments.length}", "--windows", f"{arguments.windows}"])


_DEFAULT = EXAMPLES / "tiny-gta"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=_DEFAULT, help="the example model by default")
    parser.add_argument("--backend", choices=tuple(VARIANTS), default=BACKEND, help="torch has every type of cache")
    parser.add_argument("--caches", type=_names, default=[], metavar="A,B", help="types to measure; all by default")
    parser.add_argument("--kind", choices=("code", "prose"), default="code", help="the text, of this Python")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text instead")
    parser.add_argument("--length", type=positive, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=positive, default=16, help="windows, spread over the text")
    parser.add_argument("--rows", type=positive, default=8, help="windows at a time")
    parser.add_argument("--speed", type=_names, default=[], metavar="A,B", help="measure the speed of presets instead")
    parser.add_argument("--contexts", type=context_list, default=[128, 2048, 8192], help="tokens of the prompts")
    parser.add_argument("--layers", type=positive, help="instead of the presets' own")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens that are timed after each prompt")
    parser.add_argument("--rounds", type=positive, default=3, help="times that every case is measured")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="one per core by default")
    parser.add_argument("--work", type=Path, default=WORK, help="where models for --speed are made and kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables for the documentation")
    return parser.parse_args(words)


def main() -> None:
    """Measure, print, write what was asked for."""
    arguments = parse()
    with errors_in_one_line():
        check_directories(arguments.json, arguments.markdown)
        if arguments.speed:
            arguments.work.mkdir(parents=True, exist_ok=True)
            comparison, document = speed(arguments)
            comparison.show(document["summary"], _speed_conditions(document))
            write_outputs(arguments, document, comparison.markdown(document["summary"], _speed_conditions(document)))
            return
        document = quality(arguments)
        heads, *rows = _quality_cells(document)
        table = rich.table.Table(*heads, box=None)
        for row in rows:
            table.add_row(*row)
        console = rich.console.Console(width=max(100, rich.console.Console().width), markup=False, highlight=False)
        console.print(_quality_conditions(document))
        console.print(table)
        lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
        write_outputs(arguments, document, "\n".join([_quality_conditions(document), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
