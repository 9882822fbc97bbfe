"""Inputs that make sense for a model of this package, for ``polygraphy run … --data-loader-script``.

    GTA_EDGE_MODEL=MODEL.onnx polygraphy run MODEL.onnx --onnxrt --data-loader-script examples/polygraphy_inputs.py

Random numbers would be lengths and positions outside of the cache. Here a prompt of 8 tokens is appended to an empty
cache, and then one token to a cache that holds 8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import onnx

TOKENS, CAPACITY, BATCH = 8, 64, 1


def load_data() -> Iterator[dict[str, np.ndarray]]:
    """Yield one feed for a prompt and one for a single token; Polygraphy calls this."""
    graph = onnx.load(os.environ["GTA_EDGE_MODEL"], load_external_data=False).graph
    sizes = {"batch": BATCH, "capacity": CAPACITY}  # those that the model leaves open
    caches = {}
    for value in graph.input:
        if value.name.startswith("past_") and value.name != "past_length":
            kind = value.type.tensor_type
            shape = [size.dim_value or sizes[size.dim_param] for size in kind.shape.dim]
            caches[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    rng = np.random.default_rng(0)
    for tokens, held in ((TOKENS, 0), (1, TOKENS)):
        yield {
            "input_ids": rng.integers(0, 100, (BATCH, tokens)),
            "past_length": np.full(BATCH, held, np.int64),
            "logit_positions": np.full((BATCH, 1), tokens - 1, np.int64),
            **caches,
        }
