"""llama.cpp for comparisons: built from PyPI's ``llama-cpp-python`` in an environment of its own, and models for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import last_line, logged, say
from gguf_file import write_gguf

from gta_edge.errors import BackendError
from gta_edge.formats.checkpoint import Checkpoint

PACKAGE = "llama-cpp-python==0.3.36"
BUILD = "-DGGML_NATIVE=ON"
"""For this machine's own instructions, as llama.cpp is built where speed matters."""

FLAGS = ("-E", "-P")
"""Of its interpreter: no PYTHONPATH of ours, and no look into this directory, which has a ``llama_cpp.py``."""

TOOLS = Path(__file__).with_name("llama_cpp_tools.py")
BASE = "BF16"

_SHOW = (
    "import json, platform, llama_cpp\n"
    "info = llama_cpp.llama_print_system_info().decode()\n"
    "print(json.dumps({'python': platform.python_version(), 'llama-cpp-python': llama_cpp.__version__, 'build': info}))"
)


@dataclass(frozen=True)
class LlamaCpp:
    """An environment that has llama.cpp, made by ``prepare``.

    Attributes:
        python: its interpreter.
        versions: what is in it, and what llama.cpp says it was built for.
    """

    python: Path
    versions: dict[str, str]

    @classmethod
    def prepare(cls, environment: Path) -> LlamaCpp:
        """Reuse an environment, or make it: that compiles for some minutes.

        Raises:
            BackendError: it cannot be made, with the last lines of the log.
        """
        python = (
            environment.absolute() / "bin" / "python"
        )  # not resolved: a link leads to the interpreter it is made of
        versions, _ = _versions(python)
        if versions is None:
            _install(environment, python)
            versions, reason = _versions(python)
            if versions is None:
                raise BackendError(f"{PACKAGE} was built and cannot be imported ({reason})", f"remove {environment}")
        return cls(python, versions)

    def model(self, checkpoint: Checkpoint, kind: str, work: Path, *, threads: int, fresh: bool = False) -> Path:
        """Return the checkpoint as a GGUF file of a type such as Q4_0, quantized from bf16 by llama.cpp itself."""
        path = work / f"{checkpoint.directory.resolve().name}-{kind}.gguf"
        if path.exists() and not fresh:
            say(f"{path}: reused")
            return path
        base = None if kind == BASE else self.model(checkpoint, BASE, work, threads=threads)
        say(f"{path}: is being made")
        partial = path.with_suffix(".partial")
        if base is None:
            write_gguf(checkpoint, partial)
        else:
            files = {"source": str(base), "target": str(partial)}
            self.tool({"job": "quantize", "type": kind, "threads": threads, **files})
        partial.rename(path)
        return path

    def tool(self, job: dict[str, Any]) -> dict[str, Any]:
        """Let ``llama_cpp_tools.py`` do a job.

        Raises:
            BackendError: it fails; its own reason.
        """
        command = [str(self.python), *FLAGS, str(TOOLS), json.dumps(job)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BackendError(f"llama.cpp failed to {job['job']} ({last_line(result.stderr)})")
        answer: dict[str, Any] = json.loads(last_line(result.stdout))
        return answer


def _install(environment: Path, python: Path) -> None:
    environment.parent.mkdir(parents=True, exist_ok=True)
    log = environment.with_suffix(".log")
    say(f"{environment}: is being made, with {PACKAGE}, which compiles for some minutes; progress is in {log}")
    logged([sys.executable, "-m", "venv", "--clear", str(environment)], log, "making an environment for llama.cpp")
    build = {"CMAKE_ARGS": BUILD, "CMAKE_BUILD_PARALLEL_LEVEL": f"{os.cpu_count() or 1}"}
    # --no-cache-dir: a wheel in pip's cache was built for the flags of another time
    command = [str(python), "-m", "pip", "install", "--no-cache-dir", "--no-binary=llama-cpp-python", PACKAGE]
    logged(command, log, f"pip install {PACKAGE}", **build)


def _versions(python: Path) -> tuple[dict[str, str] | None, str]:
    try:
        result = subprocess.run([str(python), *FLAGS, "-c", _SHOW], capture_output=True, text=True, check=False)
    except OSError as error:
        return None, str(error.strerror)
    if result.returncode:
        return None, last_line(result.stderr)
    versions: dict[str, str] = json.loads(last_line(result.stdout))
    return versions, ""
