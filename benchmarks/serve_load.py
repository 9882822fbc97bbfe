"""A service under load: clients on this machine, beside the same requests one at a time; its memory over many requests.

    python benchmarks/serve_load.py BUNDLE [--clients 1,2,4,8] [--requests 6] [--churn 2000] [--json]

Clients send one request after the other: prompts of 16 to 256 random tokens, answers of 16 to 64, the same ones
whoever answers them. ``one at a time`` is the same service with one slot. Times are seen by the clients: to the first
token from the request, per token between its first and last one. ``--churn`` requests of a few tokens follow, while the
process's memory is read. How many conversations fit into a GB is computed, beside GQA of the same sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from comparison import machine, place, positive

from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import gqa_like

PROMPTS, ANSWERS = (16, 257), (16, 65)
CHURN_CLIENTS = 8
KEPT_MIB = 16  # caches of texts that have ended: full soon, so that what grows after that is a leak
CONTEXTS = (2048, 8192, 32768)


@dataclass
class Measured:
    """What clients saw."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    each: list[float] = field(default_factory=list)  # seconds per token after it, of each answer
    tokens: int = 0

    def row(self) -> dict[str, float]:
        """Return them as a table has them."""
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "requests": len(self.first),
            **{f"ttft_ms_p{p}": 1e3 * percentile(self.first, p) for p in (50, 99)},
            **{f"tpot_ms_p{p}": 1e3 * percentile(self.each, p) for p in (50, 99)},
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile; NaN of nothing."""
    return float(np.percentile(values, percent)) if values else float("nan")


@contextmanager
def served(bundle: Path, slots: int, options: Sequence[str]) -> Iterator[str]:
    """Run a service and yield its address."""
    command = [sys.executable, "-m", "gta_edge", "serve", str(bundle), "--json", "--port", "0"]
    command += ["--parallel", str(slots), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(60)


def connect(url: str) -> HTTPConnection:
    """Return a connection to a service; an answer may take minutes."""
    parts = urlsplit(url)
    return HTTPConnection(str(parts.hostname), parts.port, timeout=600)


def ask(connection: HTTPConnection, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Send one request; return the seconds to its first token, and from that to its last one."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times = [time.perf_counter() for line in response if line.startswith(b"data: {")]
    assert len(times) == tokens, (len(times), tokens)
    return times[0] - started, times[-1] - times[0]


def requests(bundle: Bundle, client: int, count: int) -> Iterator[tuple[list[int], int]]:
    """Yield the prompts of a client, and how many tokens it asks for."""
    rng = np.random.default_rng(client)
    room = bundle.config.max_position_embeddings
    for _ in range(count):
        tokens = min(int(rng.integers(*ANSWERS)), room // 4)
        length = min(int(rng.integers(*PROMPTS)), room // 2)
        yield rng.integers(0, bundle.config.vocab_size, length).tolist(), tokens


def load(url: str, bundle: Bundle, clients: int, count: int) -> Measured:
    """Let clients send their requests, each one after the other."""
    found, lock = Measured(), threading.Lock()

    def run(client: int) -> None:
        connection = connect(url)
        for prompt, tokens in requests(bundle, client, count):
            first, rest = ask(connection, prompt, tokens)
            with lock:
                found.first.append(first)
                found.each.append(rest / (tokens - 1))
                found.tokens += tokens
        connection.close()

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - started
    return found


def resident_bytes(url: str) -> int:
    """Return the memory of a service's process."""
    connection = connect(url)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    (value,) = [line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes")]
    return int(float(value))


def churn(url: str, bundle: Bundle, total: int) -> list[int]:
    """Send many requests of a few tokens; return the service's memory after each twentieth of them."""
    found = [resident_bytes(url)]
    for part in range(20):
        share = max(1, total // 20 // CHURN_CLIENTS)

        def run(client: int, part: int = part, share: int = share) -> None:
            connection = connect(url)
            rng = np.random.default_rng([part, client])
            for _ in range(share):
                ask(connection, rng.integers(0, bundle.config.vocab_size, int(rng.integers(1, 40))).tolist(), 2)
            connection.close()

        threads = [threading.Thread(target=run, args=(client,)) for client in range(CHURN_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append(resident_bytes(url))
    return found


def conversations(bundle: Bundle) -> list[dict[str, Any]]:
    """Return how many conversations of some lengths have their cache in a GB of float32, and of GQA's."""
    own, gqa = bytes_per_token(bundle.config), gqa_like(bundle.config)
    beside = bytes_per_token(gqa) if gqa else None
    return [
        {"tokens": n, "fit": int(1e9 // (own * n)), "gqa_fit": int(1e9 // (beside * n)) if beside else None}
        for n in CONTEXTS
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=lambda text: [positive(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=positive, default=6, help="of each client (6)")
    parser.add_argument("--churn", type=int, default=2000, help="requests while memory is read (2000)")
    parser.add_argument("--threads", type=positive, help="of the service")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    given = ["--cache-ram", str(KEPT_MIB)] + ([] if options.threads is None else ["--threads", str(options.threads)])
    slots = max(options.clients)
    rows, memory = [], []
    with served(options.bundle, slots, given) as many, served(options.bundle, 1, given) as one:
        for url in (many, one):
            load(url, bundle, 1, 1)  # whatever is made lazily
        for clients in options.clients:
            # both in turn, each with half of the machine's moods
            for name, url in ((f"{slots} slots", many), ("one at a time", one)):
                rows.append({"clients": clients, "service": name, **load(url, bundle, clients, options.requests).row()})
        if options.churn:
            memory = churn(many, bundle, options.churn)
    command = " ".join(["python benchmarks/serve_load.py", *map(str, sys.argv[1:])])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = {"command": command, "date": date, "machine": machine(), "bundle": str(options.bundle)}
    found |= {"rows": rows, "memory_bytes": memory}
    found["conversations"] = conversations(bundle)
    print(json.dumps(found) if options.json else table(found))


def table(found: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    lines = [
        "| clients | service | tokens/s | first token p50, p99 ms | per token p50, p99 ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for many, one in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        for row in (many, one):
            ratio = f"{many['tokens_per_s'] / one['tokens_per_s']:.2f}" if row is many else ""
            lines.append(
                f"| {row['clients']} | {row['service']} | {row['tokens_per_s']:.1f} "
                f"| {row['ttft_ms_p50']:.0f}, {row['ttft_ms_p99']:.0f} "
                f"| {row['tpot_ms_p50']:.1f}, {row['tpot_ms_p99']:.1f} | {ratio} |"
            )
    if memory := found["memory_bytes"]:
        half = len(memory) // 2
        early, late = (statistics.fmean(part) / 1e6 for part in (memory[1 : half + 1], memory[half + 1 :]))
        lines.append(
            f"\nmemory: {early:.1f} MB in the mean of the first half of the many requests, {late:.1f} MB of the second"
        )
    for row in found["conversations"]:
        beside = "" if row["gqa_fit"] is None else f", of GQA {row['gqa_fit']}"
        lines.append(f"conversations of {row['tokens']:,} tokens in 1 GB of cache: {row['fit']}{beside}")
    return "\n".join([*lines, "", place(found)])


if __name__ == "__main__":
    main()
