"""What a token costs at long contexts with a smaller cache, in int8 or by a policy, beside every token's in float32.

    python benchmarks/long_contexts.py [--models gta-1b,gqa-1b] [--contexts 8192,32000] [--share 0.2] [--rounds 5] …

Models with random weights in int4, on ONNX Runtime's CPU. No prompt is read: a cache is filled with random values, as
a token costs the same whatever they are. All caches of a model are in one process and take turns; ratios are within a
round. A policy's tokens are as many as lie between two of its evictions, so that each round has one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from comparison import context_list, machine, positive
from random_bundles import make_bundles

import gta_edge
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.session import Session

TOKENS = 64  # of a round: the policies' interval
CASES = ("float32", "int8", "window", "zsmerge", "zsmerge in int8")


def opened(path: Path, case: str, context: int, share: float) -> tuple[Session, int]:
    """Return a session whose cache has room, and how many rows it holds."""
    name, _, dtype = case.partition(" in ")
    if name in ("float32", "int8"):
        return gta_edge.load(path, backend="onnxruntime", cache_dtype="int8" if name == "int8" else "fp32"), context
    rows = int(share * context)
    chosen = policy(name, rows=rows, interval=TOKENS)
    return gta_edge.load(path, backend="onnxruntime", cache=chosen, cache_dtype=dtype or "fp32"), rows


def fill(session: Session, tokens: int, rng: np.random.Generator) -> None:
    """Make the cache one of so many tokens, of random values."""
    assert isinstance(session, OnnxRuntimeSession)
    session.forward(np.zeros((1, 1), np.int64))  # whatever is made lazily
    session.reset()
    session._cache.reserve(1, tokens + 4 * TOKENS, session._resize)
    for name, values in session._buffers.items():
        flat = values.reshape(-1)
        if values.dtype == np.int8:
            flat[:] = rng.integers(-127, 128, flat.size, np.int8)
        else:  # keys, values, what was received; scales of int8
            flat[:] = 0.01 if "scale" in name else np.abs(rng.standard_normal(flat.size, np.float32))
    session._cache.length = np.array([tokens])


def timed(session: Session) -> float:
    """Return the mean seconds of a token over ``TOKENS`` of them."""
    start = time.perf_counter()
    for _ in range(TOKENS):
        session.forward(np.ones((1, 1), np.int64))
    return (time.perf_counter() - start) / TOKENS


def measured(path: Path, context: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each case costs at a context."""
    rng, times = np.random.default_rng(0), {case: [] for case in options.cases}  # type: dict[str, list[float]]
    with ExitStack() as stack:
        sessions = {}
        for case in options.cases:
            session, rows = opened(path, case, context, options.share)
            sessions[case] = stack.enter_context(session)
            fill(session, rows, rng)
            timed(session)
        for _ in range(options.rounds):
            for case, session in sessions.items():
                times[case].append(timed(session))
        for case, session in sessions.items():
            ratios = [base / own for base, own in zip(times[options.cases[0]], times[case], strict=True)]
            yield {
                "context": context,
                "cache": case,
                "ms_per_token": round(1e3 * statistics.median(times[case]), 2),
                "speed": round(statistics.median(ratios), 3),
                "speed_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "cache_MB": round(session.cache_bytes / 1e6, 1),
            }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/cache_policies"), help="where models are kept")
    parser.add_argument("--models", default="gta-1b,gqa-1b", help="presets")
    parser.add_argument("--contexts", type=context_list, default=[8192, 32000])
    parser.add_argument("--share", type=float, default=0.2, help="of the context's rows, that policies keep")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--layers", type=positive, help="layers, instead of the models' own")
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=list(CASES), help="the first is the yardstick"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.models.split(","):
        path = make_bundles(options.work, model, options.layers, ["int4"])["int4"]
        for context in options.contexts:
            for row in measured(path, context, options):
                rows.append({"model": model, **row})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        versions = {"python": platform.python_version(), "onnxruntime": version("onnxruntime")}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found = {"date": date, "machine": machine(), "versions": versions, "share": options.share, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
