"""What llama.cpp's quantized types cost beside ours: bytes, and perplexity on the same texts in the same windows.

    make real-model
    python benchmarks/llama_cpp_quality.py [CHECKPOINT] [--tokens 8192] [--window 512] [--environment DIR] …

llama.cpp's files are made by its own quantizer from the same bf16 weights. Texts are prose and code that every
installation of the same Python has (``texts.py``); calibration sees other code. Every row predicts the same tokens:
windows follow each other, and each starts with the last token of the one before. Both engines run as they come, which
rounds activations to 8 bits where the weights are quantized; ``--exact`` adds ours without that.
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
import texts
from comparison import (
    Document,
    check_directories,
    errors_in_one_line,
    machine,
    place,
    positive,
    say,
    table,
    write_outputs,
)
from llama_cpp import CHECKPOINT, WORK
from llama_cpp_engine import BASE, LlamaCpp

import gta_edge
from gta_edge.errors import InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.support.cores import usable_cores

TYPES = (BASE, "Q8_0", "Q4_K_M", "Q4_0")
TEXTS = {"prose": texts.prose, "code": texts.code}
CALIBRATION_CHARACTERS = 400_000  # of the code that is not held out, from its middle

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """One way of ours to store weights: options of ``export_model``."""

    label: str
    options: dict[str, Any]
    on_code: bool = False  # calibrated on code, and not as the options say

    @property
    def rounds_activations(self) -> bool:
        """Whether there is a second arithmetic, without rounding."""
        return self.options["precision"] in ("int8", "int4")


VARIANTS = (
    Variant("bf16", {"precision": "bf16"}),  # the weights as they are; it computes in float32
    Variant("int8", {"precision": "int8"}),
    Variant("int4, plain rounding", {"precision": "int4", "calibrate": "none"}),
    Variant("int4", {"precision": "int4"}),  # calibrated on a text that the model writes itself
    Variant("int4, 20% in int8", {"precision": "int4", "mixed": 20}),
    Variant("int4, calibrated on code", {"precision": "int4"}, on_code=True),
    Variant("int4, calibrated on code, 20% in int8", {"precision": "int4", "mixed": 20}, on_code=True),
)


def run(arguments: argparse.Namespace) -> Document:
    """Evaluate everything and return what was found."""
    checkpoint = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(checkpoint.directory)
    if tokenizer is None:
        raise InputError(f"{checkpoint.directory} has no tokenizer", NO_TOKENIZER)
    ids = {name: np.asarray(tokenizer.encode(read()), np.int64) for name, read in TEXTS.items()}
    for name, found in ids.items():
        if len(found) <= arguments.tokens:
            raise InputError(f"{name} has {len(found)} tokens", f"give --tokens below {len(found)}")
    ids = {name: found[: arguments.tokens + 1] for name, found in ids.items()}
    peer = LlamaCpp.prepare(arguments.environment or arguments.work / "environment")
    rows = [*_theirs(peer, checkpoint, ids, arguments), *_ours(checkpoint, ids, arguments)]
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"Python": platform.python_version()} | {"onnxruntime": version("onnxruntime")},
        "peer_versions": peer.versions,
        "model": checkpoint.directory.name,
        "parameters": checkpoint.config.parameters,
        "tokens": arguments.tokens,
        "window": arguments.window,
        "rows": rows,
    }


def _theirs(
    peer: LlamaCpp, checkpoint: Checkpoint, ids: dict[str, Ids], arguments: argparse.Namespace
) -> Iterator[Document]:
    """Yield a row for each of llama.cpp's types."""
    for kind in TYPES:
        path = peer.model(checkpoint, kind, arguments.work, threads=arguments.threads)
        losses = {}
        for name, tokens in ids.items():
            with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                np.save(file, tokens)
                file.flush()
                job = {"job": "evaluate", "model": str(path), "ids": file.name}
                answer = peer.tool(job | {"window": arguments.window, "threads": arguments.threads})
            losses[name] = answer["loss"]
        yield _row(f"llama.cpp {kind}", path.stat().st_size, losses)


