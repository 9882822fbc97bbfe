"""Loss and perplexity of a model on a text."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.runtime.session import Session
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief, one_line, printable

__all__ = ["Evaluation", "evaluate", "negative_log_likelihood", "read_ids", "tokens_at_once"]

_LOGIT_BYTES = 2**27  # logits of one call stay below this
_BEGINNINGS = (b"\x93N", b"PK", b"")  # of an array, of an archive, of an empty file


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``.

    Attributes:
        tokens: how many tokens were predicted.
        loss: mean negative log-likelihood, in nats.
    """

    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    session: Session, ids: npt.NDArray[np.integer], *, window: int | None = None, progress: Progress = silent
) -> Evaluation:
    """Return the loss of every token of ``ids`` [N] given those before it in its window.

    The tokens are cut into windows that follow each other; each starts with the last token of the one before, so
    that every token but the very first is predicted once.

    Args:
        session: a model; its cache is emptied.
        ids: integers [N], at least two.
        window: tokens attended at most; the model's last position by default.
        progress: told of tokens done.

    Raises:
        InputError: fewer than two tokens, a window below 1 or beyond the model's, ids outside the vocabulary, or
            something else used the session meanwhile.
        BackendError: the model gave logits that are NaN.
    """
    window = session.max_length if window is None else window
    given: Any = window
    is_whole = isinstance(given, Integral) and not isinstance(given, bool)
    if not (is_whole and 1 <= int(given) <= session.max_length):
        raise InputError(f"window is {brief(window)}", f"expected 1 to {session.max_length}, the model's positions")
    ids = _as_ids(ids)
    outside = ids[(ids < 0) | (ids >= session.config.vocab_size)]
    if outside.size:
        raise InputError(f"token id {int(outside[0])} is outside the vocabulary: 0 to {session.config.vocab_size - 1}")
    predicted = len(ids) - 1
    step = tokens_at_once(session)
    total = 0.0
    claim = session.claim()
    for start in range(0, predicted, window):
        claim.reset()
        stop = min(start + window, predicted)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            logits = claim.forward(ids[None, at:end], all_logits=True)[0]
            total += negative_log_likelihood(logits, ids[at + 1 : end + 1])
            if math.isnan(total):
                raise BackendError(
                    "the model's logits hold NaN",
                    "the weights are damaged, or too large for the type they are computed in: try another backend",
                )
            progress("evaluating", end, predicted)
    return Evaluation(predicted, total / predicted)


def tokens_at_once(session: Session) -> int:
    """Return how many tokens ``evaluate`` runs at once: a cache policy evicts rows after so many."""
    return max(1, min(session.chunk_size, _LOGIT_BYTES // (4 * session.config.vocab_size)))


def read_ids(path: Path) -> npt.NDArray[np.integer]:
    """Read token ids from a ``.npy`` file of integers [N].

    Raises:
        InputError: no such file, not the format, or not integers in one dimension. Pickled content is refused.
    """
    name = printable(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise InputError(f"{name}: is not a regular file", "give a .npy file of integers")
        with path.open("rb") as file:  # numpy does not close what it opened where it fails
            if file.read(2) not in _BEGINNINGS:  # what numpy takes for a pickle, and tells how to trust
                raise InputError(f"{name}: is not a readable .npy file of integers", "write one with numpy.save")
            file.seek(0)
            ids = np.load(file, allow_pickle=False)
            if not isinstance(ids, np.ndarray):
                ids.close()
    except GtaEdgeError:
        raise
    except Exception as error:  # what a damaged header raises has no common base
        raise InputError(
            f"{name}: is not a readable .npy file of integers ({one_line(error)})", "write one with numpy.save"
        ) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise InputError(f"{name}: holds {found}", "expected integers in one dimension")
    return ids


def _as_ids(ids: Any) -> npt.NDArray[np.integer]:
    """Return ids as an array of at least two integers [N]."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # rows of different length
        raise InputError("the ids differ in length by row", "give them in one dimension") from error
    if array.ndim != 1 or len(array) < 2:
        raise InputError(f"there are {array.size} tokens", "at least two are needed, since the first is only given")
    if array.dtype.kind not in "iu":
        raise InputError(f"the ids are {array.dtype}", "expected integers")
    return array


def negative_log_likelihood(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.integer]) -> float:
    """Return the summed loss of ``targets`` [T] under ``logits`` [T, V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    return float((normaliser - shifted[np.arange(len(targets)), targets]).sum())
