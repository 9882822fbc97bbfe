"""Artifacts: what was derived from a bundle on this machine, for this machine, and is kept in the bundle.

Lowered graphs and engines are run as they are found. A bundle comes from elsewhere, and may bring some: a graph that
computes something else, or an engine, which TensorRT runs as native code. So an artifact's record is signed with a
secret of this user on this machine. What somebody else made is never run, but made anew.

    engines/NAME/…          the artifact's files
    engines/NAME/*.json     its record: what it was made from and for; size, time and hash of every file; the signature

An artifact is replaced as a whole, and only where nothing else lies in its place. What it was made from, the bundle's
files and this version of the package, is in every record (``origin``); where that differs, it is out of date.

Compiled kernels and TensorRT-RTX's are none: they lie in the package's cache, under names that are hashes of all that
they depend on, and were not brought by a bundle.

The secret is ``machine-UID.key`` in the package's cache directory, readable by its user alone. Without it, artifacts
are made anew, once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gta_edge.errors import OutputError
from gta_edge.formats.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.formats.integrity import describe_file, is_entry, problem_of
from gta_edge.support.files import OccupiedError, cache_directory, new_directory
from gta_edge.support.json_files import parse_json
from gta_edge.support.ownership import ARTIFACTS
from gta_edge.support.partials import remove_stale
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief, one_line
from gta_edge.version import __version__

__all__ = [
    "Artifact",
    "RefusedError",
    "artifacts_directory",
    "cached_artifact",
    "difference",
    "made_from",
    "new_artifact",
    "open_artifact",
    "origin",
    "require_secret",
    "write_record",
]

_log = logging.getLogger(__name__)

_FORMAT, _FORMAT_VERSION = "gta-edge-artifact", 1
_MAX_RECORD_BYTES = 2**20
_KEY_BYTES = 32
_MACHINE_ID = Path("/etc/machine-id")
_TRIES = 10  # an artifact may be replaced while it is opened
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would be waited for


@dataclass(frozen=True)
class Artifact:
    """An artifact of this machine whose files are as recorded.

    Attributes:
        content: what its maker recorded.
        read: content of the files that were asked for, by name.
        mapped: the same, mapped into memory.
    """

    content: Mapping[str, Any]
    read: Mapping[str, bytes]
    mapped: Mapping[str, memoryview]


class RefusedError(Exception):
    """There is no artifact to use here.

    Attributes:
        kind: ``absent``: none, or one without its record; ``foreign``: made by another user or on another machine;
            ``damaged``: not as it was recorded.
    """

    def __init__(self, kind: Literal["absent", "foreign", "damaged"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def open_artifact(
    root: Path,
    place: str,
    record: str,
    *,
    read: Sequence[str] = (),
    mapped: Sequence[str] = (),
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Open an artifact, if it is this machine's and as it was written.

    All of it comes from one directory, also while another process puts a new one in its place.

    Args:
        root: the bundle's directory.
        place: the artifact's directory, from there: ``engines/tensorrt``. No link is followed on the way.
        record: name of its record.
        read: files to read.
        mapped: files to map, those of them that it has.
        verify_hashes: hash every one of them.
        progress: told of bytes hashed.

    Raises:
        RefusedError: there is none, or it is not used; why.
    """
    for remaining in reversed(range(_TRIES)):
        with ExitStack() as stack:
            held = _held(root, place, stack)
            try:
                content, files = _read_record(held, record)
                maps = [name for name in mapped if name in files]
                opened = {name: _opened(held, name, files, stack) for name in (*read, *maps)}
                for name, file in opened.items():
                    problem = problem_of(
                        file, root / place / name, files[name], verify_hashes=verify_hashes, progress=progress
                    )
                    if problem:
                        raise RefusedError("damaged", f"{name} {problem}")
                return Artifact(
                    content,
                    {name: _content(opened[name]) for name in read},
                    {name: memoryview(mmap.mmap(opened[name].fileno(), 0, access=mmap.ACCESS_READ)) for name in maps},
                )
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                refused = RefusedError("damaged", one_line(getattr(error, "strerror", None) or error))
                refused.__cause__ = error
            except RefusedError as error:
                refused = error
            if not remaining or not _was_replaced(held, root / place):
                raise refused
    raise AssertionError("the last try returns or raises")


