"""The floor under the time of a token: the bytes that a step must read, as a backend holds them."""

from __future__ import annotations

from typing import Any

from gta_edge.formats.bundle import Bundle
from gta_edge.formats.weights import Storage
from gta_edge.plan.cost import Execution, Step, operators
from gta_edge.runtime.registry import BACKENDS

__all__ = ["floor_ms", "step_weight_bytes"]


def step_weight_bytes(bundle: Bundle, opened: dict[str, Any], batch: int) -> int:
    """Return the bytes of weights that one step reads: every matrix once, and the embedding's rows.

    Args:
        bundle: the model.
        opened: what the worker said of its session: ``backend``, ``compute``, ``device``, ``holds_codes``.
        batch: rows of the step.
    """
    compute = opened["compute"]
    storage = bundle.storage if opened["holds_codes"] else Storage(compute)  # dequantised when they were loaded
    cpu_kernels = BACKENDS[opened["backend"]].cpu_kernels
    execution = Execution(compute, compute, opened["chunk_size"], cpu_kernels=cpu_kernels)
    return sum(op.weight_bytes for op in operators(bundle.config, storage, execution, Step(batch, 1, 1)))


def floor_ms(weight_bytes: float, cache_bytes: float, bytes_per_s: float) -> float:
    """Return the milliseconds that reading a step's weights and the filled cache once takes."""
    return 1e3 * (weight_bytes + cache_bytes) / bytes_per_s
