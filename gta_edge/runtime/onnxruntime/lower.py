"""Makes the graph that ONNX Runtime runs best on a CPU out of a bundle's own; ``prepared`` keeps it.

It is imported only when there is none yet, since onnx-ir costs time and memory to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.formats.bundle import Bundle
from gta_edge.graph.io import load_graph, rewriting, run_passes, serialised
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import BITS
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

__all__ = ["graph_without_new_weights", "graphs", "store_weights", "tidied"]

_INLINE_BYTES = 1024
_INT8_ACTIVATIONS, _FLOAT32 = 4, 1  # MatMulNBits' accuracy levels


def graphs(bundle: Bundle, weights: Path, location: str, progress: Progress = silent) -> tuple[bytes, bytes]:
    """Return the graph in default arithmetic and in exact arithmetic, serialised, and write their new weights.

    Args:
        bundle: the model.
        weights: file to write for the weights that lie anew.
        location: what the graphs call that file; all other weights stay in the bundle's own.
        progress: told of each.

    Raises:
        BundleError: the bundle's graph cannot be read or is none that export writes, or its weights cannot be read.
        CapacityError: there is not enough memory.
        BackendError: onnx-ir is not installed.
    """
    model = load_graph(bundle.model_path, bundle.config)
    tidied(
        model,
        bundle,
        ExpandAttentionPass(),
        common.InlinePass(),
        ShareDimensionsPass(),
        FuseMatMulsPass(_INT8_ACTIVATIONS),
        FuseNormsPass(),
    )
    with rewriting(bundle.model_path):
        store_weights(model, weights, location, progress)
    default = serialised(model, bundle.model_path)
    if bundle.precision not in BITS:
        return default, default
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    return default, serialised(model, bundle.model_path)


def graph_without_new_weights(bundle: Bundle) -> bytes:
    """Return a graph that reads the bundle's weights as they are: for where no file can be written."""
    model = load_graph(bundle.model_path, bundle.config)
    tidied(model, bundle, common.InlinePass(), ShareDimensionsPass(), FuseNormsPass())
    return serialised(model, bundle.model_path)


def tidied(model: ir.Model, bundle: Bundle, *passes: ir.passes.PassBase) -> ir.Model:
    """Run passes, and those that tidy up after any: unused nodes, common subexpressions, names; return the model.

    Raises:
        BundleError: a pass meets what it does not expect. An error of ours from within one passes as it is.
    """
    cleaning = common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass(), common.NameFixPass()
    run_passes(model, bundle.model_path, *passes, *cleaning)
    return model


def store_weights(
    model: ir.Model, weights: Path, location: str, progress: Progress, *, everything: bool = False
) -> None:
    """Write the initializers that are new, or every one, and let the model refer to them by ``location``."""
    given = [v for v in model.graph.initializers.values() if everything or isinstance(v.const_value, ir.LazyTensor)]
    large = [v for v in given if v.const_value is not None and v.const_value.nbytes >= _INLINE_BYTES]
    tensors = [v.const_value for v in large if v.const_value is not None]

    def wrote(_: Any, info: Any) -> None:
        progress("laying out weights", info.index + 1, info.total)

    if not large:
        return
    written = ir.external_data.convert_tensors_to_external(
        tensors, weights.parent, weights.name, callback=wrote, max_workers=threads_to_use(2, asked=False)
    )
    for value, tensor in zip(large, written, strict=True):
        value.const_value = ir.ExternalTensor(
            location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name)
        )
