"""Caches in blocks in torch's own operations: how new keys and values are written to one, and how it is read.

This is what the kernels are compared with. It works in float32 and on any device, and shapes alone decide what is done,
so that a step can be captured as a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional
from gta_edge.numerics.cache_codes import (
    BLOCK,
    MIN_SCALE,
    dequantize_keys,
    dequantize_values,
    levels,
    pack,
)
from gta_edge.plugins.torch_cache import Cache

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["BlockStep", "blocks_of", "quantize_groups", "reopen"]


def quantize_groups(values: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 of ``values``, and float16 scales and minima of the groups that lie along ``axis``.

    The rule is ``numerics.cache_codes``'s. Scales and minima keep the axis, with one element.
    """
    wide = values.float()
    low, high = wide.aminmax(dim=axis, keepdim=True)
    step = (high - low) * 2.0**-bits
    scales, minima = step.clamp(min=MIN_SCALE).half(), (low + step * 0.5).half()
    usable = scales.isfinite() & minima.isfinite()
    codes = ((wide - minima.float()) * scales.float().reciprocal()).round().clamp(0, levels(bits))
    unknown = torch.full_like(scales, float("nan"))
    return (
        codes.where(usable, 0).to(torch.uint8),
        scales.where(usable, unknown),
        minima.where(usable, unknown),
    )


