"""A graph for TensorRT's plugin run on the host: the attention over a cache in blocks, token by token in NumPy.

The op here is written from the documentation of the cache types: a row is read from its codes by queries of later
blocks and as it is by those of its own, and a block is quantised when its last row comes. It computes in float64 on
values of the compute type. The rest of the graph runs in ONNX's reference.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.helpers import reference
from tests.helpers.block_cases import BLOCK, VALUE_BITS, packed, quantised
from tests.helpers.tensorrt_graphs import RMSNormalization

Array = np.ndarray

INPUTS = ["query", "key", "latent", "gate", "past_key", "past_latent", "past_length", "cos", "sin", "value_decoder"]
BESIDE = ["past_key_scale", "past_latent_scale", "past_key_open", "past_latent_open"]
TYPES = {
    onnx.TensorProto.FLOAT: "tensor(float)",
    onnx.TensorProto.FLOAT16: "tensor(float16)",
    onnx.TensorProto.INT64: "tensor(int64)",
    onnx.TensorProto.INT8: "tensor(int8)",
}


def read(packed_codes: Array, scales: Array, bits: int) -> Array:
    """Values, float64 [..., N], of bytes [..., N · bits / 8] and scale and minimum [..., 2]."""
    *groups, size = packed_codes.shape
    words = np.ascontiguousarray(packed_codes).view("<u2").reshape(*groups, size // 16, 1, 8)
    shifts = (bits * np.arange(16 // bits, dtype=np.uint16))[:, None]
    codes = (words >> shifts & (2**bits - 1)).reshape(*groups, size * 8 // bits)
    scale, minimum = np.moveaxis(scales.astype(np.float64), -1, 0)
    return (codes * scale[..., None] + minimum[..., None]).astype(np.float16).astype(np.float64)


class GroupedLatentAttention(OpRun):
    """The node, whose inputs have no gaps."""

    op_domain = "gta"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        absent = [name for name in ("gate", "value_decoder") if attributes.get(f"has_{name}") == 0]
        names = [name for name in (*INPUTS, *BESIDE) if name not in absent]
        given = dict(zip(names, inputs, strict=True))
        cache = {name: given[name].copy() for name in ("past_key", "past_latent", *BESIDE)}
        query = given["query"]
        n_q, n_k, n_c = (attributes[f"num_{each}_heads"] for each in ("query", "key", "latent"))
        d_k, d_l = cache["past_key_open"].shape[-1], cache["past_latent_open"].shape[-1]
        new = {name: given[name].astype(np.float64) for name in ("query", "key", "latent", "cos", "sin")}
        batch, tokens = query.shape[:2]
        mixes = np.zeros((batch, tokens, n_q, d_l))
        for b in range(batch):
            place = SimpleNamespace(**{name: array[b] for name, array in cache.items()})
            for t in range(tokens):
                row = int(given["past_length"][b]) + t
                if row >= cache["past_latent"].shape[2]:  # there is no room, and no real token
                    break
                turned = {
                    name: reference.rotate(new[name][b, t].reshape(-1, d_k).T, new["cos"][row], new["sin"][row]).T
                    for name in ("query", "key")
                }
                place.past_key_open[:, row % BLOCK] = turned["key"]
                place.past_latent_open[:, row % BLOCK] = new["latent"][b, t].reshape(n_c, d_l)
                keys, latents = self._seen(place, row, attributes["cache_dtype"])
                for head in range(n_q):
                    scores = keys[head * n_k // n_q] @ turned["query"][head] * attributes["scale"]
                    weights = np.exp(scores - scores.max())
                    mixes[b, t, head] = weights / weights.sum() @ latents[head * n_c // n_q]
                if row % BLOCK == BLOCK - 1:
                    self._close(place, row // BLOCK, attributes["cache_dtype"])
        output = self._decoded(mixes, given)
        presents = tuple(cache.values())
        return (output.astype(query.dtype), *presents)

    @staticmethod
    def _seen(place: Any, row: int, cache: str) -> tuple[Array, Array]:
        """Keys and latents of all rows up to one, float64 [n, rows, d], as its query reads them."""
        whole = row // BLOCK
        keys = read(
            place.past_key[:, :whole], place.past_key_scale[:, :whole].swapaxes(-1, -2), 4
        )  # [n, blocks, d, 32]
        keys = keys.swapaxes(2, 3).reshape(len(keys), whole * BLOCK, keys.shape[2])
        rows = slice(0, whole * BLOCK)
        latents = read(place.past_latent[:, rows], place.past_latent_scale[:, rows], VALUE_BITS[cache])
        opened = slice(0, row % BLOCK + 1)
        return (
            np.concatenate([keys, place.past_key_open[:, opened].astype(np.float64)], 1),
            np.concatenate([latents, place.past_latent_open[:, opened].astype(np.float64)], 1),
        )

    @staticmethod
    def _close(place: Any, block: int, cache: str) -> None:
        codes, *groups = quantised(place.past_key_open.swapaxes(1, 2).astype(np.float32), 4)  # [n, d, 32]
        place.past_key[:, block] = packed(codes, 4).view(np.int8)
        place.past_key_scale[:, block] = np.stack(groups, 1)
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        codes, *groups = quantised(place.past_latent_open.astype(np.float32), VALUE_BITS[cache])
        place.past_latent[:, rows] = packed(codes, VALUE_BITS[cache]).view(np.int8)
        place.past_latent_scale[:, rows] = np.stack(groups, -1)

    @staticmethod
    def _decoded(mixes: Array, given: dict[str, Array]) -> Array:
        batch, tokens, _, d_l = mixes.shape
        if "value_decoder" in given:
            decoder = given["value_decoder"].astype(np.float64)  # [n_q, d_l, e · d_l]
            tiled = np.tile(mixes, decoder.shape[2] // d_l)
            mixes = tiled + np.einsum("btqd,qde->btqe", mixes, decoder)
        joined = mixes.reshape(batch, tokens, -1)
        return joined / (1 + np.exp(-given["gate"].astype(np.float64))) if "gate" in given else joined


class PluginGraph:
    """A lowered graph with such nodes, with as much of an ONNX Runtime session as the simulation of TensorRT uses."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._evaluator = ReferenceEvaluator(str(path), new_ops=[RMSNormalization, GroupedLatentAttention])
        self._inputs, self._outputs = ([self._value(each) for each in part] for part in (graph.input, graph.output))

    @staticmethod
    def _value(value: onnx.ValueInfoProto) -> Any:
        return SimpleNamespace(name=value.name, type=TYPES[value.type.tensor_type.elem_type])

    def get_inputs(self) -> list[Any]:
        return self._inputs

    def get_outputs(self) -> list[Any]:
        return self._outputs

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        results: list[Array] = self._evaluator.run(names, feeds)
        return results
