"""Lowers a bundle's graph to what ONNX Runtime runs best on a CPU; ``lowered`` caches it.

It is imported only when there is none yet, since onnx-ir costs time and memory to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gta_edge.formats.bundle import Bundle
from gta_edge.graph.io import load_graph, reuse_weights, run_passes, serialised, store_weights
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.graph.pack_embedding import PackEmbeddingPass
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import BITS
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.onnxruntime.passes.expand_attention import ExpandAttentionPass
from gta_edge.runtime.onnxruntime.passes.fuse_matmuls import FuseMatMulsPass
from gta_edge.runtime.onnxruntime.passes.fuse_norms import FuseNormsPass
from gta_edge.support.progress import Progress, silent
from gta_edge.support.threads import threads_to_use

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    ir, common = optional("onnx_ir", "ort"), optional("onnx_ir.passes.common", "ort")

__all__ = ["graph_without_new_weights", "graphs", "variant_graphs"]

_INT8_ACTIVATIONS, _FLOAT32 = 4, 1  # MatMulNBits' accuracy levels


def graphs(bundle: Bundle, weights: Path, location: str, progress: Progress = silent) -> tuple[bytes, bytes]:
    """Return the graph in default arithmetic and in exact arithmetic, serialised, and write their new weights.

    Args:
        bundle: the model.
        weights: file to write for the weights that are repacked.
        location: what the graphs call that file; all other weights stay in the bundle's own.
        progress: told of each.

    Raises:
        BundleError: the bundle's graph cannot be read or is none that export writes, or its weights cannot be read.
        CapacityError: there is not enough memory.
        BackendError: onnx-ir is not installed.
    """
    path = bundle.model_path
    model = _lowered(bundle, None, "fp32")
    workers = threads_to_use(2, asked=False)
    store_weights(model, path, weights, location, progress, everything=False, workers=workers)
    return _in_both_arithmetics(model, bundle)


def variant_graphs(bundle: Bundle, features: Features | None, cache_dtype: str, plain: bytes) -> tuple[bytes, bytes]:
    """Return the graphs with another cache, likewise, which read the weights that were written for ``graphs``.

    Args:
        bundle: the model.
        features: of the attention, with a managed cache.
        cache_dtype: type of the cache, ``fp32`` or ``int8``.
        plain: the graph without either, as ``graphs`` gave it: it says where its weights are.

    Raises:
        BundleError: as ``graphs``, and where a weight is not among those.
        CapacityError, BackendError: as ``graphs``.
    """
    model = _lowered(bundle, features, cache_dtype)
    reuse_weights(model, bundle.model_path, plain)
    return _in_both_arithmetics(model, bundle)


def graph_without_new_weights(bundle: Bundle, features: Features | None = None, cache_dtype: str = "fp32") -> bytes:
    """Return a graph that reads the bundle's weights as they are: for where no file can be written.

    With a cache of int8, value decoders with the tile of the mix folded in are a part of it.
    """
    model = load_graph(bundle.model_path, bundle.config)
    expanding = [] if cache_dtype == "fp32" else [ExpandAttentionPass(int8=True)]
    inlining = common.InlinePass(), ShareDimensionsPass(), FuseNormsPass()
    run_passes(model, bundle.model_path, *_managing(features), *expanding, *inlining)
    return serialised(model, bundle.model_path)


def _lowered(bundle: Bundle, features: Features | None, cache_dtype: str) -> ir.Model:
    """Return the graph with its new weights still to be made."""
    model = load_graph(bundle.model_path, bundle.config)
    attention = ExpandAttentionPass(int8=cache_dtype == "int8")
    expanding = PackEmbeddingPass(), attention, common.InlinePass(), ShareDimensionsPass()
    fusing = FuseMatMulsPass(_INT8_ACTIVATIONS), FuseNormsPass()
    run_passes(model, bundle.model_path, *_managing(features), *expanding, *fusing)
    return model


def _managing(features: Features | None) -> list[ManageCachePass]:
    return [] if features is None else [ManageCachePass(features)]


def _in_both_arithmetics(model: ir.Model, bundle: Bundle) -> tuple[bytes, bytes]:
    """Return a graph that rounds activations to int8, and one that does not; one and the same without such matmuls."""
    path = bundle.model_path
    default = serialised(model, path)
    if bundle.precision not in BITS:
        return default, default
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    return default, serialised(model, path)
