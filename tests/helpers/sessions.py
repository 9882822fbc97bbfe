"""Sessions of every backend over the same small models, and what the formula says of these."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from gta_edge.model.config import ModelConfig, parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.session import Session
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.checkpoints import write_checkpoint

# --- backends --------------------------------------------------------------------------------------------------------

Factory = Callable[..., Session]
"""Takes a config, a checkpoint's tensors by name, and the options of ``Session`` by keyword."""


def torch_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    model = Decoder(config, biases={name for name in weights if name.endswith(".bias")})
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    return TorchSession(model, **options)


_exports = tempfile.TemporaryDirectory(prefix="gta-edge-sessions-")  # removed when Python ends


@functools.cache
def _exported(entries: str) -> Path:
    """The bundle of one of the models below; exporting takes seconds, so it is done once for all tests."""
    model = next(name for name, known in ENTRIES.items() if parse_config(known).to_dict() == json.loads(entries))
    directory = Path(_exports.name) / model
    write_checkpoint(directory / "checkpoint", ENTRIES[model], reference.random_weights(ENTRIES[model]))
    export_model(directory / "checkpoint", directory / "bundle", precision=INTEGERS.get(model), verify=False)
    return directory / "bundle"


def onnxruntime_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return OnnxRuntimeSession(Bundle.open(_exported(json.dumps(config.to_dict()))), **options)


def onnxruntime_cuda_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    """The session for GPUs with its graph, on the CPU and in float32."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    own = {name: options[name] for name in options if name != "exact"}
    bundle = Bundle.open(_exported(json.dumps(config.to_dict())))
    return OnnxRuntimeCudaSession(bundle, device="cpu", compute="fp32", **own)


ENGINE = EngineSpec("tensorrt-rtx", "fp32", "fp32", max_length=24, max_batch=5, chunk_size=20)


@functools.cache
def _built(directory: Path) -> Bundle:
    bundle = Bundle.open(directory)
    simulator.build(bundle, ENGINE, directory.with_name("prepared"))
    return bundle


def tensorrt_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    """The session of engines; what stands in for TensorRT and for CUDA's driver computes on ONNX Runtime."""
    own = {name: options[name] for name in options if name == "chunk_size"}
    return simulator.open_simulated(_built(_exported(json.dumps(config.to_dict()))), ENGINE.engine, **own)


SESSIONS: dict[str, Factory] = {
    "torch": torch_session,
    "onnxruntime": onnxruntime_session,
    "onnxruntime-cuda": onnxruntime_cuda_session,
    "tensorrt": tensorrt_session,
}
growing = pytest.mark.parametrize("backend", ["torch", "onnxruntime", "onnxruntime-cuda"], indirect=True)
"""For tests of caches that begin small; an engine's has its capacity from the start."""

TOLERANCE = 1e-4  # of a float32 backend: largest error over the standard deviation of the exact logits

# --- models ----------------------------------------------------------------------------------------------------------

P = 24
VOCAB = 61
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": P, "intermediate_size": 80}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
}
# The same with weights in integers; of other sizes, one of them no multiple of what the kernel takes at once.
INTEGERS = {"gta in int4": "int4", "gqa in int8": "int8"}
ENTRIES = {
    **MODELS,
    "gta in int4": {**MODELS["gta"], "intermediate_size": 96},
    "gqa in int8": {**MODELS["gqa"], "intermediate_size": 72},
}


@functools.cache
def weights_of(model: str) -> dict[str, np.ndarray]:
    """What the formula is given: the checkpoint's tensors, or the values that the bundle's integers stand for."""
    if model not in INTEGERS:
        return reference.random_weights(ENTRIES[model])
    config = parse_config(ENTRIES[model])
    return dict(read_weights(_exported(json.dumps(config.to_dict())) / "model.onnx", config))


def exact_logits(model: str, ids: Any) -> np.ndarray:
    """Logits [T, V] of one row in float64, from the formula."""
    formula = reference.gta_logits if model.startswith("gta") else reference.llama_logits
    return formula(ENTRIES[model], weights_of(model), ids)


def open_session(backend: str, model: str, *, exact: bool = True, **options: Any) -> Session:
    if model in INTEGERS:
        options["exact"] = exact
    return SESSIONS[backend](parse_config(ENTRIES[model]), weights_of(model), **options)


# For tests of what the arithmetic could break: those of input and errors do not need it.
in_integers_too = pytest.mark.parametrize(
    ("backend", "model"),
    [
        *((backend, model) for backend in SESSIONS for model in MODELS),
        *((backend, model) for backend in ("onnxruntime", "onnxruntime-cuda", "tensorrt") for model in INTEGERS),
    ],
    indirect=True,
)


def prompt(rows: int, tokens: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert reference.relative_error(found, expected) <= TOLERANCE
