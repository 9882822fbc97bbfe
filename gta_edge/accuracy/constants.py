"""What of a model is neither a weight nor a token: its config, and the numbers that a graph has from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.graph.weights import StoredWeights
from gta_edge.model.config import ModelConfig
from gta_edge.model.tables import model_tables
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN
from gta_edge.support.text import brief

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["config_differences", "constant_problems"]

_NO_ARITHMETIC = {"dtype", "bos_token_id", "eos_token_ids"}
"""What a config says that no logit depends on."""

_TABLE_ERROR = 1e-6  # of a number around 1: cos and sin are rounded to float32 once, and libraries differ in that
_ATTRIBUTE_ERROR = 1e-6  # relative


def config_differences(bundle: ModelConfig, checkpoint: ModelConfig) -> list[str]:
    """Return in what two configs describe different models, one sentence each."""
    if type(bundle) is not type(checkpoint):
        return [f"the bundle is a {bundle.architecture} and the checkpoint a {checkpoint.architecture}"]
    found = []
    for name in (entry.name for entry in fields(bundle) if entry.name not in _NO_ARITHMETIC):
        ours, theirs = getattr(bundle, name), getattr(checkpoint, name)
        if ours != theirs:
            found.append(f"{name} is {_shown(ours)} in the bundle and {_shown(theirs)} in the checkpoint")
    return found


def _shown(value: Any) -> str:
    return brief(value.to_config() if hasattr(value, "to_config") else value)


def constant_problems(weights: StoredWeights, config: ModelConfig) -> list[str]:
    """Return which constants of a bundle's graph are not those of the config, one sentence each."""
    return [*_table_problems(weights, config), *_attribute_problems(weights.graph, config)]


def _table_problems(weights: StoredWeights, config: ModelConfig) -> Iterator[str]:
    for name, expected in model_tables(config).items():
        found = weights.table(name)
        if found is None:
            continue  # a model none of whose layers turns its keys
        if found.shape != expected.shape:
            yield f"the table {name} is {list(found.shape)}, config.json makes {list(expected.shape)}"
            continue
        allowed = _TABLE_ERROR * max(1.0, float(np.abs(expected[:1]).max()))
        wrong: npt.NDArray[np.bool_] = ~(np.abs(found - expected) <= allowed)
        if wrong.any():
            position, pair = (int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
            yield (
                f"the table {name} is {found[position, pair]:.7g} at position {position}, pair {pair}, where the "
                f"config's RoPE makes {expected[position, pair]:.7g} ({int(wrong.any(axis=1).sum())} of {len(wrong)} "
                "positions differ)"
            )


def _attribute_problems(graph: ir.Graph, config: ModelConfig) -> Iterator[str]:
    for node in graph:
        expected: dict[str, float] = {}
        if node.op_type == "RMSNormalization" and not node.domain:
            expected = {"epsilon": config.rms_norm_eps}
        elif node.op_type == op.OP and node.domain == DOMAIN:
            expected = {"scale": config.scale}
        for name, value in expected.items():
            found = node.attributes.get_float(name, 0.0)
            if not abs(found - value) <= _ATTRIBUTE_ERROR * value:
                where = brief(node.outputs[0].name)
                yield f"{name} of {node.op_type} {where} is {found:.7g}, the config's is {value:.7g}"
                return
