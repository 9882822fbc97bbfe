"""The `torch` backend on a GPU with a cache that a policy manages: kernels, and one CUDA graph for the whole text."""

from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.torch.cuda_graph import CHECKED
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

VOCAB, POSITIONS = 89, 400
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "intermediate_size": 160}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
}
CHUNK = 40


def weights_of(model: str, compute: str) -> dict[str, np.ndarray]:
    """Random weights that are numbers of the type ``compute``."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[compute]
    weights = reference.random_weights(MODELS[model])
    return {name: torch.from_numpy(weight).to(kind).float().numpy() for name, weight in weights.items()}


def open_session(model: str, compute: str, **options: Any) -> TorchSession:
    weights = weights_of(model, compute)
    decoder = Decoder(parse_config(MODELS[model]), biases={name for name in weights if name.endswith(".bias")})
    decoder.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    return TorchSession(decoder, device="cuda", compute=compute, **options)


@pytest.fixture(autouse=True)
def _checked_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKED, "1")


@pytest.fixture(params=["window", "window, merged", "window, rotated"])
def cache(request: pytest.FixtureRequest) -> Any:
    """A policy whose decisions do not depend on what rounds."""
    own = {"window, merged": {"residual_rows": 2}, "window, rotated": {"rotate": True, "sinks": 0}}
    return policy("window", **{"rows": 24, "interval": 8, "sinks": 2, **own.get(request.param, {})})


@pytest.mark.parametrize(("model", "compute"), [("gta", "fp16"), ("gqa", "bf16")])
def test_logits_are_those_of_the_formula(model: str, compute: str, cache: Any) -> None:
    count = 600 if cache.rotate else 150
    entries = MODELS[model] | {"max_position_embeddings": 700}  # of a window that is rotated, only numbers change
    exact = ManagedModel(entries, weights_of(model, compute), cache, CHUNK, observed=16 if cache.observe else None)
    ids = np.random.default_rng(3).integers(0, VOCAB, (1, count))
    with open_session(model, compute, cache=cache, chunk_size=CHUNK) as session:
        found = session.forward(ids[:, :100], all_logits=True)[0]
        assert difference(found, exact.forward(ids[0, :100])).max_rel_error <= COMPUTE_BOUNDS[compute]
        graphs, places = set(), set()
        tokens = [session.forward(ids[:, t : t + 1])[0] for t in range(100, 110)]
        for t in range(110, count):
            tokens.append(session.forward(ids[:, t : t + 1])[0])
            graphs.add(id(session.decode_graph))
            places.add(tuple(tensor.data_ptr() for layer in session._caches for tensor in layer.tensors))
        assert (session.cuda_graph, len(graphs), len(places)) == (True, 1, 1)  # captured once
        expected = np.stack([exact.forward(ids[0, t : t + 1])[0] for t in range(100, count)])
        assert difference(np.stack(tokens), expected).max_rel_error <= COMPUTE_BOUNDS[compute]
        assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]


@pytest.mark.parametrize("name", ["h2o", "corm", "zsmerge"])
def test_what_rows_receive_is_that_of_the_formula(name: str) -> None:
    """The last tokens of each chunk of a prompt observe, in a call of their own, and so do single tokens."""
    own = {} if name == "corm" else {"rows": 200}
    cache = policy(name, interval=300, **own)
    exact = ManagedModel(MODELS["gta"], weights_of("gta", "fp16"), cache, CHUNK, observed=16)
    ids = np.random.default_rng(4).integers(0, VOCAB, (1, 90))
    with open_session("gta", "fp16", cache=cache, chunk_size=CHUNK) as session:
        for part in (ids[:, :70], *(ids[:, t : t + 1] for t in range(70, 90))):
            session.forward(part)
            exact.forward(part[0])
        found = [received[0, :90] for received in session._received()]
        if name != "corm":  # of a threshold, single rows may differ
            for layer, rows in enumerate(exact.layers):
                expected = np.array([row.received for row in rows])
                np.testing.assert_allclose(found[layer], expected, rtol=0.05, atol=0.02 * expected.max())
        else:
            expected = np.array([[row.received for row in rows] for rows in exact.layers])
            assert (np.stack(found) == expected).mean() > 0.95


def test_rows_of_different_length_evict_as_if_alone() -> None:
    cache = policy("zsmerge", rows=24, interval=8, residual_rows=1)
    ids = np.random.default_rng(5).integers(0, VOCAB, (2, 120))
    found = []
    for sequences, lengths in (([0, 1], [90, 53]), ([0], [90]), ([1], [53])):
        with open_session("gta", "fp16", cache=cache, chunk_size=CHUNK) as session:
            session.forward(ids[sequences, : max(lengths)], lengths=lengths)
            for t in range(90, 120):
                logits = session.forward(ids[sequences, t : t + 1])
            found.append((logits, session.rows))
    (both, rows), *alone = found
    for b, (logits, own) in enumerate(alone):
        np.testing.assert_array_equal(rows[:, b], own[:, 0])
        assert np.isfinite(both[b]).all()
        assert logits.shape == (1, VOCAB)
