"""Linux' control groups of this process: what a container, a service or a batch system lets it have.

A limit holds for a group with all below it, so every group from the process's own up to the root counts. Version 1 has
a tree for each controller, version 2 one for all; a system may have both at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["PROC", "Group", "groups"]

PROC = Path("/proc/self")
"""What Linux says of this process; tests have a directory of their own."""


@dataclass(frozen=True)
class Group:
    """One control group, as a directory of files."""

    directory: Path
    version: int
    """1 or 2."""

    def number(self, name: str) -> int | None:
        """Return the first whole number of a file; None where there is none, as in ``max``, or no such file."""
        words = self._text(name).split()
        return int(words[0]) if words and re.fullmatch(r"-?\d{1,20}", words[0]) else None

    def words(self, name: str) -> list[str]:
        """Return the words of a file's first line."""
        return (self._text(name).splitlines() or [""])[0].split()

    def entry(self, name: str, key: str) -> int:
        """Return the number beside ``key`` in a file of such pairs, 0 where there is none."""
        found = re.search(rf"^{key} (\d{{1,20}})$", self._text(name), re.MULTILINE)
        return int(found[1]) if found else 0

    def _text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text(encoding="ascii")
        except (OSError, ValueError):  # ValueError: not ASCII, so not the kernel's
            return ""


def groups(controller: str, proc: Path = PROC) -> Iterator[Group]:
    """Yield the groups of this process that have a controller, its own first, then those above it.

    Args:
        controller: ``memory`` or ``cpu``.
        proc: directory with ``cgroup`` and ``mountinfo``.
    """
    paths = _paths(proc, controller)
    for root, mount, version in _mounts(proc, controller):
        if version in paths:
            yield from _ancestors(mount, _below(paths[version], root), version)


def _paths(proc: Path, controller: str) -> dict[int, PurePosixPath]:
    """Return the process's path in the trees of version 1 and 2."""
    found = {}
    for line in _lines(proc / "cgroup"):
        parts = line.split(":", 2)  # 4:cpu,cpuacct:/path, or 0::/path for version 2
        if len(parts) == 3 and (parts[1] == "" or controller in parts[1].split(",")):
            found[2 if parts[1] == "" else 1] = PurePosixPath(parts[2])
    return found


def _mounts(proc: Path, controller: str) -> Iterator[tuple[PurePosixPath, Path, int]]:
    """Yield what part of which tree is mounted where, and its version."""
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if len(fields) < 5 or kind not in ("cgroup", "cgroup2"):
            continue
        if kind == "cgroup2" or (rest and controller in rest[-1].split(",")):
            yield PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4])), 2 if kind == "cgroup2" else 1


def _below(path: PurePosixPath, root: PurePosixPath) -> PurePosixPath:
    """Return a path in a tree as seen from the part that is mounted; its top where the process lies elsewhere."""
    try:
        below = path.relative_to(root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _ancestors(mount: Path, below: PurePosixPath, version: int) -> Iterator[Group]:
    for part in (below, *below.parents):
        directory = mount / part
        if directory.is_dir():  # a container may see the host's path and only its own directory
            yield Group(directory, version)


def _unescaped(text: str) -> str:
    """Undo mountinfo's way to write spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
