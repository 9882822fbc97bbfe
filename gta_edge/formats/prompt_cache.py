"""A prompt cache: the KV cache of a text in a file, so that its tokens need not be run again.

    FILE.safetensors     token_ids, int32 [N], and the cache's tensors by name, each [1, heads, N, width] or as its type
                         has it (``model.kv_cache``)
    its metadata         format and format_version; of what the cache is: the bundle's hash, backend, type of
                         activations and of the cache; the version that wrote it; a hash of the tensors

A file is refused that is damaged, of a newer format, or no prompt cache at all: who opens one for writing never
replaces another file. It holds numbers only, and no pickle.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from gta_edge.errors import CapacityError, InputError
from gta_edge.formats.safetensors_files import quote
from gta_edge.support.files import new_file
from gta_edge.support.json_files import MAX_JSON_BYTES, parse_json
from gta_edge.support.text import brief, one_line
from gta_edge.version import __version__

__all__ = ["FORMAT", "FORMAT_VERSION", "PromptCacheFile", "read_prompt_cache", "read_prompt_ids", "write_prompt_cache"]

FORMAT, FORMAT_VERSION = "gta-edge-prompt-cache", 1

_IDS, _HASH = "token_ids", "sha256"
_OTHER_FILE = "give another file, or remove it"
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}
"""Types of tensors as safetensors names them, and numpy or ml_dtypes."""

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptCacheFile:
    """Content of a prompt cache.

    Attributes:
        ids: the tokens, int64 [N].
        tensors: of the cache, by name.
        origin: of what it is: what its writer was given.
    """

    ids: Ids
    tensors: Mapping[str, Array]
    origin: Mapping[str, str]


def write_prompt_cache(path: Path, ids: Ids, tensors: Mapping[str, Array], origin: Mapping[str, str]) -> None:
    """Write a prompt cache, all of it or nothing, in place of an older one.

    Args:
        path: the file.
        ids: the tokens, [N].
        tensors: of the cache, by name.
        origin: of what it is; texts by name.

    Raises:
        OutputError: it cannot be written.
        InputError: what is there is no prompt cache, and is not replaced.
    """
    if path.exists():
        with _opened(path) as file:
            _header(path, file)
    content = {_IDS: ids.astype(np.int32), **tensors}
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "gta_edge": __version__, **origin}
    metadata[_HASH] = _digest(content)
    needed = sum(array.nbytes for array in content.values())
    with new_file(path, force=True, needed_bytes=needed) as partial:
        try:
            save_file(content, partial, metadata)
        except SafetensorError as error:  # it wraps what the system says, such as a full disk
            raise OSError(None, one_line(error), str(partial)) from error


def read_prompt_cache(path: Path) -> PromptCacheFile:
    """Read a prompt cache.

    Raises:
        InputError: there is none, it is damaged, or of a newer format.
        CapacityError: there is no memory for it.
    """
    with _opened(path) as file:
        header = _header(path, file)
        file.seek(0)
        try:
            found = {
                name: np.frombuffer(entry["data"], _dtype(entry["dtype"])).reshape(entry["shape"])
                for name, entry in deserialize(file.read())  # type: ignore[no-untyped-call]  # the library's stub has none
            }
        except MemoryError as error:
            raise CapacityError(f"{quote(path)}: there is no memory for it", "close other programs") from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise _damaged(path, one_line(error)) from error
    origin = {name: value for name, value in header["__metadata__"].items() if name not in ("format", _HASH)}
    if header["__metadata__"].get(_HASH) != _digest(found):
        raise _damaged(path, "its tensors are not as they were written")
    ids = found.pop(_IDS, None)
    if ids is None or ids.ndim != 1 or ids.dtype != np.int32 or not ids.size:
        raise _damaged(path, "it has no token ids")
    return PromptCacheFile(ids.astype(np.int64), found, origin)


def read_prompt_ids(path: Path) -> tuple[Ids, dict[str, str]]:
    """Return the token ids of a prompt cache and what it is of, without reading the rest.

    Raises:
        InputError: as of ``read_prompt_cache``, as far as that can be told.
    """
    with _opened(path) as file:
        header = _header(path, file)
        try:
            entry = header[_IDS]
            begin, end = entry["data_offsets"]
            file.seek(begin, 1)
            ids = np.frombuffer(file.read(end - begin), _dtype(entry["dtype"]))
            if ids.dtype != np.int32 or [len(ids)] != entry["shape"] or not 0 < 4 * len(ids) == end - begin:
                raise ValueError("it has no token ids")
        except (ValueError, LookupError, TypeError, OSError, OverflowError, MemoryError) as error:
            raise _damaged(path, one_line(error)) from error
    return ids.astype(np.int64), {name: str(value) for name, value in header["__metadata__"].items()}


def _opened(path: Path) -> IO[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise InputError(f"{quote(path)}: is no regular file", "give another path")
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{quote(path)}: cannot be read ({error.strerror or one_line(error)})", _OTHER_FILE) from error


def _header(path: Path, file: IO[bytes]) -> Mapping[str, Any]:
    """Read a file's header, and make sure that it is a prompt cache's; the file is then at its first tensor."""
    try:
        length = int.from_bytes(file.read(8), "little")
        header: Any = parse_json(file.read(length), unique_keys=True) if 0 < length <= MAX_JSON_BYTES else None
    except (OSError, ValueError) as error:
        raise InputError(f"{quote(path)}: is no prompt cache ({one_line(error)})", _OTHER_FILE) from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if header is None or not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{quote(path)}: is no prompt cache", _OTHER_FILE)
    version = metadata.get("format_version")
    if not (isinstance(version, str) and version.isdecimal() and len(version) < 10 and int(version) >= 1):
        raise _damaged(path, f"its format_version is {brief(version)}")
    if int(version) > FORMAT_VERSION:
        raise InputError(
            f"{quote(path)}: format_version is {version}",
            f"this version of gta-edge reads up to {FORMAT_VERSION}: upgrade it, or {_OTHER_FILE}",
        )
    return {**header}


def _dtype(name: Any) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, _DTYPES[name], _DTYPES[name]))


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{quote(path)}: is damaged ({reason})", _OTHER_FILE)


def _digest(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
