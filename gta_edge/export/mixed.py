"""Which matrices of an int4 model are worth int8: those whose rounding changes the model most, for the bytes they take.

What rounding a group of matrices costs is the mean divergence KL(own || rounded) of the next token's distribution on a
text, everything else as it is. It is estimated to second order, which takes one pass forward and one back, for all
groups together: a token is drawn at each position as the model predicts it, and half the mean square of what rounding
changes in its log probability, along the slope, is the divergence (the Fisher information is its curvature). Changes at
different positions count as independent. Groups are the matrices that share an input, since engines multiply by them in
one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import ExportError
from gta_edge.export.layers import (
    Tables,
    head_of,
    normalised,
    quantised_linears,
    read_layer,
    rotation_tables,
    run_layer,
)
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import EMBEDDING, Storage, is_kept
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Layer
from gta_edge.numerics.quantization import BITS, quantize
from gta_edge.plan.cost import stored_bytes, stored_parts
from gta_edge.plugins.attention.torch import differentiable_attention
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["Group", "Mixture", "choose", "estimated", "mixture"]

_ROWS, _TOKENS = 16, 128  # of the calibration text, that divergences are estimated on
_SEED = 0
_FIRST = {"q_proj": "attention's inputs", "k_proj": "attention's inputs", "v_proj": "attention's inputs"}
_FIRST |= {"g_proj": "attention's inputs", "gate_proj": "MLP's inputs", "up_proj": "MLP's inputs"}


@dataclass(frozen=True)
class Group:
    """Matrices that share an input.

    Attributes:
        names: of the parameters.
        divergence: in nats, what int4 costs where all else is as in the checkpoint; an estimate.
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
    """Return the groups of matrices to store in int8, as ``estimated`` and ``choose`` find them.

    Args:
        source: the checkpoint.
        storage: of the model in int4.
        ids: calibration tokens [rows, T].
        percent: of the bytes of all groups in int4, that int8 may add.
        progress: told of layers done.

    Raises:
        ExportError: the weights, or what they make of the text, are not finite.
    """
    groups = estimated(source, storage, ids, progress)
    names = [name for group in groups for name in group.names]
    parts = stored_parts(source.config, storage, names)
    return choose(groups, storage, int((parts["attention"] + parts["mlp"]) * percent / 100))


def choose(groups: Sequence[Group], storage: Storage, most_bytes: int) -> Mixture:
    """Return the groups to store in int8: by what a byte gains, as long as all together stay within ``most_bytes``.

    Args:
        groups: as ``estimated`` returns them.
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


def estimated(
    source: Checkpoint, storage: Storage, ids: npt.NDArray[np.int64], progress: Progress = silent
) -> list[Group]:
    """Return every group of matrices of the layers with what int4 costs there.

    Args:
        source: the checkpoint; a layer at a time is in memory, besides what enters each layer for the tokens.
        storage: of the model in int4.
        ids: calibration tokens [rows, T]; the first of some rows are used.
        progress: told of layers done.

    Raises:
        ExportError: the weights, or what they make of the text, are not finite.
    """
    config, what = source.config, "estimating what int4 costs"
    layers = config.num_hidden_layers
    every = max(1, len(ids) // _ROWS)
    chosen = np.ascontiguousarray(ids[::every][:_ROWS, :_TOKENS])
    tables = rotation_tables(config, chosen.shape[1])
    entries = [torch.from_numpy(source.read(EMBEDDING)[chosen].astype(np.float32))]  # of each layer [B, T, H]
    with torch.no_grad():
        for i in range(layers):
            progress(what, i, 2 * layers)
            entries.append(run_layer(read_layer(source, i), config, entries[-1], tables[i]))
    slope = _slope(source, entries.pop())
    found: list[list[Group]] = []
    for i in reversed(range(layers)):
        progress(what, 2 * layers - 1 - i, 2 * layers)
        layer = read_layer(source, i, differentiable_attention)
        outputs, slope = _slopes(layer, config, entries.pop(), tables[i], slope)
        prefix = f"model.layers.{i}."
        costs = [(names, _divergence(layer, storage, prefix, names, outputs)) for names in _groups(config, i)]
        found.append([Group(names, cost, _extra_bytes(config, storage, names)) for names, cost in costs])
    progress(what, 2 * layers, 2 * layers)
    return [group for groups in reversed(found) for group in groups]


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


def _slope(source: Checkpoint, x: Tensor) -> Tensor:
    """Return by how much the log probability of a token, drawn at each position, grows with ``x`` [B, T, H]."""
    weight = torch.from_numpy(source.read(head_of(source.config)).astype(np.float32))
    random = torch.Generator().manual_seed(_SEED)
    slopes = torch.empty_like(x)
    for row, slope in zip(x, slopes, strict=True):
        leaf = row.clone().requires_grad_()
        hidden = normalised(source, leaf)
        with torch.no_grad():
            probabilities = (hidden @ weight.T).softmax(-1)  # [T, V]
            if not torch.isfinite(probabilities).all():
                raise ExportError("what the model makes of the text is not finite", "check the weights")
            drawn = torch.multinomial(probabilities, 1, generator=random)
            pull = weight[drawn[:, 0]] - probabilities @ weight
        slope.copy_(torch.autograd.grad(hidden, leaf, pull)[0])
    return slopes


def _slopes(
    layer: Layer, config: ModelConfig, x: Tensor, tables: Tables, slope: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Take the slope through a layer: return each linear's inputs and the slope at its outputs, and that at ``x``."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, linear in quantised_linears(layer).items():

        def remember(_: Any, given: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = given[0].detach(), output

        linear.register_forward_hook(remember)
    leaf = x.clone().requires_grad_()
    output = run_layer(layer, config, leaf, tables)
    gradients = torch.autograd.grad(output, [leaf, *outputs.values()], slope)
    return {name: (inputs[name], own) for name, own in zip(outputs, gradients[1:], strict=True)}, gradients[0]


def _divergence(
    layer: Layer, storage: Storage, prefix: str, names: Sequence[str], slopes: dict[str, tuple[Tensor, Tensor]]
) -> float:
    """Return half the mean square of what rounding some matrices changes in the log probabilities."""
    changed: Tensor | float = 0.0  # [B, T]
    for name in names:
        own = name.removeprefix(prefix).removesuffix(".weight")
        weight = layer.get_parameter(f"{own}.weight")
        precision, block_size = storage.of(name)
        try:
            rounded = torch.from_numpy(quantize(weight.numpy(), BITS[precision], block_size).values)
        except OverflowError as error:
            raise ExportError(f"{name} cannot be quantised: {error}", "use fp32 or bf16") from error
        inputs, slope = slopes[own]
        changed = changed + ((inputs @ (rounded - weight).T) * slope).sum(-1)
    assert not isinstance(changed, float)
    divergence = float(changed.square().mean()) / 2
    if not np.isfinite(divergence):
        raise ExportError("what the model makes of the text is not finite", "check the weights")
    return divergence
