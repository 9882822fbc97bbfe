"""The `torch` backend with caches of fewer bits on a GPU: the kernels, one CUDA graph, and PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.reference import build_decoder
from gta_edge.accuracy.tolerance import difference
from gta_edge.model.config import parse_config
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, QUANTIZED_CACHE_TYPES
from gta_edge.plugins.attention import torch as torch_ops
from gta_edge.plugins.attention.tiling import has_kernels
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

VOCAB, POSITIONS, TOKENS = 89, 400, 150
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "intermediate_size": 160}
MODELS = {
    "gta": reference.gta_entries(heads=20, n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=3, n_kv=3, d_h=64, **SMALL),
}
NEAR = {"int8": 0.1, "fp8": 0.3, "int4": 0.3, "int4v2": 0.8}
"""How far logits may be from PyTorch's own operations on the CPU, where a value may get the code beside its own."""

IDS = np.random.default_rng(2).integers(0, VOCAB, (2, TOKENS))


def opened(model: str, compute: str, cache_dtype: str, device: str, **options: Any) -> TorchSession:
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[compute]
    weights = reference.random_weights(MODELS[model])
    rounded = {name: torch.from_numpy(x).to(kind).float().numpy() for name, x in weights.items()}
    decoder = build_decoder(parse_config(MODELS[model]), rounded.items())
    return TorchSession(decoder, device=device, compute=compute, cache_dtype=cache_dtype, **options)


@pytest.mark.parametrize("cache_dtype", QUANTIZED_CACHE_TYPES)
@pytest.mark.parametrize(("model", "compute"), [("gta", "fp16"), ("gqa", "bf16")])
def test_prompts_and_tokens_are_those_of_torch(
    model: str, compute: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_kernels(parse_config(MODELS[model]).attention, compute, cache_dtype)
    with opened(model, compute, cache_dtype, "cpu") as plain:
        expected = plain.forward(IDS, all_logits=True)
        stored = [tensor for layer in plain._caches for tensor in layer.tensors]
    with opened(model, compute, cache_dtype, "cuda", capacity_step=32) as session:
        monkeypatch.setattr(torch_ops, "_latent_attention", None)  # what the kernels do not take, would fail
        prompt = session.forward(IDS[:, :70], all_logits=True)
        tokens = np.stack([session.forward(IDS[:, t : t + 1]) for t in range(70, TOKENS)], axis=1)
        assert session.cuda_graph
        found = np.concatenate([prompt, tokens], axis=1)
        assert difference(found, expected).max_rel_error <= NEAR[cache_dtype]
        for tensor, wanted in zip((x for layer in session._caches for x in layer.tensors), stored, strict=True):
            assert tensor.dtype == wanted.dtype
        if cache_dtype in BLOCK_CACHE_TYPES:  # of the first layer, whose inputs are the same, nearly every code
            key = session._caches[0].key[:, :, :4].cpu()
            assert (key == stored[0][:, :, :4]).float().mean() > 0.9
        session.truncate(40)
        again = session.forward(IDS[:, 40:70], all_logits=True)
        assert difference(again, expected[:, 40:70]).max_rel_error <= 2 * NEAR[cache_dtype]


@pytest.mark.parametrize("cache_dtype", BLOCK_CACHE_TYPES)
def test_rows_of_different_length_are_as_if_alone(cache_dtype: str) -> None:
    with opened("gta", "fp16", cache_dtype, "cuda") as session:
        session.forward(IDS, lengths=np.array([45, 130]))
        both = session.forward(IDS[:, :40], all_logits=True)
        for row, length in enumerate((45, 130)):
            session.reset()
            session.forward(IDS[row : row + 1, :length])
            alone = session.forward(IDS[row : row + 1, :40], all_logits=True)
            assert difference(both[row], alone[0]).max_rel_error <= NEAR[cache_dtype]


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_policy_moves_rows_of_8_bits(cache_dtype: str) -> None:
    window = policy("window", rows=32, interval=8, sinks=2, residual_rows=2)
    found = []
    for device in ("cpu", "cuda"):
        with opened("gta", "fp16", cache_dtype, device, cache=window, chunk_size=40) as session:
            session.forward(IDS[:1, :100])
            found.append(np.stack([session.forward(IDS[:1, t : t + 1])[0] for t in range(100, TOKENS)]))
    assert difference(found[1], found[0]).max_rel_error <= NEAR[cache_dtype]


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED_CACHE_TYPES])
def test_a_few_tokens_are_replays_and_what_comes_token_by_token(cache_dtype: str | None) -> None:
    """Of widths with a graph and between them, behind tokens that were taken back."""
    stored = cache_dtype or "fp16"
    with opened("gta", "fp16", stored, "cuda") as session, opened("gta", "fp16", stored, "cuda") as single:
        for each in (session, single):
            each.forward(IDS[:1, :37])
        for width in (2, 3, 5, 8, 11, 16, 4, 7):
            start = int(session.length[0])
            session.forward(IDS[:1, 40 : 40 + width], all_logits=True)
            session.truncate(start)
            found = session.forward(IDS[:1, start : start + width], all_logits=True)[0]
            expected = [single.forward(IDS[:1, t : t + 1])[0] for t in range(start, start + width)]
            assert difference(found, np.stack(expected)).max_rel_error <= NEAR.get(stored, 2e-2)
        assert session._graphs is not None
        assert session._graphs.captured == (5 if stored in BLOCK_CACHE_TYPES else 7)  # 2, 3, 4, 8, 16, and 6 and 12
