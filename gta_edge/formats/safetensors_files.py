"""Which tensors lie where in safetensors files, from their headers and the index of their shards.

Nothing in such a file is trusted: sizes are bounded before they are read, what the library accepts is parsed once more
for what it does not give (offsets, and keys that come twice), and no name leads out of the directory.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gta_edge.errors import CapacityError, CheckpointError
from gta_edge.support.files import plain_name
from gta_edge.support.json_files import MAX_JSON_BYTES, parse_json, read_json
from gta_edge.support.text import MAX_QUOTED, brief, one_line, printable

__all__ = [
    "INDEX",
    "SINGLE",
    "StoredTensor",
    "changed",
    "first_names",
    "opened",
    "quote",
    "read_headers",
    "read_tensor",
    "regular_file",
    "same_bytes",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_MAX_HEADER_BYTES = MAX_JSON_BYTES  # a hundred thousand tensors; the library's own limit is 100 MB
_CHUNK = 4 * 2**20  # bytes compared at a time
_MAX_NAME, _MAX_PATH = 64, 240  # characters of a tensor's name and of a path in a message
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NO_PICKLE = (
    "pickle files are never read, since loading one can run any code; "
    "convert the checkpoint with safetensors (in transformers: save_pretrained)"
)


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when its header was checked."""

    path: Path
    size: int
    modified_ns: int


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, as the checked header of its file says."""

    file: WeightFile
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size: int  # bytes


def regular_file(path: Path, max_bytes: int | None = None) -> os.stat_result:
    """Return what the system knows of a file, which must be a regular one (a pipe would wait for ever).

    Raises:
        CheckpointError: it is none, or is larger than ``max_bytes``.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{quote(path)}: cannot be read ({error.strerror})", "the checkpoint is incomplete, or this is not one"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{quote(path)}: is not a regular file", "replace it with the checkpoint's own file")
    if max_bytes is not None and info.st_size > max_bytes:
        raise CheckpointError(
            f"{quote(path)}: has {info.st_size} bytes",
            f"expected at most {max_bytes}: this is not a checkpoint's {path.name}",
        )
    return info


# --- reading tensors -----------------------------------------------------------------------------------------------


@contextmanager
def opened(tensor: StoredTensor) -> Iterator[IO[bytes]]:
    """Open a tensor's file at its first byte, once it is sure that the file is the one that was checked.

    Raises:
        CheckpointError: it has changed, or cannot be read.
    """
    try:
        with tensor.file.path.open("rb") as file:
            info = os.fstat(file.fileno())
            if (info.st_size, info.st_mtime_ns) != (tensor.file.size, tensor.file.modified_ns):
                raise changed(tensor)
            file.seek(tensor.offset)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{quote(tensor.file.path)}: cannot be read ({error.strerror or error})", "check the file and its disk"
        ) from error


