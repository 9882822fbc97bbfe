"""What one layer caches, as tensors of torch, and rows of 8 bits: shared by the ops that read caches and move rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import CACHES, DTYPES, LARGEST_CODES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["Cache", "cache_name", "dequantize_rows", "quantize_rows"]

_MIN_ROW_SCALE = 2.0**-60  # so that it can be inverted
_LARGEST = {DTYPES[name].array: largest for name, largest in LARGEST_CODES.items()}


class Cache(NamedTuple):
    """What one layer caches, as ``model.kv_cache`` has it.

    Attributes:
        key: [B, n_k, S, d_k], or its codes.
        latent: [B, n_c, S, d_l], the latent's or the value's, or codes.
        scales: of a cache of fewer bits, the key's and the latent's.
        open: of one in blocks, the open block of either.
    """

    key: Tensor
    latent: Tensor
    scales: tuple[Tensor, ...] = ()
    open: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the op's inputs."""
        return (self.key, self.latent, *self.scales, *self.open)

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Cache:
        """Return a cache of such ``tensors``."""
        key, latent, *others = tensors
        return cls(key, latent, tuple(others[:2]), tuple(others[2:]))


def cache_name(dtype: torch.dtype, value_bits: int) -> str:
    """Return what a cache is called whose arrays are of a type, and whose latents have codes of so many bits."""
    array = str(dtype).removeprefix("torch.")
    return next(
        name
        for name, stored in CACHES.items()
        if DTYPES[stored.dtype].array == array and (stored.value_bits == value_bits or not stored.in_blocks)
    )


def quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes [..., d] of int8 or float8_e4m3fn, and float32 scales [...]: the largest magnitude's share.

    A row that is not finite has a scale that is not, and is read as NaN.
    """
    wide = values.float()
    largest = _LARGEST[str(dtype).removeprefix("torch.")]
    scales = (wide.abs().amax(-1) * (1 / largest)).clamp(min=_MIN_ROW_SCALE)  # NaN stays
    scaled = (wide * (1 / scales)[..., None]).nan_to_num(0.0).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Undo ``quantize_rows``, in float32."""
    return codes.float() * scales[..., None]
