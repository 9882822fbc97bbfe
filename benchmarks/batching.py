"""What several texts at once give, beside one after another: tokens per second of the batch behind the service.

    python benchmarks/batching.py [BUNDLE …] [--requests 1,2,4,8] [--prompt 64] [--new-tokens 64] [--rounds 3] …

Each round generates the same texts twice, in turns: all at once, and one after another in a batch of one row. Prompts
are random tokens and end tokens count for nothing, so every text is as long as it was asked for. Without a bundle it is
the example model, and a random model of 160M parameters in int4.

Beside the time, the ratio of processor time is given, which other programs on the machine disturb less.

With --history the next turn of a chat is timed as well: until its first token, with the cache of what was said before,
and without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from comparison import (
    Document,
    check_directories,
    context_list,
    errors_in_one_line,
    place,
    positive,
    ranged,
    say,
    spread,
    table,
    write_outputs,
)
from comparison import machine as this_machine
from random_bundles import make_bundles

import gta_edge
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.kept_caches import KeptCaches
from gta_edge.runtime.generation.request import RequestOptions
from gta_edge.runtime.generation.text import Text
from gta_edge.runtime.session import Session

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-gta"
PRESET = "gta1-160m"
TURN_TOKENS = 32
WORK = Path("build/batching")


def seconds(session: Session, prompts: np.ndarray, new_tokens: int, rows: int) -> dict[str, float]:
    """Generate texts with so many rows at once; return how long it took, and the longest wait for a token."""
    batch, told = Batch(session, rows), [[] for _ in prompts]
    for prompt, times in zip(prompts, told, strict=True):
        options = RequestOptions(max_new_tokens=new_tokens)
        batch.add(Text.asked_for(session, prompt, options, lambda _, times=times: times.append(time.perf_counter())))
    started, before = time.perf_counter(), time.process_time()
    while batch.step():
        pass
    total, processor = time.perf_counter() - started, time.process_time() - before
    assert batch.figures.generated_tokens == prompts.shape[0] * new_tokens
    waits = [float(np.diff(times).max()) for times in told if len(times) > 1]
    return {"seconds": total, "processor_seconds": processor, "longest_wait": max(waits, default=0.0)}


def measure(session: Session, counts: list[int], prompt: int, new_tokens: int, rounds: int) -> list[Document]:
    """Return a row for each number of texts."""
    random = np.random.default_rng(0)
    vocabulary = session.config.vocab_size
    found = []
    seconds(session, random.integers(0, vocabulary, (max(counts), prompt)), 2, max(counts))  # memory, once
    for count in counts:
        runs: dict[str, list[dict[str, float]]] = {"together": [], "alone": []}
        for _ in range(rounds):
            prompts = random.integers(0, vocabulary, (count, prompt))
            runs["together"].append(seconds(session, prompts, new_tokens, count))
            runs["alone"].append(seconds(session, prompts, new_tokens, 1))
        rate = {name: [count * new_tokens / run["seconds"] for run in each] for name, each in runs.items()}
        pairs = list(zip(runs["alone"], runs["together"], strict=True))
        found.append(
            {
                "texts": count,
                "together_tokens_per_s": spread(rate["together"]),
                "alone_tokens_per_s": spread(rate["alone"]),
                "ratio": spread([a["seconds"] / b["seconds"] for a, b in pairs]),
                "processor_ratio": spread([a["processor_seconds"] / b["processor_seconds"] for a, b in pairs]),
                "longest_wait_ms": spread([1e3 * run["longest_wait"] for run in runs["together"]]),
            }
        )
        say(f"  {count} at once: {ranged(found[-1]['ratio'], 2)} times as many tokens per second")
    return found


def turn(session: Session, history: int, new_tokens: int, rounds: int) -> Document:
    """Return how long the first token of a chat's next turn takes, with the cache of the history and without."""
    random, found = np.random.default_rng(1), {"kept": [], "read": []}
    for _ in range(rounds):
        said, next_turn = (random.integers(0, session.config.vocab_size, n) for n in (history, new_tokens))
        for name, kept in (("kept", KeptCaches(2**33)), ("read", None)):
            batch, texts = Batch(session, 1, kept=kept), []
            for prompt in (said, np.concatenate([said, next_turn])):
                texts.append(Text.asked_for(session, prompt, RequestOptions(max_new_tokens=1), lambda _: None))
                batch.add(texts[-1])
                started = time.perf_counter()
                while batch.step():
                    pass
            found[name].append(time.perf_counter() - started)
            assert texts[-1].cached_tokens == (history if kept else 0)
    return {"history": history, "new_tokens": new_tokens} | {name: spread(each) for name, each in found.items()}


