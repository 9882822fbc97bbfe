"""Outputs that appear complete or not at all, and names that lead nowhere else.

A result is written under a temporary name beside its place and renamed when it is complete, so that an error, a full
disk or Ctrl-C leaves what was there before. Links are followed: what a link points to is what is replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from gta_edge.errors import OutputError

__all__ = ["cache_directory", "new_directory", "new_file", "plain_name"]

# A directory that holds one of these is a checkpoint, a bundle or part of one, which is all that force may replace.
_OURS = ("config.json", "gta_edge.json", "prepared.json", "engine.json")

# What the system says of the place that is written to; anything else is the writer's own error.
_OF_THE_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}


def plain_name(name: object) -> TypeGuard[str]:
    r"""Tell whether this is the name of a file in one directory and nothing else.

    No separator of any system, no drive or stream (``:``), not empty, ``.`` or ``..``, and printable: so no NUL, no
    line break, and nothing that a file system could not encode.
    """
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not any(mark in name for mark in "/\\:")
    )


def cache_directory() -> Path | None:
    """Return where this package keeps what can be made again, None where that cannot be told.

    That is ``$GTA_EDGE_CACHE``, else ``$XDG_CACHE_HOME/gta_edge``, else ``~/.cache/gta_edge``; always absolute. A ``~``
    in the first is the home directory, as a shell has it.
    """
    if own := os.environ.get("GTA_EDGE_CACHE"):
        try:
            return Path(own).expanduser().absolute()
        except (OSError, RuntimeError):  # nobody's home; a working directory that was removed
            return None
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # A relative path is to be ignored: XDG Base Directory Specification.
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "gta_edge"
    except RuntimeError:  # a user without a home
        return None


@contextmanager
def new_directory(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the body succeeds, and vanishes when it does not.

    Args:
        path: where the result goes; its parent must exist.
        force: replace an existing directory, once the new one is complete. Only one that is empty or holds a record
            of ours (``_OURS``) is replaced, and never one that holds the working or home directory.

    Raises:
        OutputError: ``path`` exists or may not be replaced, its parent cannot be written to, or the disk is full, also
            where the body meets that. Every other exception of the body passes as it is.
    """
    target = _resolve(path)
    _check_directory(target, force)
    partial = _partial(target)
    with _undone_on_error(target, partial):
        with _at(target):
            partial.mkdir()  # and not tempfile, whose directories only their owner can read
        yield partial
        _check_directory(target, force)  # again: it may have been made meanwhile
        with _at(target):
            _replace_directory(partial, target)


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file that becomes ``path`` when the body succeeds, and vanishes when it does not.

    Args:
        path: where the result goes; its parent must exist.
        force: replace an existing regular file, once the new one is complete.

    Raises:
        OutputError: as for ``new_directory``.
    """
    target = _resolve(path)
    _check_file(target, force)
    partial = _partial(target)
    with _undone_on_error(target, partial):
        with _at(target):
            partial.touch(exist_ok=False)
        yield partial
        _check_file(target, force)
        with _at(target):
            partial.replace(target)


def _resolve(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL
        raise OutputError(f"{str(path)!r} is no usable path ({error}); choose another one") from error


def _partial(target: Path) -> Path:
    # not made from the target's name, which may already be as long as a name can be
    return target.with_name(f".gta-edge-{secrets.token_hex(6)}.partial")


def _mode(target: Path) -> int | None:
    """Return the type and permissions of what exists there, None when nothing does."""
    with _at(target):
        try:
            return target.stat().st_mode
        except FileNotFoundError:
            return None


def _check_directory(target: Path, force: bool) -> None:
    """Raise OutputError unless a directory may appear here."""
    _check_not_protected(target)
    mode = _mode(target)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise OutputError(f"{target} exists and is no directory; choose another output path")
    if not force:
        raise OutputError(f"{target} already exists; choose another output path, or replace it with --force")
    with _at(target):
        is_empty = next(target.iterdir(), None) is None
    if not is_empty and not any((target / name).is_file() for name in _OURS):
        raise OutputError(
            f"{target} is a directory without a {' or '.join(_OURS)}, so not a checkpoint or a bundle, and is not "
            "replaced even with --force; choose another output path, or remove it yourself"
        )


def _check_file(target: Path, force: bool) -> None:
    """Raise OutputError unless a file may appear here."""
    mode = _mode(target)
    if mode is None:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(f"{target} exists and is no regular file; choose another output path")
    if not force:
        raise OutputError(f"{target} already exists; choose another output path, or replace it with --force")


def _check_not_protected(target: Path) -> None:
    for what, place in (("the working directory", Path.cwd), ("the home directory", Path.home)):
        with suppress(OSError, RuntimeError):  # a working directory that was removed, a user without a home
            path = place().resolve()
            if target == path or target in path.parents:
                raise OutputError(f"{target} is or holds {what}, which is never replaced; choose another output path")


def _replace_directory(partial: Path, target: Path) -> None:
    """Put one directory in the place of another; on an error the old one is back, or was never away."""
    if not target.exists():
        partial.rename(target)
        return
    old = _partial(target)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if not target.exists():  # Ctrl-C may come when the new one is already there
            old.rename(target)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise OutputError(
            f"{target} is written, but the one it replaces, now {old}, cannot be removed "
            f"({error.strerror}); remove it yourself"
        ) from error


@contextmanager
def _undone_on_error(target: Path, partial: Path) -> Iterator[None]:
    """Remove what is unfinished on any exception, and translate those that speak of the place written to."""
    try:
        yield
    except BaseException as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink()
        if isinstance(error, OSError) and error.errno in (None, *_OF_THE_PLACE) and _is_within(error.filename, partial):
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
    return OutputError(f"{target} cannot be written ({reason}); {remedy}")
