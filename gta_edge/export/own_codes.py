"""Matrices that a checkpoint has in a bundle's own integers: they go into it as they are, and are not rounded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gta_edge.errors import InputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.quantized_checkpoint import QuantizedTensor, reblocked
from gta_edge.formats.weights import Storage, is_kept, storage_for
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, QuantizedMatrix

__all__ = ["OwnCodes", "storage_of_own"]


class OwnCodes(Mapping[str, QuantizedMatrix]):
    """The checkpoint's matrices that are stored as they are, read when they are asked for; the last one is remembered.

    Args:
        source: the checkpoint.
        storage: of the bundle, made by ``storage_of_own``.

    Raises:
        CheckpointError: a matrix is none of the bundle's: asymmetric, its inputs out of order, its scales beyond
            float16. What shows it is read at once, codes are not.
    """

    def __init__(self, source: Checkpoint, storage: Storage) -> None:
        self._storage = storage
        self._tensors = {name: each for name, each in source.quantized.items() if _fits(each, *storage.of(name))}
        self._last: tuple[str, QuantizedMatrix] | None = None
        for name, tensor in self._tensors.items():
            tensor.check(self._bits(name))

    def __getitem__(self, name: str) -> QuantizedMatrix:
        if self._last is None or self._last[0] != name:
            _, block_size = self._storage.of(name)
            self._last = name, reblocked(self._tensors[name].matrix(self._bits(name)), block_size or 0)
        return self._last[1]

    def _bits(self, name: str) -> int:
        return BITS[self._storage.of(name)[0]]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def storage_of_own(
    source: Checkpoint, precision: str, block_size: int | None = None, embedding_precision: str | None = None
) -> Storage:
    """Return how an export stores a checkpoint's matrices: those that are in integers already as they are, if it can.

    The block size is by default the largest that they take. int8 holds 4 bits too, with any zero points. In an int4
    bundle what the checkpoint has in 8 bits is int8, and a head or embedding that it has in 4 bits is int4.

    Args:
        source: the checkpoint.
        precision: one of ``PRECISIONS``.
        block_size: what is asked for.
        embedding_precision: as ``weights.storage_for`` takes it.

    Raises:
        InputError: as ``weights.storage_for``, or the checkpoint's own matrices do not take the block size.
    """
    own = {name: each for name, each in source.quantized.items() if each.bits <= BITS.get(precision, 0)}
    own = {name: each for name, each in own.items() if not is_kept(name)}
    # int8 has no blocks unless a matrix has
    if own and (block_size is not None or precision == "int4" or any(each.block_size for each in own.values())):
        block_size = _block_size(source, precision, own, block_size)
    storage = storage_for(source.config, precision, block_size, embedding_precision)
    if precision != "int4":
        return storage
    wide = {name for name, each in source.quantized.items() if each.bits == 8 and not is_kept(name)}
    narrow = own.keys() if embedding_precision is None else set()
    return replace(storage, int8=(storage.int8 | wide) - narrow)


def _block_size(
    source: Checkpoint, precision: str, own: Mapping[str, QuantizedTensor], block_size: int | None
) -> int | None:
    """Return the block size asked for, or the largest that these matrices take as they are."""
    groups = {tensor.block_size or tensor.shape[1] for tensor in own.values()}
    possible = [size for size in BLOCK_SIZES if not any(group % size for group in groups)]
    if block_size is None:
        shapes = source.config.parameter_shapes()
        inputs = {shape[1] for name, shape in shapes.items() if len(shape) == 2 and not is_kept(name)}
        fitting = [size for size in possible if not any(each % size for each in inputs)]
        block_size = fitting[-1] if fitting else None
    if block_size not in possible:
        group = min(groups)
        name, tensor = next((n, t) for n, t in own.items() if (t.block_size or t.shape[1]) == group)
        choice = f"one of {', '.join(map(str, possible))}, or" if possible else "no block size fits; take"
        raise InputError(
            f"{name} is in int{tensor.bits} already, with a scale for every {group} inputs",
            f"expected {choice} another precision",
        )
    return block_size


def _fits(tensor: QuantizedTensor, precision: str, block_size: int | None) -> bool:
    """Tell whether what a matrix is stored in holds its integers."""
    own = tensor.block_size or tensor.shape[1]
    return tensor.bits <= BITS.get(precision, 0) and own % (block_size or tensor.shape[1]) == 0
