"""One stage as a process with a time limit: what it prints goes to the log, its figures to the results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu_stages.catalogue import Stage
from scripts.gpu_stages.figures import MARK

__all__ = ["Record", "Running"]

_GRACE_S = 5
_COUNTS = re.compile(r"\b(\d+) (passed|failed|skipped|errors?|deselected|xfailed)\b")
_MAX_LINE, _MAX_LAST = 4000, 300
_LAST_LINES = 12


class Record:
    """The files of a campaign, which several stages may write to at a time.

    Args:
        directory: where they are; it is made, and what is there is appended to.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.results, self.log = directory / "results.jsonl", directory / "log.txt"
        self._lock = threading.Lock()

    def add(self, **row: Any) -> None:
        """Append a row to the results, and have it on the disk."""
        with self._lock, self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def note(self, text: str) -> None:
        """Append to the log."""
        with self._lock, self.log.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows; a line that was not written to its end is left out."""
        found = []
        text = self.results.read_text(encoding="utf-8", errors="replace") if self.results.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                found += [row] if isinstance(row, dict) else []
        return found


@dataclass
class Running:
    """A stage that runs.

    Args:
        stage: what it is.
        command: with every place filled in.
        environment: all of it.
        directory: where it runs.
        record: where its output goes.
    """

    stage: Stage
    command: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    record: Record
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    _failed: list[str] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None
    _ended: bool = False

    def run(self, limit_s: float) -> dict[str, Any]:
        """Run it to its end or to its limit, and return its row of the results."""
        started = time.monotonic()
        self.record.note(f"\n===== {self.stage.name}: {' '.join(self.command)}\n")
        try:
            process = self._process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return self._row("failed", None, started, limit_s) | {"last": str(error)}
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        if self._ended:  # meanwhile
            self.end()
        try:
            status = process.wait(limit_s)
            outcome = "passed" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome, status = "timed out", None
        finally:
            self.end()
            reader.join(_GRACE_S)
        row = self._row(outcome, status, started, limit_s)
        if self.stage.is_test:
            counts = {kind.removesuffix("s"): int(number) for number, kind in _COUNTS.findall(row["last"])}
            row["tests"] = counts | ({"failures": self._failed} if self._failed else {})
            if outcome == "passed" and not counts.get("passed"):
                row["outcome"] = "failed"  # all skipped, which proves nothing
        return row

    def end(self) -> None:
        """End the process and all that it has started."""
        self._ended, process = True, self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)

    def tail(self) -> list[str]:
        """Return the last lines of its output, without figures."""
        return list(self._last)

    def _row(self, outcome: str, status: int | None, started: float, limit_s: float) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "outcome": outcome,
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "limit_s": round(limit_s, 1),
            "last": self._last[-1] if self._last else "",
        }

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # a pipe
        with process.stdout as lines:
            for line in lines:
                self._take(line)

    def _take(self, line: str) -> None:
        """Keep a line: its figures, or the line itself."""
        self.record.note(line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + "…\n")
        figures = _figures(line)
        if figures is not None:
            self.record.add(stage=self.stage.name, **figures)
        elif line.strip():
            self._last.append(line.strip()[:_MAX_LAST])
            if line.startswith(("FAILED ", "ERROR ")) and len(line.split()) > 1:
                self._failed.append(line.split()[1])


def _figures(line: str) -> dict[str, Any] | None:
    if line.startswith(MARK):
        with suppress(ValueError):
            found = json.loads(line[len(MARK) :])
            if isinstance(found, dict) and "what" in found and "stage" not in found:
                return found
    return None
