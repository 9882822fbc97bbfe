"""A checkpoint whose values are rotated: the same model, whose cached values have fewer outliers.

Softmax weights mix the values of a head, one row like the other, so that a rotation of all values is a rotation of the
mix. It goes into the weights on both sides, in float64, and costs nothing when the model runs:

    v_proj     R W      a head's rows, and its bias
    o_proj     W R^T    a query head's columns, where the mixes go there
    v_b_proj   R (T + W) - T    where a decoder is between: W is a query head's W_P [d_l, e·d_l], and T is [I I …], the
               tile of the mix that the op adds to what W decodes

R is orthogonal: a Hadamard matrix over the square root of its size, so that every value becomes a sum of all with equal
weights (QuaRot, arXiv 2404.00456). Where the width is no power of two, there is one for each block of the largest power
of two that divides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.plugins.attention.definition import Sizes

__all__ = ["RotatedCheckpoint", "rotation"]

_SMALLEST_BLOCK = 8

Floats = npt.NDArray[np.float64]


def rotation(width: int) -> Floats:
    """Return R [width, width], orthogonal.

    Raises:
        InputError: the width has no power of two in it that is large enough to be worth it.
    """
    block = width & -width  # the largest power of two that divides it
    if block < _SMALLEST_BLOCK:
        raise InputError(
            f"values of {width} channels cannot be rotated", f"expected a multiple of {_SMALLEST_BLOCK} channels"
        )
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.kron(np.eye(width // block), hadamard / np.sqrt(block))


@dataclass(frozen=True, eq=False)
class RotatedCheckpoint(Checkpoint):
    """A checkpoint that is read with its values rotated; made by ``RotatedCheckpoint.of``."""

    @classmethod
    def of(cls, source: Checkpoint) -> RotatedCheckpoint:
        """Return the rotated checkpoint.

        Raises:
            InputError: it has a matrix that would have to be rotated in integers, which would be rounded again; or its
                values have a width that cannot be rotated.
        """
        rotated = cls(**{each.name: getattr(source, each.name) for each in fields(source)})
        rotation(source.config.attention.latent_dim)
        integers = [name for name in source.quantized if rotated.rotates(name)]
        if integers:
            raise InputError(
                f"{integers[0]} is in integers already, and rotated it would be rounded again",
                "leave the rotation out, or take the checkpoint that it was made of",
            )
        return rotated

    def rotates(self, name: str) -> bool:
        """Tell whether a parameter is another one for the rotation."""
        return self._turn(name) is not None

    def dtype_of(self, name: str) -> str:
        return "float32" if self.rotates(name) else super().dtype_of(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        return self.exact(name).astype(np.float32) if self.rotates(name) else super().read(name)

    def exact(self, name: str) -> Floats:
        """Return a parameter in float64, rotated where it is to be; otherwise as ``read``."""
        values, turn = super().read(name).astype(np.float64), self._turn(name)
        return values if turn is None else turn(self.config.attention, values)

    def _turn(self, name: str) -> Callable[[Sizes, Floats], Floats] | None:
        """Return what turns a parameter, None where it stays as it is."""
        *_, block, module, _ = ("", "", *name.split("."))
        if block != "self_attn":
            return None
        if module == "v_proj":
            return _turn_values
        if self.config.attention.has_value_decoder:
            return _turn_decoder if module == "v_b_proj" else None
        return _turn_output if name.endswith("o_proj.weight") else None


def _turn_values(sizes: Sizes, values: Floats) -> Floats:
    """Turn v_proj's weight [n_c·d_l, H], or its bias [n_c·d_l]."""
    by_head = values.reshape(sizes.num_latent_heads, sizes.latent_dim, -1)
    return (rotation(sizes.latent_dim) @ by_head).reshape(values.shape)


def _turn_output(sizes: Sizes, values: Floats) -> Floats:
    """Turn o_proj's weight [H, n_q·d_h]."""
    by_head = values.reshape(len(values), sizes.num_query_heads, sizes.latent_dim)
    return (by_head @ rotation(sizes.latent_dim).T).reshape(values.shape)


def _turn_decoder(sizes: Sizes, values: Floats) -> Floats:
    """Turn v_b_proj's weight, whose memory is W_P [n_q, d_l, e·d_l]."""
    decoder = values.reshape(sizes.num_query_heads, sizes.latent_dim, -1)
    tile = np.tile(np.eye(sizes.latent_dim), decoder.shape[2] // sizes.latent_dim)
    return (rotation(sizes.latent_dim) @ (decoder + tile) - tile).reshape(values.shape)
