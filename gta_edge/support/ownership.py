"""What this package may replace: only what it made, and never what it is reading.

Every directory that it writes holds a record that lists its files. A directory with anything else in it is not
replaced, whatever its record says.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gta_edge.errors import OutputError
from gta_edge.support.json_files import read_json
from gta_edge.support.partials import is_stale_partial
from gta_edge.support.text import printable

__all__ = ["ARTIFACTS", "RECORDS", "check_inputs", "foreign_entry"]

RECORDS = {
    "gta_edge.json": ("gta-edge-bundle",),
    "gta_edge_checkpoint.json": ("gta-edge-checkpoint",),
    "graph.json": ("gta-edge-artifact",),
    "prepared.json": ("gta-edge-artifact",),  # what graph.json was called
    "lowered.json": ("gta-edge-model",),
    "engine.json": ("gta-edge-artifact",),
    "cache_budgets.json": ("gta-edge-artifact",),
}
"""Names of records, with the formats that such a record may have."""

ARTIFACTS = "engines"
"""Directory in a bundle for what was derived from it. No user's files belong there; their names tell."""

_ARTIFACT_FILES = {
    "engine.plan",
    "model.onnx",
    "model.onnx.data",
    "exact.onnx",
    "weights.data",
    "budgets.json",
    *RECORDS,
}
_BUNDLE, _CHECKPOINT = "gta_edge.json", "gta_edge_checkpoint.json"
_MAX_RECORD_BYTES = 2**20
_BLOCK_BYTES = 2**22
_DEPTH = 3  # engines/onnxruntime-cuda/fp16


def foreign_entry(directory: Path, *, kind: str | None = None, artifact: bool = False) -> str | None:
    """Return what keeps a directory from being ours, None if it is or is empty.

    It is ours if it holds a record whose format is known, the files that this record lists, and nothing else. A bundle
    may have artifacts too, and be damaged: it can be exported again. A checkpoint's files must be as they were written:
    others may have been trained since.

    Args:
        directory: to be replaced.
        kind: the format that its record must have; any by default.
        artifact: it lies among a bundle's artifacts, and is ours if it holds nothing but an artifact's files, with a
            record or without.

    Raises:
        OSError: it cannot be read.
    """
    if artifact:
        return _foreign_artifact(directory, _DEPTH)
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return None
    found = ((name, record) for name in RECORDS if name in names and (record := _record(directory / name, name, kind)))
    own, record = next(found, (None, None))
    if own is None or record is None:
        return f"it has no record of {f'a {kind}' if kind else 'this program'}"
    for name in names:
        path = directory / name
        if name == ARTIFACTS and own == _BUNDLE:
            foreign = _foreign_artifact(path, _DEPTH)
            if foreign is not None:
                return f"{ARTIFACTS}/{foreign}"
        elif name in record["files"] and _is_file(path):
            if own == _CHECKPOINT and _is_changed(path, record["files"][name]):
                return f"{printable(name)}, changed since it was written"
        elif name != own and not is_stale_partial(path):
            return printable(name)
    return None


def check_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is, holds, or lies in an input.

    Args:
        target: the output, resolved.
        inputs: files and directories that the same command reads; what links in them point to is an input too.

    Raises:
        OutputError: it does; which.
    """
    above = _ids_upwards(target)
    for given in inputs:
        for path in _real(given):
            its = _ids_upwards(path)
            if target == path or (above[0] is not None and above[0] == its[0]):
                how = "is"
            elif above[0] is not None and above[0] in its:
                how = "holds"
            elif path.is_dir() and its[0] in above:
                how = "lies in"
            else:
                continue
            raise OutputError(
                f"{printable(str(target))} {how} the input {printable(str(given))}", "choose another output path"
            )


def _ids_upwards(path: Path) -> list[tuple[int, int] | None]:
    """Return what identifies a path and each directory above it, by whatever name; None for what is not there."""
    found: list[tuple[int, int] | None] = []
    for each in (path, *path.parents):
        try:
            info = each.stat()
            found.append((info.st_dev, info.st_ino))
        except OSError:
            found.append(None)
    return found


def _record(path: Path, name: str, kind: str | None) -> dict[str, Any] | None:
    """Return a record of ours, None if it is none."""
    try:
        record = read_json(path, OutputError, "", max_bytes=_MAX_RECORD_BYTES)
    except OutputError:
        return None
    formats = [kind] if kind in RECORDS[name] else [] if kind else list(RECORDS[name])
    if not isinstance(record, dict) or record.get("format") not in formats:
        return None
    return record if isinstance(record.get("files"), dict) else None


def _is_changed(path: Path, entry: Any) -> bool:
    """Tell whether a file is another than its record says, as far as that says it."""
    info = path.stat()
    if not isinstance(entry, dict) or info.st_size != entry.get("bytes"):
        return True
    if "sha256" not in entry or info.st_mtime_ns == entry.get("mtime_ns"):
        return False
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return bool(digest.hexdigest() != entry["sha256"])


def _foreign_artifact(path: Path, depth: int) -> str | None:
    """Return the first entry below that is no artifact's; a link is none, and only its own name goes with it."""
    if path.is_symlink() or not path.is_dir():
        return "is no directory"
    for entry in sorted(path.iterdir()):
        if (entry.name in _ARTIFACT_FILES and _is_file(entry)) or is_stale_partial(entry):
            continue
        if depth and entry.is_dir() and not entry.is_symlink():
            below = _foreign_artifact(entry, depth - 1)
            if below is None:
                continue
            return f"{printable(entry.name)}/{below}"
        return printable(entry.name)
    return None


def _is_file(path: Path) -> bool:
    """Tell whether this is a regular file, or a link, which is removed as a link."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _real(given: Path) -> Iterator[Path]:
    """Yield where an input really lies: itself, and what the links in it point to."""
    with suppress(OSError, RuntimeError):  # reading it will say so; RuntimeError: a loop of links
        real = given.resolve()
        yield real
        for entry in real.iterdir() if real.is_dir() else ():
            if entry.is_symlink():
                with suppress(OSError, RuntimeError):
                    yield entry.resolve(strict=True)
