"""Which matrices of an int4 model are worth int8: those whose rounding changes the model most, for the bytes they take.

What rounding a group of matrices costs is measured: the mean divergence KL(own || rounded) of the next token's
distribution on a text, everything else as it is. Groups are the matrices that share an input, since engines multiply by
them in one call. The layers before the group compute the same with and without, so they run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.reference import build_decoder
from gta_edge.errors import ExportError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import Storage, is_kept
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Cache, Decoder, empty_cache
from gta_edge.numerics.quantization import BITS, quantize
from gta_edge.plan.cost import stored_bytes, stored_parts
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["Group", "Mixture", "choose", "measured", "mixture"]

_ROWS, _TOKENS = 4, 64  # of the calibration text, that a group's divergence is measured on
_FIRST = {"q_proj": "attention's inputs", "k_proj": "attention's inputs", "v_proj": "attention's inputs"}
_FIRST |= {"g_proj": "attention's inputs", "gate_proj": "MLP's inputs", "up_proj": "MLP's inputs"}


@dataclass(frozen=True)
class Group:
    """Matrices that share an input.

    Attributes:
        names: of the parameters.
        divergence: in nats, what int4 costs where all else is as in the checkpoint.
        extra_bytes: what they take more in int8.
    """

    names: tuple[str, ...]
    divergence: float
    extra_bytes: int


@dataclass(frozen=True)
class Mixture:
    """A choice of groups.

    Attributes:
        storage: with the chosen ones in int8.
        chosen: those, the ones that gain most for a byte first.
        groups: how many there are.
    """

    storage: Storage
    chosen: tuple[Group, ...]
    groups: int

    @property
    def note(self) -> str:
        """One line for people."""
        extra = sum(group.extra_bytes for group in self.chosen)
        return f"{len(self.chosen)} of {self.groups} groups of matrices are in int8, {extra / 1e6:.1f} MB more"


def mixture(
    source: Checkpoint, storage: Storage, ids: npt.NDArray[np.int64], percent: float, progress: Progress = silent
) -> Mixture:
    """Return the groups of matrices to store in int8, as ``measured`` and ``choose`` find them.

    Args:
        source: the checkpoint.
        storage: of the model in int4.
        ids: calibration tokens [rows, T].
        percent: of the bytes of all groups in int4, that int8 may add.
        progress: told of layers done.

    Raises:
        ExportError: the weights, or what they make of the text, are not finite.
    """
    groups = measured(source, storage, ids, progress)
    names = [name for group in groups for name in group.names]
    parts = stored_parts(source.config, storage, names)
    return choose(groups, storage, int((parts["attention"] + parts["mlp"]) * percent / 100))


def choose(groups: Sequence[Group], storage: Storage, most_bytes: int) -> Mixture:
    """Return the groups to store in int8: by what a byte gains, as long as all together stay within ``most_bytes``.

    Args:
        groups: as ``measured`` returns them.
        storage: of the model in int4.
        most_bytes: that they may take more.
    """
    chosen: list[Group] = []
    left = most_bytes
    for group in sorted(groups, key=lambda group: (-group.divergence / group.extra_bytes, group.names)):
        if group.extra_bytes <= left and group.divergence > 0:
            chosen.append(group)
            left -= group.extra_bytes
    names = storage.int8.union(*(group.names for group in chosen))
    return Mixture(replace(storage, int8=names), tuple(chosen), len(groups))


def measured(
    source: Checkpoint, storage: Storage, ids: npt.NDArray[np.int64], progress: Progress = silent
) -> list[Group]:
    """Return every group of matrices of the layers with what int4 costs there.

    Args:
        source: the checkpoint; all of it is held in float32.
        storage: of the model in int4.
        ids: calibration tokens [rows, T]; the first of some rows are used.
        progress: told of layers done.

    Raises:
        ExportError: the weights, or what they make of the text, are not finite.
    """
    config = source.config
    every = max(1, len(ids) // _ROWS)
    tokens = torch.from_numpy(np.ascontiguousarray(ids[::every][:_ROWS, :_TOKENS]))
    model = build_decoder(config, ((name, source.read(name)) for name in source.names))
    found: list[Group] = []
    with torch.inference_mode():
        entries = [model.model.embed_tokens(tokens)]  # of each layer [B, T, H]
        for i in range(config.num_hidden_layers):
            entries.append(_through(model, i, i + 1, entries[-1]))
        own = _distribution(model, entries[-1])
        for i in range(config.num_hidden_layers):
            progress("measuring what int4 costs", i, config.num_hidden_layers)
            for names in _groups(config, i):
                divergence = _divergence(model, source, storage, names, entries[i], i, own)
                found.append(Group(names, divergence, _extra_bytes(config, storage, names)))
    progress("measuring what int4 costs", config.num_hidden_layers, config.num_hidden_layers)
    return found


def _groups(config: ModelConfig, layer: int) -> Iterator[tuple[str, ...]]:
    prefix = f"model.layers.{layer}."
    groups: dict[str, list[str]] = {}
    for name, shape in config.layer_shapes().items():
        if len(shape) == 2 and not is_kept(name):
            own = name.removesuffix(".weight").rpartition(".")[2]
            groups.setdefault(_FIRST.get(own, own), []).append(prefix + name)
    yield from map(tuple, groups.values())


def _extra_bytes(config: ModelConfig, storage: Storage, names: Sequence[str]) -> int:
    wide = replace(storage, int8=storage.int8.union(names))
    return stored_bytes(config, wide, names) - stored_bytes(config, storage, names)


def _divergence(
    model: Decoder,
    source: Checkpoint,
    storage: Storage,
    names: Sequence[str],
    entry: Tensor,
    layer: int,
    own: Tensor,
) -> float:
    """Return the divergence of the model with some matrices rounded, given what enters their layer."""
    weights = [model.get_parameter(name) for name in names]
    kept = [weight.clone() for weight in weights]
    try:
        for name, weight in zip(names, weights, strict=True):
            precision, block_size = storage.of(name)
            weight.copy_(torch.from_numpy(quantize(source.read(name), BITS[precision], block_size).values))
        rounded = _distribution(model, _through(model, layer, model.config.num_hidden_layers, entry))
    except OverflowError as error:
        raise ExportError(f"{names[0]} cannot be quantised: {error}", "use fp32 or bf16") from error
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)
    divergence = float((own.exp() * (own - rounded)).sum(-1).mean())
    if not np.isfinite(divergence):
        raise ExportError("what the model makes of the text is not finite", "check the weights")
    return max(0.0, divergence)


def _through(model: Decoder, start: int, stop: int, x: Tensor) -> Tensor:
    """Return what layers ``start`` to ``stop`` make of [B, T, H]."""
    rows, tokens, _ = x.shape
    caches: list[Cache] = empty_cache(model.config.replace(num_hidden_layers=1), rows, tokens)
    length = torch.zeros(rows, dtype=torch.int64)
    for layer in model.model.layers[start:stop]:
        result: Any = layer(x, caches[0], length, model.cos, model.sin)
        x = result[0]
    return x


def _distribution(model: Decoder, x: Tensor) -> Tensor:
    """Return the next token's log probabilities [B, T, V] after the last layer."""
    return torch.log_softmax(model.head(model.model.norm(x)), dim=-1)
