"""Small models with room for a few hundred tokens, and sessions over them that a policy manages."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.session import Session
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.checkpoints import write_checkpoint

POSITIONS, VOCAB = 160, 61
_SIZES = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "intermediate_size": 80}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **_SIZES),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **_SIZES),
}
BACKENDS = ["torch", "onnxruntime"]
ENGINE = EngineSpec("tensorrt-rtx", "fp32", "fp32", max_length=POSITIONS, max_batch=4, chunk_size=20)
POLICIES = {
    "window": {"rows": 20, "sinks": 2},
    "window, merged": {"rows": 20, "sinks": 2, "residual_rows": 2},
    "h2o": {"rows": 20},
    "tova": {"rows": 20},
    "snapkv": {"rows": 20, "window": 6},
    "corm": {"window": 3},
    "zsmerge": {"rows": 20},
    "zsmerge, merged twice": {"rows": 20, "residual_rows": 3},
    "pyramid": {"rows": 20, "sinks": 1},
}
FEW = ["window", "zsmerge, merged twice"]

Start = Callable[..., Session]
"""Starts a session of a backend and a model with options."""


@functools.cache
def weights_of(model: str) -> dict[str, np.ndarray]:
    return reference.random_weights(MODELS[model])


@functools.cache
def _exports() -> Path:
    directory = tempfile.mkdtemp(prefix="gta-edge-managed-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@functools.cache
def bundle_of(model: str) -> Path:
    directory = _exports() / model
    write_checkpoint(directory / "checkpoint", MODELS[model], weights_of(model))
    export_model(directory / "checkpoint", directory / "bundle", verify=False)
    return directory / "bundle"


@functools.cache
def _with_engine(model: str) -> Bundle:
    bundle = Bundle.open(bundle_of(model))
    simulator.build(bundle, ENGINE, bundle.directory.with_name("prepared"))
    return bundle


def open_session(backend: str, model: str, **options: Any) -> Session:
    if backend == "torch":
        weights = weights_of(model)
        decoder = Decoder(parse_config(MODELS[model]), biases={name for name in weights if name.endswith(".bias")})
        decoder.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
        return TorchSession(decoder, **options)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
    from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession

    bundle = Bundle.open(bundle_of(model))
    if backend == "onnxruntime-cuda":  # with its graph, on the CPU and in float32
        return OnnxRuntimeCudaSession(bundle, device="cpu", compute="fp32", **options)
    if backend == "tensorrt":  # what stands in for TensorRT computes on ONNX Runtime
        return simulator.open_simulated(_with_engine(model), ENGINE.engine, chunk_size=options.get("chunk_size"))
    return OnnxRuntimeSession(bundle, **options)


def prompt(rows: int, tokens: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


def make(name: str, **changes: Any) -> Any:
    """The policy of a name in ``POLICIES``, which evicts after five tokens."""
    return policy(name.partition(",")[0], **{"interval": 5, **POLICIES[name], **changes})
