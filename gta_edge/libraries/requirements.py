"""What this package requires, from the one place that says so.

A package that runs from its source, installed in place or not at all, has its ``pyproject.toml`` beside it. What pip
wrote down when it installed that source may be older than the source is now. A wheel has what pip wrote down alone.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from gta_edge.libraries.install import DISTRIBUTION

__all__ = ["ALWAYS", "floors", "requirements"]

ALWAYS = ""
"""In the place of an extra: what is required without any."""

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_OF_DEVELOPERS = ("dev", "test")  # what nobody runs models with


def requirements(project: Path = _PROJECT) -> dict[str, list[str]]:
    """Return the requirements by extra, as ``pyproject.toml`` has them; empty where nothing says them.

    Args:
        project: ``pyproject.toml``, if the package runs from its source.
    """
    return _of_source(project) or _of_installed()


@cache
def floors(*extras: str) -> dict[str, str]:
    """Return the oldest release of each distribution that is required; empty where there is no such.

    Args:
        extras: those of these extras, or ``ALWAYS``; by default of all that are not for developers.
    """
    found: dict[str, str] = {}
    for extra, entries in requirements().items():
        if extra in _OF_DEVELOPERS or (extras and extra not in extras):
            continue
        for entry in entries:
            wanted, _, marker = entry.partition(";")
            name, floor = re.match(r"[A-Za-z0-9._-]+", wanted), re.search(r">=\s*(\d+(?:\.\d+)*)", wanted)
            if name:  # ONNX Runtime, which not every Python has a release for, says itself which is too old
                everywhere = floor and "python_version" not in marker
                found[re.sub(r"[._-]+", "-", name[0]).lower()] = floor[1] if floor and everywhere else ""
    return found


def _of_source(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        if project["name"] != DISTRIBUTION:  # somebody else's, among installed packages
            return {}
        return {ALWAYS: project["dependencies"], **project["optional-dependencies"]}
    except (OSError, ValueError, KeyError, TypeError):  # damaged, and not ours to mend
        return {}


def _of_installed() -> dict[str, list[str]]:
    try:
        entries = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for entry in entries:
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", entry)
        found.setdefault(extra[1] if extra else ALWAYS, []).append(entry)
    return found
