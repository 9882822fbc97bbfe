"""The attention kernels of a cache in blocks on a GPU, launched on raw addresses.

All memory lies between guards. The cache is compared bit for bit, the output with float64.
"""

from __future__ import annotations

import pytest
import torch

from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, COMPUTE_TYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers.block_gpu_calls import BlockCall
from tests.helpers.gpu_calls import GQA, GTA_1B, bits, on_gpu, sizes_of, synchronize

SIZES = {
    "gta-1b": GTA_1B,
    "gqa-9-3": GQA,
    "gqa-8-2-of-128": Sizes(8, 2, 2, 128, 128, 1024, has_gate=False, has_value_decoder=False),
    "6-2-3-heads": sizes_of(6, 2, 3, 48, 64, 1),
    "widest": sizes_of(4, 1, 2, 128, 256, 1),
    "16-gated": Sizes(16, 1, 1, 128, 128, 2048, has_value_decoder=False),
}
every_type = pytest.mark.parametrize("cache", BLOCK_CACHE_TYPES)
every_compute = pytest.mark.parametrize("compute", COMPUTE_TYPES)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@on_gpu
@every_type
@every_compute
@every_size
@pytest.mark.parametrize(
    ("past", "tokens", "capacity"),
    [
        ((0, 31, 32, 4999), 1, 5024),
        ((20, 63, 300), 9, 320),
        ((16, 4000), 16, 4032),
        ((0, 70), 40, 128),
        ((700, 3), 300, 1024),
    ],
)
def test_exact(compute: str, cache: str, sizes: Sizes, past: tuple[int, ...], tokens: int, capacity: int) -> None:
    BlockCall(Variant(sizes, compute, cache), past, tokens, capacity).run().check()


@on_gpu
@every_type
def test_lengths_are_not_trusted(cache: str) -> None:
    for tokens in (1, 20):
        for length in (-1, 96, 2**62):
            BlockCall(Variant(GTA_1B, "bf16", cache), (length, 60), tokens, 96).run().check()


@on_gpu
@every_type
@every_compute
def test_a_call_and_the_same_in_parts_leave_the_same_bits(compute: str, cache: str) -> None:
    """Tokens at once, in parts and one by one; the output agrees as far as sums in other orders do."""
    of, tokens, capacity = Variant(GTA_1B, compute, cache), 130, 256
    whole = BlockCall(of, (50, 3), tokens, capacity).run()
    for part in (1, 13, 64):
        call = BlockCall(of, (50, 3), tokens, capacity)
        for first in range(0, tokens, part):
            names = ("query", "key", "latent", "gate", "output")
            memory = {name: call[name][:, first : first + part].contiguous() for name in names}
            call.launch_part(memory, first)
            call["output"][:, first : first + part] = memory["output"]
        synchronize()
        for name in ("key_cache", "latent_cache", "key_scale", "latent_scale", "key_open", "latent_open"):
            assert torch.equal(bits(call[name]), bits(whole[name])), (part, name)
        difference = (call["output"].double() - whole["output"].double()).abs().max()
        assert difference <= 4e-3 * whole["output"].double().abs().max() * (4 if compute == "bf16" else 1), part


@on_gpu
@every_type
def test_a_captured_step_serves_every_length(cache: str) -> None:
    """One graph, replayed as tokens come: the plan depends on nothing that changes, borders of blocks included."""
    of, capacity = Variant(GTA_1B, "bf16", cache), 96
    calls = [BlockCall(of, (length,), 1, capacity, seed=length) for length in range(29, 35)]
    shared = BlockCall(of, (29,), 1, capacity)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        shared.launch(stream.cuda_stream)  # once before: whatever is made at the first launch is there then
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            shared.launch(stream.cuda_stream)
    for call in calls:
        for name, tensor in call.memory.tensors.items():
            if name != "workspace":
                shared[name].copy_(tensor)
        synchronize()
        graph.replay()
        synchronize()
        for name in call.memory.tensors:
            if name != "workspace":
                call[name].copy_(shared[name])
        call.check()
