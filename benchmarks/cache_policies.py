"""What cache policies cost in quality: perplexity and retrieval against the rows that stay.

    python benchmarks/cache_policies.py [CHECKPOINT] [--shares 0.5,0.3,0.2,0.1] [--windows 48] [--json FILE] …

A prompt is evicted from once, at its end; the perplexity is that of the tokens after it. Without arguments it is the
example model, with 48 windows of the modules of Python's library that it was not trained on (``examples/corpus.py``),
512 tokens of prompt and 256 after it. ``--text prose`` takes the language reference, for other models.

Retrieval: a passage lies somewhere in the prompt and comes again after it. What of the gain by the first copy is left,
says how much a policy remembers of what nothing has asked for yet.

Budgets per layer are measured on text that is not in the windows. Every session is the public one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import texts
from cache_policies_report import cell, markdown, plot, show
from comparison import Document, check_directories, errors_in_one_line, machine, positive, say, write_outputs

import gta_edge
from gta_edge.errors import InputError
from gta_edge.evaluate.cache_budgets import calibrate, cut_windows, loss_after
from gta_edge.evaluate.perplexity import negative_log_likelihood
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.cache_policies.budgets import budgets_output, write_budgets
from gta_edge.runtime.session import Session

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT, FOLLOWING = 512, 256
POSITIONS = 1024
PASSAGE = 48
"""Tokens of a passage that comes twice."""

_LOGIT_BYTES = 2**28  # of one call

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """A policy as it is measured.

    Attributes:
        label: what the table calls it.
        name: as ``policy`` takes it.
        options: likewise, without the rows.
        decides: whether the method decides how many rows stay; then it is measured once, whatever the shares.
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    decides: bool = False

    def policy(self, rows: int) -> CachePolicy:
        """Return the policy for so many rows of a layer."""
        return policy(self.name, **self.options, **({} if self.decides else {"rows": rows}))


CASES = (
    Case("recent window", "window", {"sinks": 0}),
    Case("4 sinks and a window", "window"),
    Case("H2O", "h2o"),
    Case("TOVA", "tova"),
    Case("SnapKV", "snapkv"),
    Case("PyramidInfer", "pyramid"),
    Case("its scores, the same rows in every layer", "pyramid", {"shrink": 1.0}),
    Case("ZSMerge, nothing merged", "zsmerge", {"residual_rows": 0}),
    Case("ZSMerge", "zsmerge"),
    Case("measured budgets, nothing merged", "measured", {"residual_rows": 0}),
    Case("measured budgets", "measured"),
    *(Case(f"CORM, {window}", "corm", {"window": window}, decides=True) for window in (64, 32, 16, 8)),
    Case("CORM, 16, nothing merged", "corm", {"window": 16, "residual_rows": 0}, decides=True),
)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What is read.

    Attributes:
        bundle: the model.
        windows: int64 [N, PROMPT + FOLLOWING].
        repeated: int64 [N, PROMPT + PASSAGE], a passage in the prompt and again behind it.
        unseen: the same without the first copy.
        backend: what runs the model.
        threads: for one operator; None for one per core.
    """

    bundle: Path
    windows: Ids
    repeated: Ids
    unseen: Ids
    backend: str
    threads: int | None = None

    def open(self, cache: CachePolicy | None) -> Session:
        """Return a session whose chunks are a prompt, so that it is evicted from once."""
        return gta_edge.load(self.bundle, self.backend, cache=cache, chunk_size=PROMPT, threads=self.threads)


def material(bundle: Path, ids: Ids, count: int, backend: str, threads: int | None = None) -> Material:
    """Cut windows of a text, and put passages of it into others."""
    windows = cut_windows(ids, count, PROMPT + FOLLOWING)
    generator = np.random.default_rng(0)
    prompts, passages = (
        np.stack([ids[start : start + length] for start in generator.integers(0, len(ids) - length, count)])
        for length in (PROMPT, PASSAGE)
    )
    planted = prompts.copy()
    depths = np.linspace(0, PROMPT - PASSAGE - PROMPT // 8, count).astype(int)  # not among the last, which stay anyway
    for row, depth in enumerate(depths):
        planted[row, depth : depth + PASSAGE] = passages[row]
    repeated, unseen = (np.hstack([part, passages]) for part in (planted, prompts))
    return Material(bundle, windows, repeated, unseen, backend, threads)


def loss(session: Session, windows: Ids, prompt: int) -> float:
    """Return the mean loss of what follows the prompts, a few windows at a time."""
    tokens = windows.shape[1] - prompt
    batch = max(1, min(16, _LOGIT_BYTES // (4 * tokens * session.config.vocab_size)))
    parts = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    return sum(loss_after(session, part, prompt) * len(part) for part in parts) / len(windows)


def without(source: Material) -> Document:
    """Return the losses with all rows, and with none of the prompt's."""
    with source.open(None) as session:
        full, retrieved = loss(session, source.windows, PROMPT), loss(session, source.repeated, PROMPT)
        unseen = loss(session, source.unseen, PROMPT)
        claim = session.claim()
        forgotten = 0.0
        for window in source.windows[:, PROMPT:]:  # attention knows distances alone: these may as well come first
            claim.reset()
            logits = claim.forward(window[None, :-1], all_logits=True)[0]
            forgotten += negative_log_likelihood(logits, window[1:]) / (FOLLOWING - 1)
    return {
        "perplexity": math.exp(full),
        "perplexity_forgotten": math.exp(forgotten / len(source.windows)),
        "passage_loss": retrieved,
        "passage_loss_unseen": unseen,
    }


