"""The attention op in torch, registered as ``torch.ops.gta.*``; importing this module registers it.

It exists twice, as torch's naming has it: the plain one returns new caches and can be exported; the one with a
trailing underscore writes into the caches it is given and returns the output alone.

On CUDA tensors of fp16 or bf16 it runs the CUDA kernels. What these are not made for (float32,
widths that are no multiple of 16, caches that are views, GPUs older than Ampere) is computed in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import installed, optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES
from gta_edge.plugins.attention.definition import INPUTS, Sizes, given_inputs
from gta_edge.plugins.attention.kernels import Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.torch_registry import aligned, register_op, require_aligned

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["grouped_latent_attention", "grouped_latent_attention_"]


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

    A query at position p sees cache rows 0 to p. The softmax is computed in float32, in float64 where the scores are.
    """
    b, n_q, t, d_k = query.shape
    n_k, s = key_cache.shape[1:3]
    n_v, d_v = value_cache.shape[1], value_cache.shape[3]
    # heads that share a cached head become rows of one matmul: [B, n_k, (n_q/n_k)·T, d_k] x [B, n_k, d_k, S]
    scores = (query * scale).reshape(b, n_k, -1, d_k) @ key_cache.transpose(2, 3)
    visible = torch.arange(s, device=query.device) <= positions[:, None, :, None]  # [B, 1, T, S]
    scores = scores.reshape(b, n_q, t, s).to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
    return (weights.to(query.dtype).reshape(b, n_v, -1, s) @ value_cache).reshape(b, n_q, t, d_v)


def _latent_attention(
    query: Tensor,
    key: Tensor,
    latent: Tensor,
    gate: Tensor | None,
    past_key: Tensor,
    past_latent: Tensor,
    past_length: Tensor,
    cos: Tensor,
    sin: Tensor,
    value_decoder: Tensor | None,
    num_query_heads: int,
    num_key_heads: int,
    num_latent_heads: int,
    scale: float,
) -> Tensor:
    """Grouped latent attention with its caches updated in place; shapes as in ``definition.INPUTS``."""
    b, t, _ = query.shape
    positions = past_length[:, None] + torch.arange(t, device=query.device)  # [B, T]
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [B, 1, T, d_k/2]
    q = _rotate(_heads(query, num_query_heads), cos, sin)
    k = _rotate(_heads(key, num_key_heads), cos, sin)
    _append(past_key, k, positions)
    _append(past_latent, _heads(latent, num_latent_heads), positions)
    values = _attend(q, past_key, past_latent, positions, scale)  # [B, n_q, T, d_l]
    if value_decoder is not None:
        expansion = value_decoder.shape[2] // value_decoder.shape[1]
        values = values.repeat(1, 1, 1, expansion) + values @ value_decoder  # [B, n_q, T, e·d_l]
    joined = values.transpose(1, 2).reshape(b, t, -1)
    return joined if gate is None else torch.sigmoid(gate) * joined


# --- on the kernels --------------------------------------------------------------------------------------------------


def _latent_attention_on_gpu(*arguments: Any) -> Tensor:
    """The same on CUDA tensors: the kernels, where they are made for the call."""
    inputs, heads, scale = arguments[:-4], arguments[-4:-1], arguments[-1]
    query, key, latent, gate, past_key, past_latent, past_length, cos, sin, value_decoder = inputs
    variant, device = _variant(inputs, heads), query.device
    if variant is None or torch.cuda.get_device_capability(device) < OLDEST or not scale > 0:
        return _latent_attention(*arguments)
    require_aligned("past_key", past_key)
    require_aligned("past_latent", past_latent)
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = attention_kernels(variant, current_gpu(index))
    sizes = {"batch": query.shape[0], "tokens": query.shape[1], "capacity": past_key.shape[2]}
    output: Tensor = query.new_empty(*query.shape[:2], variant.sizes.hidden_size)
    workspace = torch.empty(kernels.workspace_bytes(**sizes), dtype=torch.uint8, device=device)
    # held until the launches are queued: then the allocator may give their memory only to what follows them
    given = (query, key, latent, gate, past_length, cos, sin, value_decoder)
    whole = [None if tensor is None else aligned(tensor) for tensor in given]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in whole]
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


def _variant(inputs: tuple[Tensor | None, ...], heads: tuple[int, int, int]) -> Variant | None:
    """Return what the kernels would be compiled for, or None if they are not made for these tensors."""
    given = given_inputs(inputs)
    past_key, past_latent = given["past_key"], given["past_latent"]
    compute, past_length = given["query"].dtype, given.pop("past_length")
    types = {getattr(torch, DTYPES[name].array): name for name in COMPUTE_TYPES}
    if compute not in types or any(tensor.dtype != compute for tensor in given.values()):
        return None
    if past_length.dtype != torch.int64 or not (past_key.is_contiguous() and past_latent.is_contiguous()):
        return None
    sizes = _sizes(given, heads)
    try:
        return Variant(sizes, types[compute], types[compute])
    except BackendError:
        return None


def _sizes(given: Mapping[str, Tensor], heads: tuple[int, int, int]) -> Sizes:
    gate, decoder, d_l = given.get("gate"), given.get("value_decoder"), given["past_latent"].shape[-1]
    width = heads[0] * (d_l if decoder is None else decoder.shape[-1])
    hidden = width if gate is None else gate.shape[-1]
    return Sizes(*heads, given["past_key"].shape[-1], d_l, hidden, gate is not None, decoder is not None)


# --- torch's registry ------------------------------------------------------------------------------------------------


def _register() -> tuple[Any, Any]:
    """Register the op that returns new caches, and the one that updates them in place; return both in this order."""
    name, in_place = "grouped_latent_attention", _latent_attention
    if not installed(torch):
        return in_place, in_place  # using either says what to install
    caches = "past_key", "past_latent"
    places = [INPUTS.index(cache) for cache in caches]

    def fake(*arguments: Any) -> Any:
        given, num_query_heads = given_inputs(arguments), arguments[len(INPUTS)]
        width = given["value_decoder" if "value_decoder" in given else "past_latent"].shape[-1]
        return given["query"].new_empty(*given["query"].shape[:2], num_query_heads * width)

    mutating_schema = torch.library.infer_schema(in_place, mutates_args=caches)
    mutating = register_op(f"{name}_", mutating_schema, in_place, fake, mutates=places, on_gpu=_latent_attention_on_gpu)

    def functional(*arguments: Any) -> tuple[Tensor, ...]:
        presents = {place: arguments[place].clone() for place in places}
        output = mutating(*(presents.get(place, argument) for place, argument in enumerate(arguments)))
        return (output, *presents.values())

    schema = torch.library.infer_schema(in_place, mutates_args=()).replace("-> Tensor", "-> (Tensor, Tensor, Tensor)")

    def fakes(*arguments: Any) -> Any:
        return fake(*arguments), *(arguments[place].new_empty(arguments[place].shape) for place in places)

    plain = register_op(name, schema, functional, fakes)
    return plain, mutating


grouped_latent_attention, grouped_latent_attention_ = _register()
