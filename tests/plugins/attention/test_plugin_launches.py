"""What the plugin asks of the launch layer, from the build to a run, on a GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins import plugin_base
from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.launches import plan_attention, programs_for
from gta_edge.plugins.attention.plugin_call import largest_workspace_bytes
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_call_base import Built
from tests.helpers.attention_plugins import (
    GQA,
    GQA_ATTRIBUTES,
    OP,
    RUNTIME,
    SIZES,
    input_types,
    make,
    profile,
    shapes,
    stored_as,
)
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.plugin_values import descs, trt
from tests.helpers.refusals import message

pytestmark = pytest.mark.usefixtures("no_failures")


def configured(creator: Any, bound: list[Any], **attributes: Any) -> Any:
    made = make(creator, **attributes)
    made.configure_plugin(bound, [])
    return made


def test_a_build_settles_types_sizes_and_gpu(creator: Any, cuda: FakeCuda) -> None:
    made = configured(creator, profile(4, 512, 2048, 4096, "bf16", "fp8"), cache_dtype="fp8")
    assert made.built == Built(Variant(SIZES, "bf16", "fp8"), "sm_87", 8)
    cloned = made.clone()
    again = creator.create_plugin("layer", cloned.get_fields_to_serialize(), RUNTIME)
    assert again.built == made.built
    assert cuda.loaded == []


def test_bounds_of_a_profile_may_differ(creator: Any, cuda: FakeCuda) -> None:
    bound = profile(4, 512, 2048, 4096)
    bound[1].max = trt.Dims((4, 511, 64))
    assert configured(creator, bound).built is not None
    bound[1].max = trt.Dims((4, 512, 65))
    assert (
        message(make(creator).configure_plugin, bound, [])
        == f"{OP} has key of shape [4, 512, 65]; expected [4, 512, 64]"
    )


def test_the_workspace_is_that_of_the_plan(creator: Any, cuda: FakeCuda) -> None:
    for b, t, s in ((1, 1, 4096), (4, 512, 2048), (2, 16, 300)):
        bound = profile(b, t, s, s)
        made = configured(creator, bound)
        expected = largest_workspace_bytes(made.built.variant, "sm_87", 8, batch=b, tokens=t, capacity=s)
        assert made.get_workspace_size(bound, []) == expected > 0


def test_a_build_without_a_gpu_says_so(creator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if current_gpu.cache_info().currsize or torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(plugin_base, "_current_device", lambda: 0)
    assert "there is no NVIDIA driver" in message(make(creator).configure_plugin, profile(1, 1, 64, 64), [])


ADDRESSES = {
    "query": 0x1000,
    "key": 0x2000,
    "latent": 0x3000,
    "gate": 0x4000,
    "past_key": 0x5000,
    "past_latent": 0x6000,
    "past_length": 0x7008,
    "cos": 0x8000,
    "sin": 0x9000,
    "value_decoder": 0xA000,
    "past_key_scale": 0xD004,
    "past_latent_scale": 0xE008,
    "output": 0xB000,
    "workspace": 0xC000,
}
IN_BLOCKS = {
    "past_key_scale": 0xD000,
    "past_latent_scale": 0xE000,
    "past_key_open": 0x10000,
    "past_latent_open": 0x20000,
}
"""Of a cache in blocks, where all are multiples of 16."""


class Engine:
    """Calls a plugin as an execution context does."""

    def __init__(self, plugin: Any, compute: str = "fp16", cache: str = "fp16", **sizes: int) -> None:
        self.plugin = plugin.attach_to_context(None)
        parameters = self.plugin.parameters
        has = int(parameters.has_gate), int(parameters.has_value_decoder)
        types = input_types(compute, cache, *has)
        self.descs = descs(types, shapes(**sizes, sizes=SIZES if any(has) else GQA, cache=cache))
        self.plugin.on_shape_change(self.descs, [])

    def enqueue(self, stream: int = 7, **moved: int) -> None:
        parameters = self.plugin.parameters
        addresses = ADDRESSES | (IN_BLOCKS if "past_key_open" in parameters.inputs else {})
        inputs = [addresses[name] for name in parameters.inputs]
        outputs = [moved.get(name, addresses[name.replace("present", "past")]) for name in parameters.outputs]
        self.plugin.enqueue(self.descs, [], inputs, outputs, ADDRESSES["workspace"], stream)


def addresses_of(launch: tuple[Any, ...]) -> list[int]:
    return [value for value in launch[3] if type(value) is int]


def numbers_of(launch: tuple[Any, ...]) -> list[float]:
    return [value.item() for value in launch[3] if type(value) is not int]


def test_few_tokens_are_decoded(creator: Any, cuda: FakeCuda) -> None:
    Engine(make(creator), b=2, t=3, s=512, p=1024).enqueue()
    split, combine = cuda.launches
    made = plan_attention(programs_for(Variant(SIZES, "fp16", "fp16"), "sm_87"), 8, batch=2, tokens=3, capacity=512)
    sums = 0xC000 + made.offsets["sums"]
    assert (split[2], combine[2], split[0].handle, combine[0].handle) == (
        "gta_decode_split",
        "gta_decode_combine",
        7,
        7,
    )
    assert addresses_of(split) == [
        *(0x1000, 0x2000, 0x3000, 0x5000, 0x6000, 0, 0, 0x7008, 0x8000, 0x9000, 0xC000, sums)
    ]
    assert numbers_of(split) == [3, 512, 1024, 0.125]
    assert addresses_of(combine) == [0xC000, sums, 0x4000, 0xA000, 0x7008, 0xB000]


def test_many_tokens_are_appended_and_attended(creator: Any, cuda: FakeCuda) -> None:
    Engine(make(creator, cache_dtype="int8"), "bf16", "int8", b=2, t=300, s=512, p=1024).enqueue()
    append, prefill = cuda.launches
    caches = [0x5000, 0x6000, 0xD004, 0xE008, 0x7008, 0x8000, 0x9000]
    assert (append[2], prefill[2]) == ("gta_append", "gta_prefill")
    assert addresses_of(append) == [0x2000, 0x3000, *caches]
    assert addresses_of(prefill) == [0x1000, 0x4000, 0xA000, *caches, 0xB000]


@pytest.mark.parametrize("quantised", [0, 1])
def test_grouped_query_attention_has_neither_gate_nor_value_decoder(
    creator: Any, cuda: FakeCuda, quantised: int
) -> None:
    cache = "int8" if quantised else "bf16"
    made = make(creator, **GQA_ATTRIBUTES, **stored_as("bf16", cache))
    for tokens in (3, 300):
        engine = Engine(made, "bf16", cache, b=2, t=tokens, s=512, p=1024)
        engine.enqueue()
        engine.enqueue(present_key=0x50000)  # elsewhere: then the past is copied first
    launches = [each for each in cuda.launches if each[0] != "copy"]
    assert [each[2] for each in launches[:2] + launches[-2:]] == [
        *("gta_decode_split", "gta_decode_combine", "gta_append", "gta_prefill")
    ]
    assert addresses_of(launches[1])[2:4] == [0, 0]
    assert addresses_of(launches[-1])[:3] == [0x1000, 0, 0]
    size = 2 * 2 * 512 * 64 * (1 if quantised else 2)
    assert [each for each in cuda.launches if each[0] == "copy"] == [("copy", 0x50000, 0x5000, size, 7)] * 2


@pytest.mark.parametrize("tokens", [tiling.DECODE_TOKENS, tiling.DECODE_TOKENS + 1])
def test_the_border_between_the_two(creator: Any, cuda: FakeCuda, tokens: int) -> None:
    Engine(make(creator), b=1, t=tokens, s=64, p=64).enqueue()
    assert (cuda.launches[0][2] == "gta_decode_split") is (tokens <= tiling.DECODE_TOKENS)


def test_one_engine_goes_from_prefill_to_decode(creator: Any, cuda: FakeCuda) -> None:
    made = make(creator)
    first, second = Engine(made, b=1, t=100, s=512, p=512), Engine(made, b=1, t=1, s=512, p=512)
    loaded = len(cuda.loaded)
    for engine in (first, second, first):
        engine.enqueue()
    assert [each[2] for each in cuda.launches[::2]] == ["gta_append", "gta_decode_split", "gta_append"]
    assert len(cuda.loaded) == loaded


def test_nothing_is_copied_where_past_and_present_are_one(creator: Any, cuda: FakeCuda) -> None:
    Engine(make(creator, cache_dtype="fp8"), "fp16", "fp8", b=2, t=3, s=512, p=1024).enqueue()
    assert [each[0] for each in cuda.launches if each[0] == "copy"] == []


def test_a_present_cache_elsewhere_gets_the_past_first(creator: Any, cuda: FakeCuda) -> None:
    engine = Engine(make(creator, cache_dtype="int8"), "bf16", "int8", b=2, t=3, s=512, p=1024)
    engine.enqueue(present_key=0x50000, present_latent_scale=0xE0004)
    assert cuda.launches[:2] == [
        ("copy", 0x50000, 0x5000, 2 * 512 * 64, 7),
        ("copy", 0xE0004, 0xE008, 2 * 512 * 4, 7),
    ]
    assert addresses_of(cuda.launches[2])[3:7] == [0x50000, 0x6000, 0xD004, 0xE0004]
    cuda.launches.clear()
    Engine(make(creator), b=2, t=3, s=512, p=1024).enqueue(present_key=0x50000)
    assert cuda.launches[0] == ("copy", 0x50000, 0x5000, 2 * 2 * 512 * 64, 7)


def test_a_copy_that_fails(creator: Any, cuda: FakeCuda) -> None:
    cuda.fails = "copy"
    engine = Engine(make(creator), b=2, t=3, s=512, p=1024)
    assert message(engine.enqueue, present_key=0x50000) == (
        "the past cache could not be copied to the present one (1); bind both to one address, then nothing is copied"
    )


def test_kernels_are_loaded_before_the_first_call(creator: Any, cuda: FakeCuda) -> None:
    """So that the first call may be in the capture of a graph."""
    built = configured(creator, profile(1, 1, 512, 512))
    restored = creator.create_plugin("layer", built.get_fields_to_serialize(), RUNTIME)
    assert cuda.loaded == []
    restored.attach_to_context(None)
    assert cuda.loaded != []
    loaded = list(cuda.loaded)
    engine = Engine(restored, b=1, t=1, s=512, p=512)
    engine.enqueue()
    assert cuda.loaded == loaded


def test_contexts_share_kernels_and_nothing_else(creator: Any, cuda: FakeCuda) -> None:
    made = make(creator)
    one, two = Engine(made, b=1, t=1, s=512, p=512), Engine(made, b=2, t=20, s=64, p=512)
    assert one.plugin is not two.plugin
    loaded = len(cuda.loaded)
    one.enqueue(stream=7)
    two.enqueue(stream=8)
    one.enqueue(stream=7)
    assert [(each[0].handle, each[2]) for each in cuda.launches[::2]] == [
        (7, "gta_decode_split"),
        (8, "gta_append"),
        (7, "gta_decode_split"),
    ]
    assert len(cuda.loaded) == loaded


@pytest.mark.parametrize(("built_on", "planned_for"), [(4, 4), (8, 8), (100, 8)])
def test_on_a_larger_gpu_the_workspace_of_the_build_still_suffices(
    creator: Any, cuda: FakeCuda, built_on: int, planned_for: int
) -> None:
    """An engine may be moved to a board with the same architecture and more multiprocessors."""
    made = make(creator)
    made.built = Built(Variant(SIZES, "fp16", "fp16"), "sm_87", built_on)
    Engine(made, b=1, t=1, s=32768, p=32768).enqueue()
    expected = plan_attention(
        programs_for(made.built.variant, "sm_87"), planned_for, batch=1, tokens=1, capacity=32768
    ).numbers["splits"]
    assert numbers_of(cuda.launches[1])[-1] == expected


def test_an_engine_of_another_architecture(creator: Any, cuda: FakeCuda) -> None:
    made = make(creator)
    made.built = Built(Variant(SIZES, "fp16", "fp16"), "sm_89", 8)
    assert message(made.attach_to_context, None) == (
        "this engine was built on a GPU of sm_89, Fake is sm_87; build the engine again on this machine"
    )


def test_shapes_are_checked_before_anything_is_launched(creator: Any, cuda: FakeCuda) -> None:
    engine = Engine(make(creator), b=2, t=3, s=512, p=1024)
    engine.descs[1].dims = trt.Dims((2, 4, 64))
    text = message(engine.plugin.on_shape_change, engine.descs, [])
    assert text == f"{OP} has key of shape [2, 4, 64]; expected [2, 3, 64]"
    engine.descs[0].dims = trt.Dims((2, 4, 320))  # a call that was not announced
    assert message(engine.enqueue) == f"{OP} has query of shape [2, 4, 320]; expected [2, 3, 320]"
    assert cuda.launches == []


def test_sizes_that_were_not_announced_are_taken(creator: Any, cuda: FakeCuda) -> None:
    engine = Engine(make(creator), b=2, t=3, s=512, p=1024)
    engine.descs = descs(input_types(), shapes(3, 40, 256, 1024))
    engine.enqueue()
    assert cuda.launches[0][2] == "gta_append"
    assert numbers_of(cuda.launches[0]) == [40, 256, 1024]


# --- a cache in blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["int4", "int4v2"])
@pytest.mark.parametrize("tokens", [3, 300])
def test_a_cache_in_blocks_is_launched_with_all_its_tensors(
    creator: Any, cuda: FakeCuda, cache: str, tokens: int
) -> None:
    engine = Engine(make(creator, cache_dtype=cache), "bf16", cache, b=2, t=tokens, s=512, p=1024)
    engine.enqueue()
    variant = Variant(SIZES, "bf16", cache)
    plan = plan_attention(programs_for(variant, "sm_87"), 8, batch=2, tokens=tokens, capacity=512)
    named = {"key_cache": "past_key", "latent_cache": "past_latent"}
    named |= {name: f"past_{name}" for name in ("key_scale", "latent_scale", "key_open", "latent_open")}
    assert [launch[2] for launch in cuda.launches] == [launch.kernel for launch in plan.launches]
    seen = set()
    for found, planned in zip(cuda.launches, plan.launches, strict=True):
        given = dict(zip(planned.signature.addresses, addresses_of(found), strict=True))
        for name in named.keys() & given.keys():
            assert given[name] == (ADDRESSES | IN_BLOCKS)[named[name]]
            seen.add(name)
    assert seen == named.keys()


def test_a_present_cache_in_blocks_elsewhere_gets_the_past_first(creator: Any, cuda: FakeCuda) -> None:
    engine = Engine(make(creator, cache_dtype="int4v2"), "fp16", "int4v2", b=2, t=3, s=512, p=1024)
    sizes = {
        "key": 2 * 16 * 64 * 16,
        "latent": 2 * 512 * 128 // 4,
        "key_scale": 2 * 16 * 2 * 64 * 2,
        "latent_scale": 2 * 512 * 2 * 2,
        "key_open": 2 * 32 * 64 * 2,
        "latent_open": 2 * 32 * 128 * 2,
    }
    moved = {f"present_{name}": 0x100000 * (1 + place) for place, name in enumerate(sizes)}
    engine.enqueue(**moved)
    assert cuda.launches[: len(sizes)] == [
        ("copy", moved[f"present_{name}"], (ADDRESSES | IN_BLOCKS)[f"past_{name}"], size, 7)
        for name, size in sizes.items()
    ]


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("past_key", (2, 1, 15, 64, 16), "past_key of shape [2, 1, 15, 64, 16]; expected [2, 1, 16, 64, 16]"),
        ("past_key", (2, 1, 512, 64), "past_key of shape [2, 1, 512, 64]; expected 5 axes"),
        ("past_latent", (2, 1, 512, 128), "past_latent of shape [2, 1, 512, 128]; expected [2, 1, 512, 64]"),
        ("past_latent_scale", (2, 1, 512), "past_latent_scale of shape [2, 1, 512]; expected [2, 1, 512, 2]"),
        ("past_key_open", (2, 1, 31, 64), "past_key_open of shape [2, 1, 31, 64]; expected [2, 1, 32, 64]"),
    ],
)
def test_shapes_of_a_cache_in_blocks_that_are_refused(
    creator: Any, cuda: FakeCuda, name: str, shape: tuple[int, ...], text: str
) -> None:
    engine = Engine(make(creator, cache_dtype="int4"), "fp16", "int4", b=2, t=3, s=512, p=1024)
    place = engine.plugin.parameters.inputs.index(name)
    engine.descs[place].dims = trt.Dims(shape)
    assert message(engine.plugin.on_shape_change, engine.descs, []) == f"{OP} has {text}"


def test_a_cache_in_blocks_that_there_are_no_kernels_for(creator: Any, cuda: FakeCuda) -> None:
    made = make(creator, cache_dtype="int4")
    managed = make(creator, cache_dtype="int4", has_positions=1)
    assert "takes no positions: its rows cannot be managed" in message(managed.parameters.variant, SIZES, "fp16")
    text = message(made.configure_plugin, profile(1, 1, 80, 80, "fp16", "int4"), [])
    assert text == f"{OP} has caches in blocks for 80 tokens; expected a multiple of 32"
    assert configured(creator, profile(1, 1, 96, 80, "fp16", "int4"), cache_dtype="int4").built is not None
