"""Calibration: layer by layer, what a model computes on a text decides how its weights are rounded.

A layer gets the inputs that the quantised layers below it give, so errors do not add up unseen. Only one layer is in
memory at a time, besides its inputs for the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.export.gptq import Moments, corrected
from gta_edge.export.layers import (
    Tables,
    head_of,
    normalised,
    quantised_linears,
    read_layer,
    reporting_not_finite,
    rotation_tables,
    run_layer,
)
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.formats.weights import EMBEDDING, Storage
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Layer
from gta_edge.numerics.quantization import BITS, QuantizedMatrix, quantize
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text_files import read_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = optional("torch", "export")
    Tensor, nn = torch.Tensor, torch.nn

__all__ = ["calibrated", "calibration_ids"]

_ROWS, _TOKENS = 32, 1024  # of the text; twice as many helped little
_TEXT = "give another calibration text, in UTF-8"


def calibrated(
    source: Checkpoint, ids: npt.NDArray[np.int64], storage: Storage, progress: Progress = silent
) -> dict[str, QuantizedMatrix]:
    """Return every matrix but an untied embedding in codes, corrected for what the model computes on a text.

    A table that is looked up has no inputs to be calibrated for. A tied one is calibrated as the head that it also is.

    Args:
        source: the checkpoint.
        ids: tokens of the text [rows, T], as ``calibration_ids`` returns them.
        storage: how each matrix is stored.
        progress: told of layers done.

    Raises:
        ExportError: the weights, or what they make of the text, are not finite.
    """
    config = source.config
    layers = config.num_hidden_layers
    with reporting_not_finite():
        table = quantize(source.read(EMBEDDING), *_format(storage, EMBEDDING)).values
    x = torch.from_numpy(table[ids])  # [rows, T, H]
    del table
    result: dict[str, QuantizedMatrix] = {}
    with torch.inference_mode(), reporting_not_finite():
        for i, tables in enumerate(rotation_tables(config, ids.shape[1])):
            progress("calibrating", i, layers)
            layer = read_layer(source, i)
            result |= _quantized(layer, config, x, tables, storage, f"model.layers.{i}.")
            for start in range(len(x)):
                x[start : start + 1] = run_layer(layer, config, x[start : start + 1], tables)
        head = head_of(config)
        x = normalised(source, x).flatten(0, 1)
        moments = Moments(x.T @ x)
        weight = torch.from_numpy(source.read(head).astype(np.float32))
        result[head] = corrected(weight, moments, *_format(storage, head))
    progress("calibrating", layers, layers)
    return result


def _format(storage: Storage, name: str) -> tuple[int, int | None]:
    precision, block_size = storage.of(name)
    return BITS[precision], block_size


def calibration_ids(source: Checkpoint, text: Path) -> Any:
    """Return the text's tokens, int64 [rows, T], evenly taken from it.

    Raises:
        InputError: it cannot be read, is shorter than one row, or there is no tokenizer.
    """
    tokenizer = Tokenizer.load(source.directory)
    if tokenizer is None:
        raise InputError(f"{source.directory} has no tokenizer.json to read a calibration text with", "leave it out")
    encoded = tokenizer.encode(read_text(text, remedy=_TEXT, pipes=True), add_special_tokens=False)
    tokens = min(_TOKENS, source.config.max_position_embeddings)
    ids = np.asarray(encoded, np.int64)
    if len(ids) < tokens or (ids >= source.config.vocab_size).any():
        raise InputError(
            f"{text}: gives {len(ids)} tokens for a vocabulary of {source.config.vocab_size}",
            f"expected at least {tokens}, {_ROWS * tokens} are used: give a longer text",
        )
    rows = min(_ROWS, len(ids) // tokens)
    starts = np.linspace(0, len(ids) - tokens, rows).astype(np.int64)
    return np.stack([ids[start : start + tokens] for start in starts])


def _quantized(
    layer: Layer,
    config: ModelConfig,
    x: Tensor,
    tables: Tables,
    storage: Storage,
    prefix: str,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield the layer's matrices in codes, by their full names, and put their values into the layer."""
    linears = quantised_linears(layer)
    gathered = _moments(layer, config, linears, x, tables)
    together: dict[tuple[int, int, int | None], list[str]] = {}  # of the same inputs and format: one larger matrix
    for name in linears:
        together.setdefault((id(gathered[name]), *_format(storage, f"{prefix}{name}.weight")), []).append(name)
    shared: dict[int, Moments] = {}
    for (key, bits, block_size), names in together.items():
        if key not in shared:  # projections of one input share them
            shared[key] = Moments(gathered[names[0]])
        codes = corrected(torch.cat([linears[name].weight for name in names]), shared[key], bits, block_size)
        start = 0
        for name in names:
            part = codes.rows(start, start + linears[name].out_features)
            start += linears[name].out_features
            linears[name].weight.copy_(torch.from_numpy(part.values))
            yield f"{prefix}{name}.weight", part


def _moments(
    layer: Layer, config: ModelConfig, linears: dict[str, nn.Linear], x: Tensor, tables: Tables
) -> dict[str, Tensor]:
    """Return X^T X [in, in] of every matrix's inputs over all rows; matrices of the same input share one."""
    found: dict[str, Tensor] = {}
    sharing = {"k_proj": "q_proj", "v_proj": "q_proj", "g_proj": "q_proj", "up_proj": "gate_proj"}
    hooks = []
    for name, linear in linears.items():
        parent, _, own = name.rpartition(".")
        if own in sharing:
            continue
        found[name] = torch.zeros(linear.in_features, linear.in_features)

        def gather(_: Any, inputs: tuple[Tensor, ...], total: Tensor = found[name]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            total.addmm_(rows.T, rows)

        hooks.append(linear.register_forward_pre_hook(gather))
    for start in range(len(x)):
        run_layer(layer, config, x[start : start + 1], tables)
    for hook in hooks:
        hook.remove()
    for name in linears:
        parent, _, own = name.rpartition(".")
        if own in sharing:
            found[name] = found[f"{parent}.{sharing[own]}"]
    return found
