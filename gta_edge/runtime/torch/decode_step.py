"""The decoder's step of one token for each sequence, or of a tree's, in few launches: for a CUDA graph.

It computes what ``Decoder.forward`` does, with the same roundings. A residual's addition and the norm after it are one
kernel, across the border of layers too. What reads the same x is one matmul where there is a single sequence: reading
the weights then takes less than the launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gta_edge.libraries.optional import optional
from gta_edge.model.decoder import MLP, Cache, Decoder, ManagedInputs, SelfAttention
from gta_edge.plugins.elementwise.torch import add_norm, silu_multiply

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
else:
    torch = optional("torch", "export")
    Tensor, nn, functional = torch.Tensor, torch.nn, torch.nn.functional

__all__ = ["DecodeStep", "JoinedLinears", "join_linears"]

_JOINED = {SelfAttention: ("q_proj", "k_proj", "v_proj", "g_proj"), MLP: ("gate_proj", "up_proj")}
"""Linear layers of a block that share their input; only GTA has a g_proj."""


class DecodeStep:
    """A decoder's step, called as the decoder itself.

    Args:
        model: its attention in place.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._layers: list[Any] = list(model.model.layers)  # whose parts nn.Module does not type

    def __call__(
        self,
        input_ids: Tensor,
        past_length: Tensor,
        logit_positions: Tensor,
        caches: Sequence[Cache],
        managed: ManagedInputs | None = None,
    ) -> tuple[Tensor, list[Cache]]:
        """Append tokens to each row of the caches; arguments and results are those of ``Decoder.forward``, with M = T.

        ``logit_positions`` are 0 to T - 1 then, and are not read.
        """
        model = self._model
        presents: list[Cache] = []
        x, addend = model.model.embed_tokens(input_ids), None  # [B, T, H]
        for i, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            x, normed = add_norm(x, addend, layer.input_layernorm)
            length, more = (past_length, ()) if managed is None else (past_length[i], managed.of_layer(i))
            attended, present = layer.self_attn(normed, cache, length, *model.tables(i), *more)
            x, normed = add_norm(x, attended, layer.post_attention_layernorm)
            addend = layer.mlp(normed)
            presents.append(present)
        _, normed = add_norm(x, addend, model.model.norm)
        return model.head(normed), presents


class JoinedLinears(nn.Module):
    """Linear layers that share their input: one matmul for a single row of x on a GPU, else each by itself.

    Of several rows the results would lie apart in memory, and have to be copied for what reads them next.

    Args:
        layers: whose weights, of one type and device, move in here.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]))
        biases = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        some = any(layer.bias is not None for layer in layers)
        self.register_buffer("bias", torch.cat(biases) if some else None)
        self._divide()

    def _divide(self) -> None:
        biases = [None] * len(self.sizes) if self.bias is None else torch.split(self.bias, self.sizes)
        self._parts = list(zip(torch.split(self.weight, self.sizes), biases, strict=True))

    def _apply(self, *arguments: Any, **options: Any) -> JoinedLinears:
        """Move or retype the layers, as ``nn.Module`` does, and divide what there is then."""
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # as torch has it
        self._divide()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each layer's output for x [..., K], in order."""
        if x.is_cuda and x.numel() == x.shape[-1]:
            return list(torch.split(functional.linear(x, self.weight, self.bias), self.sizes, -1))
        return [functional.linear(x, *part) for part in self._parts]


def join_linears(model: Decoder) -> None:
    """Join the Linear layers of each block that share their input, a block at a time, and multiply on the kernel.

    Args:
        model: on its device and in its type; blocks whose matrices are in codes stay as they are.
    """
    for module in list(model.modules()):
        if not isinstance(module, (SelfAttention, MLP)):
            continue
        own = [name for name in _JOINED[type(module)] if hasattr(module, name)]
        if own and module.projections is None:
            module.projections = JoinedLinears([getattr(module, name) for name in own])
            for name in own:
                delattr(module, name)
        if isinstance(module, MLP):
            module.multiply = silu_multiply