class BlockStep:
    """One step on a cache in blocks: new tokens are written to it, and what each query sees is read from it.

    Row s is read from codes by the query at row p if s // 32 < p // 32, and as it is otherwise; both from what this
    step has written as much as from what was there. A block's codes are written with its last token.

    Args:
        cache: updated in place.
        past_length: int64 [B]; S of a sequence whose tokens are none, of which nothing is written.
        key: new ones after RoPE, [B, n_k, T, d_k].
        latent: [B, n_c, T, d_l].
    """

    def __init__(self, cache: Cache, past_length: Tensor, key: Tensor, latent: Tensor) -> None:
        self._cache, self._value_bits = cache, 8 * cache.latent.shape[3] // latent.shape[3]
        self._tokens, self._capacity = key.shape[2], cache.latent.shape[2]
        self._rounds = key.dtype in (torch.float16, torch.bfloat16)
        self._first = past_length // BLOCK  # int64 [B], the block that the new tokens begin in
        self._inside = past_length % BLOCK  # and the row in it
        self._present = (past_length + self._tokens).clamp(max=self._capacity)
        key_window, latent_window = (
            self._window(opened, new) for opened, new in zip(cache.open, (key, latent), strict=True)
        )
        self._close(key_window, latent_window)
        for opened, window in zip(cache.open, (key_window, latent_window), strict=True):
            self._keep_open(opened, window, past_length)
        self.key = self._joined(dequantize_keys(cache.key, cache.scales[0].float(), torch.cat), key_window)
        latents = dequantize_values(cache.latent, cache.scales[1].float(), self._value_bits, torch.cat)
        self.latent = self._joined(latents, latent_window)

    def visible(self) -> Tensor:
        """Return which rows of ``key`` and ``latent`` each query sees, bool [B, T, S + W]."""
        device = self._first.device
        within = self._inside[:, None] + torch.arange(self._tokens, device=device)  # [B, T], rows of the window
        starts = within // BLOCK * BLOCK
        closed = torch.arange(self._capacity, device=device) < (self._first[:, None] * BLOCK + starts)[:, :, None]
        window = torch.arange(self.key.shape[2] - self._capacity, device=device)
        exact = (window >= starts[:, :, None]) & (window <= within[:, :, None])
        return torch.cat((closed, exact), -1)

    def _joined(self, dequantized: Tensor, window: Tensor) -> Tensor:
        """Return rows read from codes [B, n, S, d] and the window's [B, n, W, d] behind them, in float32.

        Codes that no query sees may be of anything, and are zeros, since they are weighted with zero and not skipped.
        """
        if self._rounds:  # as the kernels hold it for their matmuls
            dequantized = dequantized.half().float()
        seen = (self._first * BLOCK + (self._inside + self._tokens - 1) // BLOCK * BLOCK)[:, None]
        rows = torch.arange(self._capacity, device=seen.device) < seen
        return torch.cat((dequantized.where(rows[:, None, :, None], 0.0), window), 2)

    def _window(self, opened: Tensor, new: Tensor) -> Tensor:
        """Return rows from the first block's first on as they are, float32 [B, n, W, d], W a multiple of 32."""
        batch, heads, _, width = opened.shape
        count = -(-(BLOCK - 1 + self._tokens) // BLOCK) * BLOCK
        window = opened.new_zeros((batch, heads, count, width), dtype=torch.float32)
        before = torch.arange(BLOCK, device=opened.device) < self._inside[:, None]
        window[:, :, :BLOCK] = opened.float().where(before[:, None, :, None], 0.0)
        rows = self._inside[:, None] + torch.arange(self._tokens, device=opened.device)
        return window.scatter_(2, rows[:, None, :, None].expand_as(new), new.float())

    def _close(self, key: Tensor, latent: Tensor) -> None:
        """Write the codes of the blocks that the new tokens fill."""
        blocks = self._capacity // BLOCK
        count = min(key.shape[2] // BLOCK, blocks)
        numbers = self._first[:, None] + torch.arange(count, device=key.device)  # [B, J]
        filled = (numbers + 1) * BLOCK <= self._present[:, None]
        places = numbers % blocks  # those beyond the last are filled never, and each has a place of its own
        keys, latents = (x[:, :, : count * BLOCK].reshape(*x.shape[:2], count, BLOCK, -1) for x in (key, latent))
        codes, *scales = quantize_groups(keys, 4, axis=-2)
        new = [pack(codes.transpose(-1, -2), 4, torch.cat), torch.cat(scales, -2)]
        codes, *scales = quantize_groups(latents, self._value_bits, axis=-1)
        new[1:1] = [pack(codes, self._value_bits, torch.cat)]
        new.append(torch.cat(scales, -1))
        for held, found in zip(self._cache.tensors[:4], new, strict=True):
            of_blocks = held.view(*held.shape[:2], blocks, -1)
            at = places[:, None, :, None].expand(-1, held.shape[1], -1, of_blocks.shape[-1])
            kept = of_blocks.gather(2, at)
            of_blocks.scatter_(2, at, found.flatten(3).where(filled[:, None, :, None], kept))

    def _keep_open(self, opened: Tensor, window: Tensor, past_length: Tensor) -> None:
        """Write the newest token of each place into the open block."""
        last = self._present[:, None] - 1
        rows = last - (last - torch.arange(BLOCK, device=last.device)) % BLOCK  # [B, 32], the newest row of each place
        is_new = (rows >= past_length[:, None])[:, None, :, None]
        at = (rows - self._first[:, None] * BLOCK).clamp(0, window.shape[2] - 1)
        newest = window.gather(2, at[:, None, :, None].expand_as(opened)).to(opened.dtype)
        opened.copy_(newest.where(is_new, opened))


def blocks_of(key: Tensor, latent: Tensor, length: Tensor, value_bits: int, tokens: int) -> Cache:
    """Return a cache in blocks that holds what others do.

    Args:
        key: [B, n_k, S, d_k].
        latent: [B, n_c, S, d_l].
        length: int64 [B], rows of them.
        value_bits: width of a latent's codes.
        tokens: that there is to be room for behind them.
    """
    blocks = -(-(key.shape[2] + tokens) // BLOCK)
    (batch, n_k, _, d_k), (_, n_c, _, d_l) = key.shape, latent.shape
    half, codes = key.new_zeros((), dtype=torch.float16), key.new_zeros((), dtype=torch.uint8)
    cache = Cache(
        codes.new_zeros(batch, n_k, blocks, d_k, 4 * BLOCK // 8),
        codes.new_zeros(batch, n_c, blocks * BLOCK, d_l * value_bits // 8),
        (half.new_zeros(batch, n_k, blocks, 2, d_k), half.new_zeros(batch, n_c, blocks * BLOCK, 2)),
        (key.new_zeros(batch, n_k, BLOCK, d_k), latent.new_zeros(batch, n_c, BLOCK, d_l)),
    )
    for row, count in enumerate(length.tolist()):
        part = Cache.of(tuple(tensor[row : row + 1] for tensor in cache.tensors))
        if count:
            BlockStep(part, length.new_zeros(1), key[row : row + 1, :, :count], latent[row : row + 1, :, :count])
    return cache


def reopen(cache: Cache, sequence: int, block: int) -> None:
    """Put the values that a block's codes stand for into a sequence's open block."""
    rows, bits = slice(block * BLOCK, (block + 1) * BLOCK), 8 * cache.latent.shape[3] // cache.open[1].shape[3]
    codes, scales = cache.key[sequence, :, block : block + 1], cache.scales[0][sequence, :, block : block + 1]
    key = dequantize_keys(codes, scales.float(), torch.cat)
    latent = dequantize_values(
        cache.latent[sequence, :, rows], cache.scales[1][sequence, :, rows].float(), bits, torch.cat
    )
    for opened, values in zip(cache.open, (key, latent), strict=True):
        opened[sequence] = values.to(opened.dtype)
