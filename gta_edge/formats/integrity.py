"""Whether a file is as it was recorded: by size and modification time, and by hash where these leave doubt.

Small files are hashed always, large ones when their modification time is not the recorded one, as after a copy. What
was hashed once on this machine is remembered in the package's cache, so that it need not be hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gta_edge.errors import OutputError
from gta_edge.support.files import cache_directory, write_cached
from gta_edge.support.json_files import read_json
from gta_edge.support.progress import Progress, silent

__all__ = ["describe_file", "is_entry", "problem_of", "sha256"]

_ALWAYS_HASHED_BYTES = 16 * 2**20
_BLOCK_BYTES = 2**22
_MAX_STAMP_BYTES = 4096


def describe_file(path: Path, progress: Progress = silent) -> dict[str, Any]:
    """Return what is recorded of a file: ``bytes``, ``mtime_ns`` and ``sha256``.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        info = os.fstat(file.fileno())
        digest = sha256(file, path.name, progress)
    return {"bytes": info.st_size, "mtime_ns": info.st_mtime_ns, "sha256": digest}


def is_entry(entry: object) -> bool:
    """Tell whether this is what ``describe_file`` returns, read back from a record that is not trusted."""
    kinds = {"bytes": int, "mtime_ns": int, "sha256": str}
    return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())


def problem_of(
    file: IO[bytes],
    path: Path,
    entry: Mapping[str, Any],
    *,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> str | None:
    """Return in words how an open file differs from its record, None if it does not.

    Args:
        file: open for reading, at its start; what is checked is what it reads, whatever its name stands for meanwhile.
        path: where it really lies, for what is remembered and shown.
        entry: as ``describe_file`` made it.
        verify_hashes: hash it whatever its size and time.
        progress: told of bytes hashed.

    Raises:
        OSError: it cannot be read.
    """
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file"
    if info.st_size != entry["bytes"]:
        return f"has {info.st_size} bytes, recorded were {entry['bytes']}"
    small = info.st_size <= _ALWAYS_HASHED_BYTES
    in_doubt = info.st_mtime_ns != entry["mtime_ns"] and not _remembered(path, info, entry["sha256"])
    if (verify_hashes or small or in_doubt) and sha256(file, path.name, progress) != entry["sha256"]:
        return "its content is not what was written (SHA-256 differs)"
    if in_doubt and not small:
        _remember(path, info, entry["sha256"])
    return None


def sha256(file: IO[bytes], name: str = "", progress: Progress = silent) -> str:
    """Return the hash of an open file from its start, in hexadecimal digits."""
    digest, total, done = hashlib.sha256(), os.fstat(file.fileno()).st_size, 0
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        done += len(block)
        if total > _ALWAYS_HASHED_BYTES:
            progress(f"hashing {name}", done, total)
    return digest.hexdigest()


# --- what was hashed once --------------------------------------------------------------------------------------------


def _stamp(info: os.stat_result, digest: str) -> dict[str, Any]:
    """Return what changes when a file does: nobody but the system sets ``ctime``."""
    return {
        "sha256": digest,
        "device": info.st_dev,
        "inode": info.st_ino,
        "bytes": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
    }


def _stamp_file(path: Path) -> Path | None:
    directory = cache_directory()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return directory / "verified" / f"{name}.json" if directory else None


def _remembered(path: Path, info: os.stat_result, digest: str) -> bool:
    file = _stamp_file(path)
    try:
        found = read_json(file, OutputError, "", max_bytes=_MAX_STAMP_BYTES) if file else None
    except OutputError:
        return False
    return bool(found == _stamp(info, digest))


def _remember(path: Path, info: os.stat_result, digest: str) -> None:
    file = _stamp_file(path)
    if file is not None:
        write_cached(file, json.dumps(_stamp(info, digest)).encode())  # without a cache it is hashed every time
