"""The matmul op in torch, registered as ``torch.ops.gta.blockwise_matmul``; importing this module registers it.

On CUDA tensors of fp16 or bf16 it runs the CUDA kernels, which read the quantised weights as they are packed. What
these are not made for (the CPU, float32, a number of inputs that is no multiple of 8, GPUs older than Ampere)
dequantises a slice of the matrices at a time, in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import installed, optional
from gta_edge.plugins.matmul.definition import Sizes
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import OUTPUTS_MULTIPLE
from gta_edge.plugins.matmul.tiling import Variant
from gta_edge.plugins.torch_registry import (
    CALLS_CACHED,
    Kind,
    aligned,
    compute_type,
    kind,
    making_current,
    register_op,
    runs_kernels,
    stream_handle,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["ALIGNED_INPUTS", "blockwise_matmul", "dequantised_rows"]

ALIGNED_INPUTS = 8
"""The kernels read x in pieces of 16 bytes, so K must be a multiple of this many 16-bit values."""

_SLICE_VALUES = 2**24
"""Weights that are dequantised at once."""


# --- in torch's own operations ---------------------------------------------------------------------------------------


def blockwise_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    block_size: int,
    output_sizes: Sequence[int],
) -> list[Tensor]:
    """Multiply by packed matrices that stand side by side along N.

    Args:
        x: floating point [..., K].
        weight: int32, packed (``packing.py``), for N outputs, the sum of ``output_sizes``.
        scale: float16, packed.
        bias: of x's type [N], or None.
        bits: 4 or 8.
        block_size: inputs that share a scale; 0 is one scale per output channel.
        output_sizes: the widths of the outputs, one to four.

    Returns:
        Contiguous tensors [..., size] of x's type, each with memory of its own.

    Raises:
        ValueError: types or shapes do not fit together.
    """
    sizes = _checked_sizes(tuple(map(kind, (x, weight, scale, bias))), bits, block_size, tuple(output_sizes))
    step = max(1, _SLICE_VALUES // (weight.shape[1] * (512 * 8 // bits)))
    rows = x.float()
    parts = []
    for first in range(0, weight.shape[0], step):
        tiles = slice(first, first + step)
        parts.append(rows @ _dequantised(weight[tiles], scale[tiles], bits)[: sizes.in_features])
    matmul = torch.cat(parts, dim=-1)[..., : sizes.out_features]
    if bias is not None:
        matmul = matmul + bias.float()
    return [part.to(x.dtype, copy=True).contiguous() for part in torch.split(matmul, list(sizes.output_sizes), dim=-1)]


def dequantised_rows(weight: Tensor, scale: Tensor, ids: Tensor, bits: int, in_features: int) -> Tensor:
    """Look up outputs of a packed matrix as rows of a table: an embedding tied to the head.

    Args:
        weight: int32, packed.
        scale: float16, packed.
        ids: int64 [...], from 0 to N - 1.
        bits: 4 or 8.
        in_features: K.

    Returns:
        float32 [..., K].
    """
    tile, g, h = ids // OUTPUTS_MULTIPLE, ids % 8, ids // 8 % 2
    words = _lanes(weight)[tile, :, g]  # [..., tile_k, t, 4 words]
    factors = scale[tile, :, g]  # [..., j, b, 2 h]
    factors = factors.gather(-1, h[..., None, None, None].expand(*factors.shape[:-1], 1)).flatten(-3)
    digits = _digits(words, bits)  # int4: [..., tile_k, t, w, odd, k8, h]; int8: [..., tile_k, t, s, k8, h, odd]
    along = -1 if bits == 4 else -2
    digits = digits.movedim(along, -1)
    chosen = digits.gather(-1, h[(..., *[None] * 6)].expand(*digits.shape[:-1], 1)).squeeze(-1)
    lead = ids.dim()
    # to [..., tile_k, w, k8, t, odd], from [.., t, w, odd, k8] or [.., t, s, k8, odd]
    order = (0, 2, 4, 1, 3) if bits == 4 else (0, 2, 3, 1, 4)
    codes = chosen.permute(*range(lead), *(lead + axis for axis in order)).flatten(lead) - (1 << bits - 1)
    values = codes.reshape(*factors.shape, -1) * factors[..., None].float()
    rows: Tensor = values.flatten(-2)[..., :in_features]
    return rows


def _digits(words: Tensor, bits: int) -> Tensor:
    """Return unsigned weights, int32: the words' axis becomes one for words and three for their 2·2·2 or 2·2 places.

    int4: [..., 4] to [..., 4 w, 2 odd, 2 k8, 2 h]; int8: [..., 4] to [..., 2 s, 2 k8, 2 h, 2 odd].
    """
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    digits = words[..., None] >> shifts & ((1 << bits) - 1)  # the mask takes what the sign was repeated to
    lead = words.shape if bits == 4 else (*words.shape[:-1], 2)
    return digits.reshape(*lead, 2, 2, 2)


def _lanes(weight: Tensor) -> Tensor:
    """Return a packed weight as [tile_n, tile_k, 8 g, 4 t, 4 words]."""
    return weight.reshape(*weight.shape[:2], 8, 4, 4)


def _dequantised(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return float32 [Kp, Np] of some tiles along the outputs."""
    tiles = weight.shape[0]
    digits = _digits(_lanes(weight), bits)
    # to [tile_k, w, k8, t, odd, tile_n, h, g], from [tile_n, tile_k, g, t, w, odd, k8, h] or [.., s, k8, h, odd]
    order = (1, 4, 6, 3, 5, 0, 7, 2) if bits == 4 else (1, 4, 5, 3, 7, 0, 6, 2)
    factors = scale.permute(1, 3, 0, 4, 2).reshape(-1, 1, tiles * OUTPUTS_MULTIPLE).float()  # [blocks, 1, Np]
    codes = digits.to(torch.uint8).permute(order).reshape(len(factors), -1, tiles * OUTPUTS_MULTIPLE)
    return (codes.float() - (1 << bits - 1)).mul_(factors).flatten(0, 1)