def write_record(directory: Path, record: str, content: Mapping[str, Any], progress: Progress = silent) -> None:
    """Record and sign what lies in a directory, which makes it an artifact.

    Args:
        directory: where its files are, complete.
        record: name of the record to write.
        content: what it was made from and for; JSON.
        progress: told of bytes hashed.

    Raises:
        OutputError: there is nowhere to keep the secret.
        OSError: the files cannot be read, or the record not written.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    document: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "content": dict(content),
        "files": {name: describe_file(directory / name, progress) for name in names},
    }
    document["signature"] = _signature(document, require_secret())
    (directory / record).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def require_secret() -> bytes:
    """Return the key that this user's artifacts on this machine are signed with.

    Raises:
        OutputError: there is nowhere to keep it.
    """
    directory = cache_directory()
    secret = _secret(directory) if directory else None
    if secret is None:
        where = directory or "the cache directory"
        raise OutputError(
            f"{where}: the key that artifacts are signed with cannot be kept there",
            "set GTA_EDGE_CACHE to a directory of your own that can be written to",
        )
    with suppress(OSError):  # a home directory may be shared by machines
        return hmac.digest(secret, _MACHINE_ID.read_bytes(), "sha256")
    return hmac.digest(secret, b"", "sha256")


# --- in a bundle -----------------------------------------------------------------------------------------------------


def made_from(bundle: Bundle) -> dict[str, str]:
    """Return the SHA-256 of what artifacts are made from, the bundle's graph and weights, by file name."""
    files = bundle.manifest["files"]
    return {name: files[name]["sha256"] for name in (MODEL, WEIGHTS) if name in files}


def origin(bundle: Bundle) -> dict[str, Any]:
    """Return what every record says of where an artifact comes from: the bundle's files, and this package's version."""
    return {"gta_edge": __version__, "made_from": made_from(bundle)}


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """Return the first thing that is another now than when an artifact was made; None where all is the same.

    It is named: ``TensorRT is '10.3' here and was '10.1'``, ``the bundle's files are others``.
    """
    for name in {**now, **then}:
        here, recorded = now.get(name), then.get(name)
        if here != recorded:
            texts = isinstance(here, str) and isinstance(recorded, str)
            return f"{name} is {brief(here)} here and was {brief(recorded)}" if texts else f"{name} are others"
    return None


def artifacts_directory(bundle: Bundle, place: str = ARTIFACTS) -> Path:
    """Return the directory of a bundle that artifacts lie in, or one below, made if it is not there.

    Raises:
        OutputError: the bundle cannot be written to, a link leads elsewhere, or a file is in the way.
    """
    directory = bundle.directory
    try:
        for part in Path(place).parts:
            directory /= part
            _check_no_link(directory)
            directory.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise OccupiedError(f"{directory}: cannot be made (there is a file)", "remove it") from error
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be made ({error.strerror})", "give a bundle that can be written to"
        ) from error
    return directory


