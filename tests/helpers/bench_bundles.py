"""Bundles of models that are not what they should be: damaged checkpoints, exported as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gta_edge.export.pipeline import export_model


def damaged(
    checkpoint: Path,
    directory: Path,
    matrix: str,
    change: Callable[[np.ndarray], np.ndarray],
    precision: str | None = None,
) -> Path:
    """Return the bundle of a checkpoint one matrix of which, found by a part of its name, was changed."""
    copied = shutil.copytree(checkpoint, directory / "checkpoint")
    weights = next(copied.glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if matrix in name)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, weights, metadata={"format": "pt"})
    export_model(copied, directory / "bundle", precision=precision, verify=False)
    return directory / "bundle"
