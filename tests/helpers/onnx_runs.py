"""Graphs as bundles have them, run by ONNX Runtime as they are."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from gta_edge.export.graph import prepare, traced
from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.weights import storage_for
from gta_edge.model.config import parse_config
from gta_edge.model.rope import rope_tables
from tests.helpers.attention_models import Sizes, model
from tests.helpers.small_models import MODELS, PRECISIONS, WEIGHTS, P


@functools.cache
def _serialised(name: str, precision: str) -> bytes:
    config, weights = parse_config(MODELS[name]), WEIGHTS[name]
    cos, sin = rope_tables(config.key_width, config.rope_theta, config.rope_scaling, P)
    kind, block = PRECISIONS[precision]
    quantizer = Quantizer(weights.__getitem__, storage_for(config, kind, block)) if kind.startswith("int") else None
    graph = traced(config, [key for key in weights if key.endswith(".bias")])
    graph = prepare(graph, "model.embed_tokens.weight", weights.__getitem__, {"cos": cos, "sin": sin}, kind, quantizer)
    return serialise(graph)


def bundled(name: str, precision: str = "fp32") -> ir.Model:
    """The graph as it lies in a bundle, weights included."""
    return parse(_serialised(name, precision))


def serialise(graph: ir.Model) -> bytes:
    return ir.to_proto(graph).SerializeToString()


def parse(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(content))


def runs(graph: ir.Model, *steps: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every output by name, for each step. ONNX Runtime leaves the graph as it is, so nothing else is fused."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for every cache that is copied
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(serialise(graph), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, feeds), strict=True)) for feeds in steps]


def run(graph: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output by name."""
    return runs(graph, feeds)[0]


def one_attention(
    inputs: dict[str, np.ndarray], sizes: Sizes, behind: Iterable[str] = (), dtype: Any = np.float32
) -> ir.Model:
    """The op alone, its value decoder, where it has one, stored in a type, behind nodes of some kinds."""
    proto = model(sizes)
    graph = proto.graph
    if not sizes.decoder:
        return ir.from_proto(proto)
    (declared,) = (value for value in graph.input if value.name == "value_decoder")
    graph.input.remove(declared)
    name = "value_decoder" if not behind else "stored"
    graph.initializer.append(numpy_helper.from_array(inputs["value_decoder"].astype(dtype), name))
    for i, kind in enumerate(behind):
        options = {"to": TensorProto.FLOAT} if kind == "Cast" else {}
        graph.node.insert(i, helper.make_node(kind, [name], ["value_decoder"], **options))
    return ir.from_proto(proto)
