"""The stages of speed on the backend ``torch``, with random weights: tokens beside the floor, kernels by time.

    python -m scripts.gpu_stages.models gta-1b/bf16 gta-1b/int4 ...

The floor is all weights and the cache read once, at the rate that the GPU reads at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_models import measure, random_session
from torch.profiler import ProfilerActivity, profile

from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.presets import preset
from scripts.gpu_stages.figures import REHEARSAL, tell

__all__ = ["DEVICE", "config_of"]

CONTEXTS = (12, 20) if REHEARSAL else (128, 2048, 8192, 32768)
_NEW_TOKENS = 3 if REHEARSAL else 32
_PROFILED = 3
_KERNELS_TOLD = 24

DEVICE = "cpu" if REHEARSAL else "cuda"


def config_of(name: str) -> ModelConfig:
    """Return a preset with room for the contexts; in a rehearsal a tiny model of its kind."""
    config = preset(name).replace(max_position_embeddings=max(CONTEXTS) + _NEW_TOKENS + _PROFILED + 1)
    if not REHEARSAL:
        return config
    tiny = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 384, "vocab_size": 256}
    heads = {"num_query_heads": 2} if isinstance(config, GTAConfig) else {"num_key_value_heads": 2}
    return config.replace(num_attention_heads=4, max_position_embeddings=64, **tiny, **heads)


def main(model: str) -> None:
    """Tell what a token costs at each context, and at a middle one which kernels it is made of.

    Args:
        model: a preset and the type of its weights, with a slash between.
    """
    name, _, precision = model.partition("/")
    read = 1e10 if REHEARSAL else _read_rate()
    start = time.perf_counter()
    with random_session(config_of(name), precision, DEVICE) as (session, weight_bytes):
        tell("load", model=model, seconds=time.perf_counter() - start, weight_MB=weight_bytes / 1e6)
        for row in measure(
            session, CONTEXTS, _NEW_TOKENS, weight_bytes=weight_bytes, read_bytes_per_s=read, name=model
        ):
            figures = {"peak_GiB": None if REHEARSAL else torch.cuda.max_memory_allocated() / 2**30}
            figures |= {"ms_per_token": 1e3 * row["token_s"]["median"], "ms_least": 1e3 * row["token_s"]["min"]}
            figures |= {"floor_ms": 1e3 * row["floor_s"], "floor_fraction": row["floor_fraction"]}
            figures["prefill_tokens_per_s"] = row["prefill_tokens_per_s"]
            totals, kernels = _kernels(lambda: session.forward(np.zeros((1, 1), np.int64)))
            tell("model", model=model, context=row["context"], gpu_ms=totals["span_us"] / 1e3, **figures)
            if row["context"] == CONTEXTS[1]:
                tell("token", model=model, context=row["context"], **totals)
                for kernel in kernels[:_KERNELS_TOLD]:
                    tell("kernel", model=model, **kernel)


def _read_rate() -> float:
    from gpu_timing import rates

    return rates(quick=True)["read_bytes_per_s"]


def _kernels(step: Callable[[], Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return what the GPU does in a step, copies included: totals, and the kernels by time.

    Its own clock has both: how long it is busy, and how long the step takes it from its first kernel to its last.
    """
    kind, activity = ("CPU", ProfilerActivity.CPU) if REHEARSAL else ("CUDA", ProfilerActivity.CUDA)
    step()
    found: dict[str, tuple[int, float]] = {}
    spans = []
    for _ in range(_PROFILED):
        with profile(activities=[activity]) as profiled:
            step()
        events = [event for event in profiled.events() if event.device_type.name == kind]
        if not events:
            continue
        spans.append(max(e.time_range.end for e in events) - min(e.time_range.start for e in events))
        for event in events:
            count, us = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, us + event.time_range.elapsed_us()
    kernels = [
        {"name": name[:110], "launches": count / _PROFILED, "us_each": us / count, "us": us / _PROFILED}
        for name, (count, us) in sorted(found.items(), key=lambda item: -item[1][1])
    ]
    totals = {name: sum(each[name] for each in kernels) for name in ("launches", "us")}
    return {"launches": totals["launches"], "busy_us": totals["us"], "span_us": min(spans, default=0.0)}, kernels


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