def measure(source: Material, case: Case, share: float, base: Document) -> Document:
    """Return what a policy costs at a share of the rows."""
    rows = round(share * PROMPT)
    with source.open(case.policy(rows)) as session:
        session.forward(source.windows[:1, :PROMPT])
        kept = float(session.rows.mean()) / PROMPT
        if case.decides:  # which depends on the text
            kept = _mean_share(session, source.windows)
        perplexity = math.exp(loss(session, source.windows, PROMPT))
        again = loss(session, source.repeated, PROMPT)
    gain = base["passage_loss_unseen"] - base["passage_loss"]
    return {
        "label": case.label,
        "policy": case.name,
        "options": case.options,
        "share": None if case.decides else share,
        "rows_share": kept,
        "perplexity": perplexity,
        "rise_percent": 100 * (perplexity / base["perplexity"] - 1),
        "passage_loss": again,
        "retrieved": (base["passage_loss_unseen"] - again) / gain,
    }


def _mean_share(session: Session, windows: Ids) -> float:
    shares = []
    for window in windows:
        session.reset()
        session.forward(window[None, :PROMPT])
        shares.append(session.rows.mean() / PROMPT)
    return float(np.mean(shares))


def cases(shares: list[float], chosen: list[str] | None) -> Iterator[tuple[Case, float]]:
    """Yield every policy with every share; one that decides itself once."""
    for case in CASES:
        if chosen is None or case.name in chosen:
            yield from ((case, share) for share in (shares[:1] if case.decides else shares))


