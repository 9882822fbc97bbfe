"""The floor that memory sets under the time of a token: bytes that must be read, and how fast they can be.

The benchmarks beside this file print it next to what they measured.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gta_edge.formats.bundle import Bundle
from gta_edge.formats.weights import EMBEDDING
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.cost import scale_bytes
from gta_edge.runtime.registry import BACKENDS
from gta_edge.support.cores import usable_cores

__all__ = ["bandwidth", "floor_ms", "table_bytes", "token_bytes"]


def bandwidth() -> float:
    """Return the bytes per second at which all cores of this process together read memory that no cache holds."""
    cores = usable_cores()
    parts = [np.ones(2**25, np.float32) for _ in range(cores)]  # 128 MiB each
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # one pass, nothing written
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


def table_bytes(config: ModelConfig) -> int:
    """Return the bytes of the cos and the sin table together; a token reads one row of each."""
    return 4 * config.max_position_embeddings * config.key_width


def token_bytes(bundle: Bundle, *, backend: str = "onnxruntime") -> int:
    """Return the bytes of weights that one token reads, in the form in which the backend multiplies by them."""
    config = bundle.config
    # all others are float32 by then: ONNX Runtime casts floats at loading, PyTorch's weights are dequantised there
    if bundle.precision not in BITS or not BACKENDS[backend].cpu_kernels:
        unread = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return 4 * (config.parameters - unread)
    return bundle.weight_bytes - table_bytes(config) - _embedding_bytes(bundle)


def floor_ms(weight_bytes: float, cache_bytes: float, bytes_per_s: float) -> float:
    """Return the milliseconds that reading a token's weights and the filled cache once takes."""
    return 1e3 * (weight_bytes + cache_bytes) / bytes_per_s


def _embedding_bytes(bundle: Bundle) -> int:
    """Return the bytes of a quantised bundle's embedding table where it lies apart from the head's: one row is read."""
    config = bundle.config
    values = config.vocab_size * config.hidden_size
    precision, block_size = bundle.storage.of(EMBEDDING)
    if config.tie_word_embeddings and precision == "int8":
        return 0  # it is the head's
    # a tied head reads the same scales
    scales = 0 if config.tie_word_embeddings else scale_bytes((config.vocab_size, config.hidden_size), block_size)
    return values * BITS[precision] // 8 + scales
