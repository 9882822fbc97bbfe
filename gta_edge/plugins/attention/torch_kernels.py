"""The attention op on an NVIDIA GPU: torch's tensors given to the CUDA kernels.

``torch_ops`` registers this as the in-place op's implementation on CUDA. What the kernels are not made for (float32,
widths that are no multiple of 16, caches that are views, GPUs older than Ampere) is left to the implementation in
torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["on_gpu"]


def on_gpu(eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the op for CUDA tensors; ``eager`` computes what the kernels are not made for."""

    def attend(
        query: Tensor,
        key: Tensor,
        latent: Tensor,
        gate: Tensor,
        past_key: Tensor,
        past_latent: Tensor,
        past_length: Tensor,
        cos: Tensor,
        sin: Tensor,
        value_decoder: Tensor,
        *heads_and_scale: Any,
    ) -> Tensor:
        inputs = (query, key, latent, gate, past_key, past_latent, past_length, cos, sin, value_decoder)
        variant = _variant(inputs, heads_and_scale[:3])
        device = gate.device
        if variant is None or torch.cuda.get_device_capability(device) < OLDEST or not heads_and_scale[3] > 0:
            return eager(*inputs, *heads_and_scale)
        index = torch.cuda.current_device() if device.index is None else device.index
        kernels = attention_kernels(variant, current_gpu(index))
        batch, tokens, _ = gate.shape
        capacity, positions = past_key.shape[2], cos.shape[0]
        output = torch.empty_like(gate, memory_format=torch.contiguous_format)
        size = kernels.workspace_bytes(batch, tokens, capacity)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        # kept until the launches are queued: then the allocator may give their memory only to what follows them
        whole = [tensor.contiguous() for tensor in (query, key, latent, gate, past_length, cos, sin, value_decoder)]
        addresses = [tensor.data_ptr() for tensor in whole]
        with torch.cuda.device(device):  # whose default stream has the handle of every other GPU's
            kernels.launch(
                torch.cuda.current_stream(device).cuda_stream,
                Buffers(
                    query=addresses[0],
                    key=addresses[1],
                    latent=addresses[2],
                    gate=addresses[3],
                    key_cache=past_key.data_ptr(),
                    latent_cache=past_latent.data_ptr(),
                    key_scale=0,
                    latent_scale=0,
                    past_length=addresses[4],
                    cos=addresses[5],
                    sin=addresses[6],
                    value_decoder=addresses[7],
                    output=output.data_ptr(),
                    workspace=workspace.data_ptr(),
                ),
                batch=batch,
                tokens=tokens,
                capacity=capacity,
                positions=positions,
                scale=heads_and_scale[3],
            )
        return output

    return attend


def _variant(inputs: tuple[Tensor, ...], heads: tuple[int, int, int]) -> Variant | None:
    """Return what the kernels would be compiled for, or None if they are not made for these tensors."""
    *values, past_length, cos, sin, value_decoder = inputs
    gate, past_key, past_latent = values[3:]
    types = {getattr(torch, DTYPES[name].array): name for name in COMPUTE_TYPES}
    if gate.dtype not in types or any(x.dtype != gate.dtype for x in (*values, cos, sin, value_decoder)):
        return None
    if past_length.dtype != torch.int64 or not (past_key.is_contiguous() and past_latent.is_contiguous()):
        return None
    sizes = Sizes(*heads, past_key.shape[-1], past_latent.shape[-1], gate.shape[-1])
    try:
        return Variant(sizes, types[gate.dtype], types[gate.dtype])
    except BackendError:
        return None
