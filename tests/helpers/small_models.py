"""Small models of every shape, with and without biases, and bundles of them."""

import functools
import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.export.pipeline import export_model
from gta_edge.formats import bundle
from gta_edge.graph.weights import read_weights
from gta_edge.model.config import parse_config
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint

P, VOCAB, LAYERS = 24, 61, 2
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": P, "num_hidden_layers": LAYERS}
MODELS = {
    "more keys": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **SMALL),
    "more latents": reference.gta_entries(heads=4, n_q=4, n_k=1, n_c=2, d_k=8, d_l=16, **SMALL),
    "as many": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=2, d_k=8, d_l=16, tie_word_embeddings=False, **SMALL),
    "one of each": reference.gta_entries(heads=4, n_q=2, n_k=1, n_c=1, d_k=16, d_l=32, **SMALL),
    "baseline": reference.llama_entries(**SMALL),
}
BIASES = {
    "more keys": "qkvg",
    "more latents": "vg",
    "as many": {0: "qg", 1: "k"},  # by layer
    "one of each": "",
    "baseline": "",
}
PRECISIONS: dict[str, tuple[str, int | None]] = {
    "fp32": ("fp32", None),
    "fp16": ("fp16", None),
    "bf16": ("bf16", None),
    "int8": ("int8", None),
    "int8 in blocks": ("int8", 16),
    "int4": ("int4", 32),
}


def has_bias(name: str, parameter: str) -> bool:
    if not parameter.endswith(".bias"):
        return True
    kinds = BIASES[name]
    if isinstance(kinds, dict):
        kinds = kinds[int(parameter.split(".")[2])]
    return parameter.split(".")[-2][0] in kinds


WEIGHTS = {
    name: {key: value for key, value in reference.random_weights(entries).items() if has_bias(name, key)}
    for name, entries in MODELS.items()
}


IDS = np.random.default_rng(5).integers(0, VOCAB, (2, 10))


def write_bundle(directory: Path, name: str, precision: str, *, seed: int | None = None, force: bool = False) -> Path:
    """Export one of the models; with a seed, with other weights."""
    weights = WEIGHTS[name]
    if seed is not None:
        weights = {key: value for key, value in reference.random_weights(MODELS[name], seed).items() if key in weights}
    return write_bundle_of(directory, MODELS[name], weights, precision, force=force)


def write_bundle_of(
    directory: Path, entries: dict[str, Any], weights: dict[str, np.ndarray], precision: str, *, force: bool = False
) -> Path:
    kind, block = PRECISIONS[precision]
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary, "checkpoint")
        write_checkpoint(checkpoint, entries, weights)
        export_model(checkpoint, directory, precision=kind, block_size=block, verify=False, force=force)
    return directory


@functools.cache
def _formula(weights: str, model: str, directory: Path) -> np.ndarray:
    config = json.loads((directory / "config.json").read_text())
    tensors = dict(read_weights(directory / bundle.MODEL, parse_config(config)))
    formula = reference.gta_logits if "num_query_heads" in config else reference.llama_logits
    return np.stack([formula(config, tensors, row) for row in IDS])


def formula_logits(directory: Path) -> np.ndarray:
    """The same logits from the formula in float64, for the weights that lie in the bundle."""
    sums = [sha256((directory / name).read_bytes()).hexdigest() for name in (bundle.WEIGHTS, bundle.MODEL)]
    return _formula(*sums, directory)
