"""The `torch` backend in 16 bits: on a GPU, where the attention kernels and a CUDA graph run, and on the CPU.

What it must be near to is the same model in float32 on the CPU, with weights that are 16-bit numbers already; how near
is what ``gta_edge/accuracy/tolerance.py`` says of a backend that computes in this type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.errors import BackendError
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plugins.attention import torch as torch_ops
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.token_tree import PREFIX
from gta_edge.runtime.torch.backend import TORCH
from gta_edge.runtime.torch.cuda_graph import CHECKED
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers.speculation import TreeOracle, with_costs
from tests.helpers.torch_graphs import WithoutGraph

P = 400
VOCAB = 89
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": P, "intermediate_size": 160}
ON_KERNELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, **SMALL),
    "gta with 3 latents": reference.gta_entries(heads=6, n_q=6, n_k=2, n_c=3, d_k=48, d_l=80, **SMALL),
    "gta as in gta-1b": reference.gta_entries(heads=20, n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
    "mha": reference.llama_entries(heads=3, n_kv=3, d_h=64, **SMALL),
}
WITHOUT = {
    "gta of other widths": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=2, d_k=24, d_l=8, e=2, **SMALL),
    "gqa of another width": reference.llama_entries(heads=4, n_kv=2, d_h=24, **SMALL),
}
MODELS = ON_KERNELS | WITHOUT
HALVES = ("fp16", "bf16")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(skip(test))


every_model = pytest.mark.parametrize("model", MODELS)
in_halves = pytest.mark.parametrize("compute", HALVES)


def decoder(model: str, compute: str) -> Decoder:
    """A model with random weights that are numbers of the type ``compute``, in float32."""
    entries = MODELS[model]
    weights = {name: torch.from_numpy(weight) for name, weight in reference.random_weights(entries).items()}
    found = Decoder(parse_config(entries), biases={name for name in weights if name.endswith(".bias")})
    rounded = {name: weight.to(getattr(torch, DTYPES[compute].array)).float() for name, weight in weights.items()}
    found.load_state_dict(rounded, strict=True)
    return found


def prompt(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


@functools.cache
def _expected(model: str, compute: str, ids: bytes) -> np.ndarray:
    row = np.frombuffer(ids, np.int64)[None]
    with TorchSession(decoder(model, compute)) as session:
        logits: np.ndarray = session.forward(row, all_logits=True)[0]
    return logits


def expected(model: str, compute: str, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row by the float32 session on the CPU."""
    return _expected(model, compute, np.asarray(ids, np.int64).tobytes())


def assert_near(found: np.ndarray, wanted: np.ndarray, compute: str) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert difference(found, wanted).max_rel_error <= COMPUTE_BOUNDS[compute]