def _ours(checkpoint: Checkpoint, ids: dict[str, Ids], arguments: argparse.Namespace) -> Iterator[Document]:
    """Yield a row for each of ours, and one without rounded activations where that is asked for."""
    with tempfile.TemporaryDirectory(prefix="gta-edge-quality-") as name:
        calibration = Path(name) / "calibration.txt"
        code = texts.code(held_out=False)
        middle = (len(code) - CALIBRATION_CHARACTERS) // 2
        calibration.write_text(code[middle : middle + CALIBRATION_CHARACTERS], encoding="utf-8")
        for variant in VARIANTS:
            say(f"gta-edge {variant.label}: is being exported")
            directory = Path(name) / "bundle"
            started = time.perf_counter()
            # verify=False: perplexity finds damage too, and the check has tests of its own
            options = variant.options | ({"calibrate": calibration} if variant.on_code else {})
            gta_edge.export_model(checkpoint.directory, directory, verify=False, force=True, **options)
            export_s = time.perf_counter() - started
            size = sum((directory / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
            for exact in (False, True)[: 2 if arguments.exact and variant.rounds_activations else 1]:
                losses = {}
                for text, tokens in ids.items():
                    with gta_edge.load(directory, "onnxruntime", threads=arguments.threads, exact=exact) as session:
                        losses[text] = evaluate(session, tokens, window=arguments.window).loss
                label = f"gta-edge {variant.label}{', exact arithmetic' if exact else ''}"
                yield _row(label, size, losses) | {"export_s": export_s}


def _row(label: str, size: int, losses: dict[str, float]) -> Document:
    perplexity = {name: math.exp(loss) for name, loss in losses.items()}
    say(f"{label}: {size:,} bytes, " + ", ".join(f"{name} {value:.3f}" for name, value in perplexity.items()))
    return {"label": label, "bytes": size, "loss": losses, "perplexity": perplexity}


# --- output ----------------------------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """Return the table, smallest loss of every text on the base of its own engine, and what it was measured on."""
    bases = {row["label"].partition(" ")[0]: row for row in reversed(document["rows"])}  # an engine's first row
    return f"{table([_cells(row, bases, document) for row in document['rows']])}\n\n{conditions(document)}\n"


def _cells(row: Document, bases: dict[str, Document], document: Document) -> dict[str, str]:
    base = bases[row["label"].partition(" ")[0]]
    cells = {
        "weights": row["label"],
        "bytes": f"{row['bytes']:,}",
        "bits per weight": f"{8 * row['bytes'] / document['parameters']:.2f}",
    }
    for name, value in row["perplexity"].items():
        rise = 100 * (value / base["perplexity"][name] - 1)
        cells[f"perplexity, {name}"] = f"{value:.3f}"
        cells[f"rise, {name}"] = "" if row is base else f"{rise:+.2f}%"
    return cells


def conditions(document: Document) -> str:
    """Say what was measured, with which command, on which machine, when."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"{document['model']}; {document['tokens']:,} tokens of each text were predicted, in windows of "
        f"{document['window']}: prose is `pydoc_data.topics` of this Python, code what `examples/corpus.py` holds out. "
        f"Bytes are of the files that hold the weights: GGUF without a tokenizer, `model.onnx` with its data. "
        f"{place(document)}; {versions}, llama-cpp-python {document['peer_versions']['llama-cpp-python']}."
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _command(arguments: argparse.Namespace) -> str:
    words = [] if arguments.checkpoint == CHECKPOINT else [arguments.checkpoint.name]
    words += [f"--tokens {arguments.tokens}", f"--window {arguments.window}", *(["--exact"] if arguments.exact else [])]
    return " ".join([f"python benchmarks/{Path(__file__).name}", *words])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT, help=f"{CHECKPOINT} by default")
    parser.add_argument("--work", type=Path, default=WORK, help="where llama.cpp's files are made and kept")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="llama.cpp's own; in WORK by default")
    parser.add_argument("--tokens", type=positive, default=8192, help="of each text")
    parser.add_argument("--window", type=positive, default=512, help="tokens that a prediction sees at most")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="one per core")
    parser.add_argument("--exact", action="store_true", help="also ours without activations rounded to int8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for the documentation")
    return parser.parse_args(words)


def main() -> None:
    """Evaluate, print, write what was asked for."""
    arguments = parse()
    with errors_in_one_line():
        arguments.work.mkdir(parents=True, exist_ok=True)
        check_directories(arguments.json, arguments.markdown)
        document = run(arguments)
        text = markdown(document)
        print(text, end="")
        write_outputs(arguments, document, text)


if __name__ == "__main__":
    main()
