"""Text without end: time per token and memory while a policy keeps a cache at so many rows, past the last position.

    python benchmarks/endless_text.py [--tokens 100000] [--rows 1024] [--policy window] [--cache-dtype fp32] …

A model of the shipped one's sizes with random weights and more positions, in float32 on ONNX Runtime. It generates
token after token; keys are rotated where the text passes the last position. What is shown is of each tenth of the text:
both figures should not grow. Memory is the process's own, not its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from comparison import Document, check_directories, errors_in_one_line, machine, place, positive, say, table
from random_bundles import make_bundles

import gta_edge
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.runtime.cache_policies import policy

PARTS = 10
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-gta"


def resident_bytes() -> int:
    """Return the memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux tells every process's VmRSS")


def run(arguments: argparse.Namespace) -> Document:
    """Generate, and return what each tenth of the text cost."""
    config = Checkpoint.open(EXAMPLE).config.replace(max_position_embeddings=arguments.positions)
    name = f"tiny-gta-{arguments.positions}"
    bundle = make_bundles(arguments.work, name, None, ["fp32"], config=config)["fp32"]
    kept = policy(arguments.policy, rows=arguments.rows, rotate=True)
    parts = []
    options = {"cache_dtype": arguments.cache_dtype, "threads": arguments.threads}
    with gta_edge.load(bundle, "onnxruntime", cache=kept, **options) as session:
        claim = session.claim()
        token, per_part = 0, arguments.tokens // PARTS
        for part in range(PARTS):
            times = []
            for _ in range(per_part):
                started = time.perf_counter()
                logits = claim.forward(np.array([[token]], np.int64))
                times.append(time.perf_counter() - started)
                token = int(logits[0].argmax())
            figures = {
                "tokens": (part + 1) * per_part,
                "length": int(session.length[0]),
                "rows": int(session.rows.max()),
                "median_ms": 1e3 * statistics.median(times),
                "mean_ms": 1e3 * statistics.fmean(times),
                "longest_ms": 1e3 * max(times),
                "resident_bytes": resident_bytes(),
                "cache_bytes": session.cache_bytes,
            }
            parts.append(figures)
            memory = figures["resident_bytes"] / 2**20
            say(f"{figures['tokens']:,} tokens: {figures['median_ms']:.2f} ms, {memory:.1f} MiB")
    options |= {key: getattr(arguments, key) for key in ("tokens", "rows", "policy", "positions")}
    words = [f"--{key.replace('_', '-')} {value}" for key, value in options.items()]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(__file__).name}", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "positions": arguments.positions,
        "cache_dtype": arguments.cache_dtype,
        "parts": parts,
    }


def markdown(document: Document) -> str:
    """Return the result as a table for the documentation."""
    rows = [
        {
            "tokens": f"{part['tokens']:,}",
            "rows": f"{part['rows']:,}",
            "ms a token, median": f"{part['median_ms']:.2f}",
            "mean": f"{part['mean_ms']:.2f}",
            "longest": f"{part['longest_ms']:.1f}",
            "memory, MiB": f"{part['resident_bytes'] / 2**20:.1f}",
            "cache, MiB": f"{part['cache_bytes'] / 2**20:.2f}",
        }
        for part in document["parts"]
    ]
    return f"A model of {document['positions']:,} positions. {place(document)}.\n\n{table(rows)}\n"


def main() -> None:
    """Measure, print, write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/endless_text"), help="where the model is kept")
    parser.add_argument("--tokens", type=positive, default=100_000, help="that are generated")
    parser.add_argument("--rows", type=positive, default=1024, help="of each layer, that the policy keeps")
    parser.add_argument("--positions", type=positive, default=4096, help="of the model")
    parser.add_argument("--policy", default="window", help="that keeps them, and can rotate")
    parser.add_argument("--cache-dtype", default="fp32", help="of the cache")
    parser.add_argument("--threads", type=positive, default=1, help="for one operator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for the documentation")
    arguments = parser.parse_args()
    with errors_in_one_line():
        check_directories(arguments.json, arguments.markdown)
        arguments.work.mkdir(parents=True, exist_ok=True)
        document = run(arguments)
        print(markdown(document))
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if arguments.markdown:
            arguments.markdown.write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
