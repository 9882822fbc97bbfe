"""A checkpoint in the published Hugging Face layout: what it holds is checked before anything is read.

``Checkpoint.open`` takes ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` with its shards
(the single file where there are both, as transformers has it). Everything is checked from the headers: a tensor
missing, surplus, of another shape or type, or a file that is damaged is an error at once, not after minutes of export.
Only the values are checked when they are read: every one of them must be finite.

Files are not trusted: pickles are never read, no code of a checkpoint runs, shard names cannot leave the directory.
A link may leave it (Hugging Face's cache is made of such links), but must lead to a regular file.

Each tensor is read with plain reads of its own bytes. No file stays mapped, since mapped pages count as resident:
reading a whole checkpoint one tensor after another needs the memory of the largest.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gta_edge.errors import CheckpointError
from gta_edge.formats.quantized_checkpoint import QuantizedTensor, gather_quantized
from gta_edge.formats.safetensors_files import (
    INDEX,
    SINGLE,
    StoredTensor,
    first_names,
    quote,
    read_headers,
    read_tensor,
    regular_file,
    same_bytes,
)
from gta_edge.model.config import ModelConfig, read_config
from gta_edge.model.weight_scheme import WeightScheme, weight_scheme
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES, DTYPES, PRECISIONS
from gta_edge.numerics.quantization import BITS
from gta_edge.support.arguments import path_argument
from gta_edge.support.floats import all_finite, first_not_finite
from gta_edge.support.json_files import read_json
from gta_edge.support.text import brief

__all__ = ["COMPANIONS", "Checkpoint"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that belong beside a model wherever it goes."""

_MAX_COMPANION_BYTES = 64 * 2**20  # real ones stay far below
_MAX_BIAS_BYTES = 2**20  # of one that is read to see whether it is zero
_PREFIX = "model."
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_TIED = (_HEAD, _EMBEDDING, _EMBEDDING.removeprefix(_PREFIX))  # names of one matrix, where it is tied

# Types that a parameter may be stored in, by the name that safetensors gives them.
_DTYPES = {dtype.safetensors: dtype.numpy for dtype in DTYPES.values() if dtype.safetensors}

# Tables that follow from the config, which earlier releases of transformers saved: wherever its own code ignores them.
_TABLES = re.compile(r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$|rotary_emb\.inv_freq|decoder\.version$")

# Biases of modules that a model has; zeros add nothing. What is not there, transformers sets to zero, whatever a
# switch of config.json promises.
_BIASES = re.compile(
    r"(lm_head|(model\.)?(norm|layers\.\d+\.((input|post_attention)_layernorm|(self_attn|mlp)\.\w+_proj)))\.bias"
)
_BIAS_SWITCHES = {".self_attn.": "attention_bias", ".mlp.": "mlp_bias"}


Tensor = StoredTensor | QuantizedTensor
"""How one parameter lies in the files."""


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
    _tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read the config and all headers of a checkpoint and check that they fit each other.

        Raises:
            ConfigError: ``config.json`` describes no model that is supported.
            CheckpointError: no such directory, a file that is missing, damaged, a pickle or unreadable, or tensors that
                are not the ones that the config asks for.
        """
        root = path_argument(directory, "the checkpoint")
        _check_directory(root)
        regular_file(root / "config.json")
        config = read_config(root / "config.json")
        found = read_headers(root, _is_table, _TIED if config.tie_word_embeddings else (), _is_zero_bias)
        parameters = _match(root, config, gather_quantized(found, _scheme(root)))
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
        """Return the type that a parameter is read in: float32, float16 or bfloat16; float32 where it is quantised.

        Raises:
            CheckpointError: it has no such parameter.
        """
        tensor = self._tensor(name)
        if isinstance(tensor, QuantizedTensor):
            return "float32"
        return str(_DTYPES[tensor.dtype].name)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one parameter.

        Returns:
            An array of its own, of the config's shape and the stored type (``ml_dtypes.bfloat16`` for bfloat16), of
            float32 for what is stored in integers. Every value is finite.

        Raises:
            CheckpointError: it has no such parameter, a value of it is infinite or NaN, or its file has changed since
                ``open`` or cannot be read.
            CapacityError: there is no memory for it.
        """
        tensor = self._tensor(name)
        values = tensor.values() if isinstance(tensor, QuantizedTensor) else _values(name, tensor)
        if not all_finite(values):
            raise CheckpointError(
                f"{quote(tensor.file.path)}: {name} holds {first_not_finite(values)} are not finite",
                "expected finite weights: copy the checkpoint anew, or take one from before its training diverged",
            )
        return values

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Matrices that are stored in integers, by name."""
        return {name: tensor for name, tensor in self._tensors.items() if isinstance(tensor, QuantizedTensor)}

    @property
    def precisions(self) -> tuple[str, ...]:
        """What its tensors are stored in, each once, in the order of ``PRECISIONS``."""
        found = {
            f"int{tensor.bits}"
            if isinstance(tensor, QuantizedTensor)
            else CHECKPOINT_DTYPES[str(_DTYPES[tensor.dtype].name)].name
            for tensor in self._tensors.values()
        }
        return tuple(name for name in PRECISIONS if name in found)

    @property
    def own_precision(self) -> str:
        """The narrowest precision of a bundle that holds all tensors without loss; of quantised matrices, their own."""
        integers = [name for name in self.precisions if name in BITS]
        if integers:
            return min(integers, key=lambda name: BITS[name])  # an int4 bundle may have matrices in int8
        return self.precisions[0] if len(self.precisions) == 1 else "fp32"

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{quote(self.directory)}: has no parameter {brief(name)}", "see its names")
        return self._tensors[name]


# --- files ---------------------------------------------------------------------------------------------------------


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{quote(directory)}: cannot be read ({reason})", "expected a checkpoint's directory"
        ) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(
            f"{quote(directory)}: is a file", f"give the directory that holds {SINGLE} or {INDEX}, and config.json"
        )


def _find_companions(directory: Path) -> tuple[Path, ...]:
    paths = [directory / name for name in COMPANIONS if os.path.lexists(directory / name)]
    for path in paths:
        regular_file(path, _MAX_COMPANION_BYTES)
    return tuple(paths)


# --- headers against the config --------------------------------------------------------------------------------------


def _match(directory: Path, config: ModelConfig, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the config's parameters that are present, in its order; anything that does not fit is an error."""
    if config.num_hidden_layers > len(found):  # before names are made for layers that cannot be there
        raise CheckpointError(
            f"{quote(directory)}: holds {len(found)} tensors, too few for the {config.num_hidden_layers} layers of its "
            "config.json",
            "one of the two belongs to another model",
        )
    shapes = config.parameter_shapes()
    present = _untied(config, _prefixed(found))
    missing = [name for name in shapes if name not in present and not config.is_optional(name)]
    surplus = [name for name in present if name not in shapes and not _is_zero_bias(name, present[name])]
    faults = [f"lacks {len(missing)} of the tensors that its config.json asks for: {first_names(missing)}"]
    faults = faults if missing else []
    faults += [f"holds {len(surplus)} that no {config.architecture} has: {first_names(surplus)}"] if surplus else []
    faults += _of_biases(surplus)
    if faults:
        raise CheckpointError(
            f"{quote(directory)}: {'; '.join(faults)}", "copy the checkpoint anew, or give it its own config.json"
        )
    parameters = {name: present[name] for name in shapes if name in present}
    for name, tensor in parameters.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{quote(tensor.file.path)}: {name} has the shape {brief(list(tensor.shape))}",
                f"config.json asks for {list(shapes[name])}: one of the two belongs to another model",
            )
        if isinstance(tensor, StoredTensor) and tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{quote(tensor.file.path)}: {name} is stored as {tensor.dtype}",
                f"expected one of {', '.join(_DTYPES)}: convert the checkpoint to one of them",
            )
    return parameters


