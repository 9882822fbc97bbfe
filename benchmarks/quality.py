"""What each way to store weights costs: bytes, and perplexity on a text that the model has not seen.

    python benchmarks/quality.py [CHECKPOINT] [--text FILE] [--calibrate FILE] [--tokens N] [--json FILE] …

Each bundle goes through ``export`` and is evaluated as ``gta-edge eval`` does, on ONNX Runtime. With int8 and int4
weights that rounds activations to int8 too, so they are evaluated a second time in exact arithmetic: the difference
is what rounding activations costs. Without arguments it is the example model, and the text that it was not trained on.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import rich.console
import rich.table
import texts
from comparison import check_directories, errors_in_one_line, machine, say, write_outputs

import gta_edge
from gta_edge.errors import InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import COLUMNS, EMBEDDING
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, DEFAULT_BLOCK_SIZE
from gta_edge.runtime.generation.incremental_decoder import Tokenizer
from gta_edge.support.progress import Progress
from gta_edge.support.text_files import read_text

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKEND = "onnxruntime"
BASE = "fp32"
TABLES = ("cos", "sin")
PACKAGES = ("torch", "onnxruntime", "numpy")
SECONDS_BETWEEN_LINES = 30.0

Document = dict[str, Any]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """A way to store weights."""

    precision: str
    block_size: int | None = None
    calibrated: bool = False
    embedding_precision: str | None = None
    mixed: float | None = None

    @property
    def label(self) -> str:
        """What the table calls it."""
        default = DEFAULT_BLOCK_SIZE if self.precision == "int4" else None
        blocks = f", blocks of {self.block_size or default}" if self.block_size or default else ""
        table = f", embedding in {self.embedding_precision}" if self.embedding_precision else ""
        more = f", {self.mixed:g}% in int8" if self.mixed else ""
        return f"{self.precision}{blocks}{table}{', calibrated' if self.calibrated else ''}{more}"


def variants(config: ModelConfig) -> list[Variant]:
    """Return what there is for a model: block sizes must divide the inputs of every matrix."""
    inputs = [shape[1] for shape in config.parameter_shapes().values() if len(shape) == 2]
    possible = [size for size in BLOCK_SIZES if not any(n % size for n in inputs)]
    with_default = [DEFAULT_BLOCK_SIZE] if DEFAULT_BLOCK_SIZE in possible else []
    return [
        *map(Variant, (BASE, "fp16", "bf16", "int8")),
        *(Variant("int8", size) for size in with_default),
        *(Variant("int4", size) for size in possible),
        *(Variant("int4", size, embedding_precision="int4") for size in with_default),
        *(Variant("int4", size, calibrated=True) for size in with_default),
        *(Variant("int4", size, calibrated=True, mixed=20) for size in with_default),
    ]


def lines() -> Progress:
    """Return a reporter that prints a line now and then."""
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"  {what}: {100 * done // max(1, total)}%")

    return report


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(checkpoint: Path, variant: Variant, ids: Ids, calibration: Path, directory: Path) -> Document:
    """Export one variant and evaluate it, twice where its default arithmetic rounds activations."""
    started = time.perf_counter()
    exported = gta_edge.export_model(
        checkpoint,
        directory,
        precision=variant.precision,
        block_size=variant.block_size,
        embedding_precision=variant.embedding_precision,
        mixed=variant.mixed,
        calibrate=calibration if variant.calibrated else "none",
        verify=False,  # takes longer than the export, and perplexity finds damage too
        progress=lines(),
    )
    export_s = time.perf_counter() - started
    weight_bytes = stored_bytes(exported.bundle)
    figures: Document = {
        "label": variant.label,
        "precision": variant.precision,
        "block_size": exported.bundle.block_size,
        "calibrated": variant.calibrated,
        "embedding_precision": variant.embedding_precision,
        "mixed": variant.mixed,
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / exported.bundle.config.parameters,
        "export_s": export_s,
        "perplexity_exact": None,
    }
    for name, exact in [("", False), ("_exact", True)][: 2 if variant.precision in BITS else 1]:
        started = time.perf_counter()
        with gta_edge.load(directory, BACKEND, exact=exact) as session:
            figures[f"perplexity{name}"] = evaluate(session, ids, progress=lines()).perplexity
        figures[f"evaluation_s{name}"] = time.perf_counter() - started
    return figures


def stored_bytes(bundle: Bundle) -> int:
    """Return the bytes of all parameters, scales included, but not of the tables for RoPE."""
    initializers = ir.load(bundle.model_path).graph.initializers
    again = (*TABLES, EMBEDDING + COLUMNS)  # bytes that have two names
    return sum(v.const_value.nbytes for name, v in initializers.items() if v.const_value and name not in again)


def rises(rows: list[Document]) -> Iterator[Document]:
    """Yield each variant with the rise of its perplexity against fp32, in percent."""
    base = next(row["perplexity"] for row in rows if row["precision"] == BASE)
    for row in rows:
        exact = row["perplexity_exact"]
        yield row | {
            "rise_percent": 100 * (row["perplexity"] / base - 1),
            "rise_percent_exact": None if exact is None else 100 * (exact / base - 1),
        }


def run(arguments: argparse.Namespace) -> Document:
    """Measure every variant and return what was found."""
    source = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(source.directory)
    if tokenizer is None:
        raise InputError(f"{source.directory} has no tokenizer to read a text with; take a checkpoint that has one")
    text = read_text(arguments.text) if arguments.text else texts.code()
    ids = np.asarray(tokenizer.encode(text), np.int64)[: arguments.tokens]
    todo, rows = variants(source.config), []
    with tempfile.TemporaryDirectory(prefix="gta-edge-quality-") as name:
        work = Path(name)
        calibration = arguments.calibrate
        if calibration is None:
            calibration = work / "calibration.txt"
            calibration.write_text(texts.code(held_out=False), encoding="utf-8")
        for i, variant in enumerate(todo, start=1):
            say(f"[{i}/{len(todo)}] {variant.label}")
            with tempfile.TemporaryDirectory(dir=work) as bundle:  # removed before the next one is made
                rows.append(measure(arguments.checkpoint, variant, ids, calibration, Path(bundle) / "bundle"))
            say(f"  perplexity {rows[-1]['perplexity']:.4f}, {rows[-1]['bits_per_weight']:.2f} bits per weight")
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "parameters": source.config.parameters,
        "tied": source.config.tie_word_embeddings,
        "tokens": len(ids) - 1,
        "variants": list(rises(rows)),
    }


# --- output ----------------------------------------------------------------------------------------------------------

HEADINGS = ("weights", "bytes", "bits per weight", "perplexity", "rise", "rise, exact arithmetic")


def cells(row: Document) -> list[str]:
    """Return the cells of one variant."""
    return [
        row["label"],
        f"{row['weight_bytes']:,}",
        f"{row['bits_per_weight']:.2f}",
        f"{row['perplexity']:.3f}",
        "" if row["precision"] == BASE else _percent(row["rise_percent"]),
        _percent(row["rise_percent_exact"]),
    ]


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{round(value, 2) + 0.0:+.2f}%" if math.isfinite(value) else "n/a"  # the sum makes -0 to 0


def show(document: Document) -> None:
    """Print the table."""
    console = rich.console.Console(width=max(100, rich.console.Console().width), markup=False, highlight=False)
    table = rich.table.Table(*HEADINGS, box=None)
    for row in document["variants"]:
        table.add_row(*cells(row))
    console.print(table)


def markdown(document: Document) -> str:
    """Return the table for a page of the documentation, with what it was measured on."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *map(cells, document["variants"])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{_conditions(document)}\n"


