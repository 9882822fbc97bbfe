"""Optional dependencies: every module of the package imports without them, using one says what to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from gta_edge.errors import BackendError

__all__ = ["installed", "optional"]


def optional(name: str, extra: str) -> Any:
    """Import a module, or return a stand-in that raises ``BackendError`` as soon as something in it is used.

    Args:
        name: of the module.
        extra: name of the extra in ``pyproject.toml`` that brings it.

    The stand-in may be subclassed and its attributes named, so that classes over a missing library can be defined.
    """
    try:
        return import_module(name)
    except ImportError as error:
        missing = error.name or name
        if missing.partition(".")[0] != name.partition(".")[0]:
            name = f"{name} (which lacks {missing})"
        return _Absent(name, extra)


def installed(module: Any) -> bool:
    """Tell whether ``optional`` found this module."""
    return isinstance(module, ModuleType)


class _Absent:
    """Stands for a module that is not installed, or for something in it."""

    def __init__(self, name: str, extra: str) -> None:
        self._name, self._extra = name, extra

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(self._name, self._extra)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise BackendError(
            f"the Python module {self._name} is needed and not installed; run: pip install 'gta-edge[{self._extra}]'"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        absent = self

        class Unavailable:
            def __new__(cls, *arguments: Any, **options: Any) -> Any:
                return absent(*arguments, **options)

        return (Unavailable,)