def read_tensor(name: str, tensor: StoredTensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Read a tensor as it is stored.

    Args:
        name: what messages call it.
        tensor: where it lies.
        dtype: numpy's for its type.

    Raises:
        CheckpointError: its file has changed, or cannot be read.
        CapacityError: there is no memory for it.
    """
    with opened(tensor) as file:
        try:
            values = np.fromfile(file, dtype, math.prod(tensor.shape))
        except MemoryError as error:
            raise CapacityError(
                f"{quote(tensor.file.path)}: {name} takes {tensor.size / 1e9:.1f} GB, and there is no memory for it",
                "end other programs, or use a machine with more",
            ) from error
    if values.nbytes != tensor.size:
        raise changed(tensor)
    return values.reshape(tensor.shape)


def changed(tensor: StoredTensor) -> CheckpointError:
    """Return the error for a file that is not the one whose header was read."""
    return CheckpointError(
        f"{quote(tensor.file.path)}: has changed since it was opened", "start again when it is complete"
    )


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Tell whether two tensors are the same: type, shape and every byte.

    Raises:
        CheckpointError: a file has changed, or cannot be read.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with opened(a) as one, opened(b) as other:
        for done in range(0, a.size, _CHUNK):
            count = min(_CHUNK, a.size - done)
            chunk = one.read(count)
            if len(chunk) != count:
                raise changed(a)
            if chunk != other.read(count):
                return False
    return True


# --- headers -------------------------------------------------------------------------------------------------------


def read_headers(
    directory: Path,
    ignored: Callable[[str], bool],
    movable: Collection[str] = (),
    adds_nothing: Callable[[str, StoredTensor], bool] = lambda name, tensor: False,
) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint's weight files: of the single file if there is one, else of the shards.

    Args:
        directory: the checkpoint.
        ignored: tells of a tensor's name whether it means nothing, wherever it is; such tensors are not returned.
        movable: names about which the index may be wrong.
        adds_nothing: tells of a tensor that is not where the index has it whether the model is the same without.

    Raises:
        CheckpointError: a file is missing, damaged or a pickle, or index and shards contradict each other.
    """
    if os.path.lexists(directory / SINGLE):
        return {name: tensor for name, tensor in _read_header(directory / SINGLE).items() if not ignored(name)}
    if os.path.lexists(directory / INDEX):
        return _read_shards(directory, ignored, movable, adds_nothing)
    raise CheckpointError(f"{quote(directory)}: holds neither {SINGLE} nor {INDEX}", f"{_what_instead(directory)}")


def _what_instead(directory: Path) -> str:
    """Say what to do about a directory without safetensors."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        names = []
    if pickles := [name for name in names if name.endswith(_PICKLE_SUFFIXES)]:
        return f"found {first_names(pickles)}, but {_NO_PICKLE}"
    if others := [name for name in names if name.endswith(_SUFFIX)]:
        return f"found {first_names(others)}: give the whole model as transformers' save_pretrained writes it"
    if "gta_edge.json" in names:
        return "this is a bundle: give the checkpoint that it was exported from"
    return "give the directory of a checkpoint in the Hugging Face layout"


def _read_shards(
    directory: Path,
    ignored: Callable[[str], bool],
    movable: Collection[str],
    adds_nothing: Callable[[str, StoredTensor], bool],
) -> dict[str, StoredTensor]:
    """Return the tensors of all shards; index and headers must say the same."""
    index = directory / INDEX
    placed = _read_index(index)  # tensor to shard
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        for name, tensor in _read_header(directory / shard).items():
            if ignored(name):
                continue
            if name not in placed and name not in movable:  # at once: shards together may hold any number of tensors
                if adds_nothing(name, tensor):
                    continue
                raise _contradiction(index, name, "nowhere", f"in {shard}")
            if name not in found:
                found[name] = tensor
            elif not same_bytes(found[name], tensor):
                raise CheckpointError(
                    f"{quote(directory / shard)}: holds {_name(name)}, which {found[name].file.path.name} holds too, "
                    "with other values",
                    "expected every tensor once: copy the checkpoint anew",
                )
            elif placed.get(name) == shard:
                found[name] = tensor
    for name, shard in placed.items():
        if name in movable or ignored(name):
            continue
        if name not in found:
            raise _contradiction(index, name, f"in {shard}", "in none of its files")
        if found[name].file.path.name != shard and not adds_nothing(name, found[name]):
            raise _contradiction(index, name, f"in {shard}", f"in {found[name].file.path.name}")
    return found


def _contradiction(index: Path, name: str, said: str, is_in: str) -> CheckpointError:
    return CheckpointError(
        f"{quote(index)}: says that {_name(name)} is {_name(said)}, but it is {_name(is_in)}",
        "copy index and shards anew",
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return which shard each tensor is in, the shards' names checked."""
    index = read_json(path, CheckpointError, "copy the index anew", unique_keys=True)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{quote(path)}: has no weight_map", "expected one that names each tensor's file: copy it anew"
        )
    for shard in placed.values():
        if not plain_name(shard) or not shard.endswith(_SUFFIX):
            raise CheckpointError(
                f"{quote(path)}: names the shard {brief(shard)}",
                f"expected the plain name of a {_SUFFIX} file beside it",
            )
    return placed


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file.

    The library checks that the header is well formed and that the tensors fill the file without gap or overlap. It
    does not give offsets, and takes the last of two equal keys, so the header is parsed once more.
    """
    info = regular_file(path)
    if info.st_size == 0:
        raise CheckpointError(f"{quote(path)}: is empty", "copy it anew")
    file = WeightFile(path, info.st_size, info.st_mtime_ns)
    start = b""
    try:
        with path.open("rb") as stream:  # the library says of every file that it cannot open that there is none
            start = stream.read(8)
        length = int.from_bytes(start, "little")
        if length > _MAX_HEADER_BYTES and not start.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{quote(path)}: is no valid safetensors file (its header is said to have {length} bytes, expected "
                f"are at most {_MAX_HEADER_BYTES})",
                "it is cut off or damaged: copy it anew",
            )
        with safe_open(path, framework="np"):
            pass
        return _parse_header(file)
    except SafetensorError as error:
        if start.startswith(_PICKLE_STARTS):
            raise CheckpointError(f"{quote(path)}: is a pickle and no safetensors file", _NO_PICKLE) from error
        raise CheckpointError(
            f"{quote(path)}: is no valid safetensors file ({one_line(error, MAX_QUOTED)})",
            "it is cut off or damaged: copy it anew",
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{quote(path)}: cannot be read ({error.strerror or one_line(error, MAX_QUOTED)})", "check its permissions"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{quote(path)}: has no valid header ({one_line(error, MAX_QUOTED)})", "copy it anew"
        ) from error


def _parse_header(file: WeightFile) -> dict[str, StoredTensor]:
    """Parse a header that the library has accepted."""
    with file.path.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), _MAX_HEADER_BYTES)
        header: dict[str, Any] = parse_json(stream.read(length), unique_keys=True)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


# --- messages ------------------------------------------------------------------------------------------------------


def quote(path: Path) -> str:
    """Return a path as a message can quote it; the end of it where it is very long."""
    text = printable(str(path))
    return text if len(text) <= _MAX_PATH else f"…{text[-_MAX_PATH:]}"


def first_names(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(_name(name) for name in names[:3]) + more


def _name(name: str) -> str:
    """Return a name from a file, without quotes, escaped and cut."""
    text = printable(name[:_MAX_NAME])
    return text if len(text) <= _MAX_NAME and len(name) <= _MAX_NAME else f"{text[:_MAX_NAME]}…"
