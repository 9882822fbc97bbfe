"""``gta::GroupedLatentAttention`` as a TensorRT plugin: between TensorRT's descriptors and ``kernels.py``.

Past and present caches, and what rows have received of attention, are meant to be one memory: whoever runs the engine
binds both to one address. Where the addresses differ, as when the builder times the plugin, the past is copied to the
present first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError
from gta_edge.plugins.attention.kernels import BUFFERS_OF, AttentionKernels, Buffers, attention_kernels
from gta_edge.plugins.attention.launches import programs_for
from gta_edge.plugins.attention.plugin_call import (
    FIELDS,
    Call,
    Parameters,
    describe_call,
    largest_workspace_bytes,
    read_parameters,
)
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_base import Plugin, Run, cuda_driver
from gta_edge.plugins.plugin_registry import OpPlugin

__all__ = ["ATTENTION_PLUGINS", "AttentionPlugin"]

_UPDATED = {"present_received": "received", "present_key_open": "key_open", "present_latent_open": "latent_open"}
"""Outputs that not every node has, and the field of ``Buffers`` that each is; scales have none by default."""


class AttentionPlugin(Plugin[Parameters, Call, AttentionKernels]):
    """The attention."""

    def _describe(self, types: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], exact: bool) -> Call:
        return describe_call(self.parameters, types, shapes, exact)

    def _output_shapes(self, inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        presents = [inputs[past] for past, _ in self.parameters.caches]
        given = dict(zip(self.parameters.inputs, inputs, strict=True))
        if self.parameters.has_gate:
            return [given["gate"], *presents]
        queries = expr_builder.constant(self.parameters.num_query_heads)
        decoded, query = given.get("value_decoder", given[self.parameters.as_computed]), given["query"]
        width = expr_builder.operation(self.trt.DimensionOperation.PROD, queries, decoded[len(decoded) - 1])
        return [self.trt.DimsExprs([query[0], query[1], width]), *presents]

    def _check_largest(self, call: Call, gpu: Gpu) -> None:
        programs_for(call.variant, gpu.architecture)

    def _workspace_bytes(self, call: Call, gpu: Gpu) -> int:
        sizes = {"batch": call.batch, "tokens": call.tokens, "capacity": call.capacity}
        return largest_workspace_bytes(call.variant, gpu.architecture, gpu.processors, **sizes)

    def _kernels(self, variant: Variant, gpu: Gpu) -> AttentionKernels:
        return attention_kernels(variant, gpu)

    def _fits(self, call: Call, descs: Sequence[Any]) -> bool:
        query, latent = descs[0].dims, descs[self.parameters.caches[1][0]].dims
        return (query[0], query[1], latent[2]) == (call.batch, call.tokens, call.capacity)

    def _launch(self, call: Call, kernels: AttentionKernels, run: Run) -> None:
        for past, present in self.parameters.caches:
            if run.inputs[past] != run.outputs[present]:
                _copy(run.outputs[present], run.inputs[past], run.input_desc[past], run.stream)
        given = dict(zip(self.parameters.inputs, run.inputs, strict=True))
        made = dict(zip(self.parameters.outputs, run.outputs, strict=True))
        others = {BUFFERS_OF[name]: given[name] for name in self.parameters.features.inputs}
        others |= {field: made[name] for name, field in _UPDATED.items() if name in made}
        kernels.launch(
            run.stream,
            Buffers(
                query=given["query"],
                key=given["key"],
                latent=given["latent"],
                gate=given.get("gate", 0),
                key_cache=made["present_key"],
                latent_cache=made["present_latent"],
                key_scale=made.get("present_key_scale", 0),
                latent_scale=made.get("present_latent_scale", 0),
                past_length=given["past_length"],
                cos=given["cos"],
                sin=given["sin"],
                value_decoder=given.get("value_decoder", 0),
                output=made["output"],
                workspace=run.workspace,
                **others,
            ),
            batch=call.batch,
            tokens=call.tokens,
            capacity=call.capacity,
            positions=call.positions,
            scale=self.parameters.scale,
            branch_rows=call.branch_rows,
        )


def _copy(destination: int, source: int, desc: Any, stream: int) -> None:
    """Queue a copy of a cache in the GPU's memory."""
    size = int(np.prod(tuple(desc.dims), dtype=np.int64)) * int(desc.type.itemsize)
    (status,) = cuda_driver().cuMemcpyDtoDAsync(destination, source, size, stream)
    if int(status):
        raise BackendError(
            f"the past cache could not be copied to the present one ({getattr(status, 'name', status)})",
            "bind both to one address, then nothing is copied",
        )


ATTENTION_PLUGINS = (OpPlugin(FIELDS, read_parameters, AttentionPlugin),)
