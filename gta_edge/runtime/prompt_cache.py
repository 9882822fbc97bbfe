"""Prompt caches of a session: in one file, or several in a directory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gta_edge.errors import GtaEdgeError, InputError, OutputError
from gta_edge.formats.prompt_cache import read_prompt_cache, read_prompt_ids, write_prompt_cache
from gta_edge.formats.safetensors_files import quote
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import cache_tensors
from gta_edge.model.presets import gqa_like
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session import Ids, Session

__all__ = ["CacheSize", "PromptCacheDirectory", "load_prompt_cache", "save_prompt_cache"]

_log = logging.getLogger(__name__)

_WHAT = {"bundle": "bundle", "backend": "backend", "compute": "type of activations", "cache": "type of the cache"}
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CacheSize:
    """What a prompt cache takes.

    Attributes:
        tokens: that it is of.
        nbytes: of its tensors.
        gqa_bytes: what they would take of GQA with a key and a value for each of as many groups; None of a model that
            is no GTA.
    """

    tokens: int
    nbytes: int
    gqa_bytes: int | None

    @classmethod
    def of(cls, session: Session, tokens: int) -> CacheSize:
        """Return that of so many tokens of a session."""
        other = gqa_like(session.config)
        grouped = None if other is None else _nbytes(other, session, tokens)
        return cls(tokens, _nbytes(session.config, session, tokens), grouped)


def _nbytes(config: ModelConfig, session: Session, tokens: int) -> int:
    """Return the bytes of the cache of so many tokens of one sequence, of types as a session has them."""
    tensors = cache_tensors(config, session.cache_dtype, compute=session.compute)
    return sum(tensor.nbytes(1, tokens) for tensor in tensors)


def save_prompt_cache(session: Session, path: Path, ids: Ids, saved: SavedCache) -> CacheSize:
    """Write what a session exported of ``ids`` [N] to a file, in place of an older prompt cache.

    Raises:
        InputError: what is there is no prompt cache, or the session is of no bundle.
        OutputError: it cannot be written.
    """
    write_prompt_cache(path, ids[: saved.length], saved.tensors, _origin(session))
    return CacheSize.of(session, saved.length)


def load_prompt_cache(session: Session, path: Path) -> tuple[Ids, SavedCache]:
    """Return the tokens of a prompt cache, and what ``Session.import_cache`` takes.

    Raises:
        InputError: there is none; it is damaged, of a newer format, or of something else than this session runs.
        CapacityError: there is no memory for it.
    """
    found = read_prompt_cache(path)
    reason = _foreign(session, found.origin)
    if reason is not None:
        raise InputError(f"{quote(path)}: {reason}", "give another file, or remove it")
    return found.ids, SavedCache(len(found.ids), session.cache_dtype, found.tensors)


def _origin(session: Session) -> dict[str, str]:
    """Return what decides whether a session can go on from a cache, bit for bit."""
    if session.bundle_hash is None:
        raise InputError("the session is of no bundle, by which a prompt cache is known", "load a bundle")
    return {
        "bundle": session.bundle_hash,
        "backend": session.backend,
        "compute": session.compute,
        "cache": session.cache_dtype,
    }


def _foreign(session: Session, origin: object) -> str | None:
    """Return why a prompt cache is not of what a session runs; None if it is."""
    found = origin if isinstance(origin, dict) else {}
    for name, value in _origin(session).items():
        if found.get(name) != value:
            if name == "bundle":
                return "is of another bundle"
            return f"is of the {_WHAT[name]} {found.get(name)}, and the session has {value}"
    return None


class PromptCacheDirectory:
    """Prompt caches in a directory, under names that are hashes of their tokens.

    What cannot be read there, or is of another bundle, is passed over. Files are written as others go: those not used
    for longest are removed.

    Args:
        session: whose caches they are.
        directory: where; it is made if it is not there.
        max_bytes: what they may take together.

    Raises:
        OutputError: it is no directory, and cannot be made.
    """

    def __init__(self, session: Session, directory: Path, max_bytes: int = 2**32) -> None:
        self._session, self._directory, self._max_bytes = session, directory, max_bytes
        _origin(session)  # raises where nothing could be kept
        try:
            directory.mkdir(0o700, exist_ok=True)  # what users wrote is in it
        except OSError as error:
            raise OutputError(f"{directory} cannot be made ({error.strerror})", "give another directory") from error
        self._known: dict[Path, Ids] = {}  # the one used last at the end
        for path in sorted(directory.glob(f"*{_SUFFIX}"), key=_modified):
            try:
                ids, origin = read_prompt_ids(path)
            except InputError as error:
                _log.warning("a prompt cache is passed over: %s", error)
                continue
            if _foreign(session, origin) is None:
                self._known[path] = ids

    @property
    def texts(self) -> Sequence[Ids]:
        """Tokens of all that is there."""
        return list(self._known.values())

    def take(self, place: int) -> SavedCache | None:
        """Return one of ``texts``; None where it cannot be read any more."""
        path = list(self._known)[place]
        ids = self._known.pop(path)
        try:
            found, saved = load_prompt_cache(self._session, path)
            if found.tolist() != ids.tolist():
                raise InputError(f"{quote(path)}: holds another text than it did")
            path.touch()
        except (GtaEdgeError, OSError) as error:
            _log.warning("a prompt cache is passed over: %s", error)
            return None
        self._known[path] = ids
        return saved

    def put(self, ids: Ids, saved: SavedCache) -> None:
        """Write one that is not there yet, and remove what it makes superfluous, or what is then too much.

        Where it cannot be written, nothing is lost.
        """
        ids = ids[: saved.length]
        if any(ids.tobytes() == known[: len(ids)].tobytes() for known in self._known.values()):
            return
        path = self._directory / f"{hashlib.sha256(ids.tobytes()).hexdigest()[:32]}{_SUFFIX}"
        try:
            save_prompt_cache(self._session, path, ids, saved)
        except GtaEdgeError as error:
            _log.warning("a prompt cache was not written: %s", error)
            return
        for shorter in [each for each, known in self._known.items() if known.tobytes() == ids[: len(known)].tobytes()]:
            self._remove(shorter)
        self._known[path] = ids
        sizes = {each: _size(each) for each in self._known}
        while len(sizes) > 1 and sum(sizes.values()) > self._max_bytes:
            oldest = next(iter(sizes))
            self._remove(oldest)
            del sizes[oldest]

    def _remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()
        del self._known[path]


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
