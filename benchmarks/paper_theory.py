"""What follows from sizes alone, for the page on the paper: cache, FLOPs, and a roofline beside the simulation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from paper_results import Document, Run, kind

from gta_edge.machine.devices import Device
from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.presets import preset
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plan.cost import Execution, Step, operators, query_heads
from gta_edge.plan.roofline import Model, Phase, Plan, make_plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLAIMS = Path(__file__).with_name("paper_claims.toml")
PRECISION = "bf16"  # of weights, activations and cache, where none is measured


@cache
def claims() -> Document:
    """Return what ``paper_claims.toml`` says."""
    return tomllib.loads(CLAIMS.read_text(encoding="utf-8"))


def cache_formula(config: ModelConfig) -> str:
    """Return the values that a token adds to the cache of one layer, written out."""
    first, second = config.caches
    if isinstance(config, GTAConfig):
        return f"{first.heads}·{first.width} + {second.heads}·{second.width}"
    return f"2·{first.heads}·{first.width}"


def flops_formula(config: ModelConfig) -> str:
    """Return the FLOPs of one layer for a pair of tokens, written out."""
    if isinstance(config, GTAConfig):
        return f"2·{config.num_query_heads}·({config.key_dim} + {config.latent_dim})"
    return f"4·{config.num_attention_heads}·{config.head_dim}"


def reduction(config: ModelConfig, models: Mapping[str, ModelConfig], figure: str) -> float | None:
    """Return by which part a figure is smaller than that of the same size's GQA; None where there is no GQA."""
    base = next((other for other in models.values() if kind(other) == "GQA"), None)
    return None if base is None else 1 - getattr(config, figure) / getattr(base, figure)


def prompt_flops(config: ModelConfig, tokens: int) -> int:
    """Return the FLOPs of reading a prompt: all products, the pairs that causal attention sees, one position's head."""
    execution = Execution(PRECISION, PRECISION, tokens)
    found = operators(config, PRECISION, None, execution, Step(1, tokens, 0, 1))
    return sum(operator.flops for operator in found)


def attention_share(config: ModelConfig, tokens: int) -> float:
    """Return which part of ``prompt_flops`` works on pairs of tokens."""
    pairs = config.num_hidden_layers * config.attention_flops_per_pair * tokens * (tokens + 1) // 2
    return pairs / prompt_flops(config, tokens)


def step_bytes(run: Run, model: str, context: int) -> int | None:
    """Return the bytes that a token reads, weights and cache as the backend holds them; None where it is not known."""
    static = run.statics.get(model)
    if static is None or static["cache_bytes_per_token"] is None:
        return None
    return int(static["weight_bytes_per_step"] + context * static["cache_bytes_per_token"])


# --- the simulated GPU -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """Milliseconds that a roofline allows.

    Attributes:
        prefill_ms: of a prompt.
        decode_ms: of a token after it.
        scores_ms: of the prompt's attention scores through memory, which is in ``prefill_ms`` where they are counted.
    """

    prefill_ms: float
    decode_ms: float
    scores_ms: float


def roofline(config: ModelConfig, tokens: int, score_passes: int, batch: int = 1) -> Roofline:
    """Return what the simulated GPU allows in 16 bits, the prompt as one chunk.

    Args:
        config: the model.
        tokens: of the prompt, and in the cache when the token is decoded.
        score_passes: how often the scores [heads, N, N] go through memory; 0 for a fused attention.
        batch: rows at once.
    """
    plan = _plan(config, tokens, batch)
    scores = batch * config.num_hidden_layers * query_heads(config) * DTYPES[PRECISION].bytes * score_passes
    prefill, decode = scores * tokens * tokens, scores * tokens
    return Roofline(
        1e3 * _seconds(plan.prefill, prefill, plan.device.bandwidth),
        1e3 * _seconds(plan.decode, decode, plan.device.bandwidth),
        1e3 * prefill / plan.device.bandwidth,
    )


def _plan(config: ModelConfig, tokens: int, batch: int) -> Plan:
    simulation = claims()["simulation"]
    device = Device(
        name="simulated",
        title=simulation["gpu"],
        kind="gpu",
        memory_bytes=0,
        system_bytes=0,
        runtime_bytes=0,
        bandwidth=simulation["bandwidth_bytes_per_s"],
        rates=dict.fromkeys(("fp32", "fp16", "int8"), simulation["flops_per_s"]),
        efficiency=1.0,
        shared_memory=False,
    )
    execution = Execution(PRECISION, PRECISION, tokens)
    return make_plan(Model.of("", config, PRECISION), device, execution, context=tokens, batch=batch, prompt=tokens)


def _seconds(phase: Phase, score_bytes: int, bandwidth: float) -> float:
    """Return the time of all operators, the attention with so many bytes more."""
    timed = [
        replace(each, bandwidth_s=each.bandwidth_s + score_bytes / bandwidth)
        if each.operator.name == "attention"
        else each
        for each in phase.operators
    ]
    return phase.overhead_s + sum(each.seconds for each in timed)


def simulated() -> list[dict[str, Any]]:
    """Return, for each batch and length, the authors' simulation, our roofline with and without scores in memory.

    Of each ``gta_prefill_ms``, ``gqa_prefill_ms`` and their ratio ``prefill``, and the same of decode.
    """
    simulation, found = claims()["simulation"], []
    models = {"gta": preset(simulation["gta"]), "gqa": preset(simulation["gqa"])}
    given = [[1, *line] for line in simulation["milliseconds"]] + simulation["batched_milliseconds"]
    for batch, tokens, *times in given:
        row: dict[str, Any] = {"batch": batch, "tokens": tokens, "simulated": _compared(*times)}
        for name, passes in (("written", simulation["score_passes"]), ("fused", 0)):
            gta, gqa = (roofline(config, tokens, passes, batch) for config in models.values())
            row[name] = _compared(gta.prefill_ms, gqa.prefill_ms, gta.decode_ms, gqa.decode_ms)
            row[name] |= {"gta_scores_ms": gta.scores_ms, "gqa_scores_ms": gqa.scores_ms}
        found.append(row)
    return found


def _compared(gta_prefill: float, gqa_prefill: float, gta_decode: float, gqa_decode: float) -> dict[str, float]:
    return {
        "gta_prefill_ms": gta_prefill,
        "gqa_prefill_ms": gqa_prefill,
        "prefill": gqa_prefill / gta_prefill,
        "gta_decode_ms": gta_decode,
        "gqa_decode_ms": gqa_decode,
        "decode": gqa_decode / gta_decode,
    }
