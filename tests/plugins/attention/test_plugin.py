"""The plugin in TensorRT's own registry, and its attributes; on a GPU also what it computes.

The classes are those of TensorRT's lean runtime, which has no parser and no builder, and needs a GPU only to run
engines.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge import plugins
from gta_edge.plugins.attention.plugin import AttentionPlugin
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_base import take_failures
from gta_edge.plugins.plugin_call_base import Built
from gta_edge.plugins.plugin_registry import plugin_class
from tests.helpers.attention_plugins import (
    ATTRIBUTES,
    BF16,
    BUILD,
    FLOAT,
    FORMS,
    FP8,
    GQA,
    GQA_ATTRIBUTES,
    GQA_PARAMETERS,
    HALF,
    INT8,
    INT64,
    OP,
    PARAMETERS,
    RUNTIME,
    SIZES,
    make,
    stored_as,
)
from tests.helpers.gpu_calls import GQA as GQA_9_3
from tests.helpers.gpu_calls import GTA_1B, TOLERANCE, VARIANTS, Call, bits, on_gpu
from tests.helpers.plugin_values import KINDS, Fields, descs, numbers, trt
from tests.helpers.refusals import message

pytestmark = pytest.mark.usefixtures("no_failures")


# --- the registry ----------------------------------------------------------------------------------------------------


def ours() -> list[Any]:
    return [each for each in trt.get_plugin_registry().all_creators if each.name == OP]


def test_it_is_registered_once(creator: Any) -> None:
    plugins.register(trt)
    plugins.register(trt)
    assert ours() == [creator]
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (OP, "1", "gta")


@pytest.mark.parametrize("key", [(OP, "1", ""), (OP, "1", "other"), (OP, "2", "gta"), ("Other", "1", "gta")])
def test_it_is_found_by_name_version_and_namespace_only(creator: Any, key: tuple[str, str, str]) -> None:
    assert trt.get_plugin_registry().get_creator(*key) is None


def test_without_a_module_the_one_installed_is_taken() -> None:
    script = (
        "import gta_edge.plugins as p; p.register(); p.register()\n"
        "from gta_edge.libraries.tensorrt import load\n"
        f"print(load().module.get_plugin_registry().get_creator({OP!r}, '1', 'gta').name)"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == f"{OP}\n"


def test_importing_loads_neither_tensorrt_nor_cuda() -> None:
    script = (
        "import sys, gta_edge.plugins, gta_edge.plugins.attention.plugin\n"
        "print([name for name in sys.modules if name.startswith(('tensorrt', 'cuda', 'torch', 'onnx'))])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_tensorrt_for_rtx_takes_no_plugins() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    assert re.fullmatch(
        r"tensorrt-rtx \S+ takes no plugins; build the form without them: gta-edge build --engine tensorrt-rtx",
        message(plugins.register, rtx),
    )


def test_a_registry_that_refuses() -> None:
    registry = SimpleNamespace(get_creator=lambda *key: None, register_creator=lambda creator, namespace: False)
    module = SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")})
    module.__version__, module.get_plugin_registry = "11.4.0", lambda: registry

    class Hashed(SimpleNamespace):
        __hash__ = object.__hash__

    text = message(plugins.register, Hashed(**vars(module)))
    assert text.startswith("tensorrt 11.4.0 did not register the plugin gta::GroupedLatentAttention version 1; ")


def test_classes_are_made_once_per_module() -> None:
    assert plugin_class(trt, AttentionPlugin) is plugin_class(trt, AttentionPlugin)


# --- attributes ------------------------------------------------------------------------------------------------------


def test_the_creator_declares_the_attributes_that_the_parser_shall_pass_on(creator: Any) -> None:
    names = creator.field_names
    found = {names[place].name: names[place].type for place in range(len(names))}
    assert found == {
        "num_query_heads": KINDS.INT32,
        "num_key_heads": KINDS.INT32,
        "num_latent_heads": KINDS.INT32,
        "scale": KINDS.FLOAT32,
        "cache_dtype": KINDS.CHAR,
        "has_gate": KINDS.INT32,
        "has_value_decoder": KINDS.INT32,
        "has_positions": KINDS.INT32,
        "has_branches": KINDS.INT32,
        "bias_rows": KINDS.INT32,
        "observe": KINDS.CHAR,
    }


def test_a_plugin_is_made_from_attributes(creator: Any) -> None:
    made = make(creator, plugin_namespace="gta", plugin_version="1")
    assert made.parameters == PARAMETERS
    assert made.built is None
    assert (made.plugin_name, made.plugin_version, made.plugin_namespace) == (OP, "1", "gta")
    assert made.num_outputs == 3
    assert [make(creator, cache_dtype=cache).num_outputs for cache in ("none", "int8", "int4", "int4v2")] == [
        3,
        5,
        7,
        7,
    ]
    assert make(creator, **GQA_ATTRIBUTES).parameters == GQA_PARAMETERS
    for kind in trt.PluginCapabilityType.__members__.values():
        assert made.get_capability_interface(kind) is made


def test_through_tensorrt_it_is_the_same(creator: Any) -> None:
    """From C++ and back, as the parser calls it."""
    fields = Fields(**ATTRIBUTES)
    made = trt.IPluginCreatorV3One.create_plugin(creator, "layer", fields.collection, BUILD)
    assert made.parameters == PARAMETERS
    assert trt.IPluginV3.get_capability_interface(made, trt.PluginCapabilityType.RUNTIME) is made


def test_numbers_of_64_bits_are_taken_too(creator: Any) -> None:
    wide = {name: (np.array([value], np.int64), KINDS.INT64) for name, value in ATTRIBUTES.items() if name != "scale"}
    assert make(creator, **wide, scale=(np.array([0.125]), KINDS.FLOAT64)).parameters == PARAMETERS


@pytest.mark.parametrize("cache", ["none", "int8", "int4v2"])
@pytest.mark.parametrize(("gate", "decoder"), FORMS)
def test_what_is_serialised_makes_the_same_plugin(creator: Any, cache: str, gate: int, decoder: int) -> None:
    made = make(creator, scale=0.1, cache_dtype=cache, has_gate=gate, has_value_decoder=decoder)
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
    assert again is not made
    assert (again.parameters, again.built, again.num_outputs) == (made.parameters, None, made.num_outputs)
    assert again.parameters.scale == np.float32(0.1)


@pytest.mark.parametrize(("compute", "cache"), VARIANTS)
def test_what_a_build_settled_is_serialised_too(creator: Any, compute: str, cache: str) -> None:
    made = make(creator, **stored_as(compute, cache))
    made.built = Built(Variant(SIZES, compute, cache), "sm_87", 8)
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
    assert (again.parameters, again.built) == (made.parameters, made.built)
    plain = make(creator, **GQA_ATTRIBUTES, **stored_as(compute, cache))
    plain.built = Built(Variant(GQA, compute, cache), "sm_87", 8)
    again = creator.create_plugin("layer", plain.get_fields_to_serialize(), RUNTIME)
    assert (again.parameters, again.built) == (plain.parameters, plain.built)


def test_serialised_fields_outlive_other_work(creator: Any) -> None:
    made = make(creator)
    fields = made.get_fields_to_serialize()
    for _ in range(200):
        make(creator, scale=0.5).get_fields_to_serialize()
    gc.collect()
    assert creator.create_plugin("layer", fields, RUNTIME).parameters == PARAMETERS


def test_a_clone_is_another_plugin_of_the_same_kind(creator: Any) -> None:
    made = make(creator, cache_dtype="int8")
    made.built = Built(Variant(SIZES, "fp16", "int8"), "sm_87", 8)
    cloned = made.clone()
    assert type(cloned) is type(made)
    assert (cloned.parameters, cloned.built, cloned.num_outputs) == (made.parameters, made.built, made.num_outputs)
    cloned.built = None
    cloned.num_outputs = 7
    assert made.built is not None
    assert made.num_outputs != 7


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            {"nonsense": 1},
            "has no attribute nonsense; expected num_query_heads, num_key_heads, num_latent_heads, scale, "
            "cache_dtype, has_gate, has_value_decoder, has_positions, has_branches, bias_rows, observe, "
            "plugin_namespace, plugin_version",
        ),
        ({"scale": 1}, "has scale of type INT32; expected FLOAT32 or FLOAT64"),
        ({"num_key_heads": 1.0}, "has num_key_heads of type FLOAT32; expected INT32 or INT64"),
        ({"num_key_heads": "1"}, "has num_key_heads of type CHAR; expected INT32 or INT64"),
        (
            {"num_key_heads": numbers(KINDS.BF16, np.int16, 1)},
            "has num_key_heads of type BF16; expected INT32 or INT64",
        ),
        ({"num_key_heads": numbers(KINDS.INT32, np.int32, 1, 2)}, "has 2 values for num_key_heads; expected one"),
        ({"num_key_heads": numbers(KINDS.INT32, np.int32)}, "has 0 values for num_key_heads; expected one"),
        (
            {"num_key_heads": 2},
            "has num_key_heads = 2; expected a number from 1 that divides num_query_heads, 5",
        ),
        (
            {"num_latent_heads": 0},
            "has num_latent_heads = 0; expected a number from 1 that divides num_query_heads, 5",
        ),
        (
            {"num_query_heads": -5},
            "has num_query_heads = -5; expected a number from 1 that divides num_query_heads, -5",
        ),
        ({"scale": 0.0}, "has scale = 0.0; expected more than 0"),
        ({"scale": float("nan")}, "has scale = nan; expected more than 0"),
        ({"scale": float("inf")}, "has scale = inf; expected more than 0"),
        ({"cache_dtype": "int2"}, "has cache_dtype = 'int2'; expected one of int8, fp8, int4, int4v2, none"),
        ({"cache_dtype": 1}, "has cache_dtype of type INT32; expected CHAR"),
        ({"has_gate": -1}, "has has_gate = -1; expected 0 or 1"),
        ({"has_value_decoder": 3}, "has has_value_decoder = 3; expected 0 or 1"),
        (
            {"compute": "fp16"},
            "in this engine lacks key_dim, latent_dim, hidden_size, architecture, processors; build the engine again",
        ),
    ],
)
def test_attributes_that_are_refused(creator: Any, attributes: dict[str, Any], text: str) -> None:
    assert message(make, creator, **attributes) == f"{OP} {text}"
    assert take_failures() == (f"{OP} {text}",)
    assert take_failures() == ()


@pytest.mark.parametrize(
    ("built", "text"),
    [
        ({"compute": "\x00\x00"}, "the kernels compute in fp16 or bf16, not in "),
        (
            {"hidden_size": 7},
            f"{OP} in this engine is damaged (hidden_size 7 is not a multiple of num_query_heads 5 times latent_dim "
            "128); build the engine again",
        ),
        (
            {"has_value_decoder": 0},
            f"{OP} in this engine is damaged (hidden_size 1280 is not num_query_heads 5 times latent_dim 128, and "
            "there is no value_decoder); build the engine again",
        ),
    ],
)
def test_engines_that_are_damaged(creator: Any, built: dict[str, Any], text: str) -> None:
    whole = {"key_dim": 64, "latent_dim": 128, "hidden_size": 1280, "compute": "fp16"}
    whole |= {"architecture": "sm_87", "processors": 8}
    assert make(creator, RUNTIME, **whole).built == Built(Variant(SIZES, "fp16", "fp16"), "sm_87", 8)
    assert message(make, creator, RUNTIME, **(whole | built)) == text


@pytest.mark.parametrize("lacks", ["num_query_heads", "num_key_heads", "num_latent_heads", "scale"])
def test_attributes_that_are_missing(creator: Any, lacks: str) -> None:
    fields = Fields(**{name: value for name, value in ATTRIBUTES.items() if name != lacks})
    text = f"{OP} lacks {lacks}; export the model again"
    assert message(creator.create_plugin, "layer", fields.collection, BUILD) == text


def test_from_c_plus_plus_a_refusal_is_no_plugin(creator: Any, capfd: pytest.CaptureFixture[str]) -> None:
    fields = Fields(num_query_heads=5)
    assert trt.IPluginCreatorV3One.create_plugin(creator, "layer", fields.collection, BUILD) is None
    (failure,) = take_failures()
    assert failure == f"{OP} lacks num_key_heads, num_latent_heads, scale; export the model again"
    assert failure in capfd.readouterr().err


# --- on a GPU --------------------------------------------------------------------------------------------------------

TORCH_TYPES = {
    torch.float16: HALF,
    torch.bfloat16: BF16,
    torch.float32: FLOAT,
    torch.int8: INT8,
    torch.float8_e4m3fn: FP8,
    torch.int64: INT64,
}


class PluginCall(Call):
    """A call of the op that goes through a plugin; the caches are in place."""

    def __init__(self, creator: Any, variant: Variant, past: tuple[int, ...], tokens: int, capacity: int) -> None:
        super().__init__(variant, past, tokens, capacity)
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
        )
        self.plugin = made.attach_to_context(None)
        self.scale = made.parameters.scale
        self.inputs = [self._tensor(name) for name in made.parameters.inputs]
        self.outputs = [self._tensor(name) for name in made.parameters.outputs]
        self.descs = descs([TORCH_TYPES[each.dtype] for each in self.inputs], [tuple(x.shape) for x in self.inputs])
        self.plugin.on_shape_change(self.descs, [])

    def _tensor(self, name: str) -> torch.Tensor:
        """The tensor of an input or output, by the op's name for it."""
        kernels_name = re.sub(r"^(past|present)_", "", name)
        if name != "past_length" and kernels_name != name and not name.endswith("_scale"):
            kernels_name += "_cache"
        return self[name if name == "past_length" else kernels_name]

    def launch(self, stream: Any = 0) -> None:
        workspace = self["workspace"].data_ptr() if self.workspace_bytes else 0
        inputs, outputs = ([each.data_ptr() for each in part] for part in (self.inputs, self.outputs))
        self.plugin.enqueue(self.descs, [], inputs, outputs, workspace, stream)


