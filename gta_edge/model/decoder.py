"""The decoder in PyTorch: the reference that every graph and kernel is measured against.

Clear before fast. Parameters carry the published names, so a checkpoint's tensors load as they are. The model is
Llama (pre-norm RMSNorm, SwiGLU) but for the attention, which is one registered op (``plugins/attention/torch.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import cache_tensors
from gta_edge.model.tables import layer_tables, model_tables
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.attention import torch as torch_ops
from gta_edge.plugins.torch_cache import Cache

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
else:
    torch = optional("torch", "export")
    Tensor, nn, functional = torch.Tensor, torch.nn, torch.nn.functional

__all__ = ["MLP", "Attention", "Cache", "Decoder", "ManagedInputs", "SelfAttention", "empty_cache"]

Attention: TypeAlias = "Callable[..., tuple[Tensor, Tensor, Tensor]]"
"""An attention op, which takes projections, caches and tables, and returns output and both present caches."""


@dataclass(frozen=True)
class ManagedInputs:
    """What a call with a managed cache is given besides: the tensors of a managed graph (``kv_cache``).

    Attributes:
        positions: int64 [B, T].
        row_bias: float32 [L, B, R].
        branch_start: int64 [L, B].
        branches: int64 [B, W].
        past_received: float32 [B, S] of each layer, updated in place.
        query_weight: float32 [B, T].
        decay: float32 [B].
        observe: ``mass`` or ``last``; empty without ``past_received``.
    """

    positions: Tensor | None = None
    row_bias: Tensor | None = None
    branch_start: Tensor | None = None
    branches: Tensor | None = None
    past_received: Sequence[Tensor] | None = None
    query_weight: Tensor | None = None
    decay: Tensor | None = None
    observe: str = ""

    def of_layer(self, layer: int) -> tuple[Tensor | str | None, ...]:
        """Return the attention op's last arguments."""
        row_bias, branch_start, received = (
            None if stacked is None else stacked[layer]
            for stacked in (self.row_bias, self.branch_start, self.past_received)
        )
        shared = self.query_weight, self.decay, self.observe
        return (self.positions, row_bias, branch_start, self.branches, received, *shared)


def _linear(module: str, inputs: int, outputs: int, biases: Collection[str]) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=f"{module}.bias" in biases)


class SelfAttention(nn.Module):
    """Projections around the attention op: GTA's, with value decoder and gate, or grouped-query attention's."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear  # to the value, or to the latent, which takes its place
    g_proj: nn.Linear
    v_b_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(self, config: ModelConfig, biases: Collection[str], attention: Attention | None) -> None:
        super().__init__()
        for parameter, shape in config.attention_shapes().items():
            name, _, kind = parameter.rpartition(".")
            if kind == "weight" and len(shape) == 2:
                outputs, inputs = shape
                self.add_module(name, _linear(name, inputs, outputs, biases))
        self.sizes = config.attention
        self.scale = config.scale
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.key_width, config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )
        self.attention: Attention = attention or torch_ops.grouped_latent_attention
        self.projections: nn.Module | None = None  # in the place of those that take x, where they are one product

    def forward(
        self, x: Tensor, cache: Cache, past_length: Tensor, cos: Tensor, sin: Tensor, *managed: Tensor | str | None
    ) -> tuple[Tensor, Cache]:  # x [B, T, H]
        sizes, cache = self.sizes, Cache(*cache)  # a plain pair is what is exported
        heads = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
        query, key, latent, *gate = self._projected(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = _normed_heads(query, self.q_norm), _normed_heads(key, self.k_norm)
        arguments = (
            query, key, latent, gate[0] if gate else None, cache.key, cache.latent, past_length, cos, sin,
            self._value_decoder(), *heads, self.scale,
        )  # fmt: skip
        if managed or cache.scales:
            others = managed or torch_ops.UNMANAGED
            output = torch_ops.grouped_latent_attention_(*arguments, *others, *cache.scales, *cache.open)
            return self.o_proj(output), cache
        output, present_key, present_latent = self.attention(*arguments)
        return self.o_proj(output), Cache(present_key, present_latent)

    def _value_decoder(self) -> Tensor | None:
        """Return W_P [n_q, d_l, e·d_l]: the row-major memory of v_b_proj seen so; no transpose, and no Linear call."""
        if not self.sizes.has_value_decoder:
            return None
        return self.v_b_proj.weight.view(self.sizes.num_query_heads, self.sizes.latent_dim, -1)

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        if self.projections is not None:
            return self.projections(x)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        query, key, latent = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (query, key, latent, self.g_proj(x)) if self.sizes.has_gate else (query, key, latent)


def _normed_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Normalise each head of ``x`` [B, T, n·d] by itself."""
    heads: Tensor = norm(x.reshape(*x.shape[:2], -1, *norm.normalized_shape))
    return heads.flatten(2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, biases: Collection[str]) -> None:
        super().__init__()
        self.gate_proj = _linear("gate_proj", config.hidden_size, config.intermediate_size, biases)
        self.up_proj = _linear("up_proj", config.hidden_size, config.intermediate_size, biases)
        self.down_proj = _linear("down_proj", config.intermediate_size, config.hidden_size, biases)
        self.projections: nn.Module | None = None  # in the place of gate_proj and up_proj, where they are one product
        self.multiply: Callable[[Tensor, Tensor], Tensor] = _silu_multiply

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.projections is None else self.projections(x)
        return self.down_proj(self.multiply(gate, up))  # type: ignore[no-any-return]  # nn.Module's call is untyped


