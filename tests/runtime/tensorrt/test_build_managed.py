"""Engines for a cache policy: what a build takes from it, what is recorded, and what the command says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from gta_edge.errors import EngineError, InputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.artifacts import made_from
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.libraries.tensorrt import load
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.measured import LayerRows
from gta_edge.runtime.tensorrt.build import check_spec, lower_only, managed_spec, profile_shapes, requirement
from gta_edge.runtime.tensorrt.builder import Target, build_plan
from gta_edge.runtime.tensorrt.engine import EngineManifest, EngineSpec, load_engine
from gta_edge.runtime.tensorrt.engine_cache import EngineCache, policy_options
from gta_edge.runtime.tensorrt.lower import lower
from tests.helpers.commands import Result
from tests.helpers.engines import keep_engine
from tests.helpers.records import edit
from tests.helpers.tiny import TINY

SPEC = EngineSpec("tensorrt", "fp16", "fp16", max_length=96, max_batch=2, chunk_size=32)
HERE = {"tensorrt": "10.3.0", "compute_capability": "8.7"}
H2O = policy("h2o", rows=20, interval=8)
Command = Callable[..., Result]


@pytest.fixture
def bundle(copied_bundle: Path) -> Bundle:
    return Bundle.open(copied_bundle)


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """From the third on, TensorRT-RTX fails at keys whose rotation it merges with the query's."""
    directory = tmp_path_factory.mktemp("three layers")
    initialise(TINY.replace(num_hidden_layers=3), directory / "checkpoint")
    return export_model(directory / "checkpoint", directory / "bundle", verify=False).bundle


# --- what it is built for --------------------------------------------------------------------------------------------


def test_capacity_is_what_stays_and_what_comes_before_the_next_eviction(bundle: Bundle) -> None:
    spec, layers = managed_spec(bundle, SPEC, H2O), bundle.config.num_hidden_layers
    options = "--cache-policy h2o --cache-rows 20 --cache-interval 8"
    capacities = (64,) * layers  # 20 + 8 + 32, in sixteens
    assert spec == replace(SPEC, managed=EngineCache(options, capacities, "mass", 0))
    assert policy_options(policy("zsmerge", rows=20, residual_rows=2, rotate=True)) == (
        "--cache-policy zsmerge --cache-rows 20 --cache-residual-rows 2 --cache-rotate"
    )
    of = LayerRows(rule=H2O, layer_rows=tuple(range(20, 20 + layers)))
    assert managed_spec(bundle, SPEC, of).managed.policy == (
        "--cache-policy measured --cache-rule h2o --cache-rows 20 --cache-interval 8"
    )
    check_spec(bundle, spec)


def test_inputs_have_the_shapes_of_every_profile(bundle: Bundle) -> None:
    spec = managed_spec(bundle, SPEC, policy("zsmerge", rows=20, interval=8, residual_rows=3))
    (capacity, *_), layers = spec.managed.capacities, bundle.config.num_hidden_layers
    for profile, tokens in zip(profile_shapes(bundle, spec), ((1, 1, 1), (1, 32, 32), (2, 8, 16)), strict=True):
        batches = (1, 1, 2)
        assert profile["past_length"] == tuple((layers, b) for b in batches)
        assert profile["positions"] == tuple(zip(batches, tokens, strict=True)) == profile["query_weight"]
        assert profile["row_bias"] == tuple((layers, b, 3) for b in batches)
        assert profile["decay"] == tuple((b,) for b in batches)
        assert profile["past_received.0"] == tuple((b, capacity) for b in batches)
        assert profile["past_key.0"][2][2] == capacity


def test_memory_is_that_of_rows_and_not_of_positions(bundle: Bundle) -> None:
    spec = managed_spec(bundle, SPEC, H2O)
    size = cache_bytes(bundle.config, "fp16", 64, 2) + 4 * 2 * 64 * bundle.config.num_hidden_layers
    assert spec.cache_bytes(bundle.config) == size < SPEC.cache_bytes(bundle.config) + 4 * 2 * 64 * 5
    assert requirement(bundle, spec).cache == 2 * size


def test_policies_that_make_no_sense_here(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="keeps 97 rows, and --max-length is 96; give at most 96"):
        managed_spec(bundle, SPEC, policy("h2o", rows=97))
    with pytest.raises(InputError, match="--max-length is 0; the model has positions for 1 to"):
        managed_spec(bundle, replace(SPEC, max_length=0), H2O)


# --- the record ------------------------------------------------------------------------------------------------------


