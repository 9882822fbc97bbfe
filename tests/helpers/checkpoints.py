"""Checkpoints of random weights for tests, written without the code under test."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_checkpoint(
    directory: Path, entries: dict[str, Any], weights: dict[str, np.ndarray], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Write ``config.json`` and ``model.safetensors``; return the weights as stored, in float32."""
    directory.mkdir(parents=True)
    stored = {name: weight.astype(DTYPES[dtype]) for name, weight in weights.items()}
    save_file(stored, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**entries, "torch_dtype": dtype}))
    return {name: weight.astype(np.float32) for name, weight in stored.items()}