def _silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


class Layer(nn.Module):
    """One decoder layer.

    Args:
        config: the model's sizes.
        biases: names of those that there are, ``q_proj.bias``.
        attention: as ``Decoder`` takes it.
    """

    def __init__(self, config: ModelConfig, biases: Collection[str], attention: Attention | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, biases, attention)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, biases)

    def forward(
        self, x: Tensor, cache: Cache, past_length: Tensor, cos: Tensor, sin: Tensor, *managed: Tensor | str | None
    ) -> tuple[Tensor, Cache]:  # x [B, T, H]
        attended, present = self.self_attn(self.input_layernorm(x), cache, past_length, cos, sin, *managed)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Trunk(nn.Module):
    """Everything below the head, under the prefix ``model.`` as in the published checkpoints."""

    def __init__(self, config: ModelConfig, biases: Collection[str], attention: Attention | None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            own = {name.removeprefix(prefix).partition(".")[2] for name in biases if name.startswith(prefix)}
            self.layers.append(Layer(config, own, attention))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model.

    Args:
        config: the model's sizes.
        biases: full names of the biases that the checkpoint has; None for all that the config allows.
        attention: what computes the attention; None for the registered op that returns new caches.
    """

    def __init__(
        self, config: ModelConfig, biases: Collection[str] | None = None, attention: Attention | None = None
    ) -> None:
        super().__init__()
        if biases is None:
            biases = {name for name in config.parameter_shapes() if config.is_optional(name)}
        self.config = config
        self.model = Trunk(config, biases, attention)
        self.packed_head: nn.Module | None = None  # in the place of the head's matrix, where that lies in codes
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, table in model_tables(config).items():  # outside the state dict: they follow from the config
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        past_length: Tensor,
        logit_positions: Tensor,
        caches: Sequence[Cache],
        managed: ManagedInputs | None = None,
    ) -> tuple[Tensor, list[Cache]]:
        """Append T tokens and return logits for some of them.

        Args:
            input_ids: int64 [B, T].
            past_length: int64 [B], tokens already in the cache, per row.
            logit_positions: int64 [B, M], which of the T positions to give logits for.
            caches: per layer; S must be at least ``past_length + T``.
            managed: of a managed cache; ``past_length`` is then [L, B], rows in use, and caches are updated in place.

        Returns:
            logits [B, M, V], and the present caches per layer.
        """
        x = self.model.embed_tokens(input_ids)  # [B, T, H]
        presents: list[Cache] = []
        for i, (layer, cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            if managed is None:
                x, present = layer(x, cache, past_length, *self.tables(i))
            else:
                x, present = layer(x, cache, past_length[i], *self.tables(i), *managed.of_layer(i))
            presents.append(present)
        chosen = x.gather(1, logit_positions[:, :, None].expand(-1, -1, x.shape[2]))  # [B, M, H]
        return self.head(self.model.norm(chosen)), presents

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [P, d_k/2] of a layer."""
        cos, sin = (getattr(self, name) for name in layer_tables(self.config, layer))
        return cos, sin

    def head(self, x: Tensor) -> Tensor:
        """Return float32 logits [..., V] of normalised hidden states [..., H] of any type."""
        if (
            self.packed_head is not None
        ):  # whose results are of x's type; fp16 rounds logits eight times finer than bf16
            (logits,) = self.packed_head(x.half() if x.is_cuda else x.float())
            return logits.float()  # type: ignore[no-any-return]  # nn.Module's call is untyped
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        if x.dtype == torch.float32:
            return functional.linear(x, weight)
        if x.is_cuda:  # sums are float32 there anyway; they are just not rounded to 16 bits afterwards
            if not x.numel():  # a chunk in which no row ends
                return x.new_zeros(*x.shape[:-1], len(weight), dtype=torch.float32)
            rows: Tensor = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return rows.view(*x.shape[:-1], -1)
        return functional.linear(x.float(), weight.float())


def empty_cache(
    config: ModelConfig,
    batch: int,
    capacity: int | Sequence[int],
    *,
    compute: str = "fp32",
    cache_dtype: str | None = None,
    device: torch.device | None = None,
) -> list[Cache]:
    """Return zeroed caches for all layers.

    Args:
        config: the model's sizes.
        batch: B.
        capacity: S, of all layers or of each.
        compute: type of activations.
        cache_dtype: how cached values are stored, one of ``CACHES``; by default in ``compute``.
        device: torch's default one by default.
    """
    capacities = [capacity] * config.num_hidden_layers if isinstance(capacity, int) else capacity
    layers: list[list[Tensor]] = [[] for _ in capacities]
    for tensor in cache_tensors(config, cache_dtype or compute, compute=compute):
        shape, dtype = tensor.shape(batch, capacities[tensor.layer]), getattr(torch, DTYPES[tensor.dtype].array)
        layers[tensor.layer].append(torch.zeros(shape, dtype=dtype, device=device))
    return [Cache.of(tuple(tensors)) for tensors in layers]
