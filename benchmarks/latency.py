"""Latency of a bundle: prefill and time per token at several contexts, with the floor that memory sets.

    python benchmarks/latency.py BUNDLE [--backend onnxruntime] [--contexts 128,2048] [--new-tokens 32] [--json]

First the static costs: bytes of weights and cache that a token must read, and the machine's measured bandwidth. Then
what was measured: the median over the new tokens, and its distance from the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from typing import Any

import numpy as np
import rich.console
import rich.table
from floor import bandwidth, floor_ms, token_bytes

import gta_edge
from gta_edge.bundle import Bundle
from gta_edge.errors import InputError
from gta_edge.runtime.backends import open_session
from gta_edge.runtime.session import Session


def measure(session: Session, context: int, new_tokens: int) -> dict[str, float]:
    """Return milliseconds until the first token, and per token after it, at one context."""
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, (1, context + new_tokens))
    session.reset()
    session.forward(ids[:, :context])  # warm-up: kernels, and the growth of the cache
    session.forward(ids[:, context : context + 1])
    session.reset()
    start = time.perf_counter()
    session.forward(ids[:, :context])
    first = time.perf_counter() - start
    steps = []
    for i in range(context, context + new_tokens):
        start = time.perf_counter()
        session.forward(ids[:, i : i + 1])
        steps.append(time.perf_counter() - start)
    steps.sort()
    return {
        "context": context,
        "ttft_ms": 1e3 * first,
        "prefill_tokens_per_s": context / first,
        "tpot_ms": 1e3 * statistics.median(steps),
        "tpot_p90_ms": 1e3 * steps[int(0.9 * (len(steps) - 1))],
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "cache_bytes": session.cache_bytes,
    }


def run(bundle: str, backend: str, contexts: list[int], new_tokens: int) -> dict[str, Any]:
    """Measure a bundle at every context that it has positions for."""
    opened = Bundle.open(bundle)
    rate = bandwidth()
    with open_session(opened, backend) as session:
        longest = session.max_length - new_tokens
        if min(contexts) > longest:
            raise InputError(f"contexts {contexts} with {new_tokens} new tokens pass the model's {session.max_length}")
        results = [measure(session, context, new_tokens) for context in contexts if context <= longest]
        name = session.backend
    weights = token_bytes(opened, backend=name)
    for result in results:
        cache = result["context"] * opened.config.cache_bytes_per_token()
        result["floor_ms"] = floor_ms(weights, cache, rate)
        result["bandwidth_fraction"] = result["floor_ms"] / result["tpot_ms"]
    return {
        "bundle": bundle,
        "precision": opened.precision,
        "backend": name,
        "cores": os.cpu_count(),
        "bandwidth_gb_per_s": rate / 1e9,
        "weight_bytes_read_per_token": weights,
        "cache_bytes_per_token": opened.config.cache_bytes_per_token(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "results": results,
    }


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    console = rich.console.Console()
    console.print(
        f"{report['bundle']} in {report['precision']} on {report['backend']}, {report['cores']} cores: a token reads "
        f"{report['weight_bytes_read_per_token'] / 2**20:,.1f} MiB of weights and {report['cache_bytes_per_token']:,} "
        f"bytes per cached token, at {report['bandwidth_gb_per_s']:.1f} GB/s"
    )
    table = rich.table.Table("context", "first token", "prefill", "per token", "tokens/s", "floor", "cache", box=None)
    for r in report["results"]:
        table.add_row(
            f"{r['context']}",
            f"{r['ttft_ms']:.1f} ms",
            f"{r['prefill_tokens_per_s']:.0f}/s",
            f"{r['tpot_ms']:.2f} ms",
            f"{r['decode_tokens_per_s']:.1f}",
            f"{r['floor_ms']:.2f} ms",
            f"{r['cache_bytes'] / 2**20:.1f} MiB",
        )
    console.print(table)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--contexts", default="128,512")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    contexts = [int(part) for part in arguments.contexts.split(",")]
    try:
        report = run(arguments.bundle, arguments.backend, contexts, arguments.new_tokens)
    except gta_edge.GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main()