@pytest.fixture(autouse=True)
def _checked_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay first checks that what its graph reads is still there."""
    monkeypatch.setenv(CHECKED, "1")


@pytest.fixture
def start(model: str, compute: str) -> Iterator[Callable[..., TorchSession]]:
    """Start a session of the model and type at hand on the GPU."""
    started: list[TorchSession] = []

    def begin(**options: Any) -> TorchSession:
        session = TorchSession(decoder(model, compute), device="cuda", compute=compute, **options)
        started.append(session)
        return session

    yield begin
    for session in started:
        session.close()


# --- on the CPU: what does not need a GPU ----------------------------------------------------------------------------


@every_model
@in_halves
def test_the_cpu_computes_in_16_bits_too(model, compute):
    ids = prompt(2, 40)
    wanted = np.stack([expected(model, compute, row) for row in ids])
    with TorchSession(decoder(model, compute), compute=compute, chunk_size=16) as session:
        assert session.compute == compute
        assert_near(session.forward(ids, all_logits=True), wanted, compute)
        session.truncate(30)
        for t in range(30, 40):
            assert_near(session.forward(ids[:, t : t + 1]), wanted[:, t], compute)


@every_model
@in_halves
def test_a_cache_in_16_bits_is_half_as_large(model, compute):
    sizes = {}
    for kind in ("fp32", compute):
        with TorchSession(decoder(model, compute), compute=kind) as session:
            session.forward(prompt(1, 3))
            sizes[kind] = session.cache_bytes
    assert sizes["fp32"] == 2 * sizes[compute]


@pytest.mark.parametrize(("processors", "chunk_size"), [(8, 2048), (63, 2048), (64, 8192), (132, 8192)])
def test_a_large_gpu_takes_more_of_a_prompt_at_once(processors, chunk_size, monkeypatch):
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, **options: self)  # there is no such device
    with TorchSession(decoder("gta", "fp16"), device="cuda", compute="fp16") as session:
        assert session.chunk_size == chunk_size
    with TorchSession(decoder("gta", "fp16"), device="cuda", compute="fp16", chunk_size=100) as session:
        assert session.chunk_size == 100


@pytest.mark.parametrize("compute", ["float16", "int8", "", "FP16"])
def test_an_unknown_type_to_compute_in_is_refused(compute):
    with pytest.raises(BackendError, match=r"fp32, fp16, bf16") as caught:
        TORCH.compute_for(compute, "fp16")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_gpu_the_message_says_so_in_one_line(device):
    with pytest.raises(BackendError, match="GPU") as caught:
        TorchSession(decoder("gqa", "fp16"), device=device, compute="fp16")
    assert len(str(caught.value).splitlines()) == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------


@on_gpu
@every_model
@pytest.mark.parametrize("compute", [*HALVES, "fp32"])
def test_a_prompt_at_once_and_token_by_token(start, model, compute):
    ids = prompt(1, 90)
    wanted = expected(model, compute, ids[0])
    assert_near(start().forward(ids, all_logits=True)[0], wanted, compute)
    assert_near(start(chunk_size=7).forward(ids, all_logits=True)[0], wanted, compute)
    session = start()
    by_token = np.concatenate([session.forward(ids[:, t : t + 1]) for t in range(ids.shape[1])])
    assert_near(by_token, wanted, compute)


@on_gpu
@pytest.mark.parametrize("model", MODELS)
@in_halves
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_kernels_run_what_they_are_made_for(start, model, compute, tokens, monkeypatch):
    variants = []
    real = torch_ops.attention_kernels

    def noted(variant, gpu):
        variants.append(variant)
        return real(variant, gpu)

    monkeypatch.setattr(torch_ops, "attention_kernels", noted)
    start().forward(prompt(2, tokens))
    assert bool(variants) == (model in ON_KERNELS)
    assert {variant.compute for variant in variants} <= {compute}


@on_gpu
@every_model
@in_halves
def test_a_batch_is_its_rows(start, model, compute):
    ids = prompt(3, 60)
    session = start()
    together = [session.forward(ids[:, :50]), *(session.forward(ids[:, t : t + 1]) for t in range(50, 60))]
    for row in range(3):
        wanted = expected(model, compute, ids[row])
        assert_near(np.stack([logits[row] for logits in together]), wanted[49:], compute)
        alone = start()
        one = [
            alone.forward(ids[row : row + 1, :50]),
            *(alone.forward(ids[row : row + 1, t : t + 1]) for t in range(50, 60)),
        ]
        assert_near(np.concatenate(one), wanted[49:], compute)


@on_gpu
@every_model
@in_halves
def test_rows_of_different_length(start, model, compute):
    ids, lengths = prompt(3, 45), [45, 1, 20]
    more = prompt(3, 12, seed=1)
    session = start(chunk_size=16)
    found = [session.forward(ids, lengths=lengths)]
    found += [session.forward(more[:, t : t + 1]) for t in range(12)]
    np.testing.assert_array_equal(session.length, [57, 13, 32])
    for row, length in enumerate(lengths):
        wanted = expected(model, compute, np.concatenate([ids[row, :length], more[row]]))
        assert_near(np.stack([logits[row] for logits in found]), wanted[length - 1 :], compute)


@on_gpu
@every_model
@in_halves
def test_truncate_and_reset(start, model, compute):
    ids, other = prompt(2, 40), prompt(2, 40, seed=1)
    session = start()
    session.forward(ids)
    session.forward(ids[:, :1])  # a graph is there
    session.truncate([30, 7])
    found = [session.forward(other[:, t : t + 1]) for t in range(5)]
    for row, length in enumerate([30, 7]):
        wanted = expected(model, compute, np.concatenate([ids[row, :length], other[row, :5]]))
        assert_near(np.stack([logits[row] for logits in found]), wanted[length:], compute)
    session.reset()
    found = [session.forward(other[:, t : t + 1]) for t in range(20)]
    for row in range(2):
        assert_near(np.stack([logits[row] for logits in found]), expected(model, compute, other[row, :20]), compute)
    session.reset()
    assert_near(session.forward(ids[:1])[0], expected(model, compute, ids[0])[-1], compute)  # another number of rows


@on_gpu
@every_model
@in_halves
def test_a_growing_cache_keeps_what_it_holds(start, model, compute):
    """Each step of the growth moves the cache, so the graph has to be captured anew."""
    ids = prompt(2, 70)
    session = start(capacity_step=16)
    found, capacities = [], set()
    for t in range(70):
        found.append(session.forward(ids[:, t : t + 1]))
        capacities.add(session.capacity)
    assert len(capacities) >= 4
    for row in range(2):
        assert_near(np.stack([logits[row] for logits in found]), expected(model, compute, ids[row]), compute)


@on_gpu
@pytest.mark.parametrize(("model", "compute"), [("gta", "fp16"), ("gqa", "bf16")])
def test_after_a_token_it_is_known_that_tokens_are_replays(start, model, compute):
    session = start(capacity_step=16)
    said = [session.cuda_graph]
    for tokens in (15, 1, 20, 1):  # the third grows the cache
        session.forward(prompt(1, tokens))
        said.append(session.cuda_graph)
    assert said == [None, None, True, None, True]


@on_gpu
@every_model
@in_halves
def test_the_first_token_of_a_graph_leaves_the_cache_as_it_was(start, model, compute):
    """Capturing runs the model, which writes to the cache."""
    ids = prompt(2, 34)
    session = start()
    session.forward(ids[:, :33])
    found = session.forward(ids[:, 33:])
    for row in range(2):
        assert_near(found[row], expected(model, compute, ids[row])[-1], compute)


@on_gpu
@every_model
@in_halves
def test_the_graph_is_the_step_without_it(start, model, compute, monkeypatch):
    ids = prompt(2, 300)

    def steps() -> np.ndarray:
        session = start()
        session.forward(ids[:, :40])
        return np.stack([session.forward(ids[:, t : t + 1]) for t in range(40, 300)], axis=1)

    graphed = steps()
    monkeypatch.setattr("gta_edge.runtime.torch.step_graphs.DecodeGraph", WithoutGraph)
    eager = steps()
    # the same kernels but for the library's matrix products, which may be cut otherwise in a capture
    assert difference(graphed, eager).max_rel_error <= COMPUTE_BOUNDS[compute] / 2
    for row in range(2):
        assert_near(graphed[row], expected(model, compute, ids[row])[40:], compute)


@on_gpu
@pytest.mark.parametrize(("model", "compute"), [("gta", "fp16"), ("gqa", "bf16")])
def test_a_step_that_is_launched_again_changes_nothing(start, model, compute):
    """As benchmarks do, to time it."""
    ids = prompt(2, 30)
    session = start()
    assert session.decode_graph is None
    session.forward(ids[:, :20])
    for t in range(20, 30):
        found = session.forward(ids[:, t : t + 1])
        for row in range(2):
            assert_near(found[row], expected(model, compute, ids[row])[t], compute)
        for _ in range(3):
            session.decode_graph.launch()


@on_gpu
@in_halves
@pytest.mark.parametrize("model", ["gta", "gqa"])
def test_two_sessions_take_turns(start, model, compute):
    ids = [prompt(1, 50, seed=seed) for seed in range(2)]
    sessions = [start(), start()]
    found: list[list[np.ndarray]] = [[], []]
    for t in range(50):
        for i, session in enumerate(sessions):
            found[i].append(session.forward(ids[i][:, t : t + 1])[0])
    for i in range(2):
        assert_near(np.stack(found[i]), expected(model, compute, ids[i][0]), compute)


@on_gpu
@in_halves
@pytest.mark.parametrize("model", ["gta", "gqa"])
def test_logits_that_were_returned_do_not_change_later(start, model, compute):
    session = start()
    first = session.forward(prompt(1, 1))
    kept = first.copy()
    session.forward(prompt(1, 1, seed=4))
    np.testing.assert_array_equal(first, kept)


@on_gpu
@every_model
@in_halves
def test_nodes_of_a_tree_are_their_paths_alone(start, model, compute):
    """Grown in steps of several widths, which are replays of graphs; and what an accepted path is continued by."""
    session, ids, rng = start(trees=True), prompt(1, 120), np.random.default_rng(1)
    session.forward(ids)
    tree = session.tree()
    for parents in ([PREFIX] * 3, [0, 0, 1, 2, 2], [3], [8] * 20, [PREFIX] * 40, [9, 10]):
        tree.grow(parents)
        tokens = rng.integers(0, VOCAB, (1, len(parents)))
        found = session.forward(tokens, tree=tree, all_logits=True)[0]
        for node, logits in list(zip(tree.nodes[-len(parents) :], found, strict=True))[::7]:
            alone = np.append(ids[0], tree.ids(node))
            assert_near(logits, expected(model, compute, alone)[-1], compute)
        tree.drop(tree.leaves[-2:-1] if len(parents) == 40 else [])
    text = np.append(ids[0], tree.ids(70))
    tree.accept(70)
    tree.close()
    assert_near(session.forward([[5]])[0], expected(model, compute, np.append(text, 5))[-1], compute)


@on_gpu
@in_halves
@pytest.mark.parametrize("model", ["gta", "gqa"])
def test_a_text_that_trees_of_guesses_are_accepted_for_has_its_logits(start, model, compute):
    """Rows of accepted paths are moved into place: what comes after each token follows from them."""
    session, ids = with_costs(start(trees=True), 0.0), prompt(1, 60)[0]
    steps = SpeculativeSteps(session, TreeOracle(ids[20:].tolist(), 20, 4), len(ids))
    for count in range(20, len(ids)):
        assert_near(steps.after(ids[:count]), expected(model, compute, ids[:count])[-1], compute)
    steps.settle()
    assert session.length.tolist() == [len(ids) - 1]
    assert steps.counts.calls < 20
    assert_near(session.forward([[5]])[0], expected(model, compute, np.append(ids[:-1], 5))[-1], compute)
