"""Unfinished results on disk: their names, who is working on them, how they take their place, how they go away.

A partial lies beside the place that it will take, under a hidden name that holds its owner's process id, and its owner
keeps a lock on it. An owner that was killed leaves it behind; the next run in the same directory finds the lock free
and the process gone, and removes it. What is put in place is on the disk before it has its name, so that a power cut
leaves the old or the new.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["Partial", "is_stale_partial", "remove_stale", "replace_directory", "replace_file", "restore"]

_PREFIX = ".gta-edge-"
_NAME = re.compile(r"\.gta-edge-(?:(\d+)-)?[0-9a-f]{12}\.(partial|of-[0-9a-f]{12})")
_UNKNOWN_OWNER_SECONDS = 24 * 3600  # names without a process id, as earlier versions made them, without locks
_UNLOCKED_SECONDS = 10  # more than lies between making a partial and locking it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}

_working_on: set[Path] = set()
"""Partials of this process."""


class Partial:
    """An unfinished file or directory that this process works on.

    Attributes:
        path: where it lies.
    """

    def __init__(self, parent: Path, *, directory: bool) -> None:
        """Make it, with the permissions that the umask gives, and lock it.

        Raises:
            OSError: it cannot be made there.
        """
        # not made from the name of what it becomes, which may already be as long as a name can be
        self.path = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}.partial"
        if directory:
            self.path.mkdir()
        else:
            self.path.touch(exist_ok=False)
        _working_on.add(self.path)
        self._lock: int | None = None
        with suppress(OSError):  # a file system without locks: then the process id alone tells
            self._lock = _locked(self.path)

    def release(self) -> None:
        """Give the lock up; for what is in its place, or gone."""
        _working_on.discard(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove what there is of it, as far as that is possible, and give the lock up."""
        _remove(self.path)
        self.release()


def is_stale_partial(path: Path) -> bool:
    """Tell whether this is something unfinished that its owner, who was killed, has left behind."""
    return _NAME.fullmatch(path.name) is not None and _is_stale(path)


def remove_stale(directory: Path) -> None:
    """Remove what processes that were killed have left in a directory; what may be in use stays."""
    with suppress(OSError):
        for path in _partials(directory):
            replaced = path.suffix.startswith(".of-")
            if replaced and not any(_tag(name) == path.suffix[4:] for name in _names(directory)):
                continue  # all that there is of its target: ``restore`` brings it back
            if _is_stale(path):
                _remove(path)


def restore(target: Path) -> None:
    """Bring back what was at ``target`` before a process was killed between two renames."""
    with suppress(OSError):
        if not os.path.lexists(target):
            for path in _partials(target.parent):
                if path.suffix == f".of-{_tag(target.name)}" and _is_stale(path):
                    path.rename(target)
                    return


def replace_file(partial: Path, target: Path) -> None:
    """Give a file its name, once its content is on the disk.

    Raises:
        OSError: from the system; the target is as it was.
    """
    _sync(partial)
    partial.replace(target)
    _sync(target.parent)


def replace_directory(partial: Path, target: Path) -> Path | None:
    """Give a directory its name, once its content is on the disk.

    Where there is one already, the two change places in one step. File systems that cannot do that need two: between
    them there is nothing at ``target``, and ``restore`` knows what was there.

    Returns:
        Where the one that it replaces lies now, to be removed; None if there was none.

    Raises:
        OSError: from the system; the target is as it was.
    """
    for path in _below(partial):
        _sync(path)
    if not os.path.lexists(target):
        partial.rename(target)
        _sync(target.parent)
        return None
    if _exchange(partial, target):
        _sync(target.parent)
        return partial
    old = target.with_name(f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}.of-{_tag(target.name)}")
    _working_on.add(old)
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:
        if not target.exists():  # Ctrl-C may come when the new one is already there
            old.rename(target)
        raise
    finally:
        _working_on.discard(old)
    _sync(target.parent)
    return old


# --- how -----------------------------------------------------------------------------------------------------------


def _partials(directory: Path) -> Iterator[Path]:
    yield from (directory / name for name in _names(directory) if _NAME.fullmatch(name))


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _tag(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


def _is_stale(path: Path) -> bool:
    """Tell whether nobody works on it.

    The lock tells, where there are locks: a process's id may be another's by now, and in a container nearly always is
    the same small number. Between the making of a partial and its lock the id and its age tell.
    """
    found = _NAME.fullmatch(path.name)
    assert found  # only such names are asked for
    if path in _working_on:
        return False
    try:
        age = time.time() - path.lstat().st_ctime
        if found[1] is None:
            return age > _UNKNOWN_OWNER_SECONDS
        process = int(found[1])
        os.close(_locked(path))
    except BlockingIOError:
        return False
    except OSError:  # no locks here, or it is gone
        return found[1] is not None and not _runs(int(found[1]))
    return process == os.getpid() or not _runs(process) or age > _UNLOCKED_SECONDS


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process
        return True
    return True


def _locked(path: Path) -> int:
    """Return a descriptor that holds the lock of a file or directory.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: it cannot be locked.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _below(directory: Path) -> Iterator[Path]:
    """Yield every file and directory below a directory, and itself at last; links are what they are."""
    for root, _, files in os.walk(directory, topdown=False):
        yield from (path for name in files if stat.S_ISREG((path := Path(root, name)).lstat().st_mode))
        yield Path(root)


def _sync(path: Path) -> None:
    """Have the system write a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing for a directory
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; tell whether the file system can."""
    import ctypes  # half of the start of a command that writes nothing

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:  # a C library older than 2018
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