LENGTHS = pytest.mark.parametrize(("past", "tokens", "capacity"), [((0, 330, 17), 1, 333), ((0, 300, 129), 100, 400)])
EVERY_VARIANT = pytest.mark.parametrize(("compute", "cache"), VARIANTS)


@on_gpu
@EVERY_VARIANT
@LENGTHS
def test_on_a_gpu_it_is_exact(
    creator: Any, compute: str, cache: str, past: tuple[int, ...], tokens: int, capacity: int
) -> None:
    PluginCall(creator, Variant(GTA_1B, compute, cache), past, tokens, capacity).run().check()


@on_gpu
@pytest.mark.parametrize("cache", ["bf16", "int8"])
@LENGTHS
def test_on_a_gpu_grouped_query_attention_is_exact(
    creator: Any, cache: str, past: tuple[int, ...], tokens: int, capacity: int
) -> None:
    PluginCall(creator, Variant(GQA_9_3, "bf16", cache), past, tokens, capacity).run().check()


@on_gpu
@EVERY_VARIANT
@LENGTHS
def test_on_a_gpu_separate_caches_give_the_same(
    creator: Any, compute: str, cache: str, past: tuple[int, ...], tokens: int, capacity: int
) -> None:
    call = PluginCall(creator, Variant(GTA_1B, compute, cache), past, tokens, capacity)
    old = {place: call.inputs[place].clone() for place, _ in call.plugin.parameters.caches}
    before = {place: bits(each).clone() for place, each in old.items()}
    for place, present in call.plugin.parameters.caches:
        call.inputs[place] = old[place]
        call.outputs[present].view(torch.uint8).fill_(0xFF)
    call.run().check()
    for place, each in old.items():
        assert torch.equal(bits(each), before[place]), "the past cache was written to"


