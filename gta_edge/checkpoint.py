"""A checkpoint in the published Hugging Face layout: what it holds is checked before anything is read.

``Checkpoint.open`` takes ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` with its shards
(the single file where there are both, as transformers has it). Everything is checked from the headers: a tensor
missing, surplus, of another shape or type, or a file that is damaged is an error at once, not after minutes of export.

Files are not trusted: pickles are never read, no code of a checkpoint runs, shard names cannot leave the directory.
A link may leave it (Hugging Face's cache is made of such links), but must lead to a regular file.

Each tensor is read with plain reads of its own bytes. No file stays mapped, since mapped pages count as resident:
reading a whole checkpoint one tensor after another needs the memory of the largest.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gta_edge.config import ModelConfig, read_config
from gta_edge.errors import CheckpointError
from gta_edge.files import plain_name

__all__ = ["COMPANIONS", "Checkpoint"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that belong beside a model wherever it goes."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Types that a parameter may be stored in, by the name that safetensors gives them.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_LARGEST_JSON = 64 * 2**20  # bytes of any file beside the weights; real ones stay far below
_CHUNK = 4 * 2**20  # bytes compared at a time
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NO_PICKLE = (
    "pickle files are never read, since loading one can run any code; "
    "convert the checkpoint with safetensors (in transformers: save_pretrained)"
)


@dataclass(frozen=True)
class _File:
    """A weight file as it was when its header was checked."""

    path: Path
    size: int
    modified_ns: int


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies, as the checked header of its file says."""

    file: _File
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose tensors are known to be what its config asks for; made by ``Checkpoint.open``."""

    directory: Path
    config: ModelConfig
    names: tuple[str, ...] = field(repr=False)
    """Parameters that are present, in the order of ``config.parameter_shapes()``."""
    biases: frozenset[str] = field(repr=False)
    """Those of them that a checkpoint may lack."""
    weight_bytes: int
    """Bytes of all parameters as they are stored."""
    companions: tuple[Path, ...]
    """Tokenizer and other files to copy beside a model: those of ``COMPANIONS`` that there are."""
    _tensors: Mapping[str, _Tensor] = field(repr=False)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read the config and all headers of a checkpoint and check that they fit each other.

        Raises:
            ConfigError: ``config.json`` describes no model that is supported.
            CheckpointError: no such directory, a file that is missing, damaged, a pickle or unreadable, or tensors that
                are not the ones that the config asks for.
        """
        root = Path(directory)
        _check_directory(root)
        _regular_file(root / "config.json", _LARGEST_JSON)
        config = read_config(root / "config.json")
        found = _read_headers(root)
        parameters = _match(root, config, found)
        if config.tie_word_embeddings and _HEAD in found:
            _check_tied(found[_HEAD], found[_EMBEDDING])
        return cls(
            directory=root,
            config=config,
            names=tuple(parameters),
            biases=frozenset(name for name in parameters if config.is_optional(name)),
            weight_bytes=sum(tensor.size for tensor in parameters.values()),
            companions=_find_companions(root),
            _tensors=parameters,
        )

    def dtype_of(self, name: str) -> str:
        """Return the type that a parameter is stored in: float32, float16 or bfloat16.

        Raises:
            CheckpointError: it has no such parameter.
        """
        return str(_DTYPES[self._tensor(name).dtype].name)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one parameter.

        Returns:
            An array of its own, of the config's shape and the stored type (``ml_dtypes.bfloat16`` for bfloat16).

        Raises:
            CheckpointError: it has no such parameter, or its file has changed since ``open`` or cannot be read.
        """
        tensor = self._tensor(name)
        with _opened(tensor) as file:
            values = np.fromfile(file, _DTYPES[tensor.dtype], math.prod(tensor.shape))
        if values.nbytes != tensor.size:
            raise _changed(tensor)
        return values.reshape(tensor.shape)

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory}: has no parameter {name!r}; see its names")
        return self._tensors[name]


# --- files ---------------------------------------------------------------------------------------------------------


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{directory}: cannot be read ({reason}); expected a checkpoint's directory") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{directory}: is a file; give the directory that holds {_SINGLE} and config.json")


def _regular_file(path: Path, largest: int | None = None) -> os.stat_result:
    """Return what the system knows of a file, which must be a regular one (a pipe would wait for ever)."""
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete, or this is not one"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; replace it with the checkpoint's own file")
    if largest is not None and info.st_size > largest:
        raise CheckpointError(
            f"{path}: has {info.st_size} bytes; expected at most {largest}: this is not a checkpoint's {path.name}"
        )
    return info


def _find_companions(directory: Path) -> tuple[Path, ...]:
    paths = [directory / name for name in COMPANIONS if os.path.lexists(directory / name)]
    for path in paths:
        _regular_file(path, _LARGEST_JSON)
    return tuple(paths)


@contextmanager
def _opened(tensor: _Tensor) -> Iterator[IO[bytes]]:
    """Open a tensor's file at its first byte, once it is sure that the file is the one that was checked."""
    try:
        with tensor.file.path.open("rb") as file:
            info = os.fstat(file.fileno())
            if (info.st_size, info.st_mtime_ns) != (tensor.file.size, tensor.file.modified_ns):
                raise _changed(tensor)
            file.seek(tensor.offset)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file.path}: cannot be read ({error.strerror or error}); check the file and its disk"
        ) from error


