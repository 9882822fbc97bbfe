"""Files of a checkpoint in the published Hugging Face layout, written into a directory that is not in its place yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gta_edge.errors import CheckpointError, OutputError
from gta_edge.formats.integrity import describe_file
from gta_edge.support.json_files import read_json
from gta_edge.support.text import one_line
from gta_edge.version import __version__

__all__ = ["CHECKPOINT_FORMAT", "has_random_weights", "save_tensors", "write_json", "write_record"]

CHECKPOINT_FORMAT = "gta-edge-checkpoint"
"""What the record of a checkpoint says, and so the ``kind`` of ``support.files.new_directory``."""

_RECORD = "gta_edge_checkpoint.json"
_WEIGHTS, _RANDOM = "weights", "random"  # an entry of the record


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Write one of a checkpoint's JSON files."""
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, npt.NDArray[Any]], path: Path) -> None:
    """Write one file of weights, with the names and in the types given.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps what the system says, such as a full disk
        raise OutputError(
            f"{path.name} cannot be written ({one_line(error)})", "check the disk's free space"
        ) from error
    # the library may write through a temporary file that only its owner can read; the directory has the usual mode
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_record(directory: Path, *, random_weights: bool = False) -> None:
    """List what was written: --force replaces a checkpoint that this package made, and no other.

    Args:
        directory: of the checkpoint.
        random_weights: the model has learned nothing, see ``has_random_weights``.
    """
    files = {path.name: describe_file(path) for path in sorted(directory.iterdir())}
    record: dict[str, Any] = {"format": CHECKPOINT_FORMAT, "gta_edge": __version__, "files": files}
    write_json(directory / _RECORD, record | ({_WEIGHTS: _RANDOM} if random_weights else {}))


def has_random_weights(directory: Path) -> bool:
    """Tell whether this package wrote random weights there; a record that cannot be read says nothing."""
    with suppress(CheckpointError):
        record = read_json(directory / _RECORD, CheckpointError, "")
        return isinstance(record, dict) and record.get(_WEIGHTS) == _RANDOM
    return False
