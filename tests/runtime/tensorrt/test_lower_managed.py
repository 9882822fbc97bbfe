"""Graphs of a managed cache as they go to TensorRT: inputs, capacities by layer, 8 bits, and what they compute.

The policy's side is neutral here: positions are rows, no bias, every query counts. Then logits are those of the
bundle's own graph, and what rows received is a sum that is known. Eviction is tested where sessions are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gta_edge.errors import CapacityError, EngineError, InputError
from gta_edge.graph.io import load_graph, run_passes
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import managed_shapes
from gta_edge.plugins.attention.definition import FEATURE_INPUTS, MODEL_INPUTS, SCALE_INPUTS, Features
from gta_edge.plugins.attention.plugin_call import read_parameters
from gta_edge.runtime.tensorrt.lower import lower
from gta_edge.runtime.tensorrt.passes.set_capacity import SetCapacityPass
from tests.helpers import reference
from tests.helpers.tensorrt_graphs import BATCH, LAYERS, TABLE, VOCAB, Bundles, Exact, in_reference, on_onnxruntime

CAPACITIES = (16, 13)  # of tensorrt_graphs' prompts, of 8 tokens, every layer holds all
FEATURES = [
    Features(has_positions=True),
    Features("mass", 2, has_positions=True),
    Features("last", has_positions=True),
]
ONNX = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.INT8}

every_feature = pytest.mark.parametrize("features", FEATURES, ids=lambda of: f"{of.observe}-{of.bias_rows}")

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def managed_steps(run: Run, name: str, features: Features, dtype: type) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps of ``tensorrt_graphs.logits``, given as a managed cache's; all logits, and the outputs of the last."""
    rng, config = np.random.default_rng(0), parse_config(TABLE[name])
    state = {
        f"past_{cache.name}.{i}": np.zeros((BATCH, cache.heads, capacity, cache.width), dtype)
        for i, capacity in enumerate(CAPACITIES)
        for cache in config.caches
    }
    if features.observe:
        # rows that nothing was written to hold anything
        state |= {f"past_received.{i}": np.full((BATCH, s), 7, np.float32) for i, s in enumerate(CAPACITIES)}
    length, found = np.array([0, 0]), []
    for tokens, real in ((5, [5, 3]), (1, [1, 1]), (1, [1, 1]), (1, [1, 1])):
        weight = (np.arange(tokens) < np.array(real)[:, None]).astype(np.float32)
        feeds = {
            "input_ids": rng.integers(0, VOCAB, (BATCH, tokens)),
            "logit_positions": np.tile(np.arange(tokens), (BATCH, 1)),
            "past_length": np.tile(length, (LAYERS, 1)),
            "positions": length[:, None] + np.arange(tokens),
            "row_bias": np.zeros((LAYERS, BATCH, features.bias_rows), np.float32),
            "query_weight": weight if features.observe == "mass" else 1e6 * weight,
            "decay": np.ones(BATCH, np.float32),
        }
        shapes = managed_shapes(features, batch=BATCH, tokens=tokens, capacities=CAPACITIES)
        feeds = {key: value for key, value in feeds.items() if key in (*shapes, "input_ids", "logit_positions")}
        outputs = run(feeds | state)
        found.append(outputs["logits"])
        state = {key: outputs[key.replace("past", "present")] for key in state}
        length = length + real
    return np.concatenate(found, axis=1), outputs


def written(bundles: Bundles, directory: Path, name: str, features: Features, **options: Any) -> Path:
    bundle = bundles(name, "fp32")
    return lower(bundle, directory, capacity=CAPACITIES, features=features, **options)


# --- what it computes ------------------------------------------------------------------------------------------------


