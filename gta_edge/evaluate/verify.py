"""Backends against PyTorch, on a bundle that exists: what ``gta-edge verify`` does."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.constants import config_differences
from gta_edge.accuracy.probes import Probe, encoder, probes
from gta_edge.accuracy.tolerance import Difference, Expected, Report, allowance, compare
from gta_edge.errors import BackendError, CheckpointError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.rotated_checkpoint import RotatedCheckpoint
from gta_edge.numerics.dtypes import QUANTIZED_CACHE_TYPES
from gta_edge.plan.host_memory import require_memory_for_reference
from gta_edge.runtime.registry import BACKENDS, OF_THE_MODEL, check_backend, open_session, reason_of
from gta_edge.runtime.session import Session
from gta_edge.support.progress import Progress, silent

__all__ = ["verify"]


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    backends: Sequence[str] | None = None,
    *,
    cache_dtype: str | None = None,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Report:
    """Compare logits of backends with the PyTorch model's, over a prompt and single tokens after it.

    Args:
        bundle: directory that ``export`` wrote.
        checkpoint: what it was exported from.
        backends: names from ``BACKENDS``; None for every one that works here: what does not is in the report with its
            reason, and stops no other.
        cache_dtype: type of the cache; each backend's own choice by default.
        verify_hashes: hash the bundle's weights first.
        progress: told of each backend.

    Raises:
        CheckpointError: the checkpoint cannot be read, or describes another model than the bundle.
        BackendError: a backend that was asked for does not work, or none does, or PyTorch is not installed.
    """
    for name in backends or ():
        check_backend(name)
    opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
    source = Checkpoint.open(checkpoint)
    if opened.rotated_values:
        source = RotatedCheckpoint.of(source)
    differences = config_differences(opened.config, source.config)
    if differences:
        raise CheckpointError(
            f"{checkpoint}: is another model than the one in {bundle} ({'; '.join(differences[:3])})",
            "give what it was exported from, or export it again",
        )
    require_memory_for_reference(opened.config, "comparing with PyTorch")
    progress("computing the reference in PyTorch", 0, 0)
    from gta_edge.accuracy.expected import Reference  # and with it torch

    asked = [probe for probe in probes(opened.config, encoder(opened.directory)) if not probe.past]
    reference = Reference.compute(opened, source, asked, progress)
    report = Report(
        {}, reference.quantisation, opened.precision, weights=reference.weights.counts, problems=reference.problems
    )
    judge = _Judge(opened, reference.expected)
    names = list(backends or BACKENDS)
    for done, name in enumerate(names):
        progress("verifying backends", done, len(names))
        reason = _verified(report, opened, name, judge, cache_dtype, asked=bool(backends))
        if reason:
            gc.collect()  # what was loaded so far goes before the next one comes
            (report.unavailable if BACKENDS[name].is_here(opened) else report.absent)[name] = reason
    progress("verifying backends", len(names), len(names))
    if not report.backends:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in (report.unavailable or report.absent).items())
        raise BackendError(f"none of the backends works here ({reasons})", "run `gta-edge doctor`")
    return report


class _Judge:
    """Compares a session's answers with PyTorch's, in the arithmetic that the session has."""

    def __init__(self, bundle: Bundle, expected: Sequence[Expected]) -> None:
        self._bundle, self._expected = bundle, expected
        self._distances: dict[Any, list[npt.NDArray[np.float64]]] = {}

    def __call__(self, session: Session) -> Difference:
        """Ask for the probes' tokens, and compare."""
        limit = session.max_length
        answers = [_logits(session, each.probe, limit) for each in self._expected]
        compute, rounds, cache = session.compute, session.rounds_activations, session.cache_dtype
        if compute == "fp32" and not rounds and cache == compute:
            return compare(answers, self._expected)
        distances = self._distances_of(compute, rounds, cache if cache in QUANTIZED_CACHE_TYPES else None)
        floor, factor = allowance(compute, rounds=rounds or cache in QUANTIZED_CACHE_TYPES)
        return compare(answers, self._expected, floor, factor, distances)

    def _distances_of(self, compute: str, rounds: bool, cache: str | None) -> list[npt.NDArray[np.float64]]:
        from gta_edge.accuracy.expected import arithmetic_of, distances

        key = compute, rounds, cache
        if key not in self._distances:
            self._distances[key] = distances(
                self._bundle, self._expected, arithmetic_of(self._bundle, compute, cache, rounds=rounds)
            )
        return self._distances[key]


def _verified(report: Report, bundle: Bundle, name: str, judge: _Judge, cache_dtype: str | None, *, asked: bool) -> str:
    """Add what is found of one backend, all of it or nothing; return why nothing.

    Args:
        report: to add to.
        bundle: the model.
        name: of the backend.
        judge: that compares its answers.
        cache_dtype: type of the cache.
        asked: whether it was asked for by name: then not having it is an error.
    """
    try:
        with open_session(bundle, name, cache_dtype=cache_dtype) as session:
            found = judge(session)
        if session.rounds_activations:
            with open_session(bundle, name, exact=True, cache_dtype=cache_dtype) as exact:
                rounded, found = found, judge(exact)
            report.int8_activations[name] = rounded
    except OF_THE_MODEL:
        raise
    except Exception as error:  # a library's own errors have no common base
        if asked:
            raise
        return reason_of(error)
    report.backends[name], report.compute[name] = found, session.compute
    return ""


def _logits(session: Session, probe: Probe, limit: int) -> npt.NDArray[np.float32]:
    """Return logits [n, V] of a probe's first tokens, as many as there is room for: prompt, then token by token."""
    session.reset()
    parts = []
    for start, stop in pairwise(probe.bounds):
        stop = min(stop, limit)
        if start < stop:
            parts.append(session.forward(probe.ids[:, start:stop], all_logits=True)[0])
    return np.concatenate(parts)
