"""Optional dependencies: every module of the package imports without them, using one says what to install.

What is there and cannot be used is told from what is not installed: a library whose import fails, whatever it raises,
what a half removed one has left, a file of that name that hides it, and one that is older than this package needs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from gta_edge.errors import BackendError
from gta_edge.libraries.install import install_command, reinstall_command
from gta_edge.libraries.requirements import ALWAYS, floors
from gta_edge.support.files import cache_directory
from gta_edge.support.text import one_line, printable

__all__ = [
    "UnusableError",
    "find_module",
    "installed",
    "keep_silent",
    "optional",
    "outdated",
    "require_modules",
    "too_old",
]


class UnusableError(ImportError):
    """A module is there and cannot be used.

    Attributes:
        reason: why, as the rest of a sentence that begins with the module.
        remedy: what to do; empty where reinstalling it is all there is to try.
    """

    def __init__(self, name: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"the Python module {name} {reason}", name=name)
        self.reason, self.remedy = reason, remedy


def optional(name: str, extra: str) -> Any:
    """Import a module, or return a stand-in that raises ``BackendError`` as soon as something in it is used.

    Args:
        name: of the module.
        extra: name of the extra in ``pyproject.toml`` that brings it.

    The stand-in may be subclassed and its attributes named, so that classes over a missing library can be defined.
    """
    try:
        module = find_module(name)
    except UnusableError as error:
        return _Absent(str(error), _remedy(error, name, extra))
    if module is None:
        return _Absent(f"the Python module {name} is needed and not installed", f"run: {install_command(extra)}")
    return module


def require_modules(names: Sequence[str], extra: str, importing: Callable[[str | None], None]) -> None:
    """Import modules, and refuse what is missing of them.

    Args:
        names: of the modules.
        extra: the extra in ``pyproject.toml`` that brings them; several with commas.
        importing: told of each before it is imported, and of None when all are.

    Raises:
        BackendError: some are not installed, the first of them cannot be used, or what is always needed is too old.
    """
    if old := _too_old(ALWAYS):  # which nothing else asks: they are imported plainly
        raise BackendError(*old)
    missing = []
    for name in names:
        importing(name)
        try:
            if find_module(name) is None:
                missing.append(name)
        except UnusableError as error:
            raise BackendError(str(error), _remedy(error, name, extra)) from error
    importing(None)
    if missing:
        raise BackendError(f"{', '.join(missing)} not installed", f"run: {install_command(extra)}")


def _remedy(error: UnusableError, name: str, extra: str) -> str:
    """Return what to do about a module that is there and cannot be used."""
    found = _distribution_of(name)
    again = f"pip install --upgrade --force-reinstall {found}" if found else reinstall_command(extra)
    return error.remedy or f"run: {again}"


def installed(module: Any) -> bool:
    """Tell whether ``optional`` found this module."""
    return isinstance(module, ModuleType)


def find_module(name: str) -> ModuleType | None:
    """Import a module and return it, None where it is not installed.

    Raises:
        UnusableError: it is there, and its import fails, it is not whole, another file hides it, or it is too old.
    """
    if name in _failures:  # a second try fails by what the first has left, which says nothing of the cause
        raise UnusableError(name, _failures[name])
    keep_silent()
    try:
        with _silent_import():
            module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        _check_parent(name, error)
        return None
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # whatever a library raises: SystemExit, SystemError, a Rust library's panic
        if interrupt := _interrupt_behind(error):
            raise interrupt from error
        raise _failed(name, error) from error
    _check_whole(name, module)
    _check_version(name)
    return module


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that an error was made of: modules in C report every failure of their own imports as theirs."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    return behind


@contextmanager
def _silent_import() -> Iterator[None]:
    """Let what a library prints while it is imported, which is no result of ours, go to stderr.

    In one thread at a time: of two that overlap, the one that ends last would leave stdout as it found it, redirected.
    """
    with _importing, redirect_stdout(sys.stderr):
        yield


def too_old() -> str | None:
    """Return in one line which installed library is older than this package requires, None where none is.

    For errors that nobody expected; pip sees to it at installation, and whoever installs something else later may undo
    it.
    """
    old = _too_old()
    return None if old is None else ": ".join(old)


def _too_old(*extras: str) -> tuple[str, str] | None:
    """Return problem and remedy of a library that is older than required, by these extras or any."""
    for distribution, floor in floors(*extras).items():
        if problem := _below(distribution, floor):
            return problem, f"run: pip install '{distribution}>={floor}'"
    return None


def outdated(name: str) -> str | None:
    """Return why a module's distribution is too old for this package, None where it is not, or is not known.

    Nothing is imported: this goes by what pip wrote down.

    Args:
        name: of the module.
    """
    distribution = _distribution_of(name)
    return _below(distribution, floors()[distribution]) if distribution else None


def _below(distribution: str, floor: str) -> str | None:
    """Return that a distribution is older than ``floor``, None where it is not, or not installed."""
    try:
        found = _release(distribution)
    except PackageNotFoundError:
        return None
    if not floor or _numbers(found) >= _numbers(floor):
        return None
    return f"{distribution} {printable(found)} is too old; expected {floor} or later"


@cache  # a millisecond each, and nothing is installed meanwhile
def _release(distribution: str) -> str:
    return version(distribution)


def keep_silent() -> None:
    """Turn off what a library would send or write into the home directory; to be called before it is imported.

    ONNX Runtime, which others import too, writes and sends events unless this variable is there when it is loaded.
    Matplotlib keeps a list of the system's fonts, torch makes a directory for compiled code among temporary files.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if directory := cache_directory():
        os.environ.setdefault("MPLCONFIGDIR", str(directory / "matplotlib"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory / "torchinductor"))


