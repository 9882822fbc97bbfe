"""What several answers to one prompt cost as branches of a tree, beside as many rows of a batch.

    python benchmarks/answers.py [--model gta1-160m] [--prompt 2048] [--answers 4] [--new-tokens 128] [--rounds 2] …

A model with random weights in int4, on ONNX Runtime's CPU. Tokens are random, as they cost the same whatever they are.
Each answer differs from the others from its first token on. Both sessions are in one process and take turns; ratios are
within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from comparison import errors_in_one_line, machine, positive
from random_bundles import make_bundles

import gta_edge
from gta_edge.runtime.session import Session
from gta_edge.runtime.token_tree import PREFIX


def as_branches(session: Session, prompt: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Return the seconds of the prompt [1, N], and of all tokens of the answers [n, M]."""
    session.reset()
    start = time.perf_counter()
    session.forward(prompt)
    read = time.perf_counter()
    tree, leaves = session.tree(), [PREFIX] * len(answers)
    for tokens in answers.T:
        leaves = tree.grow(leaves)
        session.forward(tokens[None], tree=tree, all_logits=True)
    return read - start, time.perf_counter() - read


def as_rows(session: Session, prompt: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Return the same, of a batch."""
    session.reset()
    start = time.perf_counter()
    session.forward(np.repeat(prompt, len(answers), 0))
    read = time.perf_counter()
    for tokens in answers.T:
        session.forward(tokens[:, None])
    return read - start, time.perf_counter() - read


WAYS = {"tree": as_branches, "batch": as_rows}


def measured(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what both ways take."""
    rng = np.random.default_rng(0)
    with (
        gta_edge.load(path, "onnxruntime", threads=options.threads, trees=True) as tree,
        gta_edge.load(path, "onnxruntime", threads=options.threads) as batch,
    ):
        sessions = {"tree": tree, "batch": batch}
        vocabulary = tree.config.vocab_size
        prompt = rng.integers(0, vocabulary, (1, options.prompt))
        answers = rng.integers(0, vocabulary, (options.answers, options.new_tokens))
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for session, run in zip(sessions.values(), WAYS.values(), strict=True):
            run(session, prompt[:, :64], answers[:, :2])
        for _ in range(options.rounds):
            for way, run in WAYS.items():
                times[way].append(run(sessions[way], prompt, answers))
        bytes_held = {way: session.cache_bytes for way, session in sessions.items()}
    totals = {way: [sum(each) for each in found] for way, found in times.items()}
    ratios = [one / other for one, other in zip(totals["tree"], totals["batch"], strict=True)]
    return {
        **{f"{way}_prompt_s": round(statistics.median(each[0] for each in times[way]), 2) for way in WAYS},
        **{f"{way}_answers_s": round(statistics.median(each[1] for each in times[way]), 2) for way in WAYS},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        **{f"{way}_cache_MB": round(size / 1e6, 1) for way, size in bytes_held.items()},
        "cache_ratio": round(bytes_held["tree"] / bytes_held["batch"], 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/answers"), help="where the model is kept")
    parser.add_argument("--model", default="gta1-160m", help="preset")
    parser.add_argument("--layers", type=positive, help="layers, instead of the model's own")
    parser.add_argument("--prompt", type=positive, default=2048, help="tokens")
    parser.add_argument("--answers", type=positive, default=4)
    parser.add_argument("--new-tokens", type=positive, default=128, help="of each answer")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--threads", type=positive)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("model", "prompt", "answers", "new_tokens", "rounds", "threads")}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in sizes.items() if value is not None]
    with errors_in_one_line():
        options.work.mkdir(parents=True, exist_ok=True)
        path = make_bundles(options.work, options.model, options.layers, ["int4"])["int4"]
        found = measured(path, options)
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *words])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    print(json.dumps({"command": command, **sizes, **found, "machine": machine(), "date": date}))


if __name__ == "__main__":
    main()
