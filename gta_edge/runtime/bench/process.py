"""The other end of ``worker.py``: starts it, asks it, and ends it whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from gta_edge.errors import BackendError
from gta_edge.runtime.bench.targets import Target, is_source_tree

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Worker", "WorkerError", "environment_for"]

Document = dict[str, Any]

_SECONDS_TO_END = 5.0
_LAST_BYTES = 4096
_HAS_US = "import gta_edge.runtime.bench.worker"


class WorkerError(BackendError):
    """The process ended instead of answering."""


class Worker:
    """A process that measures. Close it, or use it as a context manager: no process is left behind.

    It has a process group of its own, so that Ctrl-C reaches only who asked, who then ends it.

    Args:
        python: path of the interpreter.
        environment: its variables.
        directory: an empty one, which it runs in: an interpreter looks for modules where it is started.
    """

    def __init__(self, python: str, environment: dict[str, str], directory: Path) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        try:
            self._process = subprocess.Popen(
                [python, "-m", "gta_edge.runtime.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                cwd=directory,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise BackendError(f"{python} cannot be run ({error.strerror}); give a Python interpreter") from error

    def ask(self, **request: Any) -> Document:
        """Send a request and wait for its answer.

        Raises:
            BackendError: the backend's own error.
            WorkerError: the process ended; its signal, or the last line that it wrote.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout  # both are pipes
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
            answer: Document = json.loads(line) if line else {}
        except (BrokenPipeError, ValueError) as error:  # ValueError: not JSON, so not our worker
            raise WorkerError(self._reason()) from error
        if not answer:
            raise WorkerError(self._reason())
        if not answer.pop("ok"):
            raise BackendError(answer["reason"])
        return answer

    def _reason(self) -> str:
        """Say why there was no answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)
        status = self._process.poll()
        if status is not None and status < 0:
            hint = ", probably for lack of memory" if status == -signal.SIGKILL else ""
            return f"the process was ended by {signal.Signals(-status).name}{hint}"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _LAST_BYTES))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote no message")
        return f"the process ended with status {status} ({last})"

    def close(self, *, patient: bool = True) -> None:
        """End the process and all it started: with its stdin if it is given the time, else at once."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent yet cannot be sent any more
                if pipe and patient:
                    pipe.close()
        if patient:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_TO_END)
        with suppress(ProcessLookupError, PermissionError):  # it has ended, and its number may be another's
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                if file:
                    file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patient=kind is None or issubclass(kind, Exception))


def environment_for(target: Target, directory: Path) -> dict[str, str]:
    """Return variables under which the target's interpreter finds this package.

    Raises:
        BackendError: it does not find it, or something that it needs; with the line that installs it.
    """
    if target.interpreter is None:
        return target.environment(with_source=True)
    reason = ""
    for with_source in (False, True) if is_source_tree() else (False,):
        environment = target.environment(with_source=with_source)
        command = [target.python, "-c", _HAS_US]
        try:
            tried = subprocess.run(command, env=environment, cwd=directory, capture_output=True, check=False)
        except OSError as error:
            raise BackendError(f"{target.interpreter} cannot be run ({error.strerror})") from error
        if tried.returncode == 0:
            return environment
        lines = tried.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"status {tried.returncode}"
    raise BackendError(f"{target.interpreter} cannot import gta_edge ({reason}); {target.remedy}")
