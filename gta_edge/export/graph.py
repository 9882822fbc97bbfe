"""From a config to a bundle's graph: the trace and the passes, in their order."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.export.passes.attach_functions import AttachFunctionsPass
from gta_edge.export.passes.fold_weight_views import FoldWeightViewsPass
from gta_edge.export.passes.quantize_embedding import QuantizeEmbeddingPass
from gta_edge.export.passes.quantize_weights import QuantizeWeightsPass
from gta_edge.export.passes.stamp_layers import RepeatLayersPass
from gta_edge.export.passes.store_weights import StoreWeightsPass
from gta_edge.export.passes.tie_head import TieHeadPass
from gta_edge.export.quantizer import Quantizer
from gta_edge.export.trace import trace
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig, parse_config
from gta_edge.model.kv_cache import interface_names

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["prepare", "traced"]


def traced(config: ModelConfig, biases: Collection[str]) -> ir.Model:
    """Return a model's graph without weights: one layer traced and stamped for all, which takes a tenth of the time.

    Args:
        config: the model's sizes.
        biases: full names of the biases that the checkpoint has. Where layers differ in them, or in that they rotate,
            all are traced.
    """
    first = {name for name in biases if name.startswith("model.layers.0.")}
    layers = range(config.num_hidden_layers)
    if config.unrotated_layers or set(biases) != {name.replace(".0.", f".{i}.", 1) for name in first for i in layers}:
        return _traced_once(config, biases)
    model = _traced_once(config.replace(num_hidden_layers=1), first)
    return RepeatLayersPass(config.num_hidden_layers, interface_names(config))(model).model


def _traced_once(config: ModelConfig, biases: Collection[str]) -> ir.Model:
    """Return a graph that may be changed: a copy of what was traced for the same sizes, by an earlier export maybe."""
    sizes = config.replace(dtype="float32", bos_token_id=None, eos_token_ids=())  # which no graph depends on
    model = _traced(json.dumps(sizes.to_dict(), sort_keys=True), frozenset(biases)).clone()
    for value in model.graph.initializers.values():
        value.type = ir.TensorType(value.dtype) if value.dtype is not None else None  # a copy's is the original's own
    return model


@functools.lru_cache(maxsize=64)
def _traced(config: str, biases: frozenset[str]) -> ir.Model:
    return trace(parse_config(json.loads(config)), sorted(biases))


def prepare(
    model: ir.Model,
    embedding: str,
    read: Callable[[str], npt.NDArray[Any]],
    tables: dict[str, npt.NDArray[np.float32]],
    precision: str,
    quantizer: Quantizer | None = None,
) -> ir.Model:
    """Return the graph as it is stored, weights attached lazily.

    Args:
        model: as ``traced`` returns it; changed in place.
        embedding: name of the embedding table.
        read: returns a parameter by name.
        tables: arrays that are no parameters.
        precision: how the matrices are stored.
        quantizer: for the precisions in integers.
    """
    common = ir.passes.common
    if quantizer is None:
        matrices = [TieHeadPass(embedding), FoldWeightViewsPass()]
    else:  # a tied head has a matrix of its own: no engine multiplies by a quantised one that lies the other way
        matrices = [FoldWeightViewsPass(), QuantizeWeightsPass(quantizer), QuantizeEmbeddingPass(embedding, quantizer)]
    passes = ir.passes.Sequential(
        *matrices,
        StoreWeightsPass(read, tables, precision),
        AttachFunctionsPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # the tracer notes source paths of the machine it ran on
        common.NameFixPass(),
    )
    result = passes(model).model
    result.producer_name, result.producer_version = "gta-edge", None
    return result
