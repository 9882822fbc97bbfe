"""Matrices that a checkpoint has in a bundle's own integers: they go into it as they are, and are not rounded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gta_edge.errors import InputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.quantized_checkpoint import QuantizedTensor, reblocked
from gta_edge.formats.weights import block_size_for, is_kept
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, QuantizedMatrix

__all__ = ["OwnCodes", "block_size_of_own"]


class OwnCodes(Mapping[str, QuantizedMatrix]):
    """The checkpoint's matrices of the precision's width, read when they are asked for; the last one is remembered.

    Args:
        source: the checkpoint.
        precision: of the bundle; nothing is in here where it is no integer.
        block_size: of the bundle; it divides those of all of them (``block_size_of_own``).

    Raises:
        CheckpointError: a matrix is none of the bundle's: asymmetric, its inputs out of order, its scales beyond
            float16. What shows it is read at once, codes are not.
    """

    def __init__(self, source: Checkpoint, precision: str, block_size: int | None) -> None:
        self._tensors = _own(source, precision)
        self._block_size = block_size or 0
        self._last: tuple[str, QuantizedMatrix] | None = None
        for tensor in self._tensors.values():
            tensor.check()

    def __getitem__(self, name: str) -> QuantizedMatrix:
        if self._last is None or self._last[0] != name:
            self._last = name, reblocked(self._tensors[name].matrix(), self._block_size)
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def block_size_of_own(source: Checkpoint, precision: str, block_size: int | None = None) -> int | None:
    """Return the block size of a bundle; by default the largest that the checkpoint's own matrices take as they are.

    Args:
        source: the checkpoint.
        precision: of the bundle, one of ``PRECISIONS``.
        block_size: what is asked for, None for the default.

    Raises:
        InputError: as ``weights.block_size_for``, or the checkpoint's own matrices do not take it.
    """
    own = _own(source, precision)
    if not own or (block_size is None and precision == "int8" and not any(each.block_size for each in own.values())):
        return block_size_for(source.config, precision, block_size)
    groups = {tensor.block_size or tensor.shape[1] for tensor in own.values()}
    possible = [size for size in BLOCK_SIZES if not any(group % size for group in groups)]
    if block_size is None:
        shapes = source.config.parameter_shapes()
        others = {shape[1] for name, shape in shapes.items() if len(shape) == 2 and not is_kept(name)}
        fitting = [size for size in possible if not any(inputs % size for inputs in others)]
        block_size = fitting[-1] if fitting else None
    if block_size not in possible:
        name, tensor = next((n, t) for n, t in own.items() if (t.block_size or t.shape[1]) == min(groups))
        choice = f"one of {', '.join(map(str, possible))}, or" if possible else "no block size fits; take"
        raise InputError(
            f"{name} is in {precision} already, with a scale for every {tensor.block_size or tensor.shape[1]} inputs",
            f"expected {choice} another precision",
        )
    return block_size_for(source.config, precision, block_size)


def _own(source: Checkpoint, precision: str) -> dict[str, QuantizedTensor]:
    bits = BITS.get(precision)
    return {name: each for name, each in source.quantized.items() if each.bits == bits and not is_kept(name)}
