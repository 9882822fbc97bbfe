"""The check of an export: the written file in plain ONNX Runtime against the PyTorch model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.reference import compare_weights
from gta_edge.accuracy.tolerance import Report, difference, probe
from gta_edge.errors import ExportError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.libraries.onnxruntime import EXACT_PRODUCTS, first_line, load_onnxruntime
from gta_edge.model.kv_cache import INPUT_IDS, LOGIT_POSITIONS, LOGITS, PAST_LENGTH, cache_tensors
from gta_edge.support.progress import Progress, silent
from gta_edge.support.threads import compute_threads

__all__ = ["check_export", "raise_if_failed"]

_STEPS = 3


def check_export(bundle: Bundle, checkpoint: Checkpoint, progress: Progress = silent) -> Report:
    """Run prefill and decode in ONNX Runtime, none of our code between, and compare with PyTorch.

    The two models are held one after the other, not together.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        BackendError: ONNX Runtime is not installed.
    """
    ids, prefill = probe(bundle.config)
    progress("checking against PyTorch", 0, _STEPS)
    logits = _plain_logits(bundle, ids, prefill)
    progress("checking against PyTorch", 1, _STEPS)
    reference, quantisation = compare_weights(bundle, checkpoint, ids)
    progress("checking against PyTorch", _STEPS, _STEPS)
    return Report({"onnxruntime": difference(logits, reference)}, quantisation, bundle.precision)


def _plain_logits(bundle: Bundle, ids: npt.NDArray[np.int64], prefill: int) -> npt.NDArray[np.float32]:
    """Return logits [1, N, V] of a prompt and single tokens after it, caches handed from step to step as arrays."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # copying the cache is meant here, and errors are raised
    options.intra_op_num_threads = compute_threads()
    options.add_session_config_entry(*EXACT_PRODUCTS)
    try:
        session = onnxruntime.InferenceSession(
            bundle.model_path, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        return np.concatenate(list(_steps(session, bundle, ids, prefill)), axis=1)
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported model ({first_line(error)})",
            "please report this",
        ) from error


def _steps(session: Any, bundle: Bundle, ids: npt.NDArray[np.int64], prefill: int) -> Iterator[npt.NDArray[np.float32]]:
    caches = cache_tensors(bundle.config)
    feeds: dict[str, npt.NDArray[Any]] = {
        cache.past: np.zeros(cache.shape(1, ids.shape[1]), np.float32) for cache in caches
    }
    bounds = [0, *range(prefill, ids.shape[1] + 1)]
    for start, stop in pairwise(bounds):
        feeds[INPUT_IDS] = ids[:, start:stop]
        feeds[PAST_LENGTH] = np.array([start])
        feeds[LOGIT_POSITIONS] = np.arange(stop - start)[None]
        logits, *presents = session.run([LOGITS, *(cache.present for cache in caches)], feeds)
        feeds.update({cache.past: present for cache, present in zip(caches, presents, strict=True)})
        yield logits


def raise_if_failed(report: Report, bundle: Path) -> None:
    """Turn a failed check into a failed export."""
    if not report.passed:
        raise ExportError(
            f"{bundle}: the export does not agree with PyTorch ({'; '.join(report.failures)})",
            "nothing was written: check that the weights are finite, or export in a wider precision",
        )
