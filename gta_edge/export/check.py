"""The check of an export: the written file in plain ONNX Runtime against the PyTorch model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.constants import config_differences
from gta_edge.accuracy.expected import Reference
from gta_edge.accuracy.probes import Probe, encoder, probes, random_cache
from gta_edge.accuracy.tolerance import FACTORS, FLOAT32_BOUND, Expected, Report, compare
from gta_edge.errors import ExportError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import StoredWeights
from gta_edge.libraries.onnxruntime import EXACT_PRODUCTS, first_line, load_onnxruntime
from gta_edge.model.kv_cache import INPUT_IDS, LOGIT_POSITIONS, LOGITS, PAST_LENGTH, cache_tensors
from gta_edge.numerics.quantization import QuantizedMatrix
from gta_edge.support.progress import Progress, silent
from gta_edge.support.threads import compute_threads

__all__ = ["check_export"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Answer:
    """What the graph answers to a probe: logits [N, V], and what it adds to each cache in the graph's order."""

    logits: Floats
    caches: list[Floats]


def check_export(
    bundle: Bundle,
    checkpoint: Checkpoint,
    progress: Progress = silent,
    calibrated: Mapping[str, QuantizedMatrix] | None = None,
) -> Report:
    """Run prefill and decode in ONNX Runtime, none of our code between, and compare with PyTorch.

    The two models are held one after the other, not together.

    Args:
        bundle: what was exported.
        checkpoint: what it was exported from.
        progress: told of each step.
        calibrated: matrices as calibration has rounded them, which must be stored so to the last bit: what it may do
            to a matrix is less than what the checkpoint's values tell of it.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        BackendError: ONNX Runtime is not installed.
    """
    asked = probes(bundle.config, encoder(bundle.directory))
    answers = _answers(bundle, asked, progress)
    reference = Reference.compute(bundle, checkpoint, asked, progress)
    found = compare([answer.logits for answer in answers], reference.expected)
    if not found.bound_fraction <= 1:
        found = replace(found, place=f"{found.place}{_first_layer(answers, reference.expected)}")
    return Report(
        {"onnxruntime": found},
        reference.quantisation,
        bundle.precision,
        weights=reference.weights.counts,
        problems=(
            *config_differences(bundle.config, checkpoint.config),
            *_miswritten(bundle, calibrated or {}),
            *reference.problems,
        ),
    )


def _miswritten(bundle: Bundle, calibrated: Mapping[str, QuantizedMatrix]) -> Iterator[str]:
    """Yield what is wrong with the first matrix that is not stored as calibration has rounded it."""
    weights = StoredWeights(bundle.model_path, bundle.config)
    for name, expected in calibrated.items():
        for place in weights.places(name):
            stored = weights.read(name, place)
            same = isinstance(stored, QuantizedMatrix) and (
                np.array_equal(stored.codes, expected.codes) and np.array_equal(stored.scales, expected.scales)
            )
            if not same:
                yield f"{name} is not stored as it was calibrated"
                return


def _answers(bundle: Bundle, asked: Sequence[Probe], progress: Progress) -> list[_Answer]:
    """Run every probe, caches handed from step to step as arrays."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # copying the cache is meant here, and errors are raised
    options.intra_op_num_threads = compute_threads()
    options.add_session_config_entry(*EXACT_PRODUCTS)
    found = []
    try:
        progress("running the export", 0, len(asked))
        session = onnxruntime.InferenceSession(
            bundle.model_path, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        for done, probe in enumerate(asked):
            found.append(_answer(session, bundle, probe))
            progress("running the export", done + 1, len(asked))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported model ({first_line(error)})",
            "please report this",
        ) from error
    return found


def _answer(session: Any, bundle: Bundle, probe: Probe) -> _Answer:
    config, caches = bundle.config, cache_tensors(bundle.config)
    capacity = probe.past + probe.ids.shape[1]
    feeds: dict[str, npt.NDArray[Any]] = {}
    before = [array for layer in range(config.num_hidden_layers) for array in random_cache(config, layer, probe.past)]
    for cache, filled in zip(caches, before, strict=True):
        feeds[cache.past] = np.zeros(cache.shape(1, capacity), np.float32)
        feeds[cache.past][:, :, : probe.past] = filled
    del before
    logits = []
    for start, stop in pairwise(probe.bounds):
        feeds[INPUT_IDS] = probe.ids[:, start:stop]
        feeds[PAST_LENGTH] = np.array([probe.past + start])
        feeds[LOGIT_POSITIONS] = np.arange(stop - start)[None]
        given, *presents = session.run([LOGITS, *(cache.present for cache in caches)], feeds)
        feeds.update({cache.past: present for cache, present in zip(caches, presents, strict=True)})
        logits.append(given[0])
    added = [np.ascontiguousarray(feeds[cache.past][:, :, probe.past :]) for cache in caches]
    return _Answer(np.concatenate(logits), added)


def _first_layer(answers: Sequence[_Answer], expected: Sequence[Expected]) -> str:
    """Say which layer's cache is the first that is not PyTorch's: what is wrong lies before it."""
    found = [_differing_layer(answer, wanted) for answer, wanted in zip(answers, expected, strict=True)]
    layers = [each for each in found if each is not None]
    if not layers:
        return "; every layer's cache is right: the last layer or the head is wrong"
    layer, position, error, name = min(layers)
    before = f"layer {layer - 1}" if layer else "the embedding"
    return (
        f"; layer {layer}'s cache is the first that differs, by {error:.3g} of its standard deviation at position "
        f"{position} of {name}: {before} or what layer {layer} caches is wrong"
    )


def _differing_layer(answer: _Answer, expected: Expected) -> tuple[int, int, float, str] | None:
    assert expected.cache_distances is not None  # the reference has them
    for layer, pair in enumerate(expected.caches):
        bounds = np.maximum(FLOAT32_BOUND, FACTORS["fp32"] * expected.cache_distances[layer])
        for i, wanted in enumerate(pair):
            difference = np.abs(answer.caches[len(pair) * layer + i] - wanted).max(axis=(0, 1, 3))
            errors = difference / (float(wanted.std(dtype=np.float64)) or 1.0)
            wrong = ~(errors <= bounds)
            if wrong.any():
                position = int(wrong.argmax())
                return layer, position, float(errors[position]), expected.probe.name
    return None