@on_gpu
@EVERY_VARIANT
@pytest.mark.parametrize("tokens", [1, 40])
def test_on_a_gpu_its_first_call_can_be_captured_and_replayed(
    creator: Any, compute: str, cache: str, tokens: int
) -> None:
    variant = Variant(GTA_1B, compute, cache)
    graphed, eager = (PluginCall(creator, variant, (200, 0), tokens, 300) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graphed.launch(stream.cuda_stream)
    torch.cuda.synchronize()
    assert torch.equal(graphed.memory.bytes_of("output"), graphed.before["output"])  # captured, not run
    for past in ((200, 0), (200 + tokens, tokens)):
        for call in (graphed, eager):
            call.set_past(past)
        graph.replay()
        eager.run()
        assert torch.equal(bits(graphed["output"]), bits(eager["output"]))
        assert max(graphed.output_errors()) <= TOLERANCE[compute]


@on_gpu
def test_on_a_gpu_two_contexts_interleave_on_two_streams(creator: Any) -> None:
    calls = [
        PluginCall(creator, Variant(GTA_1B, "fp16", "fp16"), (4000, 17), 1, 4096),
        PluginCall(creator, Variant(GTA_1B, "bf16", "int8"), (100, 0), 64, 512),
    ]
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        for call, stream in zip(calls, streams, strict=True):
            call.launch(stream.cuda_stream)
    torch.cuda.synchronize()
    for call in calls:
        call.check()


@on_gpu
@pytest.mark.parametrize("length", [-(2**63), -1, 4096, 2**63 - 1])
@pytest.mark.parametrize("tokens", [1, 64])
def test_on_a_gpu_any_past_length_stays_in_bounds(creator: Any, length: int, tokens: int) -> None:
    """The builder times the plugin with whatever is in memory."""
    call = PluginCall(creator, Variant(GTA_1B, "fp16", "fp16"), (length, 5), tokens, 128).run()
    call.memory.check_guards()


@on_gpu
def test_on_a_gpu_a_graph_of_54_layers_costs_what_the_bare_kernels_cost(creator: Any) -> None:
    layers, variant = 54, Variant(GTA_1B, "fp16", "fp16")
    stream = torch.cuda.Stream()

    def graph_of(calls: list[Call]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call.launch(stream.cuda_stream)
        return graph

    graphs = [
        graph_of([Call(variant, (2000,), 1, 2048) for _ in range(layers)]),
        graph_of([PluginCall(creator, variant, (2000,), 1, 2048) for _ in range(layers)]),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(30):
        for graph, measured in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            measured.append(start.elapsed_time(end))
    bare, plugin = (float(np.median(measured[5:])) for measured in times)
    assert plugin < 1.02 * bare, (plugin, bare)
