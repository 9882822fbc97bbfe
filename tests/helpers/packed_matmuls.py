"""Graphs with packed matmuls, run by the functions of their ops."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from gta_edge.plugins.domain import DOMAIN
from gta_edge.plugins.matmul import definition as op


def attach_functions(model: ir.Model) -> None:
    """Add the functions of our matmuls, which a graph that goes to TensorRT does not have."""
    for node in model.graph:
        for bits, name in op.OPS.items():
            if (node.domain, node.op_type) == (DOMAIN, name):
                outputs, bias = len(node.outputs), len(node.inputs) == len(op.INPUTS)
                node.overload = op.overload(outputs, bias)
                function = ir.serde.deserialize_function(onnx.parser.parse_function(op.function(bits, outputs, bias)))
                model.functions[function.identifier()] = function


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output by name. ONNX Runtime leaves the graph as it is, so nothing is fused there."""
    attach_functions(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
