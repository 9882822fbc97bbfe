"""The in-place decoder under ``torch.compile``: one graph, and the same numbers and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder, empty_cache
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference

SMALL = {"vocab_size": 31, "max_position_embeddings": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=2, n_k=1, n_c=1, d_k=8, d_l=8, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=8, **SMALL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_compiles_whole(kind: str) -> None:
    """By ahead-of-time tracing, which is where an op needs its fake implementation; no compiler of C++ is run."""
    entries = MODELS[kind]
    model = Decoder(parse_config(entries))
    with TorchSession(model) as session:  # switches the attention to the op that writes in place
        step: Any = session._model
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        ids, past = torch.tensor([[3, 5, 7], [1, 2, 4]]), torch.tensor([0, 4])
        last = torch.full((2, 1), 2)
        results = []
        with torch.no_grad():
            for run in (step, compiled):
                caches = empty_cache(model.config, 2, 8)
                logits, _ = run(ids, past, last, caches)
                results.append((logits, *(tensor for layer in caches for tensor in layer.tensors)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(tensor.any() for tensor in results[1])  # the compiled step wrote its caches
