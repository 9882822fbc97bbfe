"""Backends against PyTorch, on a bundle that exists: what ``gta-edge verify`` does."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.tolerance import Report, difference, probe
from gta_edge.errors import BackendError, CheckpointError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.plan.host_memory import require_memory_for_torch
from gta_edge.runtime.registry import BACKENDS, OF_THE_MODEL, check_backend, open_session, reason_of
from gta_edge.runtime.session import Session
from gta_edge.support.progress import Progress, silent

__all__ = ["verify"]


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    backends: Sequence[str] | None = None,
    *,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Report:
    """Compare logits of backends with the PyTorch model's, over a prompt and single tokens after it.

    Args:
        bundle: directory that ``export`` wrote.
        checkpoint: what it was exported from.
        backends: names from ``BACKENDS``; None for every one that works here: what does not is in the report with its
            reason, and stops no other.
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
    if source.config.parameter_shapes() != opened.config.parameter_shapes():
        raise CheckpointError(
            f"{checkpoint}: is another model than the one in {bundle}", "give what it was exported from"
        )

    require_memory_for_torch(opened.config, opened.precision, "comparing with PyTorch")
    progress("computing the reference in PyTorch", 0, 0)
    from gta_edge.accuracy.reference import compare_weights  # and with it torch

    names = list(backends or BACKENDS)
    ids, prefill = probe(opened.config)
    reference, quantisation = compare_weights(opened, source, ids)
    report = Report({}, quantisation, opened.precision)
    for done, name in enumerate(names):
        progress("verifying backends", done, len(names))
        reason = _verified(report, opened, name, (ids, prefill, reference), asked=bool(backends))
        if reason:
            gc.collect()  # what was loaded so far goes before the next one comes
            (report.unavailable if BACKENDS[name].is_here(opened) else report.absent)[name] = reason
    progress("verifying backends", len(names), len(names))
    if not report.backends:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in (report.unavailable or report.absent).items())
        raise BackendError(f"none of the backends works here ({reasons})", "run `gta-edge doctor`")
    return report


def _verified(
    report: Report,
    bundle: Bundle,
    name: str,
    probed: tuple[npt.NDArray[np.int64], int, npt.NDArray[np.float32]],
    *,
    asked: bool,
) -> str:
    """Add what is found of one backend, all of it or nothing; return why nothing.

    Args:
        report: to add to.
        bundle: the model.
        name: of the backend.
        probed: ids [1, N], how many of them are the prompt, and the reference's logits [1, N, V].
        asked: whether it was asked for by name: then not having it is an error.
    """
    ids, prefill, reference = probed
    try:
        with open_session(bundle, name) as session:
            found = difference(_logits(session, ids, prefill), reference)
        if session.rounds_activations:
            with open_session(bundle, name, exact=True) as exact:
                rounded, found = found, difference(_logits(exact, ids, prefill), reference)
            report.int8_activations[name] = rounded
    except OF_THE_MODEL:
        raise
    except Exception as error:  # a library's own errors have no common base
        if asked:
            raise
        return reason_of(error)
    report.backends[name], report.compute[name] = found, session.compute
    return ""


def _logits(session: Session, ids: npt.NDArray[np.int64], prefill: int) -> npt.NDArray[np.float32]:
    """Return logits [1, N, V]: the prompt at once, then token by token."""
    parts = [session.forward(ids[:, :prefill], all_logits=True)]
    parts += [session.forward(ids[:, i : i + 1], all_logits=True) for i in range(prefill, ids.shape[1])]
    return np.concatenate(parts, axis=1)
