"""The kernels between matmuls on a GPU: on raw addresses against float64, and from torch against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gta_edge.plugins.elementwise.launches import MAX_WIDTH
from gta_edge.plugins.elementwise.torch import add_norm, silu_multiply
from tests.helpers import elementwise_cases as cases
from tests.helpers.gpu_elementwise_calls import Call

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

in_halves = pytest.mark.parametrize("compute", cases.TYPES)


def assert_near(found: Tensor, exact: Tensor, compute: str, **options: object) -> None:
    cases.assert_near(found.cpu(), exact.cpu(), compute, **options)


@in_halves
@pytest.mark.parametrize(("rows", "width"), [(1, 1280), (4, 264), (1, 8), (300, 1280), (2, MAX_WIDTH)])
@pytest.mark.parametrize("with_addend", [True, False], ids=["sum", "norm alone"])
def test_on_raw_addresses(compute: str, rows: int, width: int, with_addend: bool) -> None:
    call = Call(compute, rows, width, with_addend=with_addend).run()
    call.check_memory()
    if with_addend:
        assert torch.equal(call["sum"], call.total)
    assert_near(call["normed"], cases.normed(call.total, call["weight"]), compute)
    exact = cases.silu_multiplied(call["gate"], call["up"])
    assert_near(call["output"], exact, compute, roundings=2, factor=call["up"].cpu())


# --- from torch ------------------------------------------------------------------------------------------------------


def norm_of(width: int, compute: str) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, 1e-6)
    norm.weight.data = 1 + 0.2 * cases.values(width, compute=compute, seed=9)
    return norm.requires_grad_(False).cuda()


@in_halves
@pytest.mark.parametrize("width", [1280, 264, 12, MAX_WIDTH + 8])
def test_from_torch_it_is_what_torch_gives(compute: str, width: int) -> None:
    """Widths that the kernel does not take are torch's own operations."""
    norm, x, addend = norm_of(width, compute), *(cases.values(2, 3, width, compute=compute, seed=i) for i in (1, 2))
    x, addend = x.cuda(), addend.cuda()
    roundings = 1 if width in (1280, 264) else 2  # torch may round before it multiplies by the weight
    total, normed = add_norm(x, addend, norm)
    assert torch.equal(total, x + addend)
    assert normed.shape == x.shape
    assert_near(normed, cases.normed(total.cpu(), norm.weight.cpu(), 1e-6), compute, roundings=roundings)
    same, normed = add_norm(x, None, norm)
    assert same is x
    assert_near(normed, cases.normed(x.cpu(), norm.weight.cpu(), 1e-6), compute, roundings=roundings)
    found = silu_multiply(4 * x, addend)
    exact = cases.silu_multiplied(4 * x, addend)
    assert_near(found, exact, compute, roundings=2, factor=addend.cpu())


@in_halves
def test_views_that_are_not_aligned_or_not_contiguous(compute: str) -> None:
    whole = cases.values(2, 2 * 1280 + 1, compute=compute, seed=1).cuda()
    norm = norm_of(1280, compute)
    for x, addend in ((whole[:, 1:1281], whole[:, 1281:]), (whole[:, :2560:2], whole[:, 1:2561:2])):
        total, normed = add_norm(x, addend, norm)
        assert torch.equal(total, x + addend)
        assert_near(normed, cases.normed(total.cpu(), norm.weight.cpu(), 1e-6), compute)
        found = silu_multiply(x, addend)
        assert_near(found, cases.silu_multiplied(x, addend), compute, roundings=2, factor=addend.cpu())


@in_halves
def test_a_replayed_graph_follows_its_inputs(compute: str) -> None:
    norm, x, addend = norm_of(1280, compute), *(torch.zeros(1, 1280, dtype=cases.TYPES[compute]).cuda() for _ in "ab")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        add_norm(x, addend, norm)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        total, normed = add_norm(x, addend, norm)
        product = silu_multiply(total, normed)
    for seed in (1, 2):
        x.copy_(cases.values(1, 1280, compute=compute, seed=seed))
        addend.copy_(cases.values(1, 1280, compute=compute, seed=seed + 5))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(total, x + addend)
        assert_near(normed, cases.normed(total.cpu(), norm.weight.cpu(), 1e-6), compute)
        assert_near(product, cases.silu_multiplied(total, normed), compute, roundings=2, factor=normed.cpu())
