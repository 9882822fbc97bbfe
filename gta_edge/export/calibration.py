"""Calibration: layer by layer, what a model computes on a text decides how its weights are rounded.

A layer gets the inputs that the quantised layers below it give, so errors do not add up unseen. Only one layer is in
memory at a time, besides its inputs for the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import ExportError, InputError
from gta_edge.export.gptq import Moments, corrected
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.formats.weights import EMBEDDING, HEAD, Storage, is_kept
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Layer
from gta_edge.model.tables import layer_tables, model_tables
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
    with _not_finite():
        table = quantize(source.read(EMBEDDING), *_format(storage, EMBEDDING)).values
    x = torch.from_numpy(table[ids])  # [rows, T, H]
    del table
    rotations = {name: torch.from_numpy(table) for name, table in model_tables(config, ids.shape[1]).items()}
    result: dict[str, QuantizedMatrix] = {}
    with torch.inference_mode(), _not_finite():
        for i in range(config.num_hidden_layers):
            progress("calibrating", i, config.num_hidden_layers)
            prefix = f"model.layers.{i}."
            cos, sin = (rotations[name] for name in layer_tables(config, i))
            layer, tables = _layer(source, prefix), (cos, sin)
            result |= _quantized(layer, config, x, tables, storage, prefix)
            for start in range(len(x)):
                x[start : start + 1] = _forward(layer, config, x[start : start + 1], tables)
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        norm = torch.from_numpy(source.read("model.norm.weight").astype(np.float32))
        x = nn.functional.rms_norm(x, norm.shape, norm, config.rms_norm_eps).flatten(0, 1)
        moments = Moments(x.T @ x)
        weight = torch.from_numpy(source.read(head).astype(np.float32))
        result[head] = corrected(weight, moments, *_format(storage, head))
    progress("calibrating", config.num_hidden_layers, config.num_hidden_layers)
    return result


def _format(storage: Storage, name: str) -> tuple[int, int | None]:
    precision, block_size = storage.of(name)
    return BITS[precision], block_size


@contextmanager
def _not_finite() -> Iterator[None]:
    """Say so where weights, or what they make of a text, are no numbers that can be rounded."""
    try:
        yield
    except (OverflowError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # it is documented
        raise ExportError(
            "calibrating met values that are not finite, or beyond float16's range",
            "check the weights, or export in fp32 or bf16",
        ) from error


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


def _layer(source: Checkpoint, prefix: str) -> Layer:
    """Return one layer of a checkpoint, in float32."""
    names = [name.removeprefix(prefix) for name in source.names if name.startswith(prefix)]
    biases = {name.partition(".")[2] for name in names if name.endswith(".bias")}
    with torch.device("meta"):
        layer = Layer(source.config, biases, None)
    weights = {name: torch.from_numpy(source.read(prefix + name).astype(np.float32)) for name in names}
    layer.load_state_dict(weights, assign=True)
    return layer.eval().requires_grad_(False)


def _forward(layer: Layer, config: ModelConfig, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    rows, tokens, _ = x.shape
    key, mixed = (torch.zeros(rows, cache.heads, tokens, cache.width) for cache in config.caches)
    output, _ = layer(x, (key, mixed), torch.zeros(rows, dtype=torch.int64), *tables)
    return output  # type: ignore[no-any-return]  # nn.Module's call is untyped


def _quantized(
    layer: Layer,
    config: ModelConfig,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    storage: Storage,
    prefix: str,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield the layer's matrices in codes, by their full names, and put their values into the layer."""
    modules = layer.named_modules()
    linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and not is_kept(f"{name}.weight")}
    moments = _moments(layer, config, linears, x, tables)
    shared: dict[int, Moments] = {}
    for name, linear in linears.items():
        gathered = moments[name]
        if id(gathered) not in shared:  # projections of one input share them
            shared[id(gathered)] = Moments(gathered)
        parameter = f"{prefix}{name}.weight"
        codes = corrected(linear.weight, shared[id(gathered)], *_format(storage, parameter))
        linear.weight.copy_(torch.from_numpy(codes.values))
        yield parameter, codes


def _moments(
    layer: Layer, config: ModelConfig, linears: dict[str, nn.Linear], x: Tensor, tables: tuple[Tensor, Tensor]
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
        _forward(layer, config, x[start : start + 1], tables)
    for hook in hooks:
        hook.remove()
    for name in linears:
        parent, _, own = name.rpartition(".")
        if own in sharing:
            found[name] = found[f"{parent}.{sharing[own]}"]
    return found
