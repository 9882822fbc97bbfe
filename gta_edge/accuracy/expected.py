"""What PyTorch answers to probes in float64, with a bundle's weights, and how far narrower arithmetic is from that.

All of it is found in one pass over the weights, layer by layer, in which they are compared with the checkpoint's too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.constants import constant_problems
from gta_edge.accuracy.layerwise import FLOAT32, FLOAT64, Arithmetic, LayerWeights, Stream, run_head, run_layers
from gta_edge.accuracy.probes import LATE, Probe
from gta_edge.accuracy.reference import use_startable_threads
from gta_edge.accuracy.storage import WeightComparison
from gta_edge.accuracy.tolerance import Expected, Quantisation, quantisation
from gta_edge.errors import BundleError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import StoredWeights
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import activation_block
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["Reference", "arithmetic_of", "distances", "expected_at_end"]

Floats = npt.NDArray[np.float32]

_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"
_CASES = 2  # of float32's errors: one may be small by chance
_BUNDLE, _CHECKPOINT = "bundle", "checkpoint"


@dataclass(frozen=True)
class Reference:
    """What a bundle is checked against.

    Attributes:
        expected: PyTorch's answers to the probes.
        quantisation: the bundle's weights against the checkpoint's own, on the last probe from an empty cache.
        weights: the same, tensor by tensor.
        problems: what is wrong with weights and constants, one sentence each.
    """

    expected: Sequence[Expected]
    quantisation: Quantisation
    weights: WeightComparison
    problems: tuple[str, ...]

    @classmethod
    def compute(
        cls, bundle: Bundle, checkpoint: Checkpoint, probes: Sequence[Probe], progress: Progress = silent
    ) -> Reference:
        """Run the model in float64 and float32, with the bundle's weights and, where they differ, the checkpoint's.

        Args:
            bundle: the model.
            checkpoint: what it was exported from, with the same config.
            probes: tokens to ask for.
            progress: told of each layer.

        Raises:
            BundleError: a weight is missing, or does not fit the config.
            CheckpointError: a weight of the checkpoint cannot be read.
        """
        use_startable_threads()
        stored = StoredWeights(bundle.model_path, bundle.config)
        run = _Run(bundle.config, WeightComparison(stored, checkpoint, bundle.precision), probes, progress)
        expected = run.expected()
        problems = (*run.weights.problems, *constant_problems(stored, bundle.config))
        return cls(expected, run.quantisation(expected), run.weights, problems)


class _Run:
    """One pass over the weights."""

    def __init__(
        self, config: ModelConfig, weights: WeightComparison, probes: Sequence[Probe], progress: Progress
    ) -> None:
        missing = [n for n in config.parameter_shapes() if n not in weights.bundle.names and not config.is_optional(n)]
        if missing:
            raise BundleError(f"the weights lack {missing[0]} and {len(missing) - 1} more", "export the bundle again")
        self.config, self.weights, self.probes, self.progress = config, weights, probes, progress
        self.wide = Stream(config, FLOAT64, probes)
        self.narrow = Stream(config, FLOAT32, probes, _CASES)
        self.streams: dict[str, list[Stream]] = {_BUNDLE: [self.wide, self.narrow]}
        # a late probe's cache is none that a model made
        self.compared = max((i for i, probe in enumerate(probes) if probe.name != LATE), default=0)
        self.caches: list[list[list[Floats]]] = [[] for _ in probes]  # by probe and layer
        self.cache_distances: list[list[npt.NDArray[np.float64]]] = [[] for _ in probes]
        self.own_logits: list[Floats] = []

    @property
    def own(self) -> Stream | None:
        """The stream of the checkpoint's own weights, from where they begin to differ."""
        return next(iter(self.streams.get(_CHECKPOINT, ())), None)

    def expected(self) -> list[Expected]:
        table, own = self.weights.read(_EMBEDDING)
        rows = [probe.ids[0] for probe in self.probes]
        for stream in self.streams[_BUNDLE]:
            stream.embed([table[ids] for ids in rows])
        if own is not None:
            self._begin_own().embed([own[rows[self.compared]]])
        keep = (table, own) if self.config.tie_word_embeddings else None
        del table, own
        positions = max(probe.past + probe.ids.shape[1] for probe in self.probes)
        run_layers(self.config, self._layer, self.streams, positions, self._note_caches)
        norm, own_norm = self.weights.read(_NORM)
        if own_norm is not None and self.own is None:
            self._begin_own()
        matrix, own_matrix = keep or self.weights.read("lm_head.weight")
        if own_matrix is not None and self.own is None:
            self._begin_own()
        found = self._head(matrix, norm)
        layers = self.config.num_hidden_layers
        self.progress("checking against PyTorch", layers, layers)
        if self.own is not None:
            x = self.own.normed(0, norm if own_norm is None else own_norm)
            parts = run_head(matrix if own_matrix is None else own_matrix, [x], [None])
            self.own_logits = [np.concatenate([logits[0][0].numpy() for _, logits in parts], axis=-1)]
        return found

    def quantisation(self, expected: Sequence[Expected]) -> Quantisation:
        found = expected[self.compared]
        if not self.own_logits:
            return Quantisation(0.0, 0.0, 1.0, 0.0, found.probe.name)
        return quantisation(found.logits, self.own_logits[0], found.probe.name)

    def _begin_own(self) -> Stream:
        """Follow the checkpoint's weights too, from where float32 is now."""
        stream = Stream(self.config, FLOAT32, [self.probes[self.compared]])
        stream.x = [x[:1].clone() for x in self.narrow.x[self.compared : self.compared + 1]]
        self.streams[_CHECKPOINT] = [stream]
        return stream

    def _layer(self, index: int) -> Mapping[str, LayerWeights]:
        self.progress("checking against PyTorch", index, self.config.num_hidden_layers)
        prefix = f"model.layers.{index}."
        stored: dict[str, Floats] = {}
        own: dict[str, Floats] = {}
        for name in self.weights.bundle.names:
            if name.startswith(prefix):
                values, others = self.weights.read(name)
                stored[name.removeprefix(prefix)] = values
                if others is not None:
                    own[name.removeprefix(prefix)] = others
        if own and self.own is None:
            self._begin_own()
        return {_BUNDLE: stored} if self.own is None else {_BUNDLE: stored, _CHECKPOINT: stored | own}

    def _note_caches(self, index: int, added: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Keep what float64 caches, and how far float32 is from it."""
        for i, (wide, narrow) in enumerate(zip(added[0], added[1], strict=True)):
            self.caches[i].append([tensor.float().numpy() for tensor in wide])
            errors = []
            for exact, found in zip(wide, narrow, strict=True):
                spread = float(exact.std(correction=0)) or 1.0
                errors.append((found - exact).abs().amax((0, 1, 3)).numpy() / spread)
            self.cache_distances[i].append(np.maximum(*errors))

    def _head(self, matrix: Floats, norm: Floats) -> list[Expected]:
        inputs = [stream.normed(i, norm) for stream in (self.wide, self.narrow) for i in range(len(self.probes))]
        count = len(self.probes)
        logits = [np.empty((probe.ids.shape[1], len(matrix)), np.float32) for probe in self.probes]
        errors = [np.zeros(probe.ids.shape[1]) for probe in self.probes]
        for part, found in run_head(matrix, inputs, [None] * len(inputs)):
            for i in range(count):
                exact, narrow = found[i][0], found[count + i]
                logits[i][:, part] = exact.numpy()
                np.maximum(errors[i], (narrow - exact).abs().amax((0, 2)).numpy(), out=errors[i])
        result = []
        for i, probe in enumerate(self.probes):
            spread = float(logits[i].std(dtype=np.float64))
            distance = errors[i] / spread if spread > 0 else np.zeros_like(errors[i])
            result.append(
                Expected(probe, logits[i], spread, distance, self.caches[i], np.stack(self.cache_distances[i]))
            )
        return result


def distances(bundle: Bundle, expected: Sequence[Expected], arithmetic: Arithmetic) -> list[npt.NDArray[np.float64]]:
    """Return how far PyTorch is from float64 where it computes in another arithmetic, at each position of each probe.

    Args:
        bundle: the model.
        expected: float64's answers.
        arithmetic: what to compute in.

    Raises:
        BundleError: a weight cannot be read.
    """
    use_startable_threads()
    stream = Stream(bundle.config, arithmetic, [each.probe for each in expected], _CASES)
    matrix, norm = _pass_all(bundle, [stream])
    inputs = [stream.normed(i, norm) for i in range(len(expected))]
    errors = [np.zeros(len(each.logits)) for each in expected]
    for part, found in run_head(matrix, inputs, [_narrow(arithmetic)] * len(inputs)):
        for i, each in enumerate(expected):
            exact = torch.from_numpy(each.logits[:, part])
            np.maximum(errors[i], (found[i] - exact).abs().amax((0, 2)).numpy(), out=errors[i])
    return [error / each.spread if each.spread > 0 else error for error, each in zip(errors, expected, strict=True)]


def expected_at_end(
    bundle: Bundle, probes: Sequence[Probe], counts: Sequence[int], arithmetic: Arithmetic = FLOAT32
) -> list[Expected]:
    """Return what float64 answers to the last tokens of probes, and how far another arithmetic is off there.

    Args:
        bundle: the model.
        probes: tokens.
        counts: of each probe, how many of its last positions to give logits for.
        arithmetic: whose ``distance`` to give.

    Raises:
        BundleError: a weight cannot be read.
    """
    use_startable_threads()
    wide, narrow = Stream(bundle.config, FLOAT64, probes), Stream(bundle.config, arithmetic, probes, _CASES)
    matrix, norm = _pass_all(bundle, [wide, narrow])
    inputs = [s.normed(i, norm)[:, -count:] for s in (wide, narrow) for i, count in enumerate(counts)]
    types = [None] * len(probes) + [_narrow(arithmetic)] * len(probes)
    logits = [np.empty((count, len(matrix)), np.float32) for count in counts]
    errors = [np.zeros(count) for count in counts]
    for part, found in run_head(matrix, inputs, types):
        for i in range(len(probes)):
            exact, other = found[i][0], found[len(probes) + i]
            logits[i][:, part] = exact.numpy()
            np.maximum(errors[i], (other - exact).abs().amax((0, 2)).numpy(), out=errors[i])
    spreads = [float(each.std(dtype=np.float64)) for each in logits]
    return [
        Expected(probe, each, spread, error / (spread or 1.0))
        for probe, each, spread, error in zip(probes, logits, spreads, errors, strict=True)
    ]


def _pass_all(bundle: Bundle, streams: Sequence[Stream]) -> tuple[Floats, Floats]:
    """Run streams of the same probes through all layers; return the head's matrix and the last norm."""
    config, weights = bundle.config, StoredWeights(bundle.model_path, bundle.config)
    table = weights.values(_EMBEDDING)
    for stream in streams:
        stream.embed([table[probe.ids[0]] for probe in stream.probes])
    matrix = table if config.tie_word_embeddings else None
    del table

    def layer(index: int) -> Mapping[str, LayerWeights]:
        prefix = f"model.layers.{index}."
        names = [name for name in weights.names if name.startswith(prefix)]
        return {_BUNDLE: {name.removeprefix(prefix): weights.values(name) for name in names}}

    positions = max(probe.past + probe.ids.shape[1] for stream in streams for probe in stream.probes)
    run_layers(config, layer, {_BUNDLE: streams}, positions, lambda *_: None)
    return weights.values("lm_head.weight") if matrix is None else matrix, weights.values(_NORM)


def _narrow(arithmetic: Arithmetic) -> torch.dtype | None:
    """Return the type that an arithmetic rounds the head's matrix to, None for none."""
    return None if arithmetic.compute in ("fp32", "fp64") else arithmetic.dtype


def arithmetic_of(bundle: Bundle, compute: str, cache: str | None = None, *, rounds: bool = False) -> Arithmetic:
    """Return what a backend's arithmetic is for the weights of a bundle.

    Args:
        bundle: the model.
        compute: type of activations.
        cache: one of ``QUANTIZED_CACHE_TYPES`` where the cache is in that.
        rounds: whether activations are rounded to int8 before they are multiplied by a quantised matrix. A matrix that
            has one scale per output channel is multiplied in blocks as long as ONNX Runtime's kernels take.
    """
    blocks: list[tuple[str, int]] = []
    if rounds:
        weights, shapes = StoredWeights(bundle.model_path, bundle.config), bundle.config.parameter_shapes()
        for name in weights.names:
            size = weights.block_size(name)
            if size is not None:
                blocks.append((name, activation_block(shapes[name][1], size)))
    return Arithmetic(compute, tuple(blocks), cache)