@every_feature
@pytest.mark.parametrize("newer_ops", [True, False], ids=["newer ops", "older ops"])
@pytest.mark.parametrize(("compute", "bound"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_it_computes_what_the_bundle_does(
    bundles: Bundles, exact: Exact, tmp_path: Path, features: Features, newer_ops: bool, compute: str, bound: float
) -> None:
    name = "gta, tied" if features.observe else "gqa, tied"
    path = written(bundles, tmp_path, name, features, form="function", compute=compute, newer_ops=newer_ops)
    dtype = np.float32 if compute == "fp32" else np.float16
    found, last = managed_steps(on_onnxruntime(path), name, features, dtype)
    assert reference.relative_error(found, exact(name, "fp32")) <= bound
    if features.observe:
        _check_received(last, name, features, bound)


def test_in_bfloat16_what_a_managed_cache_is_told_stays_float32(bundles: Bundles, exact: Exact, tmp_path: Path) -> None:
    name, features = "gta, tied", Features("mass", 2, has_positions=True)
    path = written(bundles, tmp_path, name, features, form="function", compute="bf16")
    found, last = managed_steps(in_reference(path), name, features, ml_dtypes.bfloat16)
    assert 1e-4 < reference.relative_error(found, exact(name, "fp32")) <= 8e-2
    _check_received(last, name, features, 1e-5)  # of the softmax, whose weights add up to 1 in float32


def _check_received(outputs: dict[str, np.ndarray], name: str, features: Features, bound: float) -> None:
    heads = TABLE[name]["num_attention_heads"]
    for i in range(LAYERS):
        received = outputs[f"present_received.{i}"]
        assert received.dtype == np.float32
        for row, held in zip(received, (8, 6), strict=True):
            if features.observe == "mass":  # every token gave 1 a head
                assert row[:held].sum() == pytest.approx(heads * held, rel=bound)
            else:  # at that weight every query marks what it sees: the last is the newest
                np.testing.assert_array_equal(row[:held], held - 1)


# --- its interface ---------------------------------------------------------------------------------------------------


@every_feature
@pytest.mark.parametrize("form", ["plugin", "function"])
def test_inputs_have_their_types_and_each_layer_its_capacity(
    bundles: Bundles, tmp_path: Path, features: Features, form: str
) -> None:
    graph = onnx.load(written(bundles, tmp_path, "gta, tied", features, form=form, compute="bf16")).graph
    found = {
        value.name: ([d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim], value)
        for value in (*graph.input, *graph.output)
    }
    symbols: Any = {"batch": "batch", "tokens": "tokens"}
    for name, shape in managed_shapes(features, **symbols, capacities=CAPACITIES).items():
        kind = TensorProto.INT64 if name in ("past_length", "positions") else TensorProto.FLOAT
        assert (found[name][0], found[name][1].type.tensor_type.elem_type) == (list(shape), kind)
    for i, capacity in enumerate(CAPACITIES):
        for name in (f"past_key.{i}", f"past_latent.{i}", f"present_key.{i}", f"present_latent.{i}"):
            assert (found[name][0][2], found[name][1].type.tensor_type.elem_type) == (capacity, TensorProto.BFLOAT16)
        if features.observe:
            assert found[f"present_received.{i}"][0] == ["batch", capacity]


@every_feature
@pytest.mark.parametrize("cache", [None, "int8"])
@pytest.mark.parametrize("name", ["gta, tied", "gqa, tied"])
def test_the_plugins_nodes(bundles: Bundles, tmp_path: Path, features: Features, cache: str | None, name: str) -> None:
    options: dict[str, Any] = {"form": "plugin", "compute": "fp16", "cache_dtype": cache}
    graph = onnx.load(written(bundles, tmp_path, name, features, **options), load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain == "gta"]
    assert len(nodes) == LAYERS
    outer = {value.name for value in (*graph.input, *graph.output)}
    for layer, node in enumerate(nodes):
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        values = {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
        parameters = read_parameters({key: value for key, value in values.items() if not key.startswith("plugin_")})
        assert parameters.features == features
        inputs = dict(zip(parameters.inputs, node.input, strict=True))
        outputs = dict(zip(parameters.outputs, node.output, strict=True))
        assert all(inputs.values()) and [key for key in inputs if key in FEATURE_INPUTS] == list(features.inputs)
        second = "latent" if name.startswith("gta") else "value"
        assert (inputs["past_key"], inputs["past_latent"]) == (f"past_key.{layer}", f"past_{second}.{layer}")
        if features.observe:
            assert inputs["past_received"] == f"past_received.{layer}"
            assert outputs["present_received"] == f"present_received.{layer}"
        if cache:
            assert [inputs[key] for key in SCALE_INPUTS] == [f"past_key_scale.{layer}", f"past_{second}_scale.{layer}"]
            scales = {outputs[key.replace("past", "present")] for key in SCALE_INPUTS}
            assert scales == {f"present_key_scale.{layer}", f"present_{second}_scale.{layer}"} and scales < outer
            shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
            assert shapes[f"past_key_scale.{layer}"][2].dim_value == CAPACITIES[layer]
        assert set(inputs) >= set(MODEL_INPUTS[:3])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_capacities_that_make_no_sense(bundles: Bundles, tmp_path: Path) -> None:
    bundle, features = bundles("gta, tied", "fp32"), FEATURES[0]
    options: dict[str, Any] = {"form": "function", "compute": "fp16"}
    with pytest.raises(CapacityError, match="the capacity is 0 tokens; expected 1 to"):
        lower(bundle, tmp_path, capacity=(16, 0), features=features, **options)
    with pytest.raises(InputError, match="there are 3 capacities; expected one for each of 2 layers"):
        lower(bundle, tmp_path, capacity=(16, 13, 9), features=features, **options)
    with pytest.raises(InputError, match="each layer has a capacity of its own; give what the cache is managed with"):
        lower(bundle, tmp_path, capacity=(16, 13), **options)
    assert not list(tmp_path.iterdir())


def test_layers_that_share_a_capacity_get_one(bundles: Bundles) -> None:
    bundle = bundles("gta, tied", "fp32")
    model = load_graph(bundle.model_path, bundle.config)
    with pytest.raises(EngineError, match=r"past_key\.1 has the capacity of other layers, 16, and 13 is asked for"):
        run_passes(model, "model.onnx", SetCapacityPass(CAPACITIES))
    model = load_graph(bundle.model_path, bundle.config)
    with pytest.raises(EngineError, match=r"past_key\.1 is the cache of no layer; expected 1 layers"):
        run_passes(model, "model.onnx", ManageCachePass(FEATURES[1]), SetCapacityPass((16,)))


def test_a_second_time_a_capacity_changes_nothing(bundles: Bundles) -> None:
    bundle = bundles("gta, tied", "fp32")
    model = load_graph(bundle.model_path, bundle.config)
    run_passes(model, "model.onnx", ManageCachePass(FEATURES[1]), SetCapacityPass(CAPACITIES))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not SetCapacityPass(CAPACITIES)(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
