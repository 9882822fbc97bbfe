"""Backends against PyTorch, on a bundle that exists: what ``gta-edge verify`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gta_edge.bundle import Bundle
from gta_edge.checkpoint import Checkpoint
from gta_edge.errors import BackendError, CheckpointError, EngineError
from gta_edge.fidelity import Difference, Report, difference, probe
from gta_edge.progress import Progress, silent
from gta_edge.reference import compare_weights
from gta_edge.runtime.backends import BACKENDS, open_session
from gta_edge.runtime.session import Session

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
        backends: names from ``BACKENDS``; None for every one that works here.
        verify_hashes: hash the bundle's weights first.
        progress: told of each backend.

    Raises:
        CheckpointError: the checkpoint cannot be read, or describes another model than the bundle.
        BackendError: a backend that was asked for does not work, or none does, or PyTorch is not installed.
    """
    opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
    source = Checkpoint.open(checkpoint)
    if source.config.parameter_shapes() != opened.config.parameter_shapes():
        raise CheckpointError(
            f"{checkpoint}: is another model than the one in {bundle}; give what it was exported from"
        )

    names = list(backends or BACKENDS)
    ids, prefill = probe(opened.config)
    reference, quantisation = compare_weights(opened, source, ids)
    differences: dict[str, Difference] = {}
    rounded: dict[str, Difference] = {}
    compute: dict[str, str] = {}
    for done, name in enumerate(names):
        progress("verifying backends", done, len(names))
        try:
            with open_session(opened, name) as session:
                found = difference(_logits(session, ids, prefill), reference)
            if session.rounds_activations:
                rounded[session.backend] = found
                with open_session(opened, name, exact=True) as session:
                    found = difference(_logits(session, ids, prefill), reference)
            differences[session.backend] = found
            compute[session.backend] = session.compute
        except (BackendError, EngineError):
            if backends:  # asked for by name: not having it is an error
                raise
    progress("verifying backends", len(names), len(names))
    if not differences:
        raise BackendError(f"none of the backends {', '.join(names)} works here; run `gta-edge doctor`")
    return Report(differences, quantisation, opened.precision, rounded, compute)


def _logits(session: Session, ids: npt.NDArray[np.int64], prefill: int) -> npt.NDArray[np.float32]:
    """Return logits [1, N, V]: the prompt at once, then token by token."""
    parts = [session.forward(ids[:, :prefill], all_logits=True)]
    parts += [session.forward(ids[:, i : i + 1], all_logits=True) for i in range(prefill, ids.shape[1])]
    return np.concatenate(parts, axis=1)
