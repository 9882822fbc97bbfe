"""The plugin in TensorRT's own registry, and what it asks of the launch layer; on a GPU also what it computes.

The classes are those of TensorRT's lean runtime, which has no parser and no builder, and needs a GPU only to run
engines. Its descriptors have no format, so where formats matter a stand-in describes the tensors.
"""

from __future__ import annotations

import gc
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge import plugins
from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins import plugin_base
from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import attention_kernels
from gta_edge.plugins.attention.launches import plan_attention, programs_for
from gta_edge.plugins.attention.plugin import AttentionPlugin
from gta_edge.plugins.attention.plugin_call import Parameters, describe_call, largest_workspace_bytes
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_base import take_failures
from gta_edge.plugins.plugin_call_base import Built
from gta_edge.plugins.plugin_registry import plugin_class
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.gpu_calls import GQA as GQA_9_3
from tests.helpers.gpu_calls import GTA_1B, TOLERANCE, VARIANTS, Call, bits, on_gpu
from tests.helpers.plugin_values import KINDS, Fields, bounds, descs, numbers, trt
from tests.helpers.refusals import message

OP = "GroupedLatentAttention"
BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
HALF, BF16, FLOAT, INT8, FP8, INT64 = (
    getattr(trt.DataType, name) for name in ("HALF", "BF16", "FLOAT", "INT8", "FP8", "INT64")
)
TYPES = {"fp16": HALF, "bf16": BF16, "int8": INT8, "fp8": FP8}

SIZES = Sizes(5, 1, 1, 64, 128, 1280)
ATTRIBUTES: dict[str, Any] = {"num_query_heads": 5, "num_key_heads": 1, "num_latent_heads": 1, "scale": 0.125}
PARAMETERS = Parameters(5, 1, 1, 0.125)

# Grouped-query attention: neither gate nor value decoder; and each of them alone.
GQA = Sizes(8, 2, 2, 64, 64, 512, False, False)
GQA_ATTRIBUTES = ATTRIBUTES | {"num_query_heads": 8, "num_key_heads": 2, "num_latent_heads": 2}
GQA_ATTRIBUTES |= {"has_gate": 0, "has_value_decoder": 0}
GQA_PARAMETERS = Parameters(8, 2, 2, 0.125, False, False, False)
FORMS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def creator() -> Any:
    plugins.register(trt)
    return trt.get_plugin_registry().get_creator(OP, "1", "gta")


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    take_failures()
    yield
    take_failures()


def make(creator: Any, phase: Any = BUILD, **attributes: Any) -> Any:
    fields = Fields(**(ATTRIBUTES | attributes))
    return creator.create_plugin("layer", fields.collection, phase)


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
        "quantised_cache": KINDS.INT32,
        "has_gate": KINDS.INT32,
        "has_value_decoder": KINDS.INT32,
    }


def test_a_plugin_is_made_from_attributes(creator: Any) -> None:
    made = make(creator, plugin_namespace="gta", plugin_version="1")
    assert made.parameters == PARAMETERS
    assert made.built is None
    assert (made.plugin_name, made.plugin_version, made.plugin_namespace) == (OP, "1", "gta")
    assert made.num_outputs == 3
    assert make(creator, quantised_cache=1).num_outputs == 5
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


@pytest.mark.parametrize("quantised", [0, 1])
@pytest.mark.parametrize(("gate", "decoder"), FORMS)
def test_what_is_serialised_makes_the_same_plugin(creator: Any, quantised: int, gate: int, decoder: int) -> None:
    made = make(creator, scale=0.1, quantised_cache=quantised, has_gate=gate, has_value_decoder=decoder)
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
    assert again is not made
    assert (again.parameters, again.built, again.num_outputs) == (made.parameters, None, made.num_outputs)
    assert again.parameters.scale == np.float32(0.1)


