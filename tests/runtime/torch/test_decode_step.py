"""The step in fewer launches, beside the decoder that it is a step of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.reference import build_decoder
from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Cache, Decoder, ManagedInputs, empty_cache
from gta_edge.model.quantized_decoder import QuantizedLinears, build_packed_decoder
from gta_edge.plugins.elementwise.torch import silu_multiply
from gta_edge.runtime.torch.decode_step import DecodeStep, JoinedLinears, join_linears
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers.stored_models import StoredModel

SMALL = {"vocab_size": 61, "max_position_embeddings": 40, "intermediate_size": 96}
ENTRIES: dict[str, dict[str, Any]] = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, **SMALL),
    "gqa, untied": reference.llama_entries(heads=4, n_kv=2, d_h=16, tie_word_embeddings=False, **SMALL),
}
every_model = pytest.mark.parametrize("name", ENTRIES)


def decoder(name: str) -> Decoder:
    entries = ENTRIES[name]
    return build_decoder(parse_config(entries), reference.random_weights(entries).items())


def tokens(rows: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(rows).integers(0, 61, (rows, count)))


@every_model
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("joined", [False, True])
@torch.inference_mode()
def test_it_is_the_decoder_bit_for_bit(name, rows, joined):
    model, step = decoder(name), decoder(name)
    if joined:
        join_linears(step)
    lengths, zeros = torch.arange(rows), torch.zeros(rows, 1, dtype=torch.int64)
    caches, others = (empty_cache(model.config, rows, 20) for _ in range(2))
    for ids in tokens(rows, 9).split(1, 1):
        wanted, caches = model(ids, lengths, zeros, caches)
        found, others = DecodeStep(step)(ids, lengths, zeros, others)
        assert torch.equal(found, wanted)
        for layer, other in zip(caches, others, strict=True):
            assert all(torch.equal(*pair) for pair in zip(layer.tensors, other.tensors, strict=True))
        lengths = lengths + 1


@every_model
@torch.inference_mode()
def test_with_a_managed_cache_it_is_the_decoder_too(name):
    """Rows in use and a bias of each layer's own, and what rows have received."""
    model, rows, layers = decoder(name), 2, 2
    zeros = torch.zeros(rows, 1, dtype=torch.int64)
    used = torch.tensor([[3, 5], [4, 2]])
    answers = []
    for step in (model, DecodeStep(model)):
        caches = [
            Cache(*(torch.randn(x.shape, generator=torch.Generator().manual_seed(7)) for x in layer.tensors))
            for layer in empty_cache(model.config, rows, 12)
        ]
        received = [torch.zeros(rows, 12) for _ in range(layers)]
        managed = ManagedInputs(
            positions=torch.tensor([[9], [11]]),
            row_bias=torch.linspace(-1, 1, layers * rows * 8).view(layers, rows, 8),
            past_received=received,
            query_weight=torch.ones(rows, 1),
            decay=torch.ones(rows),
            observe="mass",
        )
        logits, caches = step(tokens(rows, 1), used, zeros, caches, managed)
        answers.append([logits, *received, *(tensor for layer in caches for tensor in layer.tensors)])
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))
    assert answers[0][1].any()


@every_model
def test_what_is_joined_takes_no_memory_of_its_own(name):
    model, plain = decoder(name), decoder(name)
    join_linears(model)
    held, before = (sum(x.nbytes for x in (*m.parameters(), *m.buffers())) for m in (model, plain))
    biases = sum(4 * sum(j.sizes) for j in model.modules() if isinstance(j, JoinedLinears) and j.bias is not None)
    assert before <= held <= before + biases  # of layers without one beside layers with one
    for layer in model.model.layers:
        assert layer.self_attn.projections.sizes[0] == plain.model.layers[0].self_attn.q_proj.out_features
        assert layer.mlp.projections.sizes == [96, 96]
        assert layer.mlp.multiply is silu_multiply
        assert not hasattr(layer.self_attn, "q_proj")
        assert hasattr(layer.self_attn, "o_proj")


def test_matrices_in_codes_stay_as_they_are():
    entries = ENTRIES["gta"] | {"intermediate_size": 64}
    stored = StoredModel(entries, reference.random_weights(entries), "int4")
    model = build_packed_decoder(stored.config, stored.stored())
    join_linears(model)
    for layer in model.model.layers:
        assert isinstance(layer.self_attn.projections, QuantizedLinears)
        assert isinstance(layer.mlp.projections, QuantizedLinears)
        assert layer.mlp.multiply is silu_multiply


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_joined_layers_that_are_moved_and_changed_are_what_they_are_then(bias):
    layers = [torch.nn.Linear(8, outputs, bias=bias) for outputs in (5, 3)]
    found = JoinedLinears(layers).double()
    changed = {name: torch.randn_like(tensor) for name, tensor in found.state_dict().items()}
    for part in (lambda: None, lambda: found.load_state_dict(changed)):
        part()
        x = torch.randn(2, 3, 8).double()
        whole = torch.nn.functional.linear(x, found.weight, found.bias)
        torch.testing.assert_close(torch.cat(found(x), -1), whole)


def test_biases_that_only_some_layers_have():
    layers = [torch.nn.Linear(8, 5), torch.nn.Linear(8, 3, bias=False)]
    found = JoinedLinears(layers)
    x = torch.randn(2, 3, 8)
    for y, layer in zip(found(x), layers, strict=True):
        torch.testing.assert_close(y, layer(x))
    assert found.bias is not None
    assert not found.bias[5:].any()
    assert JoinedLinears([layers[1]]).bias is None


# --- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@every_model
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_it_is_near_to_the_decoder(name, compute, rows):
    """And both to float32 on the CPU."""
    ids = tokens(rows, 30).numpy()
    with TorchSession(decoder(name)) as session:
        wanted = session.forward(ids, all_logits=True)
    with TorchSession(decoder(name), device="cuda", compute=compute) as session:
        assert isinstance(session._model.model.layers[0].mlp.projections, JoinedLinears)
        found = [session.forward(ids[:, :10], all_logits=True)]
        found += [session.forward(ids[:, t : t + 1])[:, None] for t in range(10, 30)]
        assert session.cuda_graph
    assert difference(np.concatenate(found, axis=1), wanted).max_rel_error <= COMPUTE_BOUNDS[compute]
