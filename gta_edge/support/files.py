"""Atomic file and directory writes, scratch directories, and names that lead nowhere else.

A result is written under a temporary name beside its place and renamed when it is complete and on the disk, so that an
error, a full disk, Ctrl-C, a kill or a power cut leaves the old or the new. Links are followed: what a link points to
is what is replaced. Replaced is only what this package made (``support.ownership``).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from gta_edge.errors import BundleError, OutputError
from gta_edge.support.arguments import path_argument
from gta_edge.support.ownership import check_inputs, foreign_entry
from gta_edge.support.partials import Partial, remove_stale, replace_directory, replace_file, restore
from gta_edge.support.text import printable

__all__ = [
    "OccupiedError",
    "bundle_file",
    "cache_directory",
    "check_new_file",
    "new_directory",
    "new_file",
    "plain_name",
    "scratch_directory",
    "write_cached",
]

_NAME_BYTES = 255  # of a name on Linux
# What the system says of the place that is written to; anything else is the writer's own error.
_OF_THE_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


class OccupiedError(OutputError):
    """What lies in a result's place is not this program's, and not replaced."""


def plain_name(name: object) -> TypeGuard[str]:
    r"""Tell whether this is the name of a file in one directory and nothing else.

    No separator of any system, no drive or stream (``:``), not empty, ``.`` or ``..``, of a length that there is, and
    printable: so no NUL, no line break, and nothing that a file system could not encode.
    """
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) <= _NAME_BYTES
        and name.isprintable()
        and len(name.encode()) <= _NAME_BYTES
        and not any(mark in name for mark in "/\\:")
    )


def bundle_file(directory: Path, name: str) -> Path:
    """Return where a file of a bundle really lies: in its directory, or where Hugging Face's cache keeps it.

    That cache has a directory of links, ``models--NAME/snapshots/REVISION``, into ``models--NAME/blobs``.

    Raises:
        BundleError: there is no such file, its name is no plain one, or a link leads elsewhere.
    """
    shown = printable(str(directory / name))
    if not plain_name(name):
        raise BundleError(f"{shown}: is outside the bundle", "export the bundle again, or copy it anew")
    try:
        root, real = directory.resolve(strict=True), (directory / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise BundleError(f"{shown}: is missing", "export the bundle again, or copy it anew") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, on older Pythons
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise BundleError(f"{shown}: cannot be read ({reason})", "export the bundle again, or copy it anew") from error
    model = root.parent.parent
    in_hub_cache = root.parent.name == "snapshots" and model.name.startswith("models--")
    if real.parent != root and not (in_hub_cache and real.parent == model / "blobs"):
        raise BundleError(f"{shown}: is a link that leads out of the bundle", "put the file itself there")
    return real


def cache_directory() -> Path | None:
    """Return where this package keeps what can be made again, None where that cannot be told.

    That is ``$GTA_EDGE_CACHE``, else ``$XDG_CACHE_HOME/gta_edge``, else ``~/.cache/gta_edge``; always absolute. A ``~``
    in the first is the home directory, as a shell has it.
    """
    try:
        if own := os.environ.get("GTA_EDGE_CACHE"):
            return Path(own).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # A relative path is to be ignored: XDG Base Directory Specification.
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "gta_edge"
    except (RuntimeError, OSError):  # a user without a home, a working directory that is gone
        return None


@contextmanager
def new_directory(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
    needed_bytes: int = 0,
    kind: str | None = None,
    artifact: bool = False,
) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the body succeeds, and vanishes when it does not.

    All that can be known beforehand is checked before the body runs, and again before ``path`` is replaced.

    Args:
        path: where the result goes; its parent must exist.
        force: replace an existing directory, once the new one is complete. Only one that is empty or ours is
            replaced (``support.ownership``), and never one that holds the working or home directory.
        inputs: what the body reads, files and directories: ``path`` may not be, hold, or lie in any of them.
        needed_bytes: what will be written, as far as it is known; less free space is an error at once.
        kind: format of the record that a directory to be replaced must have; any of ours by default.
        artifact: replace an incomplete artifact of a bundle too, which has lost its record.

    Raises:
        OutputError: ``path`` exists or may not be replaced, its parent cannot be written to, or the disk is full, also
            where the body meets that. Every other exception of the body passes as it is.
    """
    target = _resolve(path)
    check_inputs(target, inputs)
    _clean(target)
    _check_directory(target, force, kind, artifact)
    _check_space(target, needed_bytes)
    with _at(target):
        partial = Partial(target.parent, directory=True)  # and not tempfile's, which only their owner can read
    old: Path | None = None
    try:
        with _translated(target, partial.path):
            yield partial.path
        _check_directory(target, force, kind, artifact)  # again: it may have been made meanwhile
        with _at(target):
            old = replace_directory(partial.path, target)
    finally:
        if old is None:
            partial.remove()  # nothing, if it is in its place
    try:
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise OutputError(
            f"{target} is written, but the one it replaces, now {old}, cannot be removed ({error.strerror})",
            "remove it yourself",
        ) from error
    finally:
        partial.release()


@contextmanager
def new_file(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[Path] = (), needed_bytes: int = 0
) -> Iterator[Path]:
    """Yield an empty temporary file that becomes ``path`` when the body succeeds, and vanishes when it does not.

    Args:
        path: where the result goes; its parent must exist.
        force: replace an existing regular file, once the new one is complete.
        inputs: as for ``new_directory``.
        needed_bytes: likewise.

    Raises:
        OutputError: as for ``new_directory``.
    """
    target = check_new_file(path, force=force, inputs=inputs, needed_bytes=needed_bytes)
    with _at(target):
        partial = Partial(target.parent, directory=False)
    try:
        with _translated(target, partial.path):
            yield partial.path
        _check_file(target, force)
        with _at(target):
            replace_file(partial.path, target)
    finally:
        partial.remove()


