"""Models of random weights on a GPU, on the backend ``torch``: made there, without a checkpoint, and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from floor import floor_ms
from gpu_timing import Document, say, spread

from gta_edge.accuracy.reference import build_decoder
from gta_edge.errors import BackendError
from gta_edge.formats.weights import is_kept
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Decoder
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.quantized_decoder import build_packed_decoder
from gta_edge.numerics.quantization import BITS, DEFAULT_BLOCK_SIZE, QuantizedMatrix, code_range
from gta_edge.runtime.torch.session import TorchSession

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

__all__ = ["float_decoder", "measure", "packed_decoder", "random_decoder", "random_session"]

_PROMPTS = 3
"""Times that each prompt is run: the first after a cache has grown takes longer."""

_SPREAD = 0.02
"""Standard deviation of the weights, as checkpoints start with."""


def random_decoder(config: ModelConfig, device: str) -> Decoder:
    """Return a model of random weights in bf16, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Decoder(config)
    finally:
        torch.set_default_dtype(torch.float32)


def packed_decoder(config: ModelConfig, bits: int, device: str) -> Decoder:
    """Return a model of random int4 or int8 weights, its matrices in codes."""
    return build_packed_decoder(config, _stored(config, bits), device)


def float_decoder(config: ModelConfig, bits: int) -> Decoder:
    """Return the same model as ``packed_decoder``, dequantised: in float32, on the CPU."""
    weights = ((name, w.values if isinstance(w, QuantizedMatrix) else w) for name, w in _stored(config, bits))
    return build_decoder(config, weights)


def _stored(config: ModelConfig, bits: int) -> Iterator[tuple[str, Any]]:
    """Yield random parameters as a bundle has them; the same ones every time."""
    rng, (low, high) = np.random.default_rng(0), code_range(bits)
    block = DEFAULT_BLOCK_SIZE if bits == BITS["int4"] else 0
    scale = _SPREAD * 3.4641 / (high - low)  # the spread of evenly distributed codes is their range over sqrt(12)
    for name, shape in config.parameter_shapes().items():
        if len(shape) != 2 or is_kept(name):
            centre = float(name.endswith("norm.weight") or "layernorm" in name)
            yield name, (centre + _SPREAD * rng.standard_normal(shape)).astype(np.float32)
            continue
        outputs, inputs = shape
        codes = rng.integers(low, high, shape, np.int8, endpoint=True)
        scales = rng.uniform(0.5, 1.5, (outputs, inputs // block if block else 1)) * scale
        yield name, QuantizedMatrix(codes, scales.astype(np.float16), bits, block)


@contextmanager
def random_session(config: ModelConfig, precision: str, device: str = "cuda") -> Iterator[tuple[TorchSession, int]]:
    """Yield a session that computes in bf16, and the bytes of weights that one token reads.

    Args:
        config: the model's sizes.
        precision: ``bf16``, ``int8`` or ``int4``.
        device: where it runs.
    """
    quantised = precision in BITS
    model = packed_decoder(config, BITS[precision], device) if quantised else random_decoder(config, device)
    with TorchSession(model, device=device, compute="bf16") as session:
        yield session, _weight_bytes(model, config, quantised)


def _weight_bytes(model: Decoder, config: ModelConfig, quantised: bool) -> int:
    """Return what is read of a model's parameters; of an embedding's table of its own, that is next to nothing."""
    tables = model.cos.nbytes + model.sin.nbytes
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - tables
    if config.tie_word_embeddings:
        return held
    table: Any = model.model.embed_tokens
    return held - sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))


def measure(
    session: TorchSession,
    contexts: Sequence[int],
    new_tokens: int,
    *,
    weight_bytes: int,
    read_bytes_per_s: float,
    name: str = "",
) -> Iterator[Document]:
    """Yield for each context the time of a token after it, beside the floor: weights and cache read once.

    Args:
        session: of a model that has room for the longest context and the new tokens.
        contexts: tokens in the cache.
        new_tokens: timed one by one.
        weight_bytes: read for a token.
        read_bytes_per_s: what the GPU reaches.
        name: of the model, for the rows.

    Raises:
        BackendError: logits are not finite.
    """
    config = session.config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, max(contexts) + new_tokens))
    for context in contexts:
        say(f"{name or 'model'}, context {context}")
        session.reset()
        session.forward(ids[:, :context])  # warm-up: kernels, and the growth of the cache
        session.forward(ids[:, context : context + 1])
        prompts, steps = [], []
        for _ in range(_PROMPTS):
            session.reset()
            start = time.perf_counter()
            session.forward(ids[:, :context])
            prompts.append(time.perf_counter() - start)
        for i in range(context, context + new_tokens):
            start = time.perf_counter()
            logits = session.forward(ids[:, i : i + 1])
            steps.append(time.perf_counter() - start)
        if not np.isfinite(logits).all():
            raise BackendError(f"{name or 'the model'} at context {context} gives logits that are not finite")
        floor = floor_ms(weight_bytes, context * bytes_per_token(config, "bf16"), read_bytes_per_s)
        token = spread(steps)
        yield {
            "model": name,
            "context": context,
            "prefill_tokens_per_s": context / statistics.median(prompts),
            "token_s": token,
            "tokens_per_s": 1 / token["median"],
            "floor_s": floor / 1e3,
            "floor_fraction": floor / 1e3 / token["median"],
        }
