"""Who is measured: a backend, under this interpreter or another one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import gta_edge.version
from gta_edge.errors import BackendError
from gta_edge.libraries.install import install_command
from gta_edge.runtime.registry import BACKENDS, check_backend
from gta_edge.support.files import cache_directory
from gta_edge.support.text import brief

__all__ = ["Target", "parse_targets"]

_ROOT = Path(gta_edge.version.__file__).parents[1]
_OWN_CACHE = "GTA_EDGE_CACHE"
_OF_AN_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__")

_WORKER = "gta_edge.evaluate.bench.worker"
_WITH_PATH = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from {_WORKER} import main; main()"
_FLAGS = {
    "isolated": "-I",
    "ignore_environment": "-E",
    "no_user_site": "-s",
    "no_site": "-S",
    "safe_path": "-P",
    "dont_write_bytecode": "-B",
    "dev_mode": "-Xdev",
}
"""Options of an interpreter that decide which modules it finds, and how it runs them."""


@dataclass(frozen=True)
class Target:
    """A backend to measure.

    Attributes:
        backend: its name.
        interpreter: the Python that runs it, as it was given; None for this one.
    """

    backend: str
    interpreter: str | None = None

    @property
    def label(self) -> str:
        """As ``--backend`` takes it."""
        return self.backend if self.interpreter is None else f"{self.backend}@{self.interpreter}"

    @property
    def python(self) -> str:
        """The interpreter's path; links stay, since one in a virtual environment is a link.

        Raises:
            BackendError: there is no such program.
        """
        if self.interpreter is None:
            if not sys.executable:
                raise BackendError(
                    "this Python does not know where it lies", f"name one: {self.backend}@/usr/bin/python3"
                )
            return sys.executable
        found = shutil.which(os.path.expanduser(self.interpreter))  # noqa: PTH111  # a command's name, maybe
        if found is None:
            raise BackendError(
                f"{brief(self.interpreter)} is no program that can be run",
                f"give a Python interpreter after the @, such as {self.backend}@/usr/bin/python3",
            )
        return os.path.abspath(found)  # noqa: PTH100  # resolve() would follow the link

    @property
    def arguments(self) -> list[str]:
        """What starts a worker, after the interpreter's path.

        This interpreter's finds modules where this process does, whatever its options, working directory and
        ``sys.path`` are; another's finds those of its own environment.
        """
        if self.interpreter is not None:
            return ["-m", _WORKER]
        flags = [option for name, option in _FLAGS.items() if getattr(sys.flags, name, False)]
        optimise = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
        # a worker runs elsewhere, where a relative path, or none at all, is another place
        path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100  # resolve() would follow links
        return [*flags, *optimise, "-c", _WITH_PATH, json.dumps(list(dict.fromkeys([*path, str(_ROOT)])))]

    def environment(self, *, with_source: bool) -> dict[str, str]:
        """Return the variables to run it with.

        Another interpreter gets nothing that is meant for this one's environment, and this package only
        ``with_source``: a source tree holds it alone, an installation has packages for this interpreter beside it.
        """
        kept = dict(os.environ)
        cache = cache_directory()
        if kept.get(_OWN_CACHE) and cache is not None:
            kept[_OWN_CACHE] = str(cache)  # however it was given, a worker runs elsewhere
        if self.interpreter is None:
            return kept
        kept = {name: value for name, value in kept.items() if name not in _OF_AN_ENVIRONMENT}
        return kept | ({"PYTHONPATH": str(_ROOT)} if with_source else {})

    @property
    def remedy(self) -> str:
        """The line that installs this package and what the backend needs for the interpreter."""
        pip = "pip" if self.interpreter is None else f"{shlex.quote(self.interpreter)} -m pip"
        return install_command(BACKENDS[self.backend].extra, pip=pip)


def is_source_tree() -> bool:
    """Tell whether this package runs from its source, and not from where packages are installed."""
    return (_ROOT / "pyproject.toml").is_file()


def parse_targets(text: str | None) -> list[Target]:
    """Read ``A,B@PYTHON``; every backend that there is by default, under this interpreter.

    Raises:
        BackendError: an unknown backend, or an empty entry.
    """
    if text is None:
        return [Target(name) for name in BACKENDS]
    found = []
    for part in text.split(","):
        name, at, interpreter = part.strip().partition("@")
        check_backend(name)
        if at and not interpreter:
            raise BackendError(f"{brief(part.strip())} names no interpreter after the @", f"expected {name}@PYTHON")
        found.append(Target(name, interpreter or None))
    return list(dict.fromkeys(found))
