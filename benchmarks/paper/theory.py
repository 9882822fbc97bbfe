"""What follows from sizes alone, for the page on the paper: cache, FLOPs, and a roofline beside the simulation.

The FLOPs of a config's formulas are counted a second time, in an exported graph, which knows nothing of them: the
shapes that ONNX's shape inference finds for two sizes of the cache are multiplied out. Matmuls that are the same for
both work on tokens; what the others do more for the longer cache is what a pair of a token and a cached one costs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx.inliner
import onnx.shape_inference

from benchmarks.paper.results import Document, Run, kind
from gta_edge.errors import BundleError
from gta_edge.formats.weights import Storage
from gta_edge.machine.devices import Device
from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.presets import preset
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plan.cost import Execution, Step, operators
from gta_edge.plan.roofline import Model, Phase, Plan, make_plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLAIMS = Path(__file__).with_name("claims.toml")
PRECISION = "bf16"  # of weights, activations and cache, where none is measured

TOKENS = 8  # T, of which there may be any number
CAPACITIES = (32, 96)  # S
# Ops that multiply matrices too; the exported graphs have none of them, and a count that misses one would be wrong.
OTHER_MATMULS = frozenset({"Attention", "Conv", "Einsum", "MatMulInteger", "QLinearMatMul"})
OF_THE_HEAD = "logit_positions"  # what is computed of this input is for those positions alone, and not counted

Shape = tuple[int, ...]


@cache
def claims() -> Document:
    """Return what ``claims.toml`` says."""
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
    """Return the FLOPs of reading a prompt: all matmuls, the pairs that causal attention sees, one position's head."""
    execution = Execution(PRECISION, PRECISION, tokens)
    found = operators(config, Storage(PRECISION), execution, Step(1, tokens, 0, 1))
    return sum(operator.flops for operator in found)


def attention_share(config: ModelConfig, tokens: int) -> float:
    """Return which part of ``prompt_flops`` works on pairs of tokens."""
    pairs = config.num_hidden_layers * config.attention_flops_per_pair * tokens * (tokens + 1) // 2
    return pairs / prompt_flops(config, tokens)


def step_bytes(run: Run, model: str, context: int) -> int | None:
    """Return the bytes that a token reads, weights and cache as the backend holds them; None where it is not known."""
    facts = run.facts.get(model)
    if facts is None or facts.cache_bytes_per_token is None:
        return None
    return facts.weight_bytes_per_step + context * facts.cache_bytes_per_token


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
        batch: sequences at once.
    """
    plan = _plan(config, tokens, batch)
    scores = (
        batch * config.num_hidden_layers * config.attention.num_query_heads * DTYPES[PRECISION].bytes * score_passes
    )
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


# --- FLOPs counted in a graph -----------------------------------------------------------------------------------------


class GraphFlops(NamedTuple):
    """FLOPs of an exported graph's matmuls, all layers, without the head; a multiply-add is 2.

    Attributes:
        per_pair: for one pair of a new token and a cached one.
        per_token: for one new token, beside its pairs.
    """

    per_pair: int
    per_token: int


def count_flops(model: Path) -> GraphFlops:
    """Count the FLOPs of a bundle's ``model.onnx``; its weights are not read.

    Raises:
        BundleError: a matmul whose shape cannot be told, or one of another kind.
    """
    short, long = (_matmuls(model, capacity) for capacity in CAPACITIES)
    growth = {node: long[node] - flops for node, flops in short.items()}
    pairs = TOKENS * (CAPACITIES[1] - CAPACITIES[0])
    by_token = sum(flops for node, flops in short.items() if not growth[node])
    return GraphFlops(sum(growth.values()) // pairs, by_token // TOKENS)


def _matmuls(path: Path, capacity: int) -> dict[int, int]:
    """Return the FLOPs of every matmul by its place among the nodes, for ``TOKENS`` new tokens in one row."""
    model = onnx.load(path, load_external_data=False)
    sizes = _sizes(model, capacity)
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    del model.graph.value_info[:]  # which still has the dynamic dimensions
    flat = onnx.inliner.inline_local_functions(model)
    inferred = onnx.shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True)
    shapes, head, found = _shapes(inferred.graph), {OF_THE_HEAD}, {}
    for place, node in enumerate(inferred.graph.node):  # sorted: what a node takes stands before it
        if not head.isdisjoint(node.input):
            head |= set(node.output)
        elif node.op_type in OTHER_MATMULS:
            raise BundleError(
                f"{path}: has a node {node.op_type}, whose FLOPs are not counted; expected MatMul and Gemm"
            )
        elif node.op_type in ("MatMul", "Gemm"):
            found[place] = _flops(path, node, shapes)
    return found


def _sizes(model: onnx.ModelProto, capacity: int) -> dict[str, int]:
    """Return a size for each name of a dynamic dimension, by the inputs that have them."""
    dimensions = {value.name: [d.dim_param for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    batch, tokens = dimensions["input_ids"]
    return {batch: 1, tokens: TOKENS, dimensions["past_key.0"][2]: capacity, dimensions[OF_THE_HEAD][1]: 1}


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Return the shapes that are known in full."""
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return found


def _flops(path: Path, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Return 2·M·N·K, once for each matrix of the stack."""
    left, output = shapes.get(node.input[0]), shapes.get(node.output[0])
    if left is None or output is None:
        raise BundleError(f"{path}: the shape of the matmul {node.name!r} cannot be told; export the bundle anew")
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(output) * left[0 if turned else -1]
