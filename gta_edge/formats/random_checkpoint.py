"""A checkpoint of random weights in the published layout: what a model costs does not depend on what it has learned.

Shard by shard, so that the model is never in memory. Each tensor has a random stream of its own, so the values depend
on seed and config alone, not on the shards or on the version of a library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.formats.checkpoint_writer import CHECKPOINT_FORMAT, save_tensors, write_json, write_record
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES
from gta_edge.support.files import new_directory
from gta_edge.support.memory import require_bytes
from gta_edge.support.progress import Progress, silent

__all__ = ["STANDARD_DEVIATION", "initialise"]

STANDARD_DEVIATION = 0.02
"""Of every weight and bias but the norms', which are 1."""

_BLOCK = 2**20  # values drawn at a time
_END = "<|endoftext|>"
_END_ID = 256  # after the 256 bytes


def initialise(
    config: ModelConfig,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = 256 * 2**20,
    progress: Progress = silent,
) -> None:
    """Write a checkpoint with random weights, and a byte-level tokenizer where the vocabulary has room for one.

    Args:
        config: the model; weights get its dtype, biases included. With a tokenizer its end token replaces the
            config's special tokens.
        directory: where the checkpoint goes.
        seed: chooses the weights, 0 or above.
        force: replace an existing checkpoint.
        shard_bytes: size up to which tensors share a file; what fits into one becomes ``model.safetensors``.
        progress: told of the bytes written.

    Raises:
        InputError: a seed below 0 or a shard size below 1.
        CapacityError: there is no memory for the tensors of one file.
        OutputError: the directory exists or cannot be written, or the disk has no room for the weights.
    """
    if seed < 0:
        raise InputError(f"the seed is {seed}", "expected 0 or above")
    if shard_bytes < 1:
        raise InputError(f"the shard size is {shard_bytes} bytes", "expected 1 or above")
    with_tokenizer = config.vocab_size > _END_ID
    if with_tokenizer:
        config = config.replace(bos_token_id=None, eos_token_ids=(_END_ID,))
    with new_directory(directory, force=force, needed_bytes=config.weight_bytes, kind=CHECKPOINT_FORMAT) as partial:
        # now: the names of layers that no disk has room for would not fit into memory
        shards = list(_split(config.parameter_shapes(), CHECKPOINT_DTYPES[config.dtype].bytes, shard_bytes))
        _require_memory(config, shards)
        write_json(partial / "config.json", config.to_dict())
        if with_tokenizer:
            _write_tokenizer(config, partial)
        _write_weights(config, partial, seed, shards, progress)
        write_record(partial, random_weights=True)


# --- weights -------------------------------------------------------------------------------------------------------


def _require_memory(config: ModelConfig, shards: list[list[str]]) -> None:
    """Refuse weights of which one file's, which are in memory together, have no room."""
    shapes = config.parameter_shapes()
    largest = (
        max(sum(math.prod(shapes[name]) for name in names) for names in shards) * CHECKPOINT_DTYPES[config.dtype].bytes
    )
    require_bytes(largest, "writing the weights", "close other programs, or use a machine with more memory")


def _write_weights(
    config: ModelConfig, directory: Path, seed: int, shards: list[list[str]], progress: Progress
) -> None:
    shapes = config.parameter_shapes()
    streams = {name: i for i, name in enumerate(shapes)}
    values = _normal_values(CHECKPOINT_DTYPES[config.dtype].numpy)
    total, done = config.weight_bytes, 0
    placed: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name in names:
            tensors[name] = _tensor(
                name, shapes[name], values, np.random.SeedSequence(seed, spawn_key=(streams[name],))
            )
            placed[name] = file
            done += tensors[name].nbytes
            progress("writing random weights", done, total)
        save_tensors(tensors, directory / file)
        del tensors  # before the next shard is made
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        write_json(directory / "model.safetensors.index.json", index)


def _split(shapes: dict[str, tuple[int, ...]], value_bytes: int, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of each shard's tensors; a tensor larger than a shard is alone in one."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * value_bytes
        if names and filled + size > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _normal_values(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return 65536 values [65536] that are equally likely under the normal distribution of a weight.

    To draw one is to look up 16 random bits, already in the stored type: several times faster than to compute it.
    """
    normal = NormalDist(0.0, STANDARD_DEVIATION)
    return np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)]).astype(dtype)


def _tensor(
    name: str, shape: tuple[int, ...], values: npt.NDArray[Any], stream: np.random.SeedSequence
) -> npt.NDArray[Any]:
    """Return one tensor in the type of ``values``, drawn block by block."""
    if name.endswith("norm.weight"):
        return np.ones(shape, values.dtype)
    bits = np.random.SFC64(stream)
    flat = np.empty(math.prod(shape), values.dtype)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        indices = bits.random_raw(-(-block.size // 4)).view(np.uint16)  # four in each 64-bit number
        block[:] = values[indices[: block.size]]
    return flat.reshape(shape)


# --- tokenizer -----------------------------------------------------------------------------------------------------


def _write_tokenizer(config: ModelConfig, directory: Path) -> None:
    """Write a tokenizer whose ids 0 to 255 are the bytes of UTF-8, and 256 the end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The alphabet has a visible character for every byte: its own where it is visible, else one from 256 up, in order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(character) for character in alphabet if ord(character) < 256}
    others = iter(alphabet[len(own) :])
    vocabulary = {chr(byte) if byte in own else next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, normalized=False, special=True)])
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", entries)