# --- what is there and cannot be used --------------------------------------------------------------------------------

_failures: dict[str, str] = {}
_importing = RLock()


def _failed(name: str, error: BaseException) -> UnusableError:
    """Return why an import failed: what is too old, the module itself or what it takes from another, or what it said.

    Raises:
        UnusableError: it is too old.
    """
    for each in (name, getattr(error, "name", None)):
        _check_version(each or name)
    _failures[name] = f"is installed and cannot be loaded ({type(error).__name__}: {_said(error)})"
    return UnusableError(name, _failures[name])


def _said(error: BaseException) -> str:
    """Return what an import said, without the mark that parts a message from its remedy."""
    return one_line(error).replace("; ", ", ")


def _check_parent(name: str, error: ModuleNotFoundError) -> None:
    """Refuse a part that is missing of something that is there.

    Raises:
        UnusableError: a file hides the package, it is not whole, or it is too old to have that part.
    """
    above = str(error.name).rpartition(".")[0]
    parent = sys.modules.get(above)
    if parent is None or str(error.name) in sys.modules:  # there it is None, by which Python is told that it is absent
        return
    if not hasattr(parent, "__path__"):
        raise _hidden(name, parent)
    if parent.__file__ is None:  # a directory; CUDA's modules share one that is nobody's
        if _distribution_of(above):
            raise _left_over(name, parent)
        return
    _check_version(name)
    raise UnusableError(name, f"is missing from {printable(str(parent.__file__))}")


def _check_whole(name: str, module: ModuleType) -> None:
    """Refuse what a half removed library has left, and what has its name only.

    Raises:
        UnusableError: the module, or the package that it is in, is not what is called so.
    """
    top = sys.modules.get(_top(name), module)
    if getattr(top, "__spec__", None) is None:  # made in this process, and not found on the disk
        return
    if getattr(top, "__file__", None) is None:
        raise _left_over(name, top)
    distribution = _distribution_of(name)
    if distribution and not (hasattr(top, "__path__") and _says_its_version(top, distribution)):
        raise _hidden(name, top)


def _check_version(name: str) -> None:
    """Refuse what is older than this package needs, by its own requirements.

    Raises:
        UnusableError: it is too old.
    """
    distribution = _distribution_of(name)
    floor = floors().get(distribution or "")
    if not distribution or not floor:
        return
    found = _version(sys.modules.get(_top(name)))
    try:
        found = found if isinstance(found, str) else version(distribution)
    except PackageNotFoundError:
        return
    if _numbers(found) < _numbers(floor):
        raise UnusableError(
            name,
            f"is of {distribution} {printable(found)}, which is too old; expected {floor} or later",
            f"run: pip install '{distribution}>={floor}'",
        )


def _hidden(name: str, module: ModuleType) -> UnusableError:
    path = printable(str(module.__file__))
    if hasattr(module, "__path__"):
        reason = f"is not whole: {path} is what a removed package has left, or something else of that name"
    else:
        reason = f"is hidden by {path}, which is something else of that name"
    return UnusableError(name, reason, f"remove or rename {path}")


def _left_over(name: str, module: ModuleType) -> UnusableError:
    path = printable(next(iter(module.__path__), "?"))
    return UnusableError(
        name, f"is only a directory, {path}, which a removed package has left", f"remove {path}, and install it again"
    )


# --- what this package requires --------------------------------------------------------------------------------------


def _distribution_of(name: str) -> str | None:
    """Return the distribution that a module is of, of those that this package requires."""
    parts = name.replace("_", "-").split(".")
    return next((d for d in ("-".join(parts[:n]) for n in (2, 1)) if d in floors()), None)


def _top(name: str) -> str:
    """Return the package that a distribution is known by: ``cuda.core``, ``onnx_ir``."""
    distribution = _distribution_of(name)
    parts = name.split(".")
    return ".".join(parts[:2]) if distribution == "-".join(parts[:2]).replace("_", "-") else parts[0]


def _says_its_version(module: ModuleType, distribution: str) -> bool:
    """Tell whether a module has a version, as nearly all have, or else is what the installer wrote down."""
    if isinstance(_version(module), str):
        return True
    try:
        top = Path(str(module.__file__)).parent
        return any(top / "__init__.py" == Path(str(file.locate())) for file in files(distribution) or [])
    except PackageNotFoundError:
        return False


def _version(module: ModuleType | None) -> object:
    return getattr(module, "__version__", None)


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


class _Absent:
    """Stands for a module that cannot be used, or for something in it."""

    def __init__(self, problem: str, remedy: str) -> None:
        self._error = problem, remedy

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise BackendError(*self._error)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        absent = self

        class Unavailable:
            def __new__(cls, *arguments: Any, **options: Any) -> Any:
                return absent(*arguments, **options)

        return (Unavailable,)
