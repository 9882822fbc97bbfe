"""The plugin over a cache in blocks on a GPU: what the kernels are held to, by way of TensorRT's descriptors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gta_edge.plugins.attention.tiling import Variant
from tests.helpers.attention_plugins import BF16, FLOAT, HALF, INT8, INT64, make, stored_as
from tests.helpers.block_gpu_calls import BlockCall
from tests.helpers.gpu_calls import GQA as GQA_9_3
from tests.helpers.gpu_calls import GTA_1B, on_gpu
from tests.helpers.plugin_values import descs

pytestmark = pytest.mark.usefixtures("no_failures")

# codes are bytes, and TensorRT has none without a sign
TORCH_TYPES = {torch.float16: HALF, torch.bfloat16: BF16, torch.float32: FLOAT, torch.uint8: INT8, torch.int64: INT64}
PARTS = {"past_key": "key_cache", "past_latent": "latent_cache", "past_length": "past_length"}
"""What the kernels call an input of the op, where it is not its name without ``past_``."""
VARIANTS = [
    Variant(GTA_1B, "bf16", "int4"),
    Variant(GTA_1B, "fp16", "int4v2"),
    Variant(GQA_9_3, "bf16", "int4v2"),
    Variant(GQA_9_3, "fp16", "int4"),
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda of: f"{of.sizes.latent_dim}-{of.cache}")


class PluginCall(BlockCall):
    """A call of the op that goes through a plugin; what is present is in the past's place."""

    def __init__(self, creator: Any, variant: Variant, past: tuple[int, ...], tokens: int, capacity: int) -> None:
        super().__init__(variant, past, tokens, capacity)
        sizes = variant.sizes
        made = make(
            creator,
            num_query_heads=sizes.num_query_heads,
            num_key_heads=sizes.num_key_heads,
            num_latent_heads=sizes.num_latent_heads,
            scale=self.case.scale,
            has_gate=int(sizes.has_gate),
            has_value_decoder=int(sizes.has_value_decoder),
            **stored_as(variant.compute, variant.cache),
        )
        self.plugin = made.attach_to_context(None)
        self.inputs = [self._tensor(name) for name in made.parameters.inputs]
        self.outputs = [self._tensor(name.replace("present", "past")) for name in made.parameters.outputs]
        self.descs = descs([TORCH_TYPES[each.dtype] for each in self.inputs], [tuple(x.shape) for x in self.inputs])
        self.plugin.on_shape_change(self.descs, [])

    def _tensor(self, name: str) -> torch.Tensor:
        return self[PARTS.get(name, name.removeprefix("past_"))]

    def launch(self, stream: Any = 0) -> None:
        workspace = self["workspace"].data_ptr() if self.workspace_bytes else 0
        inputs, outputs = ([each.data_ptr() for each in part] for part in (self.inputs, self.outputs))
        self.plugin.enqueue(self.descs, [], inputs, outputs, workspace, stream)


@on_gpu
@every_variant
@pytest.mark.parametrize(("past", "tokens"), [((0, 330, 31), 1), ((0, 300, 129), 100)])
def test_on_a_gpu_it_is_exact(creator: Any, variant: Variant, past: tuple[int, ...], tokens: int) -> None:
    PluginCall(creator, variant, past, tokens, 416).run().check()


@on_gpu
@every_variant
@pytest.mark.parametrize("tokens", [2, 70])
def test_on_a_gpu_separate_caches_give_the_same(creator: Any, variant: Variant, tokens: int) -> None:
    call = PluginCall(creator, variant, (40, 95), tokens, 192)
    old = {place: call.inputs[place].clone() for place, _ in call.plugin.parameters.caches}
    before = {place: each.view(torch.uint8).clone() for place, each in old.items()}
    for place, present in call.plugin.parameters.caches:
        call.inputs[place] = old[place]
        call.outputs[present].view(torch.uint8).fill_(0xFF)
    call.run().check()
    for place, each in old.items():
        assert torch.equal(each.view(torch.uint8), before[place]), "the past cache was written to"


@on_gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_on_a_gpu_its_first_call_can_be_captured_and_replayed(creator: Any, tokens: int) -> None:
    call = PluginCall(creator, VARIANTS[0], (200, 0, 31), tokens, 288)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.launch(stream.cuda_stream)
    torch.cuda.synchronize()
    assert torch.equal(call.memory.bytes_of("output"), call.before["output"])  # captured, not run
    graph.replay()
    torch.cuda.synchronize()
    call.check()