def run(arguments: argparse.Namespace) -> Document:
    """Measure every bundle."""
    models = []
    with tempfile.TemporaryDirectory(prefix="gta-edge-batching-") as name:
        bundles = [Path(each) for each in arguments.bundles]
        if not bundles:
            gta_edge.export_model(EXAMPLE, Path(name) / "tiny-gta", verify=False)
            random = make_bundles(arguments.work, PRESET, None, ["int4"])
            bundles = [Path(name) / "tiny-gta", random["int4"]]
        for bundle in bundles:
            say(bundle.name)
            options: dict[str, Any] = {"threads": arguments.threads, "cache_dtype": arguments.cache_dtype}
            with gta_edge.load(bundle, arguments.backend, **options) as session:
                rows = measure(session, arguments.requests, arguments.prompt, arguments.new_tokens, arguments.rounds)
                models.append({"model": bundle.name, "backend": session.backend, "rows": rows})
                if 0 < arguments.history < session.max_length - TURN_TOKENS:
                    models[-1]["turn"] = turn(session, arguments.history, TURN_TOKENS, arguments.rounds)
    command = " ".join(["python benchmarks/batching.py", *sys.argv[1:]])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command, "date": date, "machine": this_machine(), "models": models}


def page(document: Document) -> str:
    """Return the figures as a table in Markdown."""
    rows = [
        {
            "model": f"{model['model']}, {model['backend']}",
            "texts at once": str(row["texts"]),
            "tokens/s": ranged(row["together_tokens_per_s"], 1),
            "one after another": ranged(row["alone_tokens_per_s"], 1),
            "ratio": ranged(row["ratio"], 2),
            "of processor time": ranged(row["processor_ratio"], 2),
            "longest wait for a token, ms": ranged(row["longest_wait_ms"], 0),
        }
        for model in document["models"]
        for row in model["rows"]
    ]
    turns = [
        {
            "model": model["model"],
            "tokens before": str(model["turn"]["history"]),
            "of the turn": str(model["turn"]["new_tokens"]),
            "first token, cache kept, ms": ranged(model["turn"]["kept"], 0, 1e3),
            "all read again, ms": ranged(model["turn"]["read"], 0, 1e3),
        }
        for model in document["models"]
        if "turn" in model
    ]
    more = f"\n\n{table(turns)}" if turns else ""
    return f"{table(rows)}{more}\n\nMedian (smallest..largest) of the rounds. {place(document)}\n"


def main() -> None:
    """Measure, print, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE")
    parser.add_argument("--requests", type=context_list, default=[1, 2, 4, 8], metavar="N,…", help="texts at once")
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=positive, default=64, help="tokens of each text")
    parser.add_argument("--history", type=int, default=0, help="tokens before a chat's turn that is timed; 0 is none")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--cache-dtype")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--work", type=Path, default=WORK, help="where a random model is made, and kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with errors_in_one_line():
        check_directories(arguments.json, arguments.markdown)
        document = run(arguments)
        markdown = page(document)
        print(markdown)
        write_outputs(arguments, document, markdown)


if __name__ == "__main__":
    main()