def _prefixed(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors under the names of a whole model, where a model without its head was saved."""
    if _EMBEDDING.removeprefix(_PREFIX) not in found or any(name.startswith(_PREFIX) for name in found):
        return found
    return {name if name == _HEAD else f"{_PREFIX}{name}": tensor for name, tensor in found.items()}


def _untied(config: ModelConfig, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a tied matrix under the embedding's name alone, whichever of the two the file has.

    Raises:
        CheckpointError: both are there and differ.
    """
    if not config.tie_word_embeddings or _HEAD not in found:
        return dict(found)
    tensors = {name: tensor for name, tensor in found.items() if name != _HEAD}
    head, embedding = found[_HEAD], tensors.setdefault(_EMBEDDING, found[_HEAD])
    if head is not embedding and not _same(head, embedding):
        raise CheckpointError(
            f"{quote(head.file.path)}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them",
            "set tie_word_embeddings to false if the head is meant, or remove the head",
        )
    return tensors


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, StoredTensor) and isinstance(b, StoredTensor):
        return same_bytes(a, b)
    if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)):
        return False
    return a.parts.keys() == b.parts.keys() and all(same_bytes(a.parts[name], b.parts[name]) for name in a.parts)


def _scheme(directory: Path) -> WeightScheme | None:
    """Return how the matrices are quantised; the config has been read, and so checked."""
    entries = read_json(directory / "config.json", CheckpointError, "copy the checkpoint anew")
    return weight_scheme(entries if isinstance(entries, dict) else {})


def _is_table(name: str) -> bool:
    """Tell whether this names a table that follows from the config."""
    return _TABLES.search(name) is not None


def _of_biases(surplus: list[str]) -> list[str]:
    """Say which of config.json's switches ask for biases that are not supported, and so what is wrong with them."""
    biases = [name for name in surplus if _BIASES.fullmatch(name)]
    switches = [switch for part, switch in _BIAS_SWITCHES.items() if any(part in name for name in biases)]
    if not switches:
        return []
    return [f"biases of {' and '.join(switches)} that are not all zero, which its config.json does not ask for"]


def _values(name: str, tensor: StoredTensor) -> npt.NDArray[Any]:
    return read_tensor(name, tensor, _DTYPES[tensor.dtype])


def _is_zero_bias(name: str, tensor: Tensor) -> bool:
    """Tell whether this is a bias that adds nothing."""
    if isinstance(tensor, QuantizedTensor):
        return False
    is_bias = _BIASES.fullmatch(name) and len(tensor.shape) == 1 and tensor.size <= _MAX_BIAS_BYTES
    return bool(is_bias) and tensor.dtype in _DTYPES and not _values(name, tensor).any()
