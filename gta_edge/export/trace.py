"""From the PyTorch model to an ONNX graph, without weights.

The model is traced on torch's meta device: shapes and names only, so a model of any size traces in seconds and in
little memory. Weights are attached afterwards, by name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Decoder, empty_cache
from gta_edge.model.kv_cache import BATCH_AXIS, CAPACITY_AXIS, interface_names
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN, VERSION

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import onnxscript
    import torch
else:
    onnx, onnxscript, torch = (optional(name, "export") for name in ("onnx", "onnxscript", "torch"))

__all__ = ["trace"]

_TORCH_OPSET = 23  # the newest that torch writes


def trace(config: ModelConfig, biases: Collection[str]) -> ir.Model:
    """Return the graph of a model: one attention node per layer, initializers named as in the checkpoint, no data.

    Args:
        config: the model's sizes.
        biases: full names of the biases that the checkpoint has.
    """
    with torch.device("meta"):
        model = Decoder(config, biases).eval().to("meta")
        ids, lengths, positions = (torch.zeros(shape, dtype=torch.int64) for shape in ((2, 8), (2,), (2, 3)))
        caches = [cache.tensors for cache in empty_cache(config, 2, 16)]  # dynamic_shapes knows no named tuples
    cache_axes = {BATCH_AXIS: "batch", CAPACITY_AXIS: "capacity"}
    axes = (
        {0: "batch", 1: "tokens"},
        {0: "batch"},
        {0: "batch", 1: "positions"},
        [(cache_axes, cache_axes)] * config.num_hidden_layers,
    )
    inputs, outputs = interface_names(config)
    with _quiet():
        program = torch.onnx.export(
            model,
            (ids, lengths, positions, caches),
            dynamo=True,
            dynamic_shapes=axes,
            input_names=inputs,
            output_names=outputs,
            opset_version=_TORCH_OPSET,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns one
    return program.model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Map the torch op to one ONNX node, whose absent inputs are empty."""
    node = _onnx_op(op.OP, op.MODEL_INPUTS, op.MODEL_OUTPUTS, op.ATTRIBUTES)
    count = len(op.MODEL_INPUTS)

    def attention(*arguments: Any) -> Any:
        return node(*arguments[:count], **op.attributes(*arguments[count:]))

    return {torch.ops.gta.grouped_latent_attention.default: attention}


def _onnx_op(
    name: str, inputs: Collection[str], outputs: Collection[str], attributes: Collection[str]
) -> Callable[..., Any]:
    """Return a callable that adds a node of ours to the graph being traced."""
    schema = onnx.defs.OpSchema
    kinds = {"scale": schema.AttrType.FLOAT, "plugin_namespace": schema.AttrType.STRING}
    kinds["plugin_version"] = schema.AttrType.STRING
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, VERSION),
        name,
        schema(
            name,
            DOMAIN,
            VERSION,
            inputs=[_parameter(i) for i in inputs],
            outputs=[schema.FormalParameter(o, "T") for o in outputs],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[schema.Attribute(a, kinds.get(a, schema.AttrType.INT)) for a in attributes],
        ),
    )


def _parameter(name: str) -> onnx.defs.OpSchema.FormalParameter:
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    kind = option.Optional if name in op.MODEL_OPTIONAL_INPUTS else option.Single
    return schema.FormalParameter(name, "tensor(int64)" if name == "past_length" else "T", param_option=kind)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's notes about itself (missing torchvision, its own deprecations) from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
