"""The passes that turn a traced graph into a bundle's, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.export.passes.attach_functions import AttachFunctionsPass
from gta_edge.export.passes.fold_weight_views import FoldWeightViewsPass
from gta_edge.export.passes.store_weights import StoreWeightsPass
from gta_edge.export.passes.tie_head import TieHeadPass
from gta_edge.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "export")

__all__ = ["prepare"]


def prepare(
    model: ir.Model,
    embedding: str,
    read: Callable[[str], npt.NDArray[Any]],
    tables: dict[str, npt.NDArray[np.float32]],
    precision: str,
) -> ir.Model:
    """Return the graph as it is stored, weights attached lazily.

    Args:
        model: as ``trace`` returns it; changed in place.
        embedding: name of the embedding table.
        read: returns a parameter by name.
        tables: arrays that are no parameters.
        precision: storage type of the matrices.
    """
    common = ir.passes.common
    passes = ir.passes.Sequential(
        TieHeadPass(embedding),
        FoldWeightViewsPass(),
        StoreWeightsPass(read, tables, precision),
        AttachFunctionsPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # the tracer notes source paths of the machine it ran on
        common.NameFixPass(),
    )
    result = passes(model).model
    result.producer_name, result.producer_version = "gta-edge", None
    return result
