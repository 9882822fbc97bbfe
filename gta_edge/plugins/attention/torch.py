"""The attention ops in torch, registered as ``torch.ops.gta.*``; importing this module registers them.

Each op exists twice, as torch's naming has it: the plain one returns new caches and can be exported; the one with a
trailing underscore writes into the caches it is given and returns the output alone.

On CUDA tensors of fp16 or bf16 grouped latent attention runs the CUDA kernels. What these are not made for (float32,
widths that are no multiple of 16, caches that are views, GPUs older than Ampere) is computed in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import installed, optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.torch_registry import aligned, register_op, require_aligned

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = [
    "grouped_latent_attention",
    "grouped_latent_attention_",
    "grouped_query_attention",
    "grouped_query_attention_",
]


# --- in torch's own operations ---------------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + d/2) of ``x`` [B, n, T, d] by the angles of ``cos``, ``sin`` [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x`` [B, T, n·d] as [B, n, T, d]."""
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(1, 2)


def _append(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """Write ``new`` [B, n, T, d] into ``cache`` [B, n, S, d] at the rows ``positions`` [B, T]."""
    cache.scatter_(2, positions[:, None, :, None].expand_as(new), new)


def _attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Softmax attention of ``query`` [B, n_q, T, d_k] over both caches; returns [B, n_q, T, d_v].

    A query at position p sees cache rows 0 to p. Scores and softmax are float32.
    """
    b, n_q, t, d_k = query.shape
    n_k, s = key_cache.shape[1:3]
    n_v, d_v = value_cache.shape[1], value_cache.shape[3]
    # heads that share a cached head become rows of one matmul: [B, n_k, (n_q/n_k)·T, d_k] x [B, n_k, d_k, S]
    scores = (query * scale).reshape(b, n_k, -1, d_k) @ key_cache.transpose(2, 3)
    visible = torch.arange(s, device=query.device) <= positions[:, None, :, None]  # [B, 1, T, S]
    weights = scores.reshape(b, n_q, t, s).float().masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
    return (weights.to(query.dtype).reshape(b, n_v, -1, s) @ value_cache).reshape(b, n_q, t, d_v)


def _latent_attention(
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
    num_query_heads: int,
    num_key_heads: int,
    num_latent_heads: int,
    scale: float,
) -> Tensor:
    """Grouped latent attention with its caches updated in place; shapes as in ``definition.INPUTS``."""
    b, t, hidden = gate.shape
    positions = past_length[:, None] + torch.arange(t, device=gate.device)  # [B, T]
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [B, 1, T, d_k/2]
    q = _rotate(_heads(query, num_query_heads), cos, sin)
    k = _rotate(_heads(key, num_key_heads), cos, sin)
    _append(past_key, k, positions)
    _append(past_latent, _heads(latent, num_latent_heads), positions)
    z = _attend(q, past_key, past_latent, positions, scale)  # [B, n_q, T, d_l]
    values = z.repeat(1, 1, 1, hidden // (num_query_heads * z.shape[-1])) + z @ value_decoder
    return torch.sigmoid(gate) * values.transpose(1, 2).reshape(b, t, hidden)


def _query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_length: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_query_heads: int,
    num_key_heads: int,
    scale: float,
) -> Tensor:
    """The baselines' attention with its caches updated in place; shapes as in ``definition.BASELINE_INPUTS``."""
    b, t, hidden = query.shape
    positions = past_length[:, None] + torch.arange(t, device=query.device)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    q = _rotate(_heads(query, num_query_heads), cos, sin)
    k = _rotate(_heads(key, num_key_heads), cos, sin)
    _append(past_key, k, positions)
    _append(past_value, _heads(value, num_key_heads), positions)
    return _attend(q, past_key, past_value, positions, scale).transpose(1, 2).reshape(b, t, hidden)


# --- on the kernels --------------------------------------------------------------------------------------------------


def _latent_attention_on_gpu(*arguments: Any) -> Tensor:
    """The same on CUDA tensors: the kernels, where they are made for the call."""
    inputs, heads, scale = arguments[:-4], arguments[-4:-1], arguments[-1]
    query, key, latent, gate, past_key, past_latent, past_length, cos, sin, value_decoder = inputs
    variant, device = _variant(inputs, heads), gate.device
    if variant is None or torch.cuda.get_device_capability(device) < OLDEST or not scale > 0:
        return _latent_attention(*arguments)
    require_aligned("past_key", past_key)
    require_aligned("past_latent", past_latent)
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = attention_kernels(variant, current_gpu(index))
    sizes = {"batch": gate.shape[0], "tokens": gate.shape[1], "capacity": past_key.shape[2]}
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    workspace = torch.empty(kernels.workspace_bytes(**sizes), dtype=torch.uint8, device=device)
    # held until the launches are queued: then the allocator may give their memory only to what follows them
    whole = [aligned(tensor) for tensor in (query, key, latent, gate, past_length, cos, sin, value_decoder)]
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
            **sizes,
            positions=cos.shape[0],
            scale=scale,
        )
    return output


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


# --- torch's registry ------------------------------------------------------------------------------------------------


def _register(
    name: str, in_place: Callable[..., Tensor], caches: tuple[str, str], output_like: str, on_gpu: Any = None
) -> tuple[Any, Any]:
    """Register an op that returns new caches, and the one that updates them in place; return both in this order.

    Args:
        name: of the first; the second's has an underscore behind it.
        in_place: what the second does, in torch's own operations; both take its arguments.
        caches: arguments that it updates.
        output_like: argument of which the output has shape and type.
        on_gpu: what the second does on CUDA tensors, if that is something else.
    """
    if not installed(torch):
        return in_place, in_place  # using either says what to install
    names = list(signature(in_place).parameters)
    places, like = [names.index(cache) for cache in caches], names.index(output_like)

    def fake(*arguments: Any) -> Any:
        return arguments[like].new_empty(arguments[like].shape)

    mutating_schema = torch.library.infer_schema(in_place, mutates_args=caches)
    mutating = register_op(f"{name}_", mutating_schema, in_place, fake, mutates=places, on_gpu=on_gpu)

    def functional(*arguments: Any) -> tuple[Tensor, ...]:
        presents = {place: arguments[place].clone() for place in places}
        output = mutating(*(presents.get(place, argument) for place, argument in enumerate(arguments)))
        return (output, *presents.values())

    schema = torch.library.infer_schema(in_place, mutates_args=()).replace("-> Tensor", "-> (Tensor, Tensor, Tensor)")

    def fakes(*arguments: Any) -> Any:
        return fake(*arguments), *(arguments[place].new_empty(arguments[place].shape) for place in places)

    plain = register_op(name, schema, functional, fakes)
    return plain, mutating


grouped_latent_attention, grouped_latent_attention_ = _register(
    "grouped_latent_attention", _latent_attention, ("past_key", "past_latent"), "gate", _latent_attention_on_gpu
)
grouped_query_attention, grouped_query_attention_ = _register(
    "grouped_query_attention", _query_attention, ("past_key", "past_value"), "query"
)
