"""One layer's attention on ONNX Runtime's CPU, with its cache in float32 and in int8, and what its operators take.

    python benchmarks/attention_layer.py [--models gta-1b,gqa-1b] [--rows 128,2048,8192] [--tokens 1] [--operators] …

The graph is that of a session: RoPE, the new rows, attention, the value decoder. Caches take turns, so many that none
is still in the processor's own caches when its turn comes, and so do the cases: float32, int8 as a step of few tokens
reads it, and int8 dequantised, as a step of many. The fastest of many calls is shown beside the median: it tells most
on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from comparison import positive

from gta_edge.model.config import ModelConfig
from gta_edge.model.presets import preset
from gta_edge.model.rope import rope_tables
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from gta_edge.runtime.onnxruntime.int8_cache import rows_for
from gta_edge.runtime.onnxruntime.passes import int8_attention
from gta_edge.runtime.onnxruntime.passes.expand_attention import ExpandAttentionPass

CASES = ("float32", "int8", "int8, dequantised")
COLD_BYTES = 64_000_000  # of all caches of a case


def one_layer(config: ModelConfig) -> onnx.ModelProto:
    """Return a graph of one attention node, without a gate."""
    of = config.attention
    n_q, n_k, n_c = heads = of.num_query_heads, of.num_key_heads, of.num_latent_heads
    d_k, d_l = of.key_dim, of.latent_dim
    shapes: dict[str, list[Any]] = {
        "query": ["b", "t", n_q * d_k],
        "key": ["b", "t", n_k * d_k],
        "latent": ["b", "t", n_c * d_l],
        "past_key": ["b", n_k, "s", d_k],
        "past_latent": ["b", n_c, "s", d_l],
        "past_length": ["b"],
        "cos": ["p", d_k // 2],
        "sin": ["p", d_k // 2],
    }
    helper, weights = onnx.helper, []
    if of.has_value_decoder:
        decoder = np.zeros((n_q, d_l, of.hidden_size // n_q), np.float32)
        weights = [onnx.numpy_helper.from_array(decoder, "value_decoder")]
    known = {*shapes, *(each.name for each in weights)}
    node = helper.make_node(
        op.OP,
        [name if name in known else "" for name in op.MODEL_INPUTS],
        list(op.MODEL_OUTPUTS),
        domain=DOMAIN,
        **op.attributes(*heads, d_k**-0.5),
    )
    kinds = {"past_length": onnx.TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), shape)
        for name, shape in shapes.items()
    ]
    ends = {"output": ["b", "t", None], "present_key": shapes["past_key"], "present_latent": shapes["past_latent"]}
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in ends.items()]
    graph = helper.make_graph([node], "layer", inputs, outputs, weights)
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=domains, ir_version=11)


class Case:
    """A graph of one layer, and the calls of it."""

    def __init__(self, name: str, config: ModelConfig, rows: int, options: argparse.Namespace) -> None:
        model, int8 = ir.from_proto(one_layer(config)), name != "float32"
        few = 0 if name.endswith("dequantised") else int8_attention.MAX_FEW_TOKENS
        with mock.patch.object(int8_attention, "MAX_FEW_TOKENS", few):
            ExpandAttentionPass(int8=int8)(model)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = options.threads, 4
        if options.operators:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(options.work) / name.replace(" ", ""))
        self.session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
        self.times: list[float] = []
        held = rows_for(rows + options.tokens) if int8 else rows + options.tokens
        rng, sizes = np.random.default_rng(0), {"b": 1, "t": options.tokens, "s": held, "p": held}
        cos, sin = rope_tables(config.key_width, config.rope_theta, config.rope_scaling, held)
        fixed = {"past_length": np.array([rows]), "cos": cos, "sin": sin}
        self._bindings: list[tuple[Any, list[Any]]] = []
        size = 0
        while size < COLD_BYTES:
            binding, arrays = self.session.io_binding(), []
            for each in self.session.get_inputs():
                shape = [sizes.get(length, length) for length in each.shape]
                array = fixed.get(each.name)
                if array is None and "int8" in each.type:
                    array = rng.integers(-127, 128, shape, np.int8)
                if array is None:  # of scales small numbers
                    array = rng.random(shape, np.float32) * np.float32(0.01 if "scale" in each.name else 1)
                arrays.append(array)
                binding.bind_input(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                if each.name.startswith("past_") and each.name != "past_length":
                    end = each.name.replace("past", "present", 1)
                    binding.bind_output(end, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                    size += array.nbytes
            binding.bind_output("output", "cpu")
            self._bindings.append((binding, arrays))

    def round(self) -> None:
        """Attend to each of the caches."""
        for binding, _ in self._bindings:
            start = time.perf_counter()
            self.session.run_with_iobinding(binding)
            self.times.append(time.perf_counter() - start)

    def operators(self) -> Iterator[tuple[str, float]]:
        """Yield what single nodes took, in us, in their order; profiling adds one or two to each."""
        found: dict[tuple[str, str], list[float]] = {}
        for event in json.loads(Path(self.session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"])
        for (kind, _), times in found.items():
            yield kind, min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="gta-1b,gqa-1b", help="presets")
    parser.add_argument("--rows", default="128,2048,8192", help="of the cache")
    parser.add_argument("--tokens", type=positive, default=1, help="new ones")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--operators", action="store_true", help="show what each takes too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as options.work:
        for name in options.models.split(","):
            for rows in map(int, options.rows.split(",")):
                cases = {case: Case(case, preset(name), rows, options) for case in CASES}
                for _ in range(options.rounds):
                    for case in cases.values():
                        case.round()
                for title, case in cases.items():
                    best, middle = min(case.times), statistics.median(case.times)
                    print(f"{name} {rows:>6} rows, {title:<18} {1e6 * best:9.1f} us, median {1e6 * middle:9.1f}")
                    if options.operators:
                        print("   ", ", ".join(f"{kind} {us:g}" for kind, us in case.operators()))


if __name__ == "__main__":
    main()
