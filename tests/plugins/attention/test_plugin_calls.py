"""Types, formats, shapes and sizes that the plugin takes, as TensorRT asks for them.

The descriptors of TensorRT's lean runtime have no format, so where formats matter a stand-in describes the tensors.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.launches import plan_attention, programs_for
from gta_edge.plugins.attention.plugin_call import Parameters, describe_call, largest_workspace_bytes
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers.attention_plugins import (
    BF16,
    FLOAT,
    FORMS,
    FP8,
    GQA,
    GQA_ATTRIBUTES,
    GQA_PARAMETERS,
    HALF,
    INT8,
    OP,
    PARAMETERS,
    SIZES,
    TYPES,
    input_types,
    make,
    shapes,
    stored_as,
    types_beside,
)
from tests.helpers.gpu_calls import VARIANTS
from tests.helpers.plugin_values import trt
from tests.helpers.refusals import message

pytestmark = pytest.mark.usefixtures("no_failures")


# --- types, shapes, formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "cache"), VARIANTS)
def test_types_of_the_outputs(creator: Any, compute: str, cache: str) -> None:
    types = input_types(compute, cache)
    found = make(creator, **stored_as(compute, cache)).get_output_data_types(types)
    assert found == [TYPES[compute], *[TYPES[cache]] * 2, *types_beside(compute, cache)]


@pytest.mark.parametrize(
    ("cache", "changes", "text"),
    [
        ("fp16", {0: FLOAT}, "query of type fp32 with query of fp32 and {}; expected fp16 or bf16"),
        ("fp16", {1: BF16}, "key of type bf16 with query of fp16 and {}; expected fp16"),
        ("fp16", {4: INT8}, "past_key of type int8 with query of fp16 and {}; expected fp16"),
        ("int8", {4: HALF}, "past_key of type fp16 with query of fp16 and {}; expected int8"),
        ("fp8", {4: INT8}, "past_key of type int8 with query of fp16 and {}; expected fp8"),
        ("int4", {4: trt.DataType.UINT8}, "past_key of type UINT8 with query of fp16 and {}; expected int8"),
        ("int8", {5: FP8}, "past_latent of type fp8 with query of fp16 and {}; expected int8"),
        ("fp16", {6: FLOAT}, "past_length of type fp32 with query of fp16 and {}; expected int64"),
        ("fp16", {9: FLOAT}, "value_decoder of type fp32 with query of fp16 and {}; expected fp16"),
        ("int8", {11: HALF}, "past_latent_scale of type fp16 with query of fp16 and {}; expected fp32"),
        ("int4", {11: FLOAT}, "past_latent_scale of type fp32 with query of fp16 and {}; expected fp16"),
        ("int4v2", {12: BF16}, "past_key_open of type bf16 with query of fp16 and {}; expected fp16"),
        ("fp16", {8: trt.DataType.INT32}, "sin of type int32 with query of fp16 and {}; expected fp16"),
    ],
)
def test_types_that_are_refused(creator: Any, cache: str, changes: dict[int, Any], text: str) -> None:
    types = input_types("fp16", cache)
    for place, changed in changes.items():
        types[place] = changed
    made = make(creator, **stored_as("fp16", cache))
    named = text.format(f"cache_dtype = {'none' if cache == 'fp16' else cache}")
    assert message(made.get_output_data_types, types) == (
        f"{OP} has {named}: retype the model, and build a strongly typed network"
    )


def test_a_node_with_scales_that_does_not_say_so(creator: Any) -> None:
    text = message(make(creator).get_output_data_types, input_types("fp16", "int8"))
    assert text.startswith(f"{OP} has 12 inputs; with cache_dtype = none it has 10: query, key, latent, gate, ")


def test_a_node_without_a_gate_that_does_not_say_so(creator: Any) -> None:
    types = input_types(gate=0, decoder=0)
    text = message(make(creator).get_output_data_types, types)
    assert text.startswith(f"{OP} has 8 inputs; with cache_dtype = none it has 10: query, key, latent, gate, ")
    assert make(creator, **GQA_ATTRIBUTES).get_output_data_types(types) == [HALF] * 3
    text = message(make(creator, **GQA_ATTRIBUTES).get_output_data_types, [*types, HALF])
    assert text == (
        f"{OP} has 9 inputs; with cache_dtype = none, has_gate = 0, has_value_decoder = 0 it has 8: query, key, "
        "latent, past_key, past_latent, past_length, cos, sin"
    )


@pytest.mark.parametrize(("cache", "beside"), [("none", 0), ("int8", 2), ("int4", 4)])
def test_shapes_are_those_of_the_gate_and_the_caches(creator: Any, cache: str, beside: int) -> None:
    """The very expressions: nothing is computed, so nothing is lost of what TensorRT knows of them."""
    inputs = [trt.DimsExprs(len(shape)) for shape in shapes(2, 3, 64, 64, cache=cache)]
    made = make(creator, cache_dtype=cache)
    found = made.get_output_shapes(inputs, [], None)
    places = [3, 4, 5, 10, 11, 12, 13][: 3 + beside]
    assert [id(each) for each in found] == [id(inputs[place]) for place in places]
    text = message(made.get_output_shapes, inputs[1:], [], None)
    assert text.startswith(f"{OP} has {len(inputs) - 1} inputs; with cache_dtype = {cache} it has {len(inputs)}: ")


class Builder(SimpleNamespace):
    """Of expressions, which are tuples."""

    def constant(self, value: int) -> Any:
        return value

    def operation(self, operation: Any, *operands: Any) -> Any:
        return (operation, *operands)


@pytest.mark.parametrize("cache", ["none", "int8", "int4"])
@pytest.mark.parametrize("decoder", [0, 1])
def test_without_a_gate_the_width_is_that_of_all_heads(
    creator: Any, monkeypatch: pytest.MonkeyPatch, cache: str, decoder: int
) -> None:
    """The values are as wide as the latents, or as what the value decoder makes of them."""
    made = make(creator, cache_dtype=cache, has_gate=0, has_value_decoder=decoder)
    monkeypatch.setattr(trt, "DimsExprs", list)  # the binding's own holds only what a builder in C++ has made
    shapes = {name: [f"{name}.{axis}" for axis in range(4)] for name in made.parameters.inputs}
    output, *presents = made.get_output_shapes(list(shapes.values()), [], Builder())
    wide = "past_latent_open" if cache == "int4" else "past_latent"  # as many as there are channels
    last = shapes["value_decoder" if decoder else wide][-1]
    assert output == ["query.0", "query.1", (trt.DimensionOperation.PROD, 5, last)]
    pasts = [name for name in shapes if name.startswith("past_") and name != "past_length"]
    assert [id(each) for each in presents] == [id(shapes[name]) for name in pasts]


class Format(Enum):
    LINEAR = 0
    CHW32 = 5


@pytest.mark.parametrize(("cache", "given"), [("none", 1), ("int8", 1), ("fp8", 0), ("int4", 1)])
def test_every_combination_of_types_and_formats(
    creator: Any, monkeypatch: pytest.MonkeyPatch, cache: str, given: int
) -> None:
    """Each tensor of each good combination, with every other type and format in its place."""
    monkeypatch.setattr(trt, "TensorFormat", Format, raising=False)
    made = make(creator, cache_dtype=cache, has_gate=given, has_value_decoder=given)
    inputs = len(made.parameters.inputs)
    good = []
    for compute in ("fp16", "bf16"):
        types = input_types(compute, compute if cache == "none" else cache, given, given)
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
    parameters = Parameters(*heads, 0.125, has_gate=bool(gate), has_value_decoder=bool(decoder))
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
    text = message(describe_call, parameters, types, tuple(shapes(1, 1, 64, 64, sizes)))  # no Sizes can say this
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
    odd = shapes(1, 1, 64, 64, SimpleNamespace(**(vars(SIZES) | {"hidden_size": 1281})))
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
