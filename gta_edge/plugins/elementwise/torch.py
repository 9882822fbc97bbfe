"""What a decoder layer does between its matmuls, on tensors: on the kernels where these take them.

Elsewhere (the CPU, float32, other widths, GPUs older than Ampere) it is the model's own operations, one by one. No
op that torch knows: only what runs without a gradient, and is not exported, calls this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.cuda.gpu import current_gpu
from gta_edge.libraries.optional import optional
from gta_edge.plugins.elementwise.kernels import ElementwiseKernels, elementwise_kernels
from gta_edge.plugins.elementwise.launches import MAX_WIDTH, VECTOR
from gta_edge.plugins.torch_registry import aligned, compute_type, making_current, runs_kernels, stream_handle

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
else:
    torch = optional("torch", "export")
    Tensor, nn, functional = torch.Tensor, torch.nn, torch.nn.functional

__all__ = ["add_norm", "silu_multiply"]


def add_norm(x: Tensor, addend: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """Return the residual's new value, and that normalised.

    Args:
        x: [..., H].
        addend: the same, what a block has put out; None at the beginning.
        norm: over H, with a weight.

    Returns:
        x + addend, or x itself, and ``norm`` of it; both of x's type.
    """
    kernels = _kernels_for(x, norm.weight, *([] if addend is None else [addend]))
    width = x.shape[-1]
    if kernels is None or width % VECTOR or width > MAX_WIDTH or norm.eps is None:
        total = x if addend is None else x + addend
        return total, norm(total)
    whole = [aligned(tensor) for tensor in (x, norm.weight, *([] if addend is None else [addend]))]
    total = x if addend is None else torch.empty_like(whole[0])
    normed = torch.empty_like(whole[0])
    index = kernels.gpu.device_id
    with making_current(index):
        kernels.add_norm(
            stream_handle(index),
            x=whole[0].data_ptr(),
            weight=whole[1].data_ptr(),
            addend=0 if addend is None else whole[2].data_ptr(),
            sum=0 if addend is None else total.data_ptr(),
            normed=normed.data_ptr(),
            rows=x.numel() // width,
            width=width,
            epsilon=norm.eps,
        )
    return total, normed


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) · up, of tensors of one shape and type."""
    kernels = _kernels_for(gate, up)
    if kernels is None or gate.shape != up.shape or gate.numel() % VECTOR:
        return functional.silu(gate) * up
    whole = [aligned(tensor) for tensor in (gate, up)]
    output = torch.empty_like(whole[0])
    index = kernels.gpu.device_id
    with making_current(index):
        kernels.silu_multiply(
            stream_handle(index),
            gate=whole[0].data_ptr(),
            up=whole[1].data_ptr(),
            output=output.data_ptr(),
            values=gate.numel(),
        )
    return output


def _kernels_for(x: Tensor, *others: Tensor) -> ElementwiseKernels | None:
    """Return the kernels for these tensors, None where they are not made for them."""
    if not x.is_cuda or not x.numel() or any(tensor.dtype != x.dtype or not tensor.is_cuda for tensor in others):
        return None
    compute = compute_type(x.dtype)
    if compute is None or not runs_kernels(x.device):
        return None
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    return elementwise_kernels(compute, current_gpu(index))