@pytest.mark.parametrize(("compute", "cache"), VARIANTS)
def test_what_a_build_settled_is_serialised_too(creator: Any, compute: str, cache: str) -> None:
    made = make(creator, quantised_cache=int(cache != compute))
    made.built = Built(Variant(SIZES, compute, cache), "sm_87", 8)
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
    assert (again.parameters, again.built) == (made.parameters, made.built)
    plain = make(creator, **GQA_ATTRIBUTES, quantised_cache=int(cache != compute))
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
    made = make(creator, quantised_cache=1)
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
            "quantised_cache, has_gate, has_value_decoder, plugin_namespace, plugin_version",
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
        ({"quantised_cache": 2}, "has quantised_cache = 2; expected 0 or 1"),
        ({"has_gate": -1}, "has has_gate = -1; expected 0 or 1"),
        ({"has_value_decoder": 3}, "has has_value_decoder = 3; expected 0 or 1"),
        (
            {"compute": "fp16"},
            "in this engine lacks key_dim, latent_dim, hidden_size, cache, architecture, processors; "
            "build the engine again",
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
        ({"cache": "bf16"}, "a cache of type bf16 does not go with fp16; expected one of fp16, int8, fp8"),
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
    whole = {"key_dim": 64, "latent_dim": 128, "hidden_size": 1280, "compute": "fp16", "cache": "fp16"}
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


# --- types, shapes, formats ------------------------------------------------------------------------------------------


def input_types(compute: Any, cache: Any, quantised: bool, gate: int = 1, decoder: int = 1) -> list[Any]:
    given = [compute] * (3 + gate) + [cache, cache, INT64] + [compute] * (2 + decoder)
    return given + [FLOAT, FLOAT] * quantised


@pytest.mark.parametrize(("compute", "cache"), VARIANTS)
def test_types_of_the_outputs(creator: Any, compute: str, cache: str) -> None:
    quantised = cache != compute
    c, s = TYPES[compute], TYPES[cache]
    found = make(creator, quantised_cache=int(quantised)).get_output_data_types(input_types(c, s, quantised))
    assert found == [c, s, s] + [FLOAT, FLOAT] * quantised


@pytest.mark.parametrize(
    ("quantised", "changes", "text"),
    [
        (0, {0: FLOAT}, "query of type fp32 with query of fp32 and quantised_cache = 0; expected fp16 or bf16"),
        (0, {1: BF16}, "key of type bf16 with query of fp16 and quantised_cache = 0; expected fp16"),
        (0, {4: INT8}, "past_key of type int8 with query of fp16 and quantised_cache = 0; expected fp16"),
        (1, {4: HALF}, "past_key of type fp16 with query of fp16 and quantised_cache = 1; expected int8 or fp8"),
        (1, {5: FP8}, "past_latent of type fp8 with query of fp16 and quantised_cache = 1; expected int8"),
        (0, {6: FLOAT}, "past_length of type fp32 with query of fp16 and quantised_cache = 0; expected int64"),
        (0, {9: FLOAT}, "value_decoder of type fp32 with query of fp16 and quantised_cache = 0; expected fp16"),
        (1, {11: HALF}, "past_latent_scale of type fp16 with query of fp16 and quantised_cache = 1; expected fp32"),
        (0, {8: trt.DataType.INT32}, "sin of type int32 with query of fp16 and quantised_cache = 0; expected fp16"),
    ],
)
def test_types_that_are_refused(creator: Any, quantised: int, changes: dict[int, Any], text: str) -> None:
    types = input_types(HALF, INT8 if quantised else HALF, bool(quantised))
    for place, changed in changes.items():
        types[place] = changed
    made = make(creator, quantised_cache=quantised)
    assert message(made.get_output_data_types, types) == (
        f"{OP} has {text}: retype the model, and build a strongly typed network"
    )


def test_a_node_with_scales_that_does_not_say_so(creator: Any) -> None:
    text = message(make(creator).get_output_data_types, input_types(HALF, INT8, True))
    assert text.startswith(f"{OP} has 12 inputs; with quantised_cache = 0 it has 10: query, key, latent, gate, ")


def test_a_node_without_a_gate_that_does_not_say_so(creator: Any) -> None:
    types = input_types(HALF, HALF, False, 0, 0)
    text = message(make(creator).get_output_data_types, types)
    assert text.startswith(f"{OP} has 8 inputs; with quantised_cache = 0 it has 10: query, key, latent, gate, ")
    assert make(creator, **GQA_ATTRIBUTES).get_output_data_types(types) == [HALF] * 3
    text = message(make(creator, **GQA_ATTRIBUTES).get_output_data_types, [*types, HALF])
    assert text == (
        f"{OP} has 9 inputs; with quantised_cache = 0, has_gate = 0, has_value_decoder = 0 it has 8: query, key, "
        "latent, past_key, past_latent, past_length, cos, sin"
    )


@pytest.mark.parametrize("quantised", [0, 1])
def test_shapes_are_those_of_the_gate_and_the_caches(creator: Any, quantised: int) -> None:
    """The very expressions: nothing is computed, so nothing is lost of what TensorRT knows of them."""
    ranks = [3, 3, 3, 3, 4, 4, 1, 2, 2, 3] + [3, 3] * quantised
    inputs = [trt.DimsExprs(rank) for rank in ranks]
    made = make(creator, quantised_cache=quantised)
    found = made.get_output_shapes(inputs, [], None)
    assert [id(each) for each in found] == [id(inputs[place]) for place in [3, 4, 5] + [10, 11] * quantised]
    text = message(made.get_output_shapes, inputs[1:], [], None)
    assert text.startswith(
        f"{OP} has {len(inputs) - 1} inputs; with quantised_cache = {quantised} it has {len(inputs)}: "
    )


class Builder(SimpleNamespace):
    """Of expressions, which are tuples."""

    def constant(self, value: int) -> Any:
        return value

    def operation(self, operation: Any, *operands: Any) -> Any:
        return (operation, *operands)


@pytest.mark.parametrize("quantised", [0, 1])
@pytest.mark.parametrize("decoder", [0, 1])
def test_without_a_gate_the_width_is_that_of_all_heads(
    creator: Any, monkeypatch: pytest.MonkeyPatch, quantised: int, decoder: int
) -> None:
    """The values are as wide as the latents, or as what the value decoder makes of them."""
    made = make(creator, quantised_cache=quantised, has_gate=0, has_value_decoder=decoder)
    monkeypatch.setattr(trt, "DimsExprs", list)  # the binding's own holds only what a builder in C++ has made
    shapes = {name: [f"{name}.{axis}" for axis in range(4)] for name in made.parameters.inputs}
    output, *presents = made.get_output_shapes(list(shapes.values()), [], Builder())
    last = shapes["value_decoder" if decoder else "past_latent"][-1]
    assert output == ["query.0", "query.1", (trt.DimensionOperation.PROD, 5, last)]
    pasts = ["past_key", "past_latent", *["past_key_scale", "past_latent_scale"] * quantised]
    assert [id(each) for each in presents] == [id(shapes[name]) for name in pasts]


class Format(Enum):
    LINEAR = 0
    CHW32 = 5


@pytest.mark.parametrize(("quantised", "given"), [(False, 1), (True, 1), (True, 0)])
def test_every_combination_of_types_and_formats(
    creator: Any, monkeypatch: pytest.MonkeyPatch, quantised: bool, given: int
) -> None:
    """Each tensor of each good combination, with every other type and format in its place."""
    monkeypatch.setattr(trt, "TensorFormat", Format, raising=False)
    made = make(creator, quantised_cache=int(quantised), has_gate=given, has_value_decoder=given)
    inputs = len(made.parameters.inputs)
    caches = [INT8, FP8] if quantised else [None]
    good = []
    for compute, cache in itertools.product((HALF, BF16), caches):
        types = input_types(compute, cache or compute, quantised, given, given)
        good.append(types + made.get_output_data_types(types))
    accepted = {tuple(types[: place + 1]) for types in good for place in range(len(types))}
    for types in good:
        for place, other, format_ in itertools.product(range(len(types)), trt.DataType.__members__.values(), Format):
            in_out = [SimpleNamespace(desc=SimpleNamespace(type=each, format=Format.LINEAR)) for each in types]
            in_out[place] = SimpleNamespace(desc=SimpleNamespace(type=other, format=format_))
            expected = (*types[:place], other) in accepted and format_ is Format.LINEAR
            assert made.supports_format_combination(place, in_out, inputs) is expected, (place, other, format_)
            assert made.supports_format_combination(place, in_out, inputs + 2) is False


# --- sizes -----------------------------------------------------------------------------------------------------------


def shapes(b: int, t: int, s: int, p: int, sizes: Sizes = SIZES, quantised: bool = False) -> list[tuple[int, ...]]:
    n_q, n_k, n_c = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
    d_k, d_l, hidden = sizes.key_dim, sizes.latent_dim, sizes.hidden_size
    found: list[tuple[int, ...]] = [
        (b, t, n_q * d_k),
        (b, t, n_k * d_k),
        (b, t, n_c * d_l),
        (b, t, hidden),
        (b, n_k, s, d_k),
        (b, n_c, s, d_l),
        (b,),
        (p, d_k // 2),
        (p, d_k // 2),
        (n_q, d_l, hidden // n_q),
    ]
    if not getattr(sizes, "has_value_decoder", True):
        del found[9]
    if not getattr(sizes, "has_gate", True):
        del found[3]
    return found + [(b, n_k, s), (b, n_c, s)] * quantised


def profile(b: int, t: int, s: int, p: int, compute: str = "fp16", cache: str = "fp16") -> list[Any]:
    quantised = cache != compute
    types = input_types(TYPES[compute], TYPES[cache], quantised)
    return bounds(types, shapes(1, 1, s, p, quantised=quantised), shapes(b, t, s, p, quantised=quantised))


NAMES = ("fp16",) * 6 + ("int64",) + ("fp16",) * 3


@pytest.mark.parametrize(
    ("place", "shape", "text"),
    [
        (0, (2, 3, 321), "query of shape [2, 3, 321]; expected [2, 3, 320]"),
        (1, (2, 4, 64), "key of shape [2, 4, 64]; expected [2, 3, 64]"),
        (3, (2, 3), "gate of shape [2, 3]; expected 3 axes"),
        (4, (2, 2, 99, 64), "past_key of shape [2, 2, 99, 64]; expected [2, 1, 99, 64]"),
        (5, (2, 1, 98, 128), "past_latent of shape [2, 1, 98, 128]; expected [2, 1, 99, 128]"),
        (5, (2, 99, 128), "past_latent of shape [2, 99, 128]; expected 4 axes"),
        (6, (2, 1), "past_length of shape [2, 1]; expected [2]"),
        (8, (11, 32), "sin of shape [11, 32]; expected [99, 32]"),
        (9, (5, 128, 128), "value_decoder of shape [5, 128, 128]; expected [5, 128, 256]"),
    ],
)
def test_shapes_that_are_refused(place: int, shape: tuple[int, ...], text: str) -> None:
    good = shapes(2, 3, 99, 99)
    assert describe_call(PARAMETERS, NAMES, tuple(good)).capacity == 99
    good[place] = shape
    assert message(describe_call, PARAMETERS, NAMES, tuple(good)) == f"{OP} has {text}"


@pytest.mark.parametrize(("gate", "decoder"), FORMS[:3])
def test_calls_without_a_gate_or_a_value_decoder(gate: int, decoder: int) -> None:
    heads, width = (8, 2, 2), 512 * (1 + decoder)
    parameters = Parameters(*heads, 0.125, False, bool(gate), bool(decoder))
    sizes = Sizes(*heads, 64, 64, width, bool(gate), bool(decoder))
    types, good = ("fp16",) * (5 + gate) + ("int64",) + ("fp16",) * (2 + decoder), shapes(2, 3, 99, 99, sizes)
    call = describe_call(parameters, types, tuple(good))
    assert (call.variant, call.sizes) == (Variant(sizes, "fp16", "fp16"), (2, 3, 99))
    good[1] = (2, 4, 128)
    assert message(describe_call, parameters, types, tuple(good)) == (
        f"{OP} has key of shape [2, 4, 128]; expected [2, 3, 128]"
    )
    if gate:
        good[3] = (2, 3, 1024)
        assert (
            "hidden_size 1024 is not num_query_heads 8 times latent_dim 64, and there is no value_decoder"
            in message(describe_call, parameters, types, tuple(good))
        )


def test_heads_of_keys_and_of_values_are_as_many_without_a_value_decoder() -> None:
    parameters = replace(GQA_PARAMETERS, num_latent_heads=1)
    sizes = SimpleNamespace(**vars(GQA) | {"num_latent_heads": 1})
    types = ("fp16",) * 5 + ("int64",) + ("fp16",) * 2
    text = message(describe_call, parameters, types, tuple(shapes(1, 1, 64, 64, sizes)))  # type: ignore[arg-type]  # no Sizes can say this
    assert "num_latent_heads 1 is not num_key_heads 2, and there is no value_decoder" in text


def test_sizes_that_there_are_no_kernels_for() -> None:
    for sizes, text in (
        (
            Sizes(5, 1, 1, 40, 128, 1280),
            "the kernels have no key width of 40; expected a multiple of 16 from 16 to 128",
        ),
        (Sizes(5, 1, 1, 64, 512, 2560), "no latent width of 512"),
    ):
        assert text in message(describe_call, PARAMETERS, NAMES, tuple(shapes(1, 1, 64, 64, sizes)))
    odd = shapes(1, 1, 64, 64, SimpleNamespace(**(vars(SIZES) | {"hidden_size": 1281})))  # type: ignore[arg-type]
    assert "do not fit its attributes: hidden_size 1281" in message(describe_call, PARAMETERS, NAMES, tuple(odd))
    assert message(describe_call, PARAMETERS, NAMES, tuple(shapes(1, 65, 64, 64))) == (
        f"{OP} has 65 new tokens in caches for 64; expected at most 64: append smaller chunks"
    )


@pytest.mark.parametrize(("batch", "tokens", "capacity"), [(1, 1, 4096), (3, 300, 2048), (8, 20, 700), (40, 16, 3000)])
@pytest.mark.parametrize("processors", [4, 16, 132])
def test_the_workspace_suffices_for_all_smaller_calls(batch: int, tokens: int, capacity: int, processors: int) -> None:
    of = Variant(SIZES, "fp16", "int8")
    largest = largest_workspace_bytes(of, "sm_87", processors, batch=batch, tokens=tokens, capacity=capacity)
    made = programs_for(of, "sm_87")
    needed = [
        plan_attention(made, fewer, batch=b, tokens=t, capacity=s).workspace_bytes
        for b in range(1, batch + 1)
        for t in (*range(1, min(tokens, tiling.DECODE_TOKENS) + 1), tokens)
        for s in (tokens, capacity // 2, capacity - 1, capacity)
        for fewer in (1, processors - 1, processors)
    ]
    assert largest == max(needed)


# --- on a GPU that is not there --------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    for each in (current_gpu, attention_kernels):
        each.cache_clear()
    fake = FakeCuda().install(monkeypatch)
    driver = sys.modules["cuda.bindings.driver"]
    monkeypatch.setattr(driver, "cuCtxGetDevice", lambda: (0, 0), raising=False)
    monkeypatch.setattr(
        driver,
        "cuMemcpyDtoDAsync",
        lambda *arguments: (fake.launches.append(("copy", *arguments)), (int(fake.fails == "copy"),))[1],
        raising=False,
    )
    yield fake
    for each in (current_gpu, attention_kernels):
        each.cache_clear()


def configured(creator: Any, bound: list[Any], **attributes: Any) -> Any:
    made = make(creator, **attributes)
    made.configure_plugin(bound, [])
    return made


def test_a_build_settles_types_sizes_and_gpu(creator: Any, cuda: FakeCuda) -> None:
    made = configured(creator, profile(4, 512, 2048, 4096, "bf16", "fp8"), quantised_cache=1)
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


class Engine:
    """Calls a plugin as an execution context does."""

    def __init__(self, plugin: Any, compute: str = "fp16", cache: str = "fp16", **sizes: int) -> None:
        self.plugin = plugin.attach_to_context(None)
        parameters = self.plugin.parameters
        quantised, has = parameters.quantised_cache, (int(parameters.has_gate), int(parameters.has_value_decoder))
        types = input_types(TYPES[compute], TYPES[cache], quantised, *has)
        self.descs = descs(types, shapes(**sizes, sizes=SIZES if any(has) else GQA, quantised=quantised))
        self.plugin.on_shape_change(self.descs, [])

    def enqueue(self, stream: int = 7, **moved: int) -> None:
        parameters = self.plugin.parameters
        inputs = [ADDRESSES[name] for name in parameters.inputs]
        outputs = [moved.get(name, ADDRESSES[name.replace("present", "past")]) for name in parameters.outputs]
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
    Engine(make(creator, quantised_cache=1), "bf16", "int8", b=2, t=300, s=512, p=1024).enqueue()
    append, prefill = cuda.launches
    caches = [0x5000, 0x6000, 0xD004, 0xE008, 0x7008, 0x8000, 0x9000]
    assert (append[2], prefill[2]) == ("gta_append", "gta_prefill")
    assert addresses_of(append) == [0x2000, 0x3000, *caches]
    assert addresses_of(prefill) == [0x1000, 0x4000, 0xA000, *caches, 0xB000]


@pytest.mark.parametrize("quantised", [0, 1])
def test_grouped_query_attention_has_neither_gate_nor_value_decoder(
    creator: Any, cuda: FakeCuda, quantised: int
) -> None:
    made = make(creator, **GQA_ATTRIBUTES, quantised_cache=quantised)
    for tokens in (3, 300):
        engine = Engine(made, "bf16", "int8" if quantised else "bf16", b=2, t=tokens, s=512, p=1024)
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
    Engine(make(creator, quantised_cache=1), "fp16", "fp8", b=2, t=3, s=512, p=1024).enqueue()
    assert [each[0] for each in cuda.launches if each[0] == "copy"] == []


def test_a_present_cache_elsewhere_gets_the_past_first(creator: Any, cuda: FakeCuda) -> None:
    engine = Engine(make(creator, quantised_cache=1), "bf16", "int8", b=2, t=3, s=512, p=1024)
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
    engine.descs = descs(input_types(HALF, HALF, False), shapes(3, 40, 256, 1024))
    engine.enqueue()
    assert cuda.launches[0][2] == "gta_append"
    assert numbers_of(cuda.launches[0]) == [40, 256, 1024]


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
            quantised_cache=int(variant.quantised),
            has_gate=int(sizes.has_gate),
            has_value_decoder=int(sizes.has_value_decoder),
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
