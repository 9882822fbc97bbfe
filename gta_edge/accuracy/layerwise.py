"""The PyTorch model run layer by layer, in several arithmetics at once: one layer is in memory at a time.

Every arithmetic has a stream of hidden states, and all streams pass a layer before the next one is read. So a model is
run in float64 beside float32 in the memory that a layer and the head's table take, and its weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.probes import Probe, random_cache
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Cache, Layer
from gta_edge.model.tables import layer_tables, model_tables
from gta_edge.numerics.dtypes import CACHES, DTYPES
from gta_edge.plugins.attention.torch import attention_in_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = optional("torch", "export")
    Tensor, nn = torch.Tensor, torch.nn

__all__ = ["FLOAT32", "FLOAT64", "Arithmetic", "LayerWeights", "Stream", "run_head", "run_layers"]

LayerWeights = Mapping[str, npt.NDArray[np.float32]]
"""A layer's parameters by their names below ``model.layers.N.``."""

_TOKENS = 256  # at a time, which bounds the memory of scores
_HEAD_ROWS = 2**13  # of the head's matrix that are widened at a time
_LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True)
class Arithmetic:
    """What numbers are rounded to while a model is run.

    Attributes:
        compute: type of activations and weights: ``fp64``, ``fp32``, ``fp16`` or ``bf16``.
        activation_blocks: by parameter, how many inputs of this matrix share a scale where activations are rounded to
            int8 before they are multiplied by it; what is not named is not rounded.
        cache: where cached values are rounded, to which of ``QUANTIZED_CACHE_TYPES``.
    """

    compute: str = "fp32"
    activation_blocks: tuple[tuple[str, int], ...] = ()
    cache: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations in torch."""
        dtype: torch.dtype = getattr(torch, "float64" if self.compute == "fp64" else DTYPES[self.compute].array)
        return dtype


FLOAT64, FLOAT32 = Arithmetic("fp64"), Arithmetic()


class Stream:
    """Hidden states of all probes in one arithmetic.

    Args:
        config: the model's sizes.
        arithmetic: what it is computed in.
        probes: whose tokens.
        rows: how often each probe is run. The rows after the first are disturbed at each layer by about as much as
            rounding does: each is another case of the arithmetic's own errors.
    """

    def __init__(self, config: ModelConfig, arithmetic: Arithmetic, probes: Sequence[Probe], rows: int = 1) -> None:
        self.config, self.arithmetic, self.probes, self.rows = config, arithmetic, probes, rows
        self.x: list[Tensor] = []  # per probe [rows, N, H]
        self._random = torch.Generator().manual_seed(0)
        self._blocks = dict(arithmetic.activation_blocks)

    def embed(self, tables: Sequence[npt.NDArray[np.float32]]) -> None:
        """Begin with the rows [N, H] of the embedding table that each probe's tokens have."""
        dtype = self.arithmetic.dtype
        self.x = [torch.from_numpy(table).to(dtype).expand(self.rows, -1, -1).clone() for table in tables]

    def pass_layer(self, index: int, layer: Layer, tables: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Run all probes through a layer of this arithmetic's type; return what each adds to its two caches."""
        cos, sin = (table.to(self.arithmetic.dtype) for table in tables)
        added = []
        with self._rounding(layer, f"model.layers.{index}."):
            for i, probe in enumerate(self.probes):
                self._disturb(self.x[i])
                cache, parts = self._cache(index, probe), []
                for start in range(0, self.x[i].shape[1], _TOKENS):
                    past = torch.full((self.rows,), probe.past + start)
                    part, cache = layer(self.x[i][:, start : start + _TOKENS], cache, past, cos, sin)
                    parts.append(part)
                self.x[i] = torch.cat(parts, dim=1)
                added.append((cache.key[:, :, probe.past :], cache.latent[:, :, probe.past :]))
        return added

    def normed(self, probe: int, norm: npt.NDArray[np.float32]) -> Tensor:
        """Return what the head multiplies by [rows, N, H], in float32 where the arithmetic is narrower."""
        weight = torch.from_numpy(norm).to(self.arithmetic.dtype)
        x = nn.functional.rms_norm(self.x[probe], weight.shape, weight, self.config.rms_norm_eps)
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        if head in self._blocks:
            x = _rounded_blocks(x, self._blocks[head])
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _disturb(self, x: Tensor) -> None:
        if self.rows > 1:
            noise = torch.rand(x[1:].shape, generator=self._random, dtype=torch.float32).sub_(0.5)
            x[1:] *= 1 + torch.finfo(x.dtype).eps * noise.to(x.dtype)

    def _cache(self, index: int, probe: Probe) -> Cache:
        caches = []
        for before in random_cache(self.config, index, probe.past):
            whole = torch.zeros(
                self.rows,
                before.shape[1],
                probe.past + probe.ids.shape[1],
                before.shape[3],
                dtype=self.arithmetic.dtype,
            )
            whole[:, :, : probe.past] = torch.from_numpy(before)
            caches.append(whole)
        return Cache.of(tuple(caches))

    @contextmanager
    def _rounding(self, layer: Layer, prefix: str) -> Iterator[None]:
        """Let the layer round activations and cached values as the arithmetic has it."""
        hooks = []
        for name, module in layer.named_modules():
            block = self._blocks.get(f"{prefix}{name}.weight")
            if block is not None:
                hooks.append(module.register_forward_pre_hook(_rounding_hook(block)))
        attention = layer.self_attn.attention
        if self.arithmetic.cache is not None:
            rounded = _with_blocks if CACHES[self.arithmetic.cache].in_blocks else _with_rounded_rows
            layer.self_attn.attention = rounded(attention, self.config, self.arithmetic.cache)
        try:
            yield
        finally:
            layer.self_attn.attention = attention
            for hook in hooks:
                hook.remove()


def run_layers(
    config: ModelConfig,
    layers: Callable[[int], Mapping[str, LayerWeights]],
    streams: Mapping[str, Sequence[Stream]],
    positions: int,
    done: Callable[[int, list[list[tuple[Tensor, Tensor]]]], None],
) -> None:
    """Run streams through all layers.

    Args:
        config: the model's sizes.
        layers: returns the weights of layer i by a name for each set of weights; a set may come in later.
        streams: by the same names, those that use them; may be added to while layers are read.
        positions: for which RoPE's tables are needed.
        done: told after each layer what its streams, all of them in order, added to their caches, by probe.
    """
    rotations = {name: torch.from_numpy(table) for name, table in model_tables(config, positions).items()}
    with torch.inference_mode():
        for i in range(config.num_hidden_layers):
            cos, sin = (rotations[name] for name in layer_tables(config, i))
            added = []
            for name, weights in layers(i).items():
                built: dict[torch.dtype, Layer] = {}
                for stream in streams[name]:
                    dtype = stream.arithmetic.dtype
                    if dtype not in built:
                        built[dtype] = _layer(config, weights, dtype)
                    added.append(stream.pass_layer(i, built[dtype], (cos, sin)))
            done(i, added)


def run_head(
    matrix: npt.NDArray[np.float32], inputs: Sequence[Tensor], narrow: Sequence[torch.dtype | None]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Multiply by the head's matrix [V, H] a part at a time.

    Args:
        matrix: the head's.
        inputs: [rows, N, H] each, float32 or float64.
        narrow: for each, the type that the matrix is rounded to before it is multiplied by, None for none.

    Yields:
        a part of the vocabulary, and each input's logits for it [rows, N, part].
    """
    for start in range(0, len(matrix), _HEAD_ROWS):
        part = slice(start, min(start + _HEAD_ROWS, len(matrix)))
        stored = torch.from_numpy(matrix[part])
        with torch.inference_mode():
            logits = []
            for x, dtype in zip(inputs, narrow, strict=True):
                weight = stored if dtype is None else stored.to(dtype)
                logits.append(x @ weight.to(x.dtype).T)
        yield part, logits


def _layer(config: ModelConfig, weights: LayerWeights, dtype: torch.dtype) -> Layer:
    biases = {name.partition(".")[2] for name in weights if name.endswith(".bias")}
    with torch.device("meta"):
        layer = Layer(config, biases, None)
    layer.load_state_dict({name: torch.from_numpy(array).to(dtype) for name, array in weights.items()}, assign=True)
    return layer.eval().requires_grad_(False)


# --- rounding --------------------------------------------------------------------------------------------------------


def _rounding_hook(block: int) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, inputs: (_rounded_blocks(inputs[0], block),)


def _rounded_blocks(x: Tensor, block: int) -> Tensor:
    """Round x [..., K] to int8 with a scale for each ``block`` of inputs; what is left over is a block too."""
    width = x.shape[-1]
    padded = nn.functional.pad(x, (0, -width % block))
    return _rounded(padded.view(*x.shape[:-1], -1, block), "int8").flatten(-2)[..., :width]


def _rounded(x: Tensor, dtype: str) -> Tensor:
    """Round each row of x [..., d] to 8 bits, the largest magnitude being the largest number."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / _LARGEST[dtype]
    scaled = x / scale
    return (scaled.round() if dtype == "int8" else scaled.to(torch.float8_e4m3fn).to(x.dtype)) * scale


def _with_rounded_rows(attention: Callable[..., Any], config: ModelConfig, dtype: str) -> Callable[..., Any]:
    """Return an attention that rounds new keys and latents; before RoPE, which turns an error and leaves its size."""
    heads = [cache.heads for cache in config.caches]

    def rounded(query: Tensor, key: Tensor, latent: Tensor, *others: Any) -> Any:
        new = (x.reshape(*x.shape[:-1], n, -1) for x, n in zip((key, latent), heads, strict=True))
        return attention(query, *(_rounded(x, dtype).flatten(-2) for x in new), *others)

    return rounded


def _with_blocks(attention: Callable[..., Any], config: ModelConfig, dtype: str) -> Callable[..., Any]:
    """Return an attention that reads the cache that it is given as one in blocks would, and hands it on as it is."""
    bits = CACHES[dtype].value_bits

    def rounded(*arguments: Any) -> Any:
        return attention_in_blocks(bits, *arguments), *attention(*arguments)[1:]

    return rounded
