"""Lowers a bundle's graph to what ONNX Runtime runs on a GPU; ``lowered`` caches it.

    engines/onnxruntime-cuda/fp16/, bf16/, fp32/    by the type to compute in, each with the files of lowered.py

Every operator has a kernel of the CUDA provider in that type (docs/onnxruntime-cuda.md has the table): one that has not
would run on the CPU, with a copy each way in every step, and no CUDA graph. It is imported only when there is none yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gta_edge.errors import BundleError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.builder import Nodes, take_place
from gta_edge.graph.io import load_graph, reuse_weights, rewriting, run_passes, serialised, store_weights
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.graph.pack_embedding import PackEmbeddingPass
from gta_edge.graph.retype import ConvertPrecisionPass
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.onnxruntime.passes.fuse_matmuls import FuseMatMulsPass
from gta_edge.runtime.onnxruntime.passes.fuse_norms import FuseNormsPass
from gta_edge.runtime.onnxruntime.passes.multiply_by_head import MultiplyByHeadPass
from gta_edge.runtime.onnxruntime.passes.spell_for_cuda import SpellForCudaPass
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief
from gta_edge.support.threads import threads_to_use

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    ir, common = optional("onnx_ir", "ort-gpu"), optional("onnx_ir.passes.common", "ort-gpu")

__all__ = ["cuda_graph", "cuda_model", "managed_cuda_graph"]

_FLOAT32_PRODUCTS = 1  # MatMulNBits' accuracy level on a CPU; CUDA's kernel multiplies in its input's type anyway
_SCALE, _BIAS = 2, 5  # inputs of MatMulNBits


def cuda_graph(
    bundle: Bundle,
    compute: str,
    weights: Path,
    location: str,
    progress: Progress = silent,
    *,
    everything: bool = False,
    features: Features | None = None,
) -> bytes:
    """Return the graph, serialised, and write its weights.

    Args:
        bundle: the model.
        compute: ``fp16``, ``bf16`` or ``fp32``.
        weights: file to write for weights that are converted or repacked.
        location: what the graph calls that file; all other weights stay in the bundle's own.
        progress: told of each.
        everything: write all weights, so that the graph needs nothing of the bundle.
        features: of a managed cache; None for none.

    Raises:
        BundleError: the bundle's graph cannot be read or is none that export writes, or its weights cannot be read.
        CapacityError: there is not enough memory.
        BackendError: onnx-ir is not installed.
        EngineError: a weight is beyond float16's range.
    """
    path, model = bundle.model_path, cuda_model(bundle, compute, features)
    workers = threads_to_use(2, asked=False)
    store_weights(model, path, weights, location, progress, everything=everything, workers=workers)
    return serialised(model, path)


def managed_cuda_graph(bundle: Bundle, compute: str, features: Features, plain: bytes) -> bytes:
    """Return the graph of a managed cache, serialised, which reads the weights that were written for another.

    Args:
        bundle: the model.
        compute: ``fp16``, ``bf16`` or ``fp32``.
        features: of the attention.
        plain: the graph without them, as ``cuda_graph`` gave it: it says where its weights are.

    Raises:
        BundleError: as ``cuda_graph``, and where a weight is not among those.
        CapacityError, BackendError, EngineError: as ``cuda_graph``.
    """
    model = cuda_model(bundle, compute, features)
    reuse_weights(model, bundle.model_path, plain)
    return serialised(model, bundle.model_path)


def cuda_model(bundle: Bundle, compute: str, features: Features | None = None) -> ir.Model:
    """Return the graph with its weights still to be written; otherwise as ``cuda_graph``."""
    model = load_graph(bundle.model_path, bundle.config, "ort-gpu")
    run_passes(
        model,
        bundle.model_path,
        *([] if features is None else [ManageCachePass(features)]),
        PackEmbeddingPass(),
        common.InlinePass(),
        ShareDimensionsPass(),
        ConvertPrecisionPass(compute),
        FuseMatMulsPass(_FLOAT32_PRODUCTS),
        FuseNormsPass(),
        MultiplyByHeadPass(),
        SpellForCudaPass(),
    )
    with rewriting(bundle.model_path):
        _convert_matmuls(model, ir.DataType[DTYPES[compute].onnx])
        _slice_splits(model)
    left = next((node for node in model.graph if node.op_type == "DequantizeLinear"), None)
    if left is not None:
        raise BundleError(f"{brief(left.name)} dequantises outside of a matmul", "export the bundle again")
    return model


def _convert_matmuls(model: ir.Model, dtype: ir.DataType) -> None:
    """Give scales and biases of ``MatMulNBits`` the type of its other input, and every bias an Add of its own.

    CUDA's kernel wants the one, and knows no bias in earlier releases; later ones add it in a kernel of its own too.
    """
    for node in [node for node in model.graph if node.op_type == "MatMulNBits"]:
        for index in (_SCALE, _BIAS):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.dtype != dtype:
                _retype(value, dtype)
        if len(node.inputs) > _BIAS:
            nodes = Nodes()
            matmul = nodes("MatMulNBits", *node.inputs[: _SCALE + 1], domain=node.domain, **_numbers(node))
            total = nodes("Add", matmul, node.inputs[_BIAS])
            model.graph.insert_before(node, nodes.made)
            take_place(node.outputs[0], total)
            model.graph.remove(node, safe=True)


def _slice_splits(model: ir.Model) -> None:
    """Replace every Split by a Slice for each part.

    In earlier releases CUDA's kernel for Split copies the sizes from memory of the host, which it fills in
    each run and then gives back. A CUDA graph reads that place again in every replay, whatever lies there by then.
    """
    for node in [node for node in model.graph if node.op_type == "Split"]:
        sizes = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        assert sizes is not None  # FuseMatMulsPass made it
        nodes, start = Nodes(), 0
        for old, size in zip(node.outputs, sizes.numpy().tolist(), strict=True):
            where = nodes.constant(start), nodes.constant(start + size), nodes.constant(node.attributes.get_int("axis"))
            take_place(old, nodes("Slice", node.inputs[0], *where))
            start += size
        model.graph.insert_before(node, nodes.made)
        model.graph.remove(node, safe=True)


def _numbers(node: ir.Node) -> dict[str, int]:
    return {name: node.attributes.get_int(name) for name in node.attributes}


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    stored = value.const_value
    assert stored is not None  # FuseMatMulsPass made it

    def data() -> ir.TensorProtocol:
        with np.errstate(all="ignore"):  # as float16 already, by ConvertPrecisionPass, which checked the range
            return ir.tensor(np.asarray(stored.numpy(), np.float32).astype(dtype.numpy()), dtype=dtype)

    value.const_value = ir.LazyTensor(data, dtype=dtype, shape=ir.Shape(stored.shape.numpy()), name=value.name)
    value.type = ir.TensorType(dtype)
