"""Bundles of small models, and graphs run on the CPU as they are written for TensorRT."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from gta_edge.formats.bundle import Bundle
from gta_edge.model.config import parse_config
from tests.helpers import reference

CAPACITY, BATCH, LAYERS, VOCAB = 16, 2, 2, 61
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": 24, "num_hidden_layers": LAYERS}
TABLE = {
    "gta, tied": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **SMALL),
    "gta, untied": reference.gta_entries(
        heads=4, n_q=4, n_k=1, n_c=2, d_k=8, d_l=16, tie_word_embeddings=False, **SMALL
    ),
    "gqa, tied": reference.llama_entries(**SMALL),
    "gqa, untied": reference.llama_entries(tie_word_embeddings=False, **SMALL),
}

Bundles = Callable[[str, str], Bundle]
Exact = Callable[[str, str], np.ndarray]

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def on_onnxruntime(path: Path) -> Run:
    """ONNX Runtime leaves the graph as it is, so every node runs in the type that it has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for every cache that is copied
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


class RMSNormalization(OpRun):
    """As the standard has it: ONNX's own reference sums in the input's type, whatever ``stash_type`` says."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, weight: np.ndarray, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[np.ndarray]:
        assert (axis, stash_type) == (-1, 1)
        wide = x.astype(np.float32)
        normed = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(epsilon))
        return (normed.astype(x.dtype) * weight,)


def in_reference(path: Path) -> Run:
    evaluator = ReferenceEvaluator(str(path), new_ops=[RMSNormalization])
    return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def logits(run: Run, name: str, dtype: type) -> np.ndarray:
    """All logits of a ragged prefill, 5 and 3 tokens, and of three tokens more, one at a time."""
    rng = np.random.default_rng(0)
    caches = parse_config(TABLE[name]).caches
    state = {
        f"past_{cache.name}.{i}": np.zeros((BATCH, cache.heads, CAPACITY, cache.width), dtype)
        for i in range(LAYERS)
        for cache in caches
    }
    length, found = np.array([0, 0]), []
    for tokens, real in ((5, [5, 3]), (1, [1, 1]), (1, [1, 1]), (1, [1, 1])):
        feeds = {
            "input_ids": rng.integers(0, VOCAB, (BATCH, tokens)),
            "past_length": length,
            "logit_positions": np.tile(np.arange(tokens), (BATCH, 1)),
        }
        outputs = run(feeds | state)
        assert outputs["logits"].dtype == np.float32
        assert all(outputs[key.replace("past", "present")].dtype == dtype for key in state)
        found.append(outputs["logits"])
        state = {key: outputs[key.replace("past", "present")] for key in state}
        length = length + real
    return np.concatenate(found, axis=1)
