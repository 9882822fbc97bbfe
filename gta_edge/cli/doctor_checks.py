"""What ``doctor`` tries, in a process of its own: a library that ends the process it is imported into does not end it.

The process answers each check in turn with a line of JSON. Where it ends before it has answered, that is the answer of
the check that was running, and another process goes on with the next.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any

from gta_edge.errors import GtaEdgeError
from gta_edge.runtime.backend import Backend
from gta_edge.runtime.registry import BACKENDS
from gta_edge.support.text import one_line

__all__ = ["CHECKS", "answer", "run"]

Answer = dict[str, Any]
"""``works``, ``reason``, ``remedy``, and what a check has found beside."""

_TIMEOUT_S = 300.0
_LAST_BYTES = 4096
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from gta_edge.cli.doctor_checks import answer
answer(int(sys.argv[2]), sys.argv[3:])
"""


# --- one process after another ---------------------------------------------------------------------------------------


def run(names: Sequence[str]) -> dict[str, Answer]:
    """Return what each of these ``CHECKS`` answers; one that ends its process, or does not end, says so."""
    answers: dict[str, Answer] = {}
    while len(answers) < len(names):
        todo = names[len(answers) :]
        given, ending = _ask(todo)
        answers |= dict(zip(todo, given, strict=False))
        if len(given) < len(todo):
            answers[todo[len(given)]] = ending
    return answers


def _ask(names: Sequence[str]) -> tuple[list[Answer], Answer]:
    """Return the answers of a new process, which may be too few, and what to make of its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        # the modules are looked for where this process does, and not where the interpreter would look by itself
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(out.fileno()), *names]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(out.fileno(),),
                timeout=_TIMEOUT_S,
                check=False,
            )
            ending = _ending(done.returncode, errors)
        except subprocess.TimeoutExpired:
            ending = f"did not end in {_TIMEOUT_S:.0f} s"
        out.seek(0)
        lines = out.read().decode(errors="replace").splitlines(keepends=True)
    said = [json.loads(line) for line in lines if line.endswith("\n")]
    module = said[-1].get("module") if said else None  # what it was importing
    last = _state(f"importing {module} {ending}", _reinstall(module)) if module else _state(f"trying it {ending}")
    return [each for each in said if "works" in each], last


def _reinstall(module: str) -> str:
    return f"pip install --upgrade --force-reinstall {module.replace('_', '-').replace('.', '-')}"


def _ending(status: int, errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - _LAST_BYTES))
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    said = f" ({one_line(lines[-1])})" if lines else ""
    how = f"with {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    how += ", probably for lack of memory" if status == -signal.SIGKILL else ""
    return f"ends the process {how}{said}"


def answer(descriptor: int, names: Sequence[str]) -> None:
    """Answer these checks, a line each, where nothing else is written: libraries may print anything anywhere."""
    global _answers
    _answers = os.fdopen(descriptor, "w", encoding="ascii")
    for name in names:
        try:
            found = CHECKS[name]()
        except GtaEdgeError as error:
            found = _refused(error)
        except Exception as error:  # a library's own: doctor is asked because something is wrong
            found = _state(f"{type(error).__name__}: {one_line(error)}", "run `gta-edge doctor --json`, and report it")
        _say(found)
    os._exit(0)  # libraries may fail when they are unloaded, and all is said


def _say(document: dict[str, Any]) -> None:
    if _answers:
        _answers.write(json.dumps(document) + "\n")
        _answers.flush()


_answers: IO[str] | None = None  # one process asks, another answers


def _state(reason: str | None = None, remedy: str | None = None, **found: Any) -> Answer:
    return {"works": reason is None, "reason": reason, "remedy": remedy, **found}


def _refused(error: GtaEdgeError) -> Answer:
    return _state(error.problem, (error.remedy or "").removeprefix("run: ") or None)


# --- the checks ------------------------------------------------------------------------------------------------------


def _importing(module: str | None) -> None:
    """Say what is being imported, which may end this process."""
    _say({"module": module})


def _modules(*names: str, extra: str) -> Answer:
    """Whether these modules can be imported."""
    from gta_edge.libraries.optional import require_modules

    require_modules(names, extra, _importing)
    return _state()


def _backend(backend: Backend) -> Answer:
    """Whether a backend works here, and what it has found."""
    availability = backend.availability(_importing)
    return (_refused(availability.error) if availability.error else _state()) | dict(availability.found)


def _driver() -> Answer:
    """Whether CUDA starts, and the version that the driver knows."""
    from gta_edge.libraries.cuda import driver_cuda_version, driver_problem

    version = driver_cuda_version()
    found = _refused(problem) if (problem := driver_problem()) else _state()
    return found | {"cuda": f"{version[0]}.{version[1]}" if version else None}


def _kernels() -> Answer:
    """Whether the CUDA kernels can be compiled and run here, and on what."""
    from gta_edge.cuda.compiler import check_compiler
    from gta_edge.cuda.gpu import current_gpu
    from gta_edge.cuda.session import check_usable

    gpu = current_gpu()
    check_compiler(gpu.architecture)
    check_usable()
    return _state(gpu=f"{gpu.name}, {gpu.architecture}, {gpu.processors} multiprocessors")


CHECKS: dict[str, Callable[[], Answer]] = {
    "driver": _driver,
    "kernels": _kernels,
    **{name: partial(_backend, backend) for name, backend in BACKENDS.items()},
    "export": lambda: _modules("torch", "onnx", "onnx_ir", "onnxscript", extra="export"),
    "plot": lambda: _modules("matplotlib", extra="plot"),
}
"""By what they are of."""
