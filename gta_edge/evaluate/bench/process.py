"""The other end of ``worker.py``: starts it, asks it, and ends it whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from gta_edge.errors import BackendError, GtaEdgeError, OutputError
from gta_edge.evaluate.bench.targets import Target, is_source_tree
from gta_edge.support.text import brief, one_line, printable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Worker", "WorkerError", "environment_for", "last_words", "temporary_files"]

Document = dict[str, Any]

_SECONDS_TO_END = 5.0
_SECONDS_TO_IMPORT = 120.0
_LAST_BYTES = 4096
_LONGEST_LINE = 2**26  # characters; steps that were timed are some twenty each
_MAX_NOISE = 10_000  # lines that are no answers; who writes more is no worker of ours
_ANSWER = '{"ok":'
_HAS_US = "import gta_edge.evaluate.bench.worker"
_OTHERS = ("-m", "gta_edge.evaluate.bench.worker")
_AN_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
_MAX_REASON = 300
_KINDS: dict[str, type[GtaEdgeError]] = {"OutputError": OutputError}
"""Errors of a worker that are not its backend's."""


class WorkerError(BackendError):
    """The process ended instead of answering."""


class Worker:
    """A process that measures. Close it, or use it as a context manager: no process is left behind.

    It has a process group of its own, so that Ctrl-C reaches only who asked, who then ends it.

    Args:
        python: path of the interpreter.
        environment: its variables.
        directory: an empty one, which it runs in: an interpreter looks for modules where it is started.
        arguments: of the interpreter, as ``Target.arguments`` has them.

    Raises:
        BackendError: the interpreter cannot be run.
        OutputError: the directory cannot be written to.
    """

    def __init__(
        self, python: str, environment: dict[str, str], directory: Path, arguments: Sequence[str] = _OTHERS
    ) -> None:
        with temporary_files(directory):
            self._errors: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # closed by close()
        try:
            self._process = subprocess.Popen(
                [python, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                cwd=directory,
                encoding="utf-8",
                errors="replace",  # whatever an interpreter prints before it is ours
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise BackendError(
                f"{brief(python)} cannot be run ({error.strerror})", "give a Python interpreter"
            ) from error

    def ask(self, **request: Any) -> Document:
        """Send a request and wait for its answer.

        Raises:
            BackendError: the backend's own error.
            OutputError: it could not write its temporary files.
            WorkerError: the process ended; its signal, or the last line that it wrote.
        """
        stdin = self._process.stdin
        assert stdin  # a pipe
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        answer = self._answer()
        if not answer.pop("ok"):
            remedy = answer.get("remedy")
            kind = _KINDS.get(str(answer.get("kind")), BackendError)
            raise kind(str(answer.get("reason")), None if remedy is None else str(remedy))
        return answer

    def _answer(self) -> Document:
        """Return the next answer; lines before it are what sites and libraries print, and none of our business."""
        stdout = self._process.stdout
        assert stdout  # a pipe
        for _ in range(_MAX_NOISE):
            line = stdout.readline(_LONGEST_LINE)
            if not line:
                break
            begin = max(0, line.find(_ANSWER))  # after what was begun and not ended
            with suppress(ValueError, RecursionError):  # not JSON
                answer = json.loads(line[begin:])
                if isinstance(answer, dict) and isinstance(answer.get("ok"), bool):
                    return answer
        raise self._ended()

    def _ended(self) -> WorkerError:
        """Return why there was no answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)
        status = self._process.poll()
        if status is None:
            return WorkerError("the process gave no answer that this program understands", "give a Python interpreter")
        if status < 0:
            hint = ", probably for lack of memory" if status == -signal.SIGKILL else ""
            return WorkerError(f"the process was ended by {signal.Signals(-status).name}{hint}")
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _LAST_BYTES))
        return WorkerError(f"the process ended with status {status} ({last_words(self._errors.read())})")

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
            tried = subprocess.run(
                command,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,  # what waits for a person is no interpreter
                capture_output=True,
                check=False,
                timeout=_SECONDS_TO_IMPORT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = getattr(error, "strerror", None) or f"it did not end in {_SECONDS_TO_IMPORT:.0f} s"
            raise BackendError(
                f"{brief(target.interpreter)} cannot be run ({why})", "give a Python interpreter"
            ) from error
        if tried.returncode == 0:
            return environment
        reason = last_words(tried.stderr) if tried.stderr.strip() else f"status {tried.returncode}"
    raise BackendError(f"{printable(target.interpreter)} cannot import gta_edge ({reason})", target.remedy)


def last_words(output: bytes) -> str:
    """Return why an interpreter ended: the last error that it wrote, or else its last line."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _AN_ERROR.match(line)]
    return one_line((errors or lines or ["it wrote no message"])[-1], _MAX_REASON)


@contextmanager
def temporary_files(directory: Path) -> Iterator[None]:
    """Turn what the system says of temporary files in the body into one message with their place.

    Raises:
        OutputError: they cannot be written.
    """
    try:
        yield
    except OSError as error:  # numpy's has no number where it could not write all
        raise OutputError(
            f"{printable(str(directory))}: temporary files cannot be written there "
            f"({error.strerror or 'no space left on device'})",
            "free some space, or set TMPDIR to another directory",
        ) from error
