"""The attention ops in torch, registered as ``torch.ops.gta.*``; importing this module registers them.

Each op exists twice, as torch's naming has it: the plain one returns new caches and can be exported; the one with a
trailing underscore writes into the caches it is given and returns the output alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gta_edge.libraries.optional import installed, optional

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["grouped_latent_attention", "grouped_query_attention"]


_EAGER: dict[str, Callable[..., Tensor]] = {}
"""The functions behind the ops, in torch's own operations."""


def _op(mutates: tuple[str, ...]) -> Callable[[Any], Any]:
    """Register a function as ``torch.ops.gta.NAME``."""

    def register(function: Callable[..., Any]) -> Any:
        if not installed(torch):
            return function
        _EAGER[function.__name__] = function
        return torch.library.custom_op(f"gta::{function.__name__}", function, mutates_args=mutates)

    return register


def _fake_of(op: Any) -> Callable[[Any], Any]:
    """Register how an op's outputs look, for tracing."""
    return op.register_fake if installed(torch) else lambda function: function


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
    # heads that share a cached head become rows of one product: [B, n_k, (n_q/n_k)·T, d_k] x [B, n_k, d_k, S]
    scores = (query * scale).reshape(b, n_k, -1, d_k) @ key_cache.transpose(2, 3)
    visible = torch.arange(s, device=query.device) <= positions[:, None, :, None]  # [B, 1, T, S]
    weights = scores.reshape(b, n_q, t, s).float().masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
    return (weights.to(query.dtype).reshape(b, n_v, -1, s) @ value_cache).reshape(b, n_q, t, d_v)


@_op(mutates=("past_key", "past_latent"))
def grouped_latent_attention_(
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
    """The op with its caches updated in place; shapes as in ``grouped_latent_attention.INPUTS``."""
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


@_op(mutates=())
def grouped_latent_attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The op as a function: returns output, present_key, present_latent and leaves its inputs alone."""
    present_key, present_latent = past_key.clone(), past_latent.clone()
    heads = (num_query_heads, num_key_heads, num_latent_heads)
    output = grouped_latent_attention_(
        query, key, latent, gate, present_key, present_latent, past_length, cos, sin, value_decoder, *heads, scale
    )
    return output, present_key, present_latent


@_op(mutates=("past_key", "past_value"))
def grouped_query_attention_(
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
    """The baselines' attention with its caches updated in place."""
    b, t, hidden = query.shape
    positions = past_length[:, None] + torch.arange(t, device=query.device)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    q = _rotate(_heads(query, num_query_heads), cos, sin)
    k = _rotate(_heads(key, num_key_heads), cos, sin)
    _append(past_key, k, positions)
    _append(past_value, _heads(value, num_key_heads), positions)
    return _attend(q, past_key, past_value, positions, scale).transpose(1, 2).reshape(b, t, hidden)


@_op(mutates=())
def grouped_query_attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The baselines' attention as a function: returns output, present_key, present_value."""
    present_key, present_value = past_key.clone(), past_value.clone()
    output = grouped_query_attention_(
        query, key, value, present_key, present_value, past_length, cos, sin, num_query_heads, num_key_heads, scale
    )
    return output, present_key, present_value


if installed(torch):
    from gta_edge.plugins.attention.torch_kernels import on_gpu

    grouped_latent_attention_.register_kernel("cuda")(on_gpu(_EAGER["grouped_latent_attention_"]))


@_fake_of(grouped_latent_attention)
def _(  # shapes only, for export
    query: Tensor, key: Tensor, latent: Tensor, gate: Tensor, past_key: Tensor, past_latent: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(past_key), torch.empty_like(past_latent)


@_fake_of(grouped_query_attention)
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)
