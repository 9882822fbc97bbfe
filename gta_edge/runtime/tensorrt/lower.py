"""Lowers a bundle's graph to what TensorRT parses: typed, of one capacity, with the plugin's nodes or without.

Two forms. ``plugin`` leaves the attention as one node for the plugin to implement. ``function`` has the body of the
function that gives the node its meaning in its place, standard operators, and needs no plugin; positions and mask are
computed once for all layers, which halves the time that TensorRT-RTX takes to build a deep model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import CapacityError, InputError, OutputError
from gta_edge.formats.artifacts import origin
from gta_edge.formats.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.graph.io import load_graph, run_passes, serialised, store_weights
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.graph.pack_embedding import PackEmbeddingPass
from gta_edge.graph.retype import ConvertPrecisionPass
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import TREES, cache_tensors, capacity_of
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import CACHES, COMPUTE_TYPES, FLOAT_TYPES, QUANTIZED_CACHE_TYPES
from gta_edge.plugins.attention.definition import MAX_BIAS_ROWS, Features
from gta_edge.runtime.tensorrt.engine import IMPLEMENTATIONS
from gta_edge.runtime.tensorrt.passes.fold_constants import FoldConstantsPass
from gta_edge.runtime.tensorrt.passes.keep_plugin_nodes import KeepPluginNodesPass
from gta_edge.runtime.tensorrt.passes.lower_opset import LowerOpsetPass
from gta_edge.runtime.tensorrt.passes.omit_absent_inputs import OmitAbsentInputsPass
from gta_edge.runtime.tensorrt.passes.pack_matmuls import PackMatMulsPass
from gta_edge.runtime.tensorrt.passes.quantize_cache import QuantizeCachePass
from gta_edge.runtime.tensorrt.passes.set_capacity import SetCapacityPass
from gta_edge.runtime.tensorrt.passes.write_out_key_rotations import WriteOutKeyRotationsPass
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    ir, common = optional("onnx_ir", "tensorrt"), optional("onnx_ir.passes.common", "tensorrt")

__all__ = ["FORMS", "RECORD", "load_model", "lower"]

FORMS = ("plugin", "function")

FORMAT = "gta-edge-model"
RECORD = "lowered.json"
"""Says what a lowered model was made from and for."""
_WRITTEN = (MODEL, WEIGHTS)


def lower(
    bundle: Bundle,
    directory: Path,
    *,
    form: str = "plugin",
    compute: str,
    cache_dtype: str | None = None,
    capacity: int | Sequence[int],
    batch: int | None = None,
    newer_ops: bool = True,
    matmul: str = "native",
    features: Features | None = None,
    progress: Progress = silent,
) -> Path:
    """Write ``model.onnx``, its weights and a record into a directory, which then needs nothing of the bundle.

    Args:
        bundle: the model.
        directory: where to write; made if it does not exist, and empty if it does. What is written is complete only
            when this returns.
        form: ``plugin`` or ``function``.
        compute: ``fp16`` or ``bf16``; in the function form also ``fp32``.
        cache_dtype: one of ``QUANTIZED_CACHE_TYPES``, in the plugin form; otherwise what ``compute`` is.
        capacity: rows of each cache; with features, of each layer's. Whole blocks, of a cache in blocks.
        batch: rows of a step; any number if None.
        newer_ops: whether the parser knows operators of opset 23 and 24 (TensorRT 10.15 and later).
        matmul: implementation of products with quantised matrices, ``plugin`` (in either form, and not in ``fp32``)
            or ``native``.
        features: inputs of a managed cache that the graph has; None for the graph of a cache that keeps every token.
        progress: told of each tensor written.

    Returns:
        The ONNX file.

    Raises:
        InputError: the options do not go together, or not with this model.
        CapacityError: the model's positions do not reach that capacity.
        BundleError: the bundle's graph cannot be read or is none that export writes, or its weights cannot be read.
        OutputError: the directory holds a model, or cannot be written.
        EngineError: a weight is beyond float16's range, or an operator has no form that older parsers know.
        BackendError: onnx-ir is not installed.
    """
    capacities = [capacity] if isinstance(capacity, int) else list(capacity)
    _check(bundle, form, compute, cache_dtype, batch)
    _check_capacities(bundle, capacities, features, cache_dtype or compute)
    _check_matmul(matmul, compute)
    directory = Path(directory)
    if any((directory / name).exists() for name in (MODEL, WEIGHTS, RECORD)):
        raise OutputError(f"{directory}: holds a model already", "choose another directory, or an empty one")
    quantised = cache_dtype if cache_dtype in QUANTIZED_CACHE_TYPES else None
    model, packing = load_model(bundle), PackMatMulsPass()
    passes: list[ir.passes.PassBase] = [ManageCachePass(features)] if features else []
    passes.append(PackEmbeddingPass())
    if form == "plugin":
        passes.append(KeepPluginNodesPass())
    else:
        passes += [common.InlinePass(), ShareDimensionsPass()]
    if matmul == "plugin":
        passes.append(packing)
    passes.append(ConvertPrecisionPass(compute))
    passes.append(SetCapacityPass(capacity, batch))
    if quantised:
        passes.append(QuantizeCachePass(quantised, cache_tensors(bundle.config, quantised, compute=compute)))
    if not newer_ops:
        passes += [LowerOpsetPass(), FoldConstantsPass()]
    elif features:
        passes.append(WriteOutKeyRotationsPass())
    if form == "plugin":
        passes.append(OmitAbsentInputsPass())
    run_passes(model, bundle.model_path, *passes, common.RemoveUnusedOpsetsPass())
    record: dict[str, Any] = {"format": FORMAT, "form": form, "compute": compute, "cache_dtype": quantised or compute}
    record |= {"capacity": capacity, "batch": batch, "newer_ops": newer_ops}
    record |= {"managed": asdict(features)} if features else {}
    record |= {"matmul": matmul, "packed": packing.matmuls, "not_packed": packing.left}
    record |= origin(bundle)
    try:
        directory.mkdir(exist_ok=True)
        store_weights(model, bundle.model_path, directory / WEIGHTS, WEIGHTS, progress)
        (directory / MODEL).write_bytes(serialised(model, bundle.model_path))
        record["files"] = {
            name: {"bytes": (directory / name).stat().st_size} for name in _WRITTEN if (directory / name).exists()
        }
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror})", "choose another directory") from error
    return directory / MODEL


def _check(bundle: Bundle, form: str, compute: str, cache_dtype: str | None, batch: int | None) -> None:
    if form not in FORMS:
        raise InputError(f"the form is {form!r}", f"expected {' or '.join(FORMS)}")
    computes = FLOAT_TYPES if form == "function" else COMPUTE_TYPES
    if compute not in computes:
        raise InputError(f"the {form} form computes in {', '.join(computes)}, not in {compute!r}", "choose one of them")
    caches = (compute, *QUANTIZED_CACHE_TYPES) if form == "plugin" else (compute,)
    if cache_dtype is not None and cache_dtype not in caches:
        whose = f"the {form} form of {bundle.config.architecture} in {compute}"
        raise InputError(f"{whose} has no cache of {cache_dtype!r}", f"expected {' or '.join(caches)}")
    if batch is not None and batch < 1:
        raise InputError(f"the batch is {batch}", "expected at least 1")


def _check_capacities(bundle: Bundle, capacities: Sequence[int], features: Features | None, cache: str) -> None:
    layers = bundle.config.num_hidden_layers
    if features is None and len(capacities) > 1:
        raise InputError("each layer has a capacity of its own", "give what the cache is managed with, or one capacity")
    if len(capacities) not in (1, layers):
        raise InputError(f"there are {len(capacities)} capacities", f"expected one for each of {layers} layers")
    # a managed cache has a few rows more, where residual rows begin
    most = capacity_of(cache, bundle.config.max_position_embeddings) + (MAX_BIAS_ROWS if features else 0)
    for capacity in capacities:
        if not 1 <= capacity <= most and not (features == TREES and capacity > most):  # rows of trees are no positions
            raise CapacityError(f"the capacity is {capacity} tokens", f"expected 1 to {most}, the model's positions")
        if capacity != capacity_of(cache, capacity):
            raise CapacityError(f"the capacity is {capacity} tokens", f"expected whole blocks of {BLOCK} in {cache}")
    if features and CACHES[cache].in_blocks:
        raise InputError(
            f"a cache in {cache} is not managed: its rows do not move alone", "leave out one of both, or take int8"
        )


def _check_matmul(matmul: str, compute: str) -> None:
    if matmul not in IMPLEMENTATIONS:
        raise InputError(f"matmul is {matmul!r}", f"expected {' or '.join(IMPLEMENTATIONS)}")
    if matmul == "plugin" and compute not in COMPUTE_TYPES:
        raise InputError(
            "the plugin multiplies in fp16 or bf16, not in 'fp32'", "choose one of them, or native matmuls"
        )


def load_model(bundle: Bundle) -> ir.Model:
    """Return a bundle's graph, whose weights are read when they are asked for.

    Raises:
        BundleError: it cannot be read or is none that export writes, or the weights do not lie within the bundle.
        BackendError: onnx-ir is not installed.
    """
    return load_graph(bundle.model_path, bundle.config, "tensorrt")