def run(arguments: argparse.Namespace) -> Document:
    """Export, measure the budgets of layers, then every policy; return what was found."""
    with tempfile.TemporaryDirectory(prefix="gta-edge-cache-") as work:
        checkpoint = shortened(arguments.checkpoint, Path(work) / "checkpoint")
        bundle = gta_edge.export_model(checkpoint, Path(work) / "bundle", verify=False).bundle
        read, kept_apart = text_of(arguments.text)
        tokenizer = Tokenizer.load(bundle.directory)
        if tokenizer is None:
            raise InputError(f"{arguments.checkpoint} has no tokenizer", NO_TOKENIZER)
        ids = np.asarray(tokenizer.encode(read), np.int64)
        runs_on: dict[str, Any] = {"backend": arguments.backend, "threads": arguments.threads}
        budgets = None
        if arguments.policies is None or "measured" in arguments.policies:
            say("budgets of the layers")
            budgets = calibrate(bundle, kept_apart, windows=arguments.calibration_windows, **runs_on)
            with budgets_output(bundle, force=True) as directory:
                write_budgets(directory, bundle, budgets)
        source = material(bundle.directory, ids, arguments.windows, **runs_on)
        base = without(source)
        say(f"all rows: perplexity {base['perplexity']:.3f}; none of the prompt's: {base['perplexity_forgotten']:.3f}")
        todo, rows = list(cases(arguments.shares, arguments.policies)), []
        for i, (case, share) in enumerate(todo, start=1):
            found = measure(source, case, share, base)
            rows.append(found)
            say(f"[{i}/{len(todo)}] {case.label}: {100 * found['rows_share']:.1f}% of the rows, {cell(found)}")
    return {
        "command": _command(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "model": arguments.checkpoint.resolve().name,
        "text": arguments.text,
        "backend": arguments.backend,
        "windows": arguments.windows,
        "prompt": PROMPT,
        "following": FOLLOWING,
        "passage": PASSAGE,
        "budgets": None if budgets is None else {**budgets.measured, "budgets": list(budgets.rows)},
        "base": base,
        "shares": arguments.shares,
        "results": rows,
    }


def shortened(checkpoint: Path, place: Path) -> Path:
    """Return the checkpoint with no more positions than are measured, since attention costs as the capacity."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["max_position_embeddings"] <= POSITIONS or config.get("rope_scaling"):
        return checkpoint
    place.mkdir()
    for path in checkpoint.iterdir():
        if path.name not in ("config.json", "gta_edge_checkpoint.json"):
            (place / path.name).symlink_to(path.resolve())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}), encoding="utf-8")
    return place


def text_of(name: str) -> tuple[str, str]:
    """Return a text to measure on, and another one for what is chosen by measuring."""
    if name == "code":
        return texts.code(), texts.code(held_out=False)
    prose = texts.prose()
    return prose[len(prose) // 2 :], prose[: len(prose) // 2]


# --- the command -----------------------------------------------------------------------------------------------------


_DEFAULT = EXAMPLES / "tiny-gta"


def _command(arguments: argparse.Namespace) -> str:
    """Return the command with what the figures depend on, without the places of a machine."""
    words = [] if arguments.checkpoint == _DEFAULT else [arguments.checkpoint.name]
    defaults = parse([])
    for name in ("text", "shares", "windows", "calibration_windows", "policies", "backend"):
        value = getattr(arguments, name)
        if value != getattr(defaults, name):
            parts = value if isinstance(value, list) else [value]
            joined = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in parts)
            words.append(f"--{name.replace('_', '-')} {joined}")
    return " ".join(["python", f"benchmarks/{Path(__file__).name}", *words])


def _shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        shares = []
    if not shares or not all(0.02 <= share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} are no shares from 0.02 to 1")
    return shares


def _policies(text: str) -> list[str]:
    names, known = text.split(","), {case.name for case in CASES}
    if not known.issuperset(names):
        raise argparse.ArgumentTypeError(f"{text!r} are no policies of {', '.join(sorted(known))}")
    return names


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=_DEFAULT, help="the example model by default")
    parser.add_argument("--text", choices=("code", "prose"), default="code", help="Python's library, or its reference")
    parser.add_argument("--shares", type=_shares, default=[0.5, 0.3, 0.2, 0.1], help="of the rows, that stay")
    parser.add_argument("--windows", type=positive, default=48, help="of the text")
    parser.add_argument("--calibration-windows", type=positive, default=8, help="of other text, for measured budgets")
    parser.add_argument("--policies", type=_policies, help="these alone, of all")
    parser.add_argument("--backend", default="torch", help="what runs the model")
    parser.add_argument("--threads", type=positive, help="for one operator; one per core by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables for the documentation")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw perplexity and retrieval against rows")
    return parser.parse_args(words)


def main() -> None:
    """Measure, print, write what was asked for."""
    arguments = parse()
    with errors_in_one_line():
        check_directories(arguments.json, arguments.markdown, arguments.plot)
        document = run(arguments)
        show(document)
        write_outputs(arguments, document, markdown(document))
        if arguments.plot:
            plot(document, arguments.plot)


if __name__ == "__main__":
    main()
