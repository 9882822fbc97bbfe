"""A checkpoint's layers one at a time, in float32: what it takes to run a model that is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gta_edge.errors import ExportError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import EMBEDDING, HEAD, is_kept
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Attention, Layer, empty_cache
from gta_edge.model.tables import layer_tables, model_tables

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = optional("torch", "export")
    Tensor, nn = torch.Tensor, torch.nn

__all__ = [
    "Tables",
    "head_of",
    "normalised",
    "quantised_linears",
    "read_layer",
    "reporting_not_finite",
    "rotation_tables",
    "run_layer",
]

Tables: TypeAlias = "tuple[Tensor, Tensor]"
"""cos and sin [T, d_k/2]."""


def read_layer(source: Checkpoint, index: int, attention: Attention | None = None) -> Layer:
    """Return one layer of a checkpoint, in float32.

    Args:
        source: the checkpoint.
        index: of the layer.
        attention: as ``Decoder`` takes it.
    """
    prefix = f"model.layers.{index}."
    names = [name.removeprefix(prefix) for name in source.names if name.startswith(prefix)]
    biases = {name.partition(".")[2] for name in names if name.endswith(".bias")}
    with torch.device("meta"):
        layer = Layer(source.config, biases, attention)
    weights = {name: torch.from_numpy(source.read(prefix + name).astype(np.float32)) for name in names}
    layer.load_state_dict(weights, assign=True)
    return layer.eval().requires_grad_(False)


def run_layer(layer: Layer, config: ModelConfig, x: Tensor, tables: Tables) -> Tensor:
    """Return what a layer makes of ``x`` [B, T, H], from an empty cache."""
    rows, tokens, _ = x.shape
    cache = empty_cache(config.replace(num_hidden_layers=1), rows, tokens)[0]
    output: Any = layer(x, cache, torch.zeros(rows, dtype=torch.int64), *tables)
    result: Tensor = output[0]
    return result


def rotation_tables(config: ModelConfig, tokens: int) -> list[Tables]:
    """Return the tables of every layer, for so many positions."""
    found = {name: torch.from_numpy(table) for name, table in model_tables(config, tokens).items()}
    return [(found[cos], found[sin]) for cos, sin in (layer_tables(config, i) for i in range(config.num_hidden_layers))]


def quantised_linears(layer: Layer) -> dict[str, nn.Linear]:
    """Return a layer's linears whose matrices are quantised, by their names in it."""
    modules = layer.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and not is_kept(f"{name}.weight")}


def head_of(config: ModelConfig) -> str:
    """Return the parameter that the head multiplies by."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def normalised(source: Checkpoint, x: Tensor) -> Tensor:
    """Return ``x`` [..., H] after the last layer's norm: what the head multiplies."""
    norm = torch.from_numpy(source.read("model.norm.weight").astype(np.float32))
    return nn.functional.rms_norm(x, norm.shape, norm, source.config.rms_norm_eps)


@contextmanager
def reporting_not_finite() -> Iterator[None]:
    """Say so where weights, or what they make of a text, are no numbers that can be rounded."""
    try:
        yield
    except (OverflowError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # it is documented
        raise ExportError(
            "calibrating met values that are not finite, or beyond float16's range",
            "check the weights, or export in fp32 or bf16",
        ) from error
