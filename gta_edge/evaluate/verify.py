"""Backends against PyTorch, on a bundle that exists: what ``gta-edge verify`` does."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
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
from gta_edge.runtime.cache_policies.base import CachePolicy
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
    cache: CachePolicy | None = None,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Report:
    """Compare logits of backends with the PyTorch model's, over a prompt and single tokens after it.

    With a cache policy, PyTorch's are those of the same policy. One that observes attention is compared in float32
    alone: where attention is rounded, other rows may stay.

    Args:
        bundle: directory that ``export`` wrote.
        checkpoint: what it was exported from.
        backends: names from ``BACKENDS``; None for every one that works here: what does not is in the report with its
            reason, and stops no other.
        cache_dtype: type of the cache; each backend's own choice by default.
        cache: policy that says which rows of it stay; all by default.
        verify_hashes: hash the bundle's weights first.
        progress: told of each backend.

    Raises:
        CheckpointError: the checkpoint cannot be read, or describes another model than the bundle.
        BackendError: a backend that was asked for does not work, or none does, or PyTorch is not installed.
        InputError: a policy that makes no sense for the model.
    """
    for name in backends or ():
        check_backend(name)
    opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
    if cache is not None:
        cache = cache.for_bundle(opened)
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
    judge = _Judge(opened, reference.expected, cache)
    names = list(backends or BACKENDS)
    for done, name in enumerate(names):
        progress("verifying backends", done, len(names))
        options = {"cache_dtype": cache_dtype, "cache": cache}
        reason = _verified(report, opened, name, judge, options, asked=bool(backends))
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

    def __init__(self, bundle: Bundle, expected: Sequence[Expected], policy: CachePolicy | None) -> None:
        self._bundle, self._expected, self._policy = bundle, expected, policy
        self._distances: dict[Any, list[npt.NDArray[np.float64]]] = {}
        self._managed: dict[Any, list[Expected]] = {}

    @property
    def exactly(self) -> bool:
        """Whether attention may not be rounded, as it decides which rows stay."""
        return self._policy is not None and self._policy.observe is not None

    def __call__(self, session: Session) -> Difference:
        """Ask for the probes' tokens, and compare."""
        compute, rounds, cache = session.compute, session.rounds_activations, session.cache_dtype
        exact = compute == "fp32" and not rounds and cache == compute
        expected = self._expected if self._policy is None else self._managed_expected(session, self._policy, exact)
        answers = [_logits(session, each.probe, session.max_length) for each in expected]
        if exact:
            return compare(answers, expected)
        distances = self._distances_of(compute, rounds, cache if cache in QUANTIZED_CACHE_TYPES else None)
        floor, factor = allowance(compute, rounds=rounds or cache in QUANTIZED_CACHE_TYPES)
        return compare(answers, expected, floor, factor, distances)

    def _managed_expected(self, session: Session, policy: CachePolicy, exact: bool) -> list[Expected]:
        """Return PyTorch's answers under a policy, in float32, with chunks and observed tokens as the session has them.

        Raises:
            BackendError: the policy may keep other rows there.
        """
        if self.exactly and not exact:
            raise BackendError(
                f"cache policy {policy.name} goes by attention, which {session.backend} in {session.compute} with a "
                f"cache of {session.cache_dtype} rounds, so that other rows may stay",
                "verify with the policy window, or without one",
            )
        key = session.chunk_size, session.observed_tokens
        if key not in self._managed:
            from gta_edge.runtime.torch.session import TorchSession, load_decoder

            options: dict[str, Any] = dict(zip(("chunk_size", "observed_tokens"), key, strict=True))
            with TorchSession(load_decoder(self._bundle, "cpu", "fp32"), cache=policy, **options) as torch_session:
                found = [_logits(torch_session, each.probe, torch_session.max_length) for each in self._expected]
            self._managed[key] = [
                replace(each, logits=logits, spread=float(logits.std(dtype=np.float64)))
                for each, logits in zip(self._expected, found, strict=True)
            ]
        return self._managed[key]

    def _distances_of(self, compute: str, rounds: bool, cache: str | None) -> list[npt.NDArray[np.float64]]:
        from gta_edge.accuracy.expected import arithmetic_of, distances

        key = compute, rounds, cache
        if key not in self._distances:
            self._distances[key] = distances(
                self._bundle, self._expected, arithmetic_of(self._bundle, compute, cache, rounds=rounds)
            )
        return self._distances[key]


def _verified(report: Report, bundle: Bundle, name: str, judge: _Judge, options: dict[str, Any], *, asked: bool) -> str:
    """Add what is found of one backend, all of it or nothing; return why nothing.

    Args:
        report: to add to.
        bundle: the model.
        name: of the backend.
        judge: that compares its answers.
        options: of its session.
        asked: whether it was asked for by name: then not having it is an error.
    """
    try:
        with open_session(bundle, name, exact=judge.exactly, **options) as session:
            found = judge(session)
        if session.rounds_activations:
            with open_session(bundle, name, exact=True, **options) as exact:
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
