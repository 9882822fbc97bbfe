"""Whether a draft model pays beside the shipped one: what calls cost, how often it must be right, and how often it is.

    python benchmarks/draft.py [--rounds 200] [--threads N]
    python benchmarks/draft.py --draft CHECKPOINT [--prompts 6] [--new-tokens 96] …

Without a draft, models of random weights stand for it: what a guess costs does not depend on what a model has learned.
From the cost of a guess and that of wider calls follows how often guesses have to come true. With ``--draft``, for
example one that ``examples/train_tiny.py draft`` has trained, text is generated from the beginnings of modules that
neither model has seen: plainly, with prompt lookup and with the draft, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from comparison import check_directories, errors_in_one_line, machine, place, positive, table
from random_bundles import make_bundles
from texts import code

import gta_edge
from gta_edge.model.config import GTAConfig, read_config
from gta_edge.runtime.session import Ids, Session

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-gta"
PRECISIONS = ("fp32", "int8", "int4")
WIDTHS = (1, 2, 3, 4, 6, 8)
CONTEXT = 256
SHAPES = {"1 layer of 64": (1, 64, 160), "1 layer of 128": (1, 128, 320), "2 layers of 128": (2, 128, 512)}
"""Layers, hidden size and MLP width of what stands for a draft."""

WAYS = ("plain", "lookup", "draft")
SAMPLINGS = {"greedy": 0.0, "at temperature 0.8": 0.8}

Row = dict[str, Any]


def of_shape(model: GTAConfig, layers: int, hidden: int, intermediate: int) -> GTAConfig:
    """Return a small model with the vocabulary and the positions of another: heads of 32, of which each has a map."""
    heads = hidden // 32
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    attention = {"num_key_heads": 1, "key_dim": 32, "num_latent_heads": heads // 2, "latent_dim": 32, "head_dim": 32}
    return model.replace(**sizes, **attention, num_attention_heads=heads, num_query_heads=heads)


# --- what calls cost -------------------------------------------------------------------------------------------------


def milliseconds(sessions: dict[str, tuple[Session, Sequence[int]]], rounds: int) -> dict[str, dict[int, float]]:
    """Return what calls of some widths take in each session, in turns: the lowest tenth, as others may run beside."""
    rng, times = np.random.default_rng(1), dict[tuple[str, int], list[float]]()
    for session, _ in sessions.values():
        session.reset()
        session.forward(rng.integers(0, session.config.vocab_size, (1, CONTEXT)))
    for _ in range(rounds):
        for name, (session, widths) in sessions.items():
            for width in widths:
                ids = rng.integers(0, session.config.vocab_size, (1, width))
                for timed in (False, True):  # the first brings its weights into the processor's caches
                    start = time.perf_counter()
                    session.forward(ids, all_logits=True)
                    if timed:
                        times.setdefault((name, width), []).append(1e3 * (time.perf_counter() - start))
                    session.truncate(CONTEXT)
    return {
        name: {width: float(np.quantile(times[name, width], 0.1)) for width in widths}
        for name, (_, widths) in sessions.items()
    }


def needed(calls: dict[int, float], guess: float, speed: float) -> float | None:
    """Return how likely each token of a guess has to be right for a speed beside plain decoding; None if 1 is too low.

    A call of w tokens gives 1 + a + … + a^(w-1), and takes what it takes and w - 1 guesses (arXiv 2211.17192, 3.3).
    """
    for a in np.linspace(0, 1, 101):
        for width, ms in list(calls.items())[1:]:
            if sum(a**i for i in range(width)) * calls[1] / (ms + (width - 1) * guess) >= speed:
                return float(a)
    return None


def costs(options: argparse.Namespace) -> list[Row]:
    """Return a row for each precision of the model: its calls, guesses of each shape, and how good these must be."""
    model, found = read_config(MODEL / "config.json"), []
    assert isinstance(model, GTAConfig)
    shapes = {name: of_shape(model, *shape) for name, shape in SHAPES.items()}
    for precision in PRECISIONS:
        sessions: dict[str, tuple[Session, Sequence[int]]] = {"": (opened(options, MODEL, precision), WIDTHS)}
        for number, (name, config) in enumerate(shapes.items()):
            bundle = make_bundles(options.work, f"draft-{number}", None, [precision], config=config)[precision]
            sessions[name] = gta_edge.load(bundle, "onnxruntime", threads=options.threads), (1,)
        times = milliseconds(sessions, options.rounds)
        for session, _ in sessions.values():
            session.close()
        calls = times.pop("")
        guesses = {
            name: {
                "parameters": shapes[name].parameters,
                "ms": each[1],
                "even": needed(calls, each[1], 1.0),
                "worth": needed(calls, each[1], 1.1),
            }
            for name, each in times.items()
        }
        found.append({"precision": precision, "calls_ms": calls, "guesses": guesses})
    return found


def opened(options: argparse.Namespace, checkpoint: Path, precision: str) -> Session:
    """Return a session of a checkpoint in a precision, whose bundle is made anew where the checkpoint is newer."""
    bundle, weights = options.work / f"{checkpoint.resolve().name}-{precision}", checkpoint / "model.safetensors"
    if not bundle.exists() or bundle.stat().st_mtime < weights.stat().st_mtime:
        gta_edge.export_model(checkpoint, bundle, precision=precision, verify=False, force=True)
    return gta_edge.load(bundle, "onnxruntime", threads=options.threads)


# --- how often guesses come true -------------------------------------------------------------------------------------


def agreement(model: Session, draft: Session, texts: Sequence[Ids], temperature: float) -> float:
    """Return how likely a guess of the next token of these texts is accepted (arXiv 2211.17192, 3.5)."""
    accepted = []
    for ids in texts:
        p, q = (_distributions(each, ids, temperature) for each in (model, draft))
        accepted.append(float(np.minimum(p, q).sum(-1).mean()))
    return statistics.fmean(accepted)


def _distributions(session: Session, ids: Ids, temperature: float) -> np.ndarray[Any, Any]:
    """Return what a model expects after each token of a text, [T, V]; at temperature 0 all of the likeliest token."""
    session.reset()
    logits = session.forward(ids[None], all_logits=True)[0].astype(np.float64)
    if not temperature:
        return np.asarray(np.arange(logits.shape[1]) == logits.argmax(-1)[:, None], np.float64)
    scores = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return np.asarray(scores / scores.sum(-1, keepdims=True))


def generation(model: Session, draft: Session, prompts: Sequence[Ids], options: argparse.Namespace) -> list[Row]:
    """Return a row for each way of sampling: time per token of each way of guessing, in turns, and what came true."""
    found = []
    for name, temperature in SAMPLINGS.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        counts: dict[str, list[tuple[int, int, float]]] = {way: [] for way in WAYS}
        for turn in range(options.turns + 1):
            ms = {way: list[float]() for way in WAYS}
            for seed, prompt in enumerate(prompts):
                for way in WAYS:
                    given = {"speculate": "lookup"} if way == "lookup" else {"draft": draft} if way == "draft" else {}
                    run = gta_edge.generate(
                        model, prompt, max_new_tokens=options.new_tokens, temperature=temperature, seed=seed,
                        ignore_eos=True, **given,
                    )  # fmt: skip
                    list(run)
                    timings = run.timings
                    ms[way].append(timings["tpot_ms"])
                    if turn and way != "plain":
                        counts[way].append(tuple(timings[key] for key in ("drafted", "accepted", "tokens_per_step")))
            if turn:  # the first warms up
                for way in WAYS:
                    times[way].append(statistics.fmean(ms[way]))
        row: Row = {"sampling": name, "ms": {way: statistics.median(each) for way, each in times.items()}}
        for way in WAYS[1:]:
            drafted, accepted, tokens = (sum(each) for each in zip(*counts[way], strict=True))
            row[way] = {
                "drafted": drafted,
                "accepted": accepted,
                "tokens_per_step": tokens / len(counts[way]),
                "speeds": [a / b for a, b in zip(times["plain"], times[way], strict=True)],
            }
        found.append(row)
    return found


def with_draft(options: argparse.Namespace) -> Row:
    """Return what a trained draft does: how often it is right, and what it saves in each precision."""
    found: Row = {"draft": options.draft.name, "precisions": {}}
    for precision in PRECISIONS:
        with opened(options, MODEL, precision) as model, opened(options, options.draft, precision) as draft:
            assert model.tokenizer is not None  # the model has one
            ids = np.array(model.tokenizer.encode(code()), np.int64)
            starts = np.linspace(0, len(ids) - 1000, options.prompts).astype(int)
            texts = [ids[start : start + 512] for start in starts]
            found["precisions"][precision] = {
                "agreement": {name: agreement(model, draft, texts, each) for name, each in SAMPLINGS.items()},
                "generation": generation(model, draft, [text[:128] for text in texts], options),
            }
    return found


# --- the whole -------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Row:
    """Measure what was asked for."""
    if options.draft is not None:
        read_config(options.draft / "config.json")  # what is no checkpoint is refused before the long part
    words = [
        f"--{name.replace('_', '-')} {value}"
        for name in ("draft", "rounds", "prompts", "new_tokens", "turns", "threads")
        if (value := getattr(options, name)) is not None
    ]
    found: Row = {
        "command": " ".join(["python", f"benchmarks/{Path(__file__).name}", *words]),
        "machine": machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "onnxruntime": version("onnxruntime"),
        "costs": costs(options),
    }
    return found if options.draft is None else found | {"trained": with_draft(options)}


def markdown(found: Row) -> str:
    """Return the figures as tables."""
    lines, rows = [f"{place(found)}.", ""], []
    calls = [{"model": row["precision"], **_ms(row["calls_ms"])} for row in found["costs"]]
    for row in found["costs"]:
        for name, guess in row["guesses"].items():
            needs = {f"right for {speed}x": _share(guess[key]) for key, speed in (("even", "1.0"), ("worth", "1.1"))}
            cost = {"ms a guess": f"{guess['ms']:.3f}", "of a token": f"{guess['ms'] / row['calls_ms'][1]:.2f}"}
            size = {"parameters": f"{guess['parameters']:,}"}
            rows.append({"model": row["precision"], "draft": name, **size, **cost, **needs})
    lines += [table(calls), "", table(rows), ""]
    rows = []
    for precision, each in found.get("trained", {"precisions": {}})["precisions"].items():
        for row in each["generation"]:
            cells = {"model": precision, "sampling": row["sampling"]}
            cells["accepted of held-out text"] = _share(each["agreement"][row["sampling"]])
            cells["plain ms"] = f"{row['ms']['plain']:.3f}"
            for way in WAYS[1:]:
                own = row[way]
                cells[f"{way}: drafted, accepted"] = f"{own['drafted']}, {own['accepted']}"
                cells[f"{way}: speed"] = f"{statistics.median(own['speeds']):.2f}"
            rows.append(cells)
    return "\n".join(lines + ([table(rows)] if rows else []))


def _ms(calls: dict[int, float]) -> dict[str, str]:
    return {f"{width} token{'s' * (width > 1)}": f"{ms:.3f}" for width, ms in calls.items()}


def _share(value: float | None) -> str:
    return "never" if value is None else f"{100 * value:.0f}%"


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="where bundles are kept")
    parser.add_argument("--draft", type=Path, default=None, help="a trained checkpoint with the model's tokenizer")
    parser.add_argument("--rounds", type=positive, default=200, help="calls of each width")
    parser.add_argument("--prompts", type=positive, default=6, help="of 128 tokens of held-out text")
    parser.add_argument("--new-tokens", type=positive, default=96, help="after each prompt")
    parser.add_argument("--turns", type=positive, default=5, help="of the three ways, beside a first one that warms up")
    parser.add_argument("--threads", type=positive, default=None, help="one per core by default")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    options = parser.parse_args()
    with errors_in_one_line():
        check_directories(options.json)
        found = run(options)
        print(markdown(found))
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
