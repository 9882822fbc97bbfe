"""FLOPs counted in an exported graph: what its matrix products do, and how much of it grows with the cache.

A second way to the figures of ``gta_edge.model.config``, which knows nothing of them: it multiplies out the shapes that
ONNX's shape inference finds for two sizes of the cache. Products that are the same for both work on tokens; what the
others do more for the longer cache is what a pair of a token and a cached one costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference

from gta_edge.errors import BundleError

TOKENS = 8  # T, of which there may be any number
CAPACITIES = (32, 96)  # S
# Ops that multiply matrices too; the exported graphs have none of them, and a count that misses one would be wrong.
OTHER_PRODUCTS = frozenset({"Attention", "Conv", "Einsum", "MatMulInteger", "QLinearMatMul"})
OF_THE_HEAD = "logit_positions"  # what is computed of this input is for those positions alone, and not counted

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GraphFlops:
    """FLOPs of an exported graph's matrix products, all layers, without the head; a multiply-add is 2.

    Attributes:
        per_pair: for one pair of a new token and a cached one.
        per_token: for one new token, beside its pairs.
    """

    per_pair: int
    per_token: int


def count(model: Path) -> GraphFlops:
    """Count the FLOPs of a bundle's ``model.onnx``; its weights are not read.

    Raises:
        BundleError: a matrix product whose shape cannot be told, or one of another kind.
    """
    short, long = (_matmuls(model, capacity) for capacity in CAPACITIES)
    growth = {node: long[node] - flops for node, flops in short.items()}
    pairs = TOKENS * (CAPACITIES[1] - CAPACITIES[0])
    by_token = sum(flops for node, flops in short.items() if not growth[node])
    return GraphFlops(sum(growth.values()) // pairs, by_token // TOKENS)


def _matmuls(path: Path, capacity: int) -> dict[int, int]:
    """Return the FLOPs of every matrix product by its place among the nodes, for ``TOKENS`` new tokens in one row."""
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
        elif node.op_type in OTHER_PRODUCTS:
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
        raise BundleError(f"{path}: the shape of the product {node.name!r} cannot be told; export the bundle anew")
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(output) * left[0 if turned else -1]