@lru_cache(CALLS_CACHED)
def _checked_sizes(inputs: tuple[Kind | None, ...], bits: int, block_size: int, output_sizes: tuple[int, ...]) -> Sizes:
    """Return the call's sizes, of which ``inputs`` (x, weight, scale and bias) are."""
    x, *parts = inputs
    assert x is not None  # the op's schema has it
    if not x[1].is_floating_point or not x[0]:
        raise ValueError(f"x is {_described(x)}; expected floating point [..., K]")
    sizes = Sizes(x[0][-1], output_sizes, bits, block_size)
    expected = (
        (sizes.weight_shape, torch.int32),
        (sizes.scale_shape, torch.float16),
        ((sizes.out_features,), x[1]),
    )
    for name, found, wanted in zip(("weight", "scale", "bias"), parts, expected, strict=True):
        if found is not None and found != wanted:
            raise ValueError(
                f"{name} is {_described(found)}; expected {wanted[1]} {list(wanted[0])} for {sizes.in_features} inputs "
                f"and {sizes.out_features} outputs, int{bits} in blocks of {block_size}"
            )
    return sizes


def _described(of: Kind) -> str:
    return f"{of[1]} {list(of[0])}"


# --- on the kernels --------------------------------------------------------------------------------------------------


def _on_gpu(*arguments: Any) -> list[Tensor]:
    """The same on CUDA tensors: the kernels, where they are made for the call."""
    *tensors, bits, block_size, output_sizes = arguments
    x, device = tensors[0], tensors[0].device
    compute = compute_type(x.dtype)
    if compute is None or x.shape[-1] % ALIGNED_INPUTS or not runs_kernels(device):
        return blockwise_matmul(*arguments)
    sizes = _checked_sizes(tuple(map(kind, tensors)), bits, block_size, tuple(output_sizes))
    if any(tensor is not None and tensor.device != device for tensor in tensors):
        raise BackendError(f"x is on {device}, and weight, scale or bias elsewhere", "move them to one device")
    outputs = [x.new_empty(shape) for shape in sizes.output_shapes(x.shape)]
    rows = x.numel() // sizes.in_features
    if not rows:
        return outputs
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = matmul_kernels(Variant(bits, block_size, compute), current_gpu(index))
    # held until the launch is queued: then the allocator may give their memory only to what follows it
    whole = [None if tensor is None else aligned(tensor) for tensor in tensors]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in whole]
    with making_current(index):  # whose default stream has the handle of every other GPU's
        kernels.launch(
            stream_handle(index),
            x=addresses[0],
            weight=addresses[1],
            scale=addresses[2],
            bias=addresses[3],
            outputs=[output.data_ptr() for output in outputs],
            rows=rows,
            in_features=sizes.in_features,
            output_sizes=sizes.output_sizes,
        )
    return outputs


# --- torch's registry ------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Any, bits: int, block_size: int, sizes: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in sizes]  # shapes only, for export


if installed(torch):
    register_op(
        "blockwise_matmul",
        "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, int block_size, int[] output_sizes)"
        " -> Tensor[]",
        blockwise_matmul,
        _fake,
        on_gpu=_on_gpu,
    )