def write_cached(path: Path, content: bytes | memoryview) -> None:
    """Write a file that can be made again, as ``new_file`` does; where it cannot be written, nothing is lost."""
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, force=True) as partial:
            partial.write_bytes(content)


def check_new_file(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[Path] = (), needed_bytes: int = 0
) -> Path:
    """Return where ``new_file`` would write, once it is sure that nothing known beforehand is against it.

    Raises:
        OutputError: as for ``new_file``.
    """
    target = _resolve(path)
    check_inputs(target, inputs)
    _clean(target)
    _check_file(target, force)
    _check_space(target, needed_bytes)
    return target


@contextmanager
def scratch_directory(parent: str | os.PathLike[str] | None = None, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory that vanishes with the body; what killed processes left there vanishes before.

    Args:
        parent: where; the system's directory for temporary files by default.
        needed_bytes: what will be written, as far as it is known; less free space is an error at once.

    Raises:
        OutputError: it cannot be made; where, and why.
    """
    try:
        place = Path(tempfile.gettempdir() if parent is None else parent)
    except OSError as error:  # none of the usual places can be written to
        raise OutputError(
            f"there is no directory for temporary files ({error.strerror or error})",
            "set TMPDIR to one with free space",
        ) from error
    remove_stale(place)
    remedy = "set TMPDIR to a directory with free space" if parent is None else "free some space there"
    try:
        partial = Partial(place, directory=True)
    except OSError as error:
        raise OutputError(f"{place}: no directory can be made in it ({error.strerror})", remedy) from error
    try:
        partial.path.chmod(0o700)
        free = shutil.disk_usage(partial.path).free
        if needed_bytes > free:
            raise OutputError(
                f"{place}: has {free / 1e6:.1f} MB free, and temporary files take {needed_bytes / 1e6:.1f} MB",
                f"{remedy}",
            )
        yield partial.path
    finally:
        partial.remove()


def _resolve(path: str | os.PathLike[str]) -> Path:
    try:
        return path_argument(path, "the path to write").resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL
        raise OutputError(f"{str(path)!r} is no usable path ({error})", "choose another one") from error


def _mode(target: Path) -> int | None:
    """Return the type and permissions of what exists there, None when nothing does."""
    with _at(target):
        try:
            return target.stat().st_mode
        except FileNotFoundError:
            return None


def _check_directory(target: Path, force: bool, kind: str | None, artifact: bool) -> None:
    """Raise OutputError unless a directory may appear here."""
    _check_not_protected(target)
    mode = _mode(target)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise OccupiedError(f"{target} exists and is no directory", "choose another output path")
    if not force:
        raise OutputError(f"{target} already exists", "choose another output path, or replace it with --force")
    with _at(target):
        foreign = foreign_entry(target, kind=kind, artifact=artifact)
    if foreign is not None:
        raise OccupiedError(
            f"{target} holds what this program did not make ({foreign}), and is not replaced even with --force",
            "choose another output path, or remove it yourself",
        )


def _check_file(target: Path, force: bool) -> None:
    """Raise OutputError unless a file may appear here."""
    mode = _mode(target)
    if mode is None:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(f"{target} exists and is no regular file", "choose another output path")
    if not force:
        raise OutputError(f"{target} already exists", "choose another output path, or replace it with --force")


def _check_not_protected(target: Path) -> None:
    for what, place in (("the working directory", Path.cwd), ("the home directory", Path.home)):
        with suppress(OSError, RuntimeError):  # a working directory that was removed, a user without a home
            path = place().resolve()
            if target == path or target in path.parents:
                raise OutputError(f"{target} is or holds {what}, which is never replaced", "choose another output path")


def _clean(target: Path) -> None:
    """Put right what killed processes left beside the target."""
    restore(target)
    remove_stale(target.parent)


def _check_space(target: Path, needed_bytes: int) -> None:
    """Raise OutputError where the result cannot fit, before it is made."""
    if not needed_bytes:
        return
    with _at(target):
        free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        raise OutputError(
            f"{target} cannot be written (it takes about {needed_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free)",
            "free some space, or choose another output path",
        )


@contextmanager
def _translated(target: Path, partial: Path) -> Iterator[None]:
    """Translate errors of the body that speak of the place written to."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, *_OF_THE_PLACE) and _is_within(error.filename, partial):
            raise _output_error(target, error) from error
        raise


def _is_within(filename: object, partial: Path) -> bool:
    """Tell whether an OSError's file is ours; an error of a write to an open file names none."""
    if not isinstance(filename, (str, bytes)):
        return True
    path = Path(os.fsdecode(filename))
    return path == partial or partial in path.parents


@contextmanager
def _at(target: Path) -> Iterator[None]:
    """Translate every OSError of our own steps."""
    try:
        yield
    except OSError as error:
        raise _output_error(target, error) from error


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT and not target.parent.is_dir():
        reason, remedy = "its parent directory does not exist", "make it first"
    elif error.errno in (None, errno.ENOSPC, errno.EDQUOT):  # numpy gives no number where it could not write all
        remedy = "free some space, or choose another output path"
    else:
        remedy = "choose another output path"
    return OutputError(f"{target} cannot be written ({reason})", remedy)
