"""The stages of speed on the backend ``torch``, with random weights: tokens beside the floor, kernels by time.

    python -m scripts.gpu_stages.models gta-1b/bf16 gta-1b/int4 ...

The floor is all weights and the cache read once, at the rate that the GPU reads at. A token is timed twice: from call
to logits by the host's clock, and, as replays of its graph one behind the other, by the GPU's.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_models import measure, random_session
from torch.profiler import ProfilerActivity, profile

from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.presets import preset
from gta_edge.runtime.torch.session import TorchSession
from scripts.gpu_stages.figures import REHEARSAL, tell

__all__ = ["DEVICE", "config_of"]

CONTEXTS = (12, 20) if REHEARSAL else (128, 2048, 8192, 32768)
_NEW_TOKENS = 3 if REHEARSAL else 32
_PROFILED = 3
_KERNELS_TOLD = 24
_GPU_SECONDS = 0.05

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
    """Tell what a token costs at each context; then which kernels a token and a prompt are made of.

    The profiler comes last: once it has run, the driver reports every launch to it, and this process is slower for
    good.

    Args:
        model: a preset and the type of its weights, with a slash between.
    """
    name, _, precision = model.partition("/")
    read = 1e10 if REHEARSAL else _read_rate()
    start = time.perf_counter()
    with random_session(config_of(name), precision, DEVICE) as (session, weight_bytes):
        tell("load", model=model, seconds=time.perf_counter() - start, weight_MB=weight_bytes / 1e6)
        gpu_ms = {}
        for row in measure(
            session, CONTEXTS, _NEW_TOKENS, weight_bytes=weight_bytes, read_bytes_per_s=read, name=model
        ):
            gpu_ms[row["context"]] = _gpu_ms(session)
            figures = {"gpu_ms": gpu_ms[row["context"]]}
            figures |= {"peak_GiB": None if REHEARSAL else torch.cuda.max_memory_allocated() / 2**30}
            figures |= {"ms_per_token": 1e3 * row["token_s"]["median"], "ms_least": 1e3 * row["token_s"]["min"]}
            figures |= {"floor_ms": 1e3 * row["floor_s"], "floor_fraction": row["floor_fraction"]}
            figures["prefill_tokens_per_s"] = row["prefill_tokens_per_s"]
            tell("model", model=model, context=row["context"], **figures)
        for kind, context in (("token", CONTEXTS[1]), ("prompt", CONTEXTS[1]), ("prompt", CONTEXTS[-2])):
            _tell_kernels(session, model, kind, context, gpu_ms[context] if kind == "token" else None)


def _read_rate() -> float:
    from gpu_timing import rates

    return rates(quick=True)["read_bytes_per_s"]


def _gpu_ms(session: TorchSession) -> float | None:
    """Return what the GPU takes for the token that the session ran last, by its own clock; None without a graph."""
    if session.decode_graph is None:
        return None
    from gpu_timing import seconds

    return 1e3 * seconds(session.decode_graph.launch, _GPU_SECONDS)


def _tell_kernels(session: TorchSession, model: str, kind: str, context: int, gpu_ms: float | None) -> None:
    """Tell what a token after a context, or a prompt of that length, is made of.

    Args:
        session: of the model.
        model: its name.
        kind: ``token`` or ``prompt``.
        context: tokens.
        gpu_ms: what the GPU takes without a profiler, where that is known.
    """
    ids = np.zeros((1, context), np.int64)
    session.reset()
    start = time.perf_counter()
    session.forward(ids)
    wall_ms = 1e3 * (time.perf_counter() - start)

    def step() -> None:
        if kind == "token":
            session.forward(ids[:, :1])
        else:
            session.reset()
            session.forward(ids)

    kernels = _kernels(step)
    totals = {name: sum(each[name] for each in kernels) for name in ("launches", "us")}
    figures = {"launches": totals["launches"], "busy_us": totals["us"], "gpu_ms": gpu_ms}
    tell(kind, model=model, context=context, **figures, wall_ms=wall_ms if kind == "prompt" else None)
    for kernel in kernels[:_KERNELS_TOLD]:
        tell("kernel", model=model, of=kind, context=context, **kernel)


def _kernels(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return what the GPU does in a step, copies included, by time.

    Its own clock says how long each is busy. How long the step takes is not for the profiler to say: with it, a graph's
    kernels begin later after one another.
    """
    kind, activity = ("CPU", ProfilerActivity.CPU) if REHEARSAL else ("CUDA", ProfilerActivity.CUDA)
    step()
    found: dict[str, tuple[int, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a second profile forgets the first, which is meant
        for _ in range(_PROFILED):
            with profile(activities=[activity]) as profiled:
                step()
            for event in profiled.events():
                if event.device_type.name == kind:
                    count, us = found.get(event.name, (0, 0.0))
                    found[event.name] = count + 1, us + event.time_range.elapsed_us()
    return [
        {"name": name[:110], "launches": count / _PROFILED, "us_each": us / count, "us": us / _PROFILED}
        for name, (count, us) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