def _changed(tensor: _Tensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file.path}: has changed since it was opened; start again when it is complete")


# --- headers -------------------------------------------------------------------------------------------------------


def _read_headers(directory: Path) -> dict[str, _Tensor]:
    """Return every tensor of the checkpoint's weight files."""
    if os.path.lexists(directory / _SINGLE):
        return _read_header(directory / _SINGLE)
    if os.path.lexists(directory / _INDEX):
        return _read_shards(directory)
    raise CheckpointError(f"{directory}: holds neither {_SINGLE} nor {_INDEX}; {_what_instead(directory)}")


def _what_instead(directory: Path) -> str:
    """Say what to do about a directory without safetensors."""
    try:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    except OSError:
        pickles = []
    if pickles:
        return f"found {_some(pickles)}, but {_NO_PICKLE}"
    if (directory / "gta_edge.json").exists():
        return "this is a bundle: give the checkpoint that it was exported from"
    return "give the directory of a checkpoint in the Hugging Face layout"


def _read_shards(directory: Path) -> dict[str, _Tensor]:
    """Return the tensors of all shards; index and headers must say the same."""
    index = directory / _INDEX
    placed = _read_index(index)  # tensor to shard
    found: dict[str, _Tensor] = {}
    for shard in sorted(set(placed.values())):
        tensors = _read_header(directory / shard)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{directory / shard}: holds {_some(twice)}, which {found[twice[0]].file.path.name} holds too; "
                "expected every tensor once: copy the checkpoint anew"
            )
        found |= tensors
    for name in sorted(placed.keys() | found.keys()):
        said = f"in {placed[name]}" if name in placed else "nowhere"
        is_in = f"in {found[name].file.path.name}" if name in found else "in none of its files"
        if said != is_in:
            raise CheckpointError(
                f"{index}: says that {_brief(name)} is {said}, but it is {is_in}; copy index and shards anew"
            )
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Return which shard each tensor is in, the shards' names checked."""
    _regular_file(path, _LARGEST_JSON)
    try:
        index = _parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a valid index ({_brief(error)}); copy it anew") from error
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: has no weight_map; expected one that names each tensor's file: copy it anew")
    for shard in placed.values():
        if not plain_name(shard) or not shard.endswith(_SUFFIX):
            raise CheckpointError(
                f"{path}: names the shard {_brief(shard)!r}; expected the plain name of a {_SUFFIX} file beside it"
            )
    return placed


