"""Loss and perplexity of a model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.progress import Progress, silent
from gta_edge.runtime.session import Session

__all__ = ["Evaluation", "evaluate", "read_ids"]

_LOGIT_BYTES = 2**27  # logits of one call stay below this


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
        InputError: fewer than two tokens, a window below 2 or beyond the model's, or ids outside the vocabulary.
    """
    window = session.max_length if window is None else window
    if not 1 <= window <= session.max_length:
        raise InputError(f"window is {window}; expected 1 to {session.max_length}, the model's positions")
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise InputError(f"there are {ids.size} tokens; at least two are needed, since the first is only given")
    outside = ids[(ids < 0) | (ids >= session.config.vocab_size)]
    if outside.size:
        raise InputError(f"token id {int(outside[0])} is outside the vocabulary: 0 to {session.config.vocab_size - 1}")
    predicted = len(ids) - 1
    step = max(1, min(session.chunk_size, _LOGIT_BYTES // (4 * session.config.vocab_size)))
    total = 0.0
    for start in range(0, predicted, window):
        session.reset()
        stop = min(start + window, predicted)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            logits = session.forward(ids[None, at:end], all_logits=True)[0]
            total += _negative_log_likelihood(logits, ids[at + 1 : end + 1])
            progress("evaluating", end, predicted)
    return Evaluation(predicted, total / predicted)


def read_ids(path: Path) -> npt.NDArray[np.integer]:
    """Read token ids from a ``.npy`` file of integers [N].

    Raises:
        InputError: no such file, not the format, or not integers in one dimension. Pickled content is refused.
    """
    try:
        with path.open("rb") as file:  # numpy does not close what it opened where it fails
            ids = np.load(file, allow_pickle=False)
            if not isinstance(ids, np.ndarray):
                ids.close()
    except Exception as error:  # what a damaged header raises has no common base
        raise InputError(f"{path}: is not a readable .npy file of integers ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {found}; expected integers in one dimension")
    return ids


def _negative_log_likelihood(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.integer]) -> float:
    """Return the summed loss of ``targets`` [T] under ``logits`` [T, V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    return float((normaliser - shifted[np.arange(len(targets)), targets]).sum())
