"""The plugin of a node with inputs of a managed cache on a GPU, from TensorRT's addresses to float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gta_edge.plugins.attention.kernels import BUFFERS_OF
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers.attention_plugins import BF16, FLOAT, FP8, HALF, INT8, INT64, make, stored_as
from tests.helpers.gpu_calls import on_gpu
from tests.helpers.managed_gpu_calls import VARIANTS, ManagedCall
from tests.helpers.managed_plugins import attributes
from tests.helpers.plugin_values import descs

pytestmark = pytest.mark.usefixtures("no_failures")

TORCH_TYPES = {
    torch.float16: HALF,
    torch.bfloat16: BF16,
    torch.float32: FLOAT,
    torch.int8: INT8,
    torch.float8_e4m3fn: FP8,
    torch.int64: INT64,
}
PARTS = BUFFERS_OF | {
    "past_key": "key_cache",
    "past_latent": "latent_cache",
    "past_key_scale": "key_scale",
    "past_latent_scale": "latent_scale",
}
"""What the kernels call an input of the op, where they call it something else."""


class PluginCall(ManagedCall):
    """A call of the op that goes through a plugin; what is present is in the past's place."""

    def __init__(self, creator: Any, variant: Variant, past: tuple[int, ...], tokens: int, **options: Any) -> None:
        super().__init__(variant, past, tokens, **options)
        sizes = variant.sizes
        made = make(
            creator,
            num_query_heads=sizes.num_query_heads,
            num_key_heads=sizes.num_key_heads,
            num_latent_heads=sizes.num_latent_heads,
            scale=self.scale,
            has_gate=int(sizes.has_gate),
            has_value_decoder=int(sizes.has_value_decoder),
            **stored_as(variant.compute, variant.cache),
            **attributes(variant.features),
        )
        self.plugin = made.attach_to_context(None)
        self.scale = made.parameters.scale
        self.inputs = [self._tensor(name) for name in made.parameters.inputs]
        self.outputs = [self._tensor(name.replace("present", "past")) for name in made.parameters.outputs]
        self.descs = descs([TORCH_TYPES[each.dtype] for each in self.inputs], [tuple(x.shape) for x in self.inputs])
        self.plugin.on_shape_change(self.descs, [])

    def _tensor(self, name: str) -> torch.Tensor:
        return self[PARTS.get(name, name)]

    def launch(self, stream: Any = 0) -> None:
        workspace = self["workspace"].data_ptr() if self.workspace_bytes else 0
        inputs, outputs = ([each.data_ptr() for each in part] for part in (self.inputs, self.outputs))
        self.plugin.enqueue(self.descs, [], inputs, outputs, workspace, stream)


@on_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu_a_few_tokens_are_exact(creator: Any, name: str) -> None:
    PluginCall(creator, VARIANTS[name], (0, 330, 17), 3, capacity=400).run().check()


@on_gpu
@pytest.mark.parametrize("name", [name for name, of in VARIANTS.items() if not of.features.has_branches])
def test_on_a_gpu_a_prompt_is_exact(creator: Any, name: str) -> None:
    PluginCall(creator, VARIANTS[name], (0, 129), 40, capacity=200, observes=False).run().check()


@on_gpu
@pytest.mark.parametrize("name", ["gta, all, mass, bf16", "gqa, last, int8"])
def test_on_a_gpu_what_rows_received_may_lie_elsewhere(creator: Any, name: str) -> None:
    call = PluginCall(creator, VARIANTS[name], (0, 300), 2, capacity=320)
    place = call.plugin.parameters.inputs.index("past_received")
    call.inputs[place] = call["received"].clone()
    before = call.inputs[place].clone()
    call["received"].fill_(torch.nan)
    call.run().check()
    assert torch.equal(call.inputs[place].view(torch.int32), before.view(torch.int32))
