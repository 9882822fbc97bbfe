"""Runs the campaign's stages, one process after the other, within a budget of time."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scripts.gpu_stages.catalogue import STAGES, Stage
from scripts.gpu_stages.process import Record, Running
from scripts.gpu_stages.report import table

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
BUDGET_S, MOST_S = 840, 10**6
LEAST_S = 10
"""A stage is not begun with less time left."""
_TOOLKITS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/cuda/nsight-compute")
_WORKER_BYTES = 6 * 2**30
"""Memory for each of several pytest processes: a CUDA context, and float64 references."""


class Left(Exception):  # noqa: N818  # no error: the reason why a stage is left out
    """A stage cannot run here."""


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for.

    Returns:
        0 if all that ran passed, 1 if not or if there is no GPU, 130 after Ctrl-C.
    """
    options = _parse(arguments)
    chosen = [stage for stage in STAGES if stage.name in options.only] if options.only else list(STAGES)
    if options.list:
        for stage in chosen:
            print(f"{stage.name:<24} {stage.limit_s:>4} s  {stage.what}")
        return 0
    if not options.rehearse and (problem := gpu_problem()):
        print(
            f"error: {problem}; run this on a machine with an NVIDIA GPU, or rehearse it without one: "
            "python scripts/gpu_campaign.py --rehearse",
            file=sys.stderr,
        )
        return 1
    record = Record(options.output)
    if options.resume:
        done = {row["stage"] for row in record.rows() if row.get("outcome") == "passed"}
        chosen = [stage for stage in chosen if stage.name not in done]
    record.add(
        what="campaign",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
        rehearsal=options.rehearse,
        budget_s=options.budget,
    )
    campaign = Campaign(record, options.rehearse, time.monotonic() + options.budget, options.limits)
    try:
        with _signals():
            campaign.run(chosen)
    except KeyboardInterrupt:
        return 130
    finally:
        text = table(record.rows(), options.output)
        (options.output / "table.md").write_text(text, encoding="utf-8")
        print(f"\n{text}")
    if not campaign.ran:
        print("error: no stage ran; the table above says why", file=sys.stderr)
    return 1 if campaign.failed or not campaign.ran else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_campaign.py", description="Prove and measure gta-edge on a GPU.")
    parser.add_argument("--budget", type=_positive, default=BUDGET_S, metavar="SECONDS", help="of all stages together")
    parser.add_argument(
        "--limits", type=_positive, default=1, metavar="N", help="times the stages' limits; 6 on a board"
    )
    parser.add_argument("--only", type=_names, default=(), metavar="STAGE,...", help="these stages, see --list")
    parser.add_argument("--resume", action="store_true", help="leave out what DIR says has passed")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="for the results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: simulated kernels, a tiny model")
    parser.add_argument("--list", action="store_true", help="list the stages and end")
    options = parser.parse_args(arguments)
    options.output = options.output.absolute()
    return options


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= MOST_S:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to {MOST_S}")
    return value


def _names(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no stage is called {unknown[0]!r}; expected some of {', '.join(known)}")
    return names


def gpu_problem() -> str | None:
    """Return why there is no GPU to run on, None if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status, count = driver.cuInit(0), ctypes.c_int()
    except (OSError, AttributeError):
        return "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)"
    if status or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return f"the NVIDIA driver finds no GPU here (cuInit gave {status})"
    return None


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the campaign as Ctrl-C does: stages with it, and the table written."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Campaign:
    """Stages that run, and how they ended.

    Args:
        record: where all of it goes.
        rehearse: whether there is no GPU.
        deadline: on the monotonic clock.
        limits: factor of the stages' time limits.
    """

    def __init__(self, record: Record, rehearse: bool, deadline: float, limits: float = 1) -> None:
        self.record, self.rehearse, self.deadline, self.limits = record, rehearse, deadline, limits
        self.ran = self.failed = 0
        self._running: list[Running] = []
        self._ended = False

    def run(self, stages: Sequence[Stage]) -> None:
        """Run stages in their order: one at a time on a GPU, in a rehearsal, where no time counts, two."""
        with ThreadPoolExecutor(2 if self.rehearse else 1) as pool:
            try:
                for done in [pool.submit(self._stage, stage) for stage in stages]:
                    done.result()
            except BaseException:
                self._ended = True
                for running in list(self._running):
                    running.end()
                raise

    def _stage(self, stage: Stage) -> None:
        if self._ended:
            return
        left = self.deadline - time.monotonic()
        try:
            command = self._command(stage)
            if left < LEAST_S:
                raise Left("no time left")
        except Left as reason:
            self.record.add(stage=stage.name, outcome="left out", last=str(reason))
            print(f"{stage.name}: left out, {reason}", flush=True)
            return
        running = Running(stage, command, self._environment(stage), ROOT, self.record)
        self._running.append(running)
        if self._ended:  # before it could be told
            return
        print(f"{stage.name} …", flush=True)
        row = running.run(min(self.limits * stage.limit_s, left))
        self._running.remove(running)
        self.record.add(**row)
        self.ran += 1
        print(f"{stage.name}: {row['outcome']} after {row['seconds']} s", flush=True)
        if row["outcome"] != "passed":
            self.failed += 1
            print("\n".join(f"    {line}" for line in running.tail()), flush=True)

    def _command(self, stage: Stage) -> list[str]:
        """Return a stage's command with its places filled in.

        Raises:
            Left: something that it needs is not here.
        """
        if self.rehearse:
            if stage.rehearsal is None:
                raise Left("not rehearsed, or with another stage")
        else:
            missing = [name for name in stage.needs if not _installed(name)]
            if missing:
                raise Left(f"{', '.join(missing)} not installed")
            if old := _outdated(stage.needs):
                raise Left(old)
        command: list[str] = []
        for part in stage.rehearsal if self.rehearse and stage.rehearsal else stage.command:
            if part == "{spread}":
                command += _spread()
            elif part.startswith("{program:"):
                command.append(_program(part[len("{program:") : -1]))
            else:
                output = self.record.results.parent
                command.append(part.replace("{python}", sys.executable).replace("{output}", str(output)))
        return command

    def _environment(self, stage: Stage) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.rehearse:
            own |= {"GTA_EDGE_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **stage.environment}


def _installed(name: str) -> bool:
    kind, _, distribution = name.partition(":")
    try:
        if kind == "distribution" and distribution:
            importlib.metadata.version(distribution)
            return True
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package above it is missing
        return False


def _outdated(names: Sequence[str]) -> str | None:
    """Return which module is older than this package requires, with what it requires; None where none is."""
    from gta_edge.libraries.optional import outdated  # here, since --list needs nothing but Python

    return next(filter(None, map(outdated, names)), None)


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_TOOLKITS))
    if found is None:
        raise Left(f"no {name} on the path nor in {_TOOLKITS[0]}")
    return found


def _spread() -> list[str]:
    """Return pytest's arguments for several processes, where pytest-xdist is here and there is memory for them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = min(8, os.cpu_count() or 1, memory // _WORKER_BYTES)
    return ["-n", str(workers), "--dist", "worksteal"] if workers > 1 and _installed("xdist") else []