@contextmanager
def new_artifact(bundle: Bundle, place: str, *, force: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a directory for an artifact's files, and at last its record; it appears in the bundle when it is complete.

    Args:
        bundle: where.
        place: the artifact's directory, from the bundle's: ``engines/tensorrt``.
        force: replace one that is there.
        needed_bytes: what will be written, as far as it is known.

    Raises:
        OutputError: there is one already and not ``force``, something else is in its place, there is nowhere to keep
            the secret, or the bundle cannot be written to. Every other exception of the body passes as it is.
    """
    require_secret()
    directory = bundle.directory / place
    above = list(directory.parents)[: len(Path(place).parts) - 1]
    try:
        artifacts_directory(bundle, str(Path(place).parent))
        _check_no_link(directory)
        with new_directory(directory, force=force, needed_bytes=needed_bytes, artifact=True) as partial:
            yield partial
    finally:
        with suppress(OSError):  # not there, or not empty
            for parent in above:
                parent.rmdir()


def cached_artifact(
    bundle: Bundle,
    place: str,
    record: str,
    content: Mapping[str, Any],
    make: Callable[[Path], None],
    *,
    read: Sequence[str],
    mapped: Sequence[str] = (),
    progress: Progress = silent,
) -> Artifact | None:
    """Return an artifact that can be made at any time: the one there is, or one made now.

    None where it cannot be kept: the bundle cannot be written to, or the disk is full. Where something else is in its
    place, a warning says so, once.

    Args:
        bundle: what it is made from.
        place: its directory, from the bundle's.
        record: name of its record.
        content: what it is made from and for; one with another is out of date.
        make: writes its files into a directory. An OSError there is taken for one of the place.
        read: as ``open_artifact`` takes it.
        mapped: likewise.
        progress: told of bytes hashed.

    Raises:
        GtaEdgeError: from ``make``, but for OutputError.
    """
    options: dict[str, Any] = {"read": read, "mapped": mapped, "progress": progress, "verify_hashes": bundle.verified}
    remove_stale(bundle.directory / ARTIFACTS)
    with suppress(RefusedError):
        found = open_artifact(bundle.directory, place, record, **options)
        if difference(content, found.content) is None:
            return found
    try:
        with new_artifact(bundle, place, force=True) as partial:
            make(partial)
            write_record(partial, record, content, progress)
        found = open_artifact(bundle.directory, place, record, **options)
    except OccupiedError as error:
        _warn_once(f"{bundle.directory / place}: is made anew at every load ({error.problem}); remove what is there")
    except (OutputError, OSError, RefusedError):  # read-only, full, or just replaced: it goes without, slower to load
        pass
    else:
        return found if difference(content, found.content) is None else None
    return None


def _check_no_link(directory: Path) -> None:
    if directory.is_symlink():
        raise OccupiedError(f"{directory}: is a link, and engines are read from the bundle itself", "remove the link")


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


# --- reading ---------------------------------------------------------------------------------------------------------


def _held(root: Path, place: str, stack: ExitStack) -> int:
    """Return a descriptor of the artifact's directory; whatever gets its name now, it stays the same one."""
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        for part in Path(place).parts:
            descriptor = os.open(part, _DIRECTORY, dir_fd=descriptor)
            stack.callback(os.close, descriptor)
    except FileNotFoundError as error:
        raise RefusedError("absent", "there is none") from error
    except OSError as error:  # a link, a file, or a directory that may not be read
        raise RefusedError("damaged", f"it is no directory of the bundle's own ({error.strerror})") from error
    return descriptor


def _was_replaced(held: int, path: Path) -> bool:
    """Tell whether there is another directory by now than the one that is held."""
    try:
        now, then = path.stat(follow_symlinks=False), os.fstat(held)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


def _opened(held: int, name: str, files: Mapping[str, Any], stack: ExitStack) -> Any:
    if not is_entry(files.get(name)):
        raise RefusedError("damaged", f"{name} is not in its record")
    return stack.enter_context(os.fdopen(os.open(name, _FILE, dir_fd=held), "rb", buffering=0))


def _content(file: Any) -> bytes:
    file.seek(0)
    return bytes(file.readall())


def _read_record(held: int, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the content and the files of a record of this machine's."""
    try:
        with os.fdopen(os.open(name, _FILE, dir_fd=held), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_RECORD_BYTES:
                raise ValueError("no file of a record's size")
            document = parse_json(file.read(_MAX_RECORD_BYTES))
    except FileNotFoundError as error:
        raise RefusedError("absent", f"it has no {name}") from error
    except (OSError, ValueError) as error:
        raise RefusedError("absent", f"{name} is not a record ({one_line(error)})") from error
    wanted = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
    if not isinstance(document, dict) or any(document.get(key) != value for key, value in wanted.items()):
        raise RefusedError("absent", f"{name} is not a record of this version")
    signature = document.pop("signature", None)
    try:
        own = isinstance(signature, str) and hmac.compare_digest(
            signature.encode(), _signature(document, require_secret()).encode()
        )
    except (OutputError, ValueError, RecursionError):  # ValueError: text that cannot be encoded
        own = False
    if not own:
        raise RefusedError("foreign", "it was made by another user or on another machine, or its record was changed")
    content, files = document.get("content"), document.get("files")
    if not isinstance(content, dict) or not isinstance(files, dict):
        raise RefusedError("damaged", f"{name} does not say what it was made from, and its files")
    return content, files


# --- the signature ---------------------------------------------------------------------------------------------------


def _signature(document: Mapping[str, Any], key: bytes) -> str:
    return hmac.new(key, json.dumps(document, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _secret(directory: Path) -> bytes | None:
    """Return this user's secret, made if there is none, None where none can be kept."""
    path = directory / f"machine-{os.geteuid()}.key"
    for _ in range(2):  # what another process makes meanwhile is read the second time
        try:
            found = _read_secret(path)
            if found is not None:
                return found
            _make_secret(path)
        except OSError:
            return None
    return None


def _read_secret(path: Path) -> bytes | None:
    """Return the secret, None if there is none, or one that others can read or have made."""
    try:
        descriptor = os.open(path, _FILE)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        private = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077
        secret = file.read(_KEY_BYTES + 1) if private else b""
    return secret if len(secret) == _KEY_BYTES else None


def _make_secret(path: Path) -> None:
    """Write a new secret, unless another process has meanwhile written one that can be used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            if _read_secret(path) is None:  # others can read it, or it is damaged
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
