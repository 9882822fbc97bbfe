"""Who is measured: a backend, under this interpreter or another one."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import gta_edge.version
from gta_edge.errors import BackendError
from gta_edge.runtime.backends import BACKENDS

__all__ = ["EXTRAS", "Target", "parse_targets"]

EXTRAS = {"onnxruntime": "ort", "onnxruntime-cuda": "ort-gpu", "torch": "export"}
"""What installs a backend; the others' extras have their names."""

_ROOT = Path(gta_edge.version.__file__).parents[1]
_OF_AN_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__")


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
            return sys.executable
        found = shutil.which(os.path.expanduser(self.interpreter))  # noqa: PTH111  # a command's name, maybe
        if found is None:
            raise BackendError(
                f"{self.interpreter} is no program that can be run; give a Python interpreter after the @, such as "
                f"{self.backend}@/usr/bin/python3"
            )
        return os.path.abspath(found)  # noqa: PTH100  # resolve() would follow the link

    def environment(self, *, with_source: bool) -> dict[str, str]:
        """Return the variables to run it with.

        Another interpreter gets nothing that is meant for this one's environment, and this package only
        ``with_source``: a source tree holds it alone, an installation has packages for this interpreter beside it.
        """
        if self.interpreter is None:
            path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        kept = {name: value for name, value in os.environ.items() if name not in _OF_AN_ENVIRONMENT}
        return kept | ({"PYTHONPATH": str(_ROOT)} if with_source else {})

    @property
    def remedy(self) -> str:
        """The line that installs this package and what the backend needs for the interpreter."""
        pip = "pip install" if self.interpreter is None else f"{self.interpreter} -m pip install"
        return f"{pip} 'gta-edge[{EXTRAS.get(self.backend, self.backend)}]'"


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
        if name not in BACKENDS:
            raise BackendError(f"no backend is called {name!r}; there are {', '.join(BACKENDS)}")
        if at and not interpreter:
            raise BackendError(f"{part.strip()!r} names no interpreter after the @; expected {name}@PYTHON")
        found.append(Target(name, interpreter or None))
    return list(dict.fromkeys(found))
