"""The inputs of a managed cache in the attention kernels on a GPU, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gta_edge.plugins.attention.definition import Features
from gta_edge.plugins.attention.torch import grouped_latent_attention_
from tests.helpers.gpu_calls import GQA, GTA_1B, TYPES, bits, on_gpu, synchronize
from tests.helpers.managed_gpu_calls import VARIANTS, ManagedCall

every_variant = pytest.mark.parametrize("name", VARIANTS)


@on_gpu
@every_variant
@pytest.mark.parametrize(
    ("past", "tokens", "capacity"),
    [((0, 2999, 1500, 17), 1, 3000), ((0, 330, 17), 3, 333), ((0, 984, 15, 500), 16, 1000)],
)
def test_decode_is_exact(name: str, past: tuple[int, ...], tokens: int, capacity: int) -> None:
    ManagedCall(VARIANTS[name], past, tokens, capacity).run().check()


@on_gpu
@pytest.mark.parametrize("name", [name for name, of in VARIANTS.items() if of.features.has_branches])
@pytest.mark.parametrize(("past", "tokens", "capacity"), [((2000,), 20, 2050), ((0, 700), 64, 800)])
def test_a_tree_is_exact(name: str, past: tuple[int, ...], tokens: int, capacity: int) -> None:
    ManagedCall(VARIANTS[name], past, tokens, capacity).run().check()


@on_gpu
@pytest.mark.parametrize("name", [name for name, of in VARIANTS.items() if not of.features.has_branches])
@pytest.mark.parametrize(("past", "tokens", "capacity"), [((0, 23, 5), 17, 40), ((700, 1), 300, 1000)])
def test_a_prompt_is_exact(name: str, past: tuple[int, ...], tokens: int, capacity: int) -> None:
    ManagedCall(VARIANTS[name], past, tokens, capacity, observes=False).run().check()


@on_gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_large_batch(tokens: int) -> None:
    past = tuple(13 * row % 250 for row in range(70))
    ManagedCall(VARIANTS["gta, all, mass, bf16"], past, tokens, 270).run().check()


@on_gpu
@pytest.mark.parametrize("name", ["gta, all, mass, bf16", "gqa, last, int8"])
def test_a_replayed_graph_is_the_launches(name: str) -> None:
    eager, graphed = (ManagedCall(VARIANTS[name], (700, 3), 2, 800) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graphed.launch(stream.cuda_stream)
    for _ in range(2):  # what rows have received changes each time
        eager.launch()
        graph.replay()
    synchronize()
    for part in ("output", "key_cache", "latent_cache", "received"):
        assert torch.equal(bits(eager[part]), bits(graphed[part])), part


def op_inputs(sizes: Any, features: Features, past: tuple[int, ...], tokens: int, capacity: int) -> dict[str, Any]:
    """The op's arguments by name, on the CPU, in float64 and int64; values that 16 bits have."""
    random = torch.Generator().manual_seed(0)
    batch, n_q, n_k, n_c = len(past), sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().double()

    angles = torch.arange(capacity)[:, None] / 100.0 ** (torch.arange(0, sizes.key_dim, 2) / sizes.key_dim)
    given: dict[str, Any] = {
        "query": normal(batch, tokens, n_q * sizes.key_dim),
        "key": normal(batch, tokens, n_k * sizes.key_dim),
        "latent": normal(batch, tokens, n_c * sizes.latent_dim),
        "gate": normal(batch, tokens, sizes.hidden_size) if sizes.has_gate else None,
        "past_key": normal(batch, n_k, capacity, sizes.key_dim),
        "past_latent": normal(batch, n_c, capacity, sizes.latent_dim),
        "past_length": torch.tensor(past),
        "cos": angles.cos().bfloat16().double(),
        "sin": angles.sin().bfloat16().double(),
        "value_decoder": (normal(n_q, sizes.latent_dim, sizes.hidden_size // n_q) / 16).bfloat16().double()
        if sizes.has_value_decoder
        else None,
        "num_query_heads": n_q,
        "num_key_heads": n_k,
        "num_latent_heads": n_c,
        "scale": sizes.key_dim**-0.5,
    }
    if features.has_positions:
        given["positions"] = torch.randint(0, capacity, (batch, tokens), generator=random)
    if features.bias_rows:
        given["row_bias"] = torch.rand(batch, features.bias_rows, generator=random)
    if features.has_branches:
        given["branch_start"] = torch.tensor(past) // 2
        given["branches"] = torch.randint(-(2**62), 2**62, (batch, capacity), generator=random)
    if features.observe:
        given["past_received"] = torch.rand(batch, capacity, generator=random)
        given["query_weight"] = torch.rand(batch, tokens, generator=random) * (tokens <= 16)
        given["decay"] = torch.ones(batch)
        given["observe"] = features.observe
    return given


@on_gpu
@pytest.mark.parametrize("sizes", [GTA_1B, GQA], ids=["gta", "gqa"])
@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize(
    "features", [Features("mass", 2, True, False), Features(None, 0, False, True), Features("mass", 0, True, True)]
)
def test_the_op_of_torch_on_a_gpu_is_that_on_the_cpu(sizes: Any, features: Features, tokens: int) -> None:
    if features.observe and features.has_branches and tokens > 16:
        features = Features(None, 0, True, True)
    wanted = op_inputs(sizes, features, (300, 0, 77), tokens, 400)
    found = {
        name: x.to("cuda", torch.bfloat16 if x.dtype == torch.float64 else x.dtype) if torch.is_tensor(x) else x
        for name, x in wanted.items()
    }
    with torch.inference_mode():
        expected, output = (grouped_latent_attention_(**given) for given in (wanted, found))
    assert (output.cpu().double() - expected).abs().max() <= 2e-2 * expected.abs().max()
    if features.observe:
        for row, past in enumerate((300, 0, 77)):
            used = slice(0, past + tokens)
            one, other = found["past_received"][row, used].cpu(), wanted["past_received"][row, used]
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@on_gpu
def test_the_op_of_torch_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from gta_edge.plugins.attention import torch as module

    monkeypatch.setattr(module, "_latent_attention", lambda *arguments: pytest.fail("in torch's own operations"))
    given = op_inputs(GTA_1B, Features("last", 1, True, True), (30,), 3, 64)
    given = {
        name: x.to("cuda", TYPES["bf16"] if x.dtype == torch.float64 else x.dtype) if torch.is_tensor(x) else x
        for name, x in given.items()
    }
    with torch.inference_mode():
        assert grouped_latent_attention_(**given).isfinite().all()
