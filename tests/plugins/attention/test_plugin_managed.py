"""The plugin of a node with inputs of a managed cache: attributes, types, shapes, and what an engine keeps of them."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import FEATURE_INPUTS, OUTPUTS, Features
from gta_edge.plugins.attention.kernels import BUFFERS_OF
from gta_edge.plugins.attention.launches import plan_attention, programs_for, signature
from gta_edge.plugins.attention.plugin_call import describe_call, largest_workspace_bytes, read_parameters
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.plugin_call_base import Built
from tests.helpers.attention_plugins import (
    ATTRIBUTES,
    FLOAT,
    HALF,
    INT64,
    OP,
    PARAMETERS,
    RUNTIME,
    SIZES,
    TYPES,
    make,
    stored_as,
)
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.managed_plugins import FEATURES, WORDS, attributes, input_shapes, input_types
from tests.helpers.plugin_values import bounds, descs, trt
from tests.helpers.refusals import message

pytestmark = pytest.mark.usefixtures("no_failures")

MANAGED = Features("mass", 2, has_positions=True)
NAMES = {HALF: "fp16", FLOAT: "fp32", INT64: "int64"}

every_feature = pytest.mark.parametrize("features", FEATURES, ids=lambda of: "-".join(attributes(of)))


def described(features: Features, shapes: list[tuple[int, ...]], exact: bool = True) -> Any:
    parameters = read_parameters(ATTRIBUTES | attributes(features))
    types = tuple(NAMES[each] for each in input_types(features))
    return describe_call(parameters, types, tuple(shapes), exact)


# --- attributes ------------------------------------------------------------------------------------------------------


@every_feature
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_inputs_and_outputs_are_what_the_attributes_say(creator: Any, features: Features, cache: str) -> None:
    made = make(creator, **attributes(features), **stored_as("fp16", cache))
    inputs, outputs = made.parameters.inputs, made.parameters.outputs
    given = [name for name in inputs if name in FEATURE_INPUTS]
    assert given == [name for name in FEATURE_INPUTS if name in features.inputs]
    assert ("present_received" in outputs) == (features.observe is not None)
    assert made.num_outputs == len(outputs) == 3 + (features.observe is not None) + 2 * (cache == "int8")
    scales = ["past_key_scale", "past_latent_scale"] if cache == "int8" else []
    assert list(inputs[10 + len(given) :]) == scales  # behind all others
    for past, present in made.parameters.caches:
        assert inputs[past].replace("past", "present") == outputs[present]
    types = input_types(features, cache=cache)
    held = [TYPES[cache]] * 2 + [FLOAT] * (features.observe is not None) + [FLOAT, FLOAT] * (cache == "int8")
    assert made.get_output_data_types(types) == [HALF, *held]


def test_without_any_it_is_the_plugin_of_before(creator: Any) -> None:
    explicit = {"has_positions": 0, "has_branches": 0, "bias_rows": 0, "observe": "none"}
    assert make(creator, **explicit).parameters == make(creator).parameters == PARAMETERS
    assert PARAMETERS.features == Features()


@every_feature
def test_what_is_serialised_makes_the_same_plugin(creator: Any, features: Features) -> None:
    made = make(creator, **attributes(features))
    for built in (None, Built(Variant(SIZES, "fp16", "fp16", features), "sm_87", 8)):
        made.built = built
        again = creator.create_plugin("layer", made.get_fields_to_serialize(), RUNTIME)
        assert (again.parameters, again.built, again.num_outputs) == (made.parameters, built, made.num_outputs)
    assert made.timing_cache_id != make(creator).timing_cache_id


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"observe": "most"}, "has observe = 'most'; expected one of mass, last, none"),
        ({"observe": "m\nass"}, "has observe = 'm\\nass'; expected one of mass, last, none"),
        ({"observe": 1}, "has observe of type INT32; expected CHAR"),
        ({"bias_rows": 9}, "has bias_rows = 9; expected 0 to 8"),
        ({"bias_rows": -1}, "has bias_rows = -1; expected 0 to 8"),
        ({"has_positions": 2}, "has has_positions = 2; expected 0 or 1"),
        ({"has_branches": -1}, "has has_branches = -1; expected 0 or 1"),
    ],
)
def test_attributes_that_are_refused(creator: Any, wrong: dict[str, Any], text: str) -> None:
    assert message(make, creator, **wrong) == f"{OP} {text}"


# --- types and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANAGED.inputs)
def test_types_that_are_refused(creator: Any, name: str) -> None:
    made = make(creator, **attributes(MANAGED))
    types = input_types(MANAGED)
    place = made.parameters.inputs.index(name)
    expected, types[place] = NAMES[types[place]], HALF
    assert message(made.get_output_data_types, types) == (
        f"{OP} has {name} of type fp16 with query of fp16 and cache_dtype = none, has_positions = 1, bias_rows = 2, "
        f"observe = mass; expected {expected}: retype the model, and build a strongly typed network"
    )


def test_a_node_with_such_inputs_that_does_not_say_so(creator: Any) -> None:
    text = message(make(creator).get_output_data_types, input_types(MANAGED))
    assert text.startswith(f"{OP} has 15 inputs; with cache_dtype = none it has 10: query, key, latent, gate, ")
    text = message(make(creator, **attributes(MANAGED)).get_output_data_types, input_types(Features()))
    assert text.endswith("value_decoder, positions, row_bias, past_received, query_weight, decay")


@every_feature
def test_shapes_of_the_outputs_are_the_inputs_own(creator: Any, features: Features) -> None:
    made = make(creator, **attributes(features))
    given = {name: trt.DimsExprs(1 + place % 3) for place, name in enumerate(made.parameters.inputs)}
    found = made.get_output_shapes(list(given.values()), [], None)
    pasts = ["past_key", "past_latent", "past_received"][: len(found) - 1]
    assert [id(each) for each in found] == [id(given[name]) for name in ("gate", *pasts)]
    assert len(found) == len(OUTPUTS) - (features.observe is None)


class Format(Enum):
    LINEAR = 0
    CHW32 = 5


@every_feature
def test_every_combination_of_types_and_formats(
    creator: Any, monkeypatch: pytest.MonkeyPatch, features: Features
) -> None:
    monkeypatch.setattr(trt, "TensorFormat", Format, raising=False)
    made = make(creator, **attributes(features))
    inputs = input_types(features)
    types = inputs + made.get_output_data_types(inputs)
    for place in range(10, len(types)):  # those before are as without features
        for other in trt.DataType.__members__.values():
            for format_ in Format:
                in_out = [SimpleNamespace(desc=SimpleNamespace(type=each, format=Format.LINEAR)) for each in types]
                in_out[place] = SimpleNamespace(desc=SimpleNamespace(type=other, format=format_))
                expected = other == types[place] and format_ is Format.LINEAR
                assert made.supports_format_combination(place, in_out, len(inputs)) is expected, (place, other, format_)


@every_feature
def test_calls(features: Features) -> None:
    call = described(features, input_shapes(features, 2, 3, 99, 120))
    assert call.variant == Variant(SIZES, "fp16", "fp16", features)
    assert (call.sizes, call.positions) == ((2, 3, 99), 120)
    assert call.branch_rows == (WORDS if features.has_branches else 0)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("positions", (2, 4), "positions of shape [2, 4]; expected [2, 3]"),
        ("positions", (3,), "positions of shape [3]; expected [2, 3]"),
        ("row_bias", (2, 2), "row_bias of shape [2, 2]; expected [2, 3]"),
        ("row_bias", (1, 3), "row_bias of shape [1, 3]; expected [2, 3]"),
        ("branch_start", (2, 1), "branch_start of shape [2, 1]; expected [2]"),
        ("branches", (3, WORDS), f"branches of shape [3, {WORDS}]; expected [2, {WORDS}]"),
        ("branches", (2,), "branches of shape [2]; expected 2 axes"),
        ("past_received", (2, 1, 99), "past_received of shape [2, 1, 99]; expected [2, 99]"),
        ("past_received", (2, 98), "past_received of shape [2, 98]; expected [2, 99]"),
        ("query_weight", (2, 99), "query_weight of shape [2, 99]; expected [2, 3]"),
        ("decay", (1,), "decay of shape [1]; expected [2]"),
    ],
)
def test_shapes_that_are_refused(name: str, shape: tuple[int, ...], text: str) -> None:
    features = Features("mass", 3, has_positions=True, has_branches=True)
    shapes = input_shapes(features, 2, 3, 99, 120)
    shapes[10 + features.inputs.index(name)] = shape
    assert message(described, features, shapes) == f"{OP} has {text}"


@every_feature
@pytest.mark.parametrize(("batch", "tokens", "capacity"), [(1, 1, 4096), (3, 64, 700)])
def test_the_workspace_suffices_for_all_smaller_calls(
    features: Features, batch: int, tokens: int, capacity: int
) -> None:
    of = Variant(SIZES, "fp16", "int8", features)
    largest = largest_workspace_bytes(of, "sm_87", 16, batch=batch, tokens=tokens, capacity=capacity)
    made = programs_for(of, "sm_87")
    needed = [
        plan_attention(made, processors, batch=b, tokens=t, capacity=s).workspace_bytes
        for b in range(1, batch + 1)
        for t in range(1, tokens + 1)
        for s in (max(t, 64), capacity // 2 + t, capacity - 1, capacity)
        for processors in (1, 15, 16)
    ]
    assert largest == max(needed)


# --- launches --------------------------------------------------------------------------------------------------------


STREAM = 7


def enqueue(plugin: Any, features: Features, tokens: int, cuda: FakeCuda, **moved: int) -> dict[str, dict[str, Any]]:
    """Enqueue a call whose inputs lie at addresses of their own; what each kernel got by the name of its parameter."""
    shapes = input_shapes(features, 2, tokens, 96, 120)
    given = descs(input_types(features), shapes)
    context = plugin.attach_to_context(None)
    context.on_shape_change(given, [])
    parameters = context.parameters
    addresses = {name: 0x1000 * (place + 1) for place, name in enumerate(parameters.inputs)}
    addresses["output"] = 0x100000
    outputs = [moved.get(name, addresses[name.replace("present", "past")]) for name in parameters.outputs]
    cuda.launches.clear()
    context.enqueue(given, [], [addresses[name] for name in parameters.inputs], outputs, 0x200000, STREAM)
    found = {}
    for each in cuda.launches:
        if each[0] != "copy":
            of = signature(each[2], Variant(SIZES, "fp16", "fp16", features))
            found[each[2]] = dict(zip((*of.addresses, *of.numbers), each[3], strict=True))
    return found | {"addresses": addresses}


@every_feature
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_kernels_get_the_inputs_that_there_are(creator: Any, cuda: FakeCuda, features: Features, tokens: int) -> None:
    found = enqueue(make(creator, **attributes(features)), features, tokens, cuda)
    addresses = found.pop("addresses")
    assert set(found) in ({"gta_decode_split", "gta_decode_combine"}, {"gta_append", "gta_prefill"})
    seen: dict[str, int] = {}
    for values in found.values():
        seen |= {name: value for name, value in values.items() if name not in ("mixes", "sums", "scores")}
    for name in features.inputs:
        if BUFFERS_OF[name] in seen:
            assert seen[BUFFERS_OF[name]] == addresses[name], name
    decodes = "gta_decode_split" in found
    assert decodes == (tokens <= (64 if features.has_branches else 16))
    expected = {BUFFERS_OF[name] for name in features.inputs}
    assert expected <= set(seen) if decodes else {"token_positions", "row_bias", "received"} & expected <= set(seen)
    if features.has_branches:
        assert found["gta_decode_split"]["branch_rows"] == WORDS
    assert not [each for each in cuda.launches if each[0] == "copy"]  # past and present are one memory


def test_a_prompt_in_an_engine_for_trees(creator: Any, cuda: FakeCuda) -> None:
    """More tokens than a word has bits: each sees those before it, and no words are read."""
    made = make(creator, **attributes(TREES))
    bound = bounds(input_types(TREES), input_shapes(TREES, 1, 1, 96, 120), input_shapes(TREES, 2, 96, 96, 120))
    made.configure_plugin(bound, [])
    assert made.get_workspace_size(bound, []) > 0
    found = enqueue(made, TREES, 70, cuda)
    assert [each[2] for each in cuda.launches] == ["gta_append", "gta_prefill"]
    assert found["gta_append"]["token_positions"] == found["addresses"]["positions"]


def test_what_rows_received_elsewhere_gets_the_past_first(creator: Any, cuda: FakeCuda) -> None:
    found = enqueue(make(creator, **attributes(MANAGED)), MANAGED, 3, cuda, present_received=0x500000)
    past = found["addresses"]["past_received"]
    assert cuda.launches[0] == ("copy", 0x500000, past, 2 * 96 * 4, STREAM)
    assert found["gta_decode_combine"]["received"] == 0x500000


def test_a_build_settles_the_features(creator: Any, cuda: FakeCuda) -> None:
    made = make(creator, **attributes(MANAGED))
    types = input_types(MANAGED)
    bound = bounds(types, input_shapes(MANAGED, 1, 1, 96, 120), input_shapes(MANAGED, 2, 64, 96, 120))
    made.configure_plugin(bound, [])
    assert made.built == Built(Variant(SIZES, "fp16", "fp16", MANAGED), "sm_87", 8)
    size = largest_workspace_bytes(made.built.variant, "sm_87", 8, batch=2, tokens=64, capacity=96)
    plain = largest_workspace_bytes(Variant(SIZES, "fp16", "fp16"), "sm_87", 8, batch=2, tokens=64, capacity=96)
    assert made.get_workspace_size(bound, []) == size > plain  # scores are kept where attention is observed
