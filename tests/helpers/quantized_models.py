"""Small models with matrices of many widths, for int4 and int8."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint

VOCABULARY, POSITIONS = 97, 24
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "intermediate_size": 256}

MODELS: dict[str, dict[str, Any]] = {
    "tied": reference.gta_entries(heads=4, n_q=2, d_l=64, **SMALL),
    "several heads, untied": reference.gta_entries(
        heads=8, n_q=4, n_k=2, n_c=2, d_l=32, tie_word_embeddings=False, **SMALL
    ),
    "without biases": reference.gta_entries(heads=4, n_q=2, d_l=32, e=2, **{**SMALL, "intermediate_size": 320}),
    "odd widths, untied": reference.gta_entries(
        heads=3, n_q=3, d_l=24, tie_word_embeddings=False, **{**SMALL, "intermediate_size": 180}
    ),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
    "mha, untied": reference.llama_entries(heads=4, n_kv=4, d_h=32, tie_word_embeddings=False, **SMALL),
}


def checkpoint_of(name: str, directory: Path) -> dict[str, np.ndarray]:
    weights = reference.random_weights(MODELS[name])
    if name == "without biases":
        weights = {n: w for n, w in weights.items() if not n.endswith(".bias")}
    return write_checkpoint(directory, MODELS[name], weights)