def _read_header(path: Path) -> dict[str, _Tensor]:
    """Return the tensors of one file.

    The library checks that the header is well formed and that the tensors fill the file without gap or overlap. It
    does not give offsets, and takes the last of two equal keys, so the header is parsed once more.
    """
    info = _regular_file(path)
    if info.st_size == 0:
        raise CheckpointError(f"{path}: is empty; copy it anew")
    file = _File(path, info.st_size, info.st_mtime_ns)
    start = b""
    try:
        with path.open("rb") as stream:  # the library says of every file that it cannot open that there is none
            start = stream.read(4)
        with safe_open(path, framework="np"):
            pass
        return _parse_header(file)
    except SafetensorError as error:
        if start.startswith(_PICKLE_STARTS):
            raise CheckpointError(f"{path}: is a pickle and no safetensors file; {_NO_PICKLE}") from error
        raise CheckpointError(
            f"{path}: is no valid safetensors file ({_brief(error)}); it is cut off or damaged: copy it anew"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: has no valid header ({_brief(error)}); copy it anew") from error


def _parse_header(file: _File) -> dict[str, _Tensor]:
    """Parse a header that the library has accepted."""
    with file.path.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), file.size)
        header = _parse_json(stream.read(length))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = _Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def _parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON in which no key may come twice.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise ValueError(f"{_brief(key)} comes twice")
            entries[key] = value
        return entries

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)


# --- headers against the config --------------------------------------------------------------------------------------


def _match(directory: Path, config: ModelConfig, found: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """Return the config's parameters that are present, in its order; anything that does not fit is an error."""
    if config.num_hidden_layers > len(found):  # before names are made for layers that cannot be there
        raise CheckpointError(
            f"{directory}: holds {len(found)} tensors, too few for the {config.num_hidden_layers} layers of its "
            "config.json; one of the two belongs to another model"
        )
    shapes = config.parameter_shapes()
    missing = [name for name in shapes if name not in found and not config.is_optional(name)]
    surplus = [name for name in found if name not in shapes and not _is_harmless(name, config)]
    faults = [f"lacks {len(missing)} of the tensors that its config.json asks for: {_some(missing)}"] if missing else []
    faults += [f"holds {len(surplus)} that no {config.architecture} has: {_some(surplus)}"] if surplus else []
    if faults:
        raise CheckpointError(
            f"{directory}: {'; '.join(faults)}; copy the checkpoint anew, or give it its own config.json"
        )
    parameters = {name: found[name] for name in shapes if name in found}
    for name, tensor in parameters.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file.path}: {name} has the shape {_brief(list(tensor.shape))}; config.json asks for "
                f"{list(shapes[name])}: one of the two belongs to another model"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{tensor.file.path}: {name} is stored as {tensor.dtype}; expected one of {', '.join(_DTYPES)}: "
                "convert the checkpoint to one of them"
            )
    return parameters


def _is_harmless(name: str, config: ModelConfig) -> bool:
    """Tell whether a tensor says nothing that the config does not say; a tied head is compared later."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == _HEAD)


def _check_tied(head: _Tensor, embedding: _Tensor) -> None:
    """Raise CheckpointError unless head and embedding are the same bytes."""
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and _same_bytes(head, embedding):
        return
    raise CheckpointError(
        f"{head.file.path}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them; "
        "set tie_word_embeddings to false if the head is meant, or remove the head"
    )


def _same_bytes(a: _Tensor, b: _Tensor) -> bool:
    with _opened(a) as one, _opened(b) as other:
        for done in range(0, a.size, _CHUNK):
            count = min(_CHUNK, a.size - done)
            chunk = one.read(count)
            if len(chunk) != count:
                raise _changed(a)
            if chunk != other.read(count):
                return False
    return True


# --- messages ------------------------------------------------------------------------------------------------------


def _some(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(_brief(name) for name in names[:3]) + more


def _brief(value: object) -> str:
    """Return what a file says in one line that cannot be long."""
    text = str(value)
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:117]}..."