def _conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    place = document["machine"]
    tied = " A tied table in int4 lies twice, which counts." if document["tied"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"{document['tokens']:,} tokens were predicted. Bytes are without the cos and sin tables; bits are over the "
        f"{document['parameters']:,} parameters.{tied} `{document['command']}` on {place['cores']} cores of "
        f"{place['cpu']}, {document['date'][:10]}; {versions}."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _command(arguments: argparse.Namespace) -> str:
    """Return the command with what the figures depend on; files by their names, without the places of a machine."""
    words = [] if arguments.checkpoint == _DEFAULT else [arguments.checkpoint.name]
    for option in ("text", "calibrate", "tokens"):
        value = getattr(arguments, option)
        if value is not None:
            words += [f"--{option}", value.name if isinstance(value, Path) else f"{value}"]
    return " ".join(["python", f"benchmarks/{Path(__file__).name}", *words])


_DEFAULT = EXAMPLES / "tiny-gta"


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 1")
    return int(text)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=_DEFAULT, help="the example model by default")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to predict; by default the held-out corpus")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="by default the rest of the corpus")
    parser.add_argument("--tokens", type=_at_least_two, help="of the text, from its beginning; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for the documentation")
    return parser.parse_args(words)


def main() -> None:
    """Evaluate, print, write what was asked for."""
    arguments = parse()
    with errors_in_one_line():
        check_directories(arguments.json, arguments.markdown)
        document = run(arguments)
        show(document)
        write_outputs(arguments, document, markdown(document))


if __name__ == "__main__":
    main()
