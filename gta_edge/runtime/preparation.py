"""Makes the graph that ONNX Runtime runs best on a CPU out of a bundle's own; ``prepared`` keeps it.

It is imported only when there is none yet, since onnx-ir costs time and memory to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.bundle import Bundle
from gta_edge.errors import BackendError, GtaEdgeError
from gta_edge.optional import installed, optional
from gta_edge.progress import Progress, silent
from gta_edge.quantization import BITS
from gta_edge.runtime.passes.expand_attention import ExpandAttentionPass
from gta_edge.runtime.passes.fuse_norms import FuseNormsPass
from gta_edge.runtime.passes.fuse_products import FuseProductsPass
from gta_edge.runtime.passes.share_dimensions import ShareDimensionsPass
from gta_edge.weights import check_locations

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    ir, common = optional("onnx_ir", "ort"), optional("onnx_ir.passes.common", "ort")

__all__ = ["graph_without_new_weights", "graphs", "load_graph", "run_passes", "store_weights"]

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
        BundleError: the weights do not lie within the bundle.
        BackendError: the bundle's graph cannot be read, or onnx-ir is not installed.
    """
    model = load_graph(bundle)
    run_passes(
        model,
        ExpandAttentionPass(),
        common.InlinePass(),
        ShareDimensionsPass(),
        FuseProductsPass(_INT8_ACTIVATIONS),
        FuseNormsPass(),
    )
    store_weights(model, weights, location, progress)
    default = bytes(ir.to_proto(model).SerializeToString())
    if bundle.precision not in BITS:
        return default, default
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    return default, bytes(ir.to_proto(model).SerializeToString())


def graph_without_new_weights(bundle: Bundle) -> bytes:
    """Return a graph that reads the bundle's weights as they are: for where no file can be written."""
    model = load_graph(bundle)
    run_passes(model, common.InlinePass(), ShareDimensionsPass(), FuseNormsPass())
    return bytes(ir.to_proto(model).SerializeToString())


def load_graph(bundle: Bundle) -> ir.Model:
    """Return a bundle's graph, whose weights are read when they are asked for.

    Raises:
        BundleError: the weights do not lie within the bundle.
        BackendError: it cannot be read, or onnx-ir is not installed.
    """
    if not installed(ir):
        ir.load(bundle.model_path)  # says what to install
    try:
        model = ir.load(bundle.model_path)
    except Exception as error:  # the parser's errors have no common base
        raise BackendError(f"{bundle.model_path}: is not a readable ONNX model ({error}); export it again") from error
    check_locations(model, bundle.model_path)
    return model


def run_passes(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    """Run passes, and those that tidy up after any: unused nodes, common subexpressions, names.

    Raises:
        BackendError: a pass meets what it does not expect. An error of ours from within one passes as it is.
    """
    cleaning = common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass(), common.NameFixPass()
    try:
        ir.passes.Sequential(*passes, *cleaning)(model)
    except ir.passes.PassError as error:
        cause = error.__cause__
        if isinstance(cause, GtaEdgeError):
            raise cause from error
        raise BackendError(f"the graph is none that this version writes ({cause}); export the bundle again") from error


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
        tensors, weights.parent, weights.name, callback=wrote, max_workers=2
    )
    for value, tensor in zip(large, written, strict=True):
        value.const_value = ir.ExternalTensor(
            location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name)
        )