def test_an_engine_is_read_as_it_was_kept(bundle: Bundle) -> None:
    record = EngineManifest(managed_spec(bundle, SPEC, H2O), made_from(bundle), HERE["tensorrt"], ["8.7"])
    keep_engine(bundle, record, b"the engine")
    assert load_engine(bundle, "tensorrt", **HERE) == (b"the engine", record)
    with pytest.raises(EngineError) as raised:
        load_engine(bundle, "tensorrt", tensorrt="11.0.0", compute_capability="8.7")
    assert str(raised.value).endswith("--max-batch 2 --cache-policy h2o --cache-rows 20 --cache-interval 8 --force")


@pytest.mark.parametrize(
    "change",
    [
        {"capacities": [64, 0, 64]},
        {"capacities": ["64"]},
        {"capacities": 64},
        {"capacities": [64.0]},
        {"observe": "most"},
        {"bias_rows": 9},
        {"bias_rows": "2"},
        {"policy": 5},
        {"another": 1},
    ],
    ids=str,
)
def test_records_that_are_none(bundle: Bundle, change: dict[str, Any]) -> None:
    record = EngineManifest(managed_spec(bundle, SPEC, H2O), made_from(bundle), HERE["tensorrt"], ["8.7"])
    directory = keep_engine(bundle, record, b"the engine")
    edit(directory / "engine.json", lambda document: document["content"]["spec"]["managed"].update(change), sign=True)
    with pytest.raises(EngineError, match="is not the record of an engine") as raised:
        load_engine(bundle, "tensorrt", **HERE)
    assert "\n" not in str(raised.value)


# --- TensorRT and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", [policy("zsmerge", rows=20, interval=8), policy("corm", rows=20, interval=8)], ids=["mass", "last"]
)
def test_tensorrt_rtx_builds_it(three_layers: Bundle, tmp_path: Path, of: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the parser and the builder of the package tensorrt-rtx are needed")
    bundle = three_layers
    spec = managed_spec(bundle, replace(SPEC, engine="tensorrt-rtx"), of)
    options = {"form": "function", "compute": "fp16", "capacity": spec.managed.capacities}
    model = lower(bundle, tmp_path / "model", **options, features=spec.managed.features)
    target = Target(load("tensorrt-rtx"), ("8.6",), None)
    assert build_plan(model, spec, profile_shapes(bundle, spec), target).nbytes > 0


def test_the_command_writes_the_graph_of_a_policy(command: Command, bundle: Bundle, tmp_path: Path) -> None:
    options = ("--cache-policy", "zsmerge", "--cache-rows", 100, "--max-batch", 2)
    document = command(
        "build", bundle.directory, "--onnx-only", "--output", tmp_path / "model", *options, "--json"
    ).content
    positions, layers = bundle.config.max_position_embeddings, bundle.config.num_hidden_layers
    assert document["max_length"] == positions
    assert document["cache_policy"] == "--cache-policy zsmerge --cache-rows 100"
    rows = document["cache_rows"]
    assert len(rows) == layers and 100 < rows[0] <= positions + 8
    record = json.loads((tmp_path / "model" / "lowered.json").read_text())
    assert record["managed"] == {"observe": "mass", "bias_rows": 1, "has_positions": True, "has_branches": False}
    assert record["capacity"] == rows
    graph = onnx.load(document["written"], load_external_data=False).graph
    assert {"positions", "row_bias", "query_weight", "decay", "past_received.0"} <= {
        value.name for value in graph.input
    }
    printed = command("build", bundle.directory, "--onnx-only", "--output", tmp_path / "again", *options)
    assert f"a cache of {rows[0]} rows in bf16" in printed.out


def test_what_the_command_refuses(command: Command, bundle: Bundle) -> None:
    words = ("build", bundle.directory, "--onnx-only")
    assert "no cache policy is called" in command(*words, "--cache-policy", "h20", "--cache-rows", 5).usage
    assert "--cache-rows is for a cache policy: give --cache-policy too" in command(*words, "--cache-rows", 5).usage
    assert "needs rows" in command(*words, "--cache-policy", "h2o").error
    many = bundle.config.max_position_embeddings + 1
    text = command(*words, "--cache-policy", "h2o", "--cache-rows", many).error
    assert f"keeps {many} rows, and --max-length is {many - 1}" in text


def test_the_form_of_a_graph_is_that_of_its_capacities(bundle: Bundle, tmp_path: Path) -> None:
    spec = managed_spec(
        bundle, SPEC, LayerRows(rule=H2O, layer_rows=(50, *(20,) * (bundle.config.num_hidden_layers - 1)))
    )
    graph = onnx.load(lower_only(bundle, spec, tmp_path / "model"), load_external_data=False).graph
    sizes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    found = [sizes[f"past_key.{i}"][2].dim_value for i in range(bundle.config.num_hidden_layers)]
    assert tuple(found) == spec.managed.capacities
    assert found[0] > found[1]
