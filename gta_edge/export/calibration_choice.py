"""What an export is calibrated with: a text file, a text that the model writes itself, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gta_edge.errors import CapacityError, InputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.checkpoint_writer import has_random_weights
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.host_memory import require_memory_for_own_text
from gta_edge.support.progress import Progress

__all__ = ["NONE", "SELF", "Calibration", "choose_calibration"]

SELF, NONE = "self", "none"
"""Words that may stand for a text file."""

_TOKENIZER = "tokenizer.json"
_MAX_PARAMETERS = 2e9  # that a model may have to be calibrated unasked: two cores take a quarter of an hour for as many


@dataclass(frozen=True)
class Calibration:
    """What an export is calibrated with.

    Attributes:
        text: the file, ``"self"`` for a text that the model writes, None for nothing.
        note: why an export that is calibrated by default is not, where a person should know.
    """

    text: Path | str | None
    note: str | None = None

    def __bool__(self) -> bool:
        return self.text is not None

    def ids(self, source: Checkpoint, progress: Progress) -> npt.NDArray[np.int64]:
        """Return the tokens to calibrate with [rows, T]; errors as ``calibration_ids`` and ``own_text`` raise them."""
        if self.text == SELF:
            from gta_edge.export.own_text import own_text  # and with it torch

            return own_text(source, progress)
        from gta_edge.export.calibration import calibration_ids

        assert self.text is not None
        found: npt.NDArray[np.int64] = calibration_ids(source, Path(self.text))
        return found


def choose_calibration(
    source: Checkpoint, precision: str, asked: str | Path | None, *, in_integers: bool
) -> Calibration:
    """Return what an export is calibrated with.

    By default a model in int4 writes a text, if it has a tokenizer and so is made for text, and no more parameters and
    no less memory than allow it. Not one of random weights, which this package made: there is nothing to preserve.

    Args:
        source: the checkpoint.
        precision: that it is exported in.
        asked: a file, ``"self"`` or ``"none"``; None for the default.
        in_integers: whether the checkpoint's matrices are in integers already.

    Raises:
        InputError: this precision or checkpoint is not calibrated.
        CapacityError: there is no memory for the model, which is asked for a text.
    """
    if asked == NONE:
        return Calibration(None)
    if asked is None:
        return Calibration(None) if precision != "int4" or in_integers else _default(source)
    if precision not in BITS:
        raise InputError(f"precision is {precision}, which is not calibrated", "calibrate int8 or int4")
    if in_integers:
        raise InputError(
            f"{source.directory} is in integers already, which are not rounded again", "leave the calibration out"
        )
    if asked != SELF:
        return Calibration(Path(asked))
    require_memory_for_own_text(source)
    return Calibration(SELF)


def _default(source: Checkpoint) -> Calibration:
    if not any(path.name == _TOKENIZER for path in source.companions) or has_random_weights(source.directory):
        return Calibration(None)
    parameters = source.config.parameters
    if parameters > _MAX_PARAMETERS:
        return Calibration(None, _note(f"a model of {parameters / 1e9:.1f} billion parameters takes long for it"))
    try:
        require_memory_for_own_text(source)
    except CapacityError:
        return Calibration(None, _note("there is no memory for the whole model"))
    return Calibration(SELF)


def _note(reason: str) -> str:
    return f"not calibrated ({reason}): --calibrate FILE, or --calibrate self, loses less to int4"
