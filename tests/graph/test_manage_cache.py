"""A bundle's graph with a managed cache: its interface, and that it means what the model in PyTorch does."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from gta_edge.graph.attention import attention_nodes, node_features
from gta_edge.graph.io import add_attention_function
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder, ManagedInputs
from gta_edge.model.kv_cache import TREES, cache_tensors, interface_names, managed_shapes
from gta_edge.plugins.attention.definition import Features
from tests.helpers import reference
from tests.helpers.managed_steps import FEATURES, Feeds, as_unmanaged, managed_step, specified
from tests.helpers.onnx_runs import bundled, run
from tests.helpers.small_models import LAYERS, MODELS, WEIGHTS

every_model = pytest.mark.parametrize("name", MODELS)
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
TOLERANCE = 1e-5


def managed(name: str, features: Features) -> ir.Model:
    graph = bundled(name)
    ManageCachePass(features)(graph)
    return graph


def in_torch(name: str, features: Features, feeds: Feeds) -> Feeds:
    """The same step by the decoder, whose outputs are named like the graph's."""
    config = parse_config(MODELS[name])
    model = Decoder(config, biases={key for key in WEIGHTS[name] if key.endswith(".bias")})
    model.load_state_dict({key: torch.from_numpy(weight) for key, weight in WEIGHTS[name].items()}, strict=True)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in feeds.items()}
    if features == TREES:
        tensors |= {key: tensors[key].expand(LAYERS, -1) for key in ("past_length", "branch_start")}
    names = [cache.name for cache in config.caches]
    caches = [tuple(tensors[f"past_{key}.{i}"] for key in names) for i in range(LAYERS)]
    given = {key: tensors[key] for key in features.inputs if key in tensors}
    if features.observe:
        given["past_received"] = [tensors[f"past_received.{i}"] for i in range(LAYERS)]
    step = ManagedInputs(**given, observe=features.observe or "")
    with torch.no_grad():
        logits, presents = model(
            *(tensors[key] for key in ("input_ids", "past_length", "logit_positions")), caches, step
        )
    assert all(
        x is y for present, cache in zip(presents, caches, strict=True) for x, y in zip(present[:2], cache, strict=True)
    )
    past = {key: value for key, value in tensors.items() if key.startswith("past_") and key != "past_length"}
    return {"logits": logits.numpy()} | {key.replace("past", "present"): x.numpy() for key, x in past.items()}


@every_model
@every_feature
def test_the_interface_is_that_of_a_managed_cache(name: str, features: Features) -> None:
    config, graph = parse_config(MODELS[name]), managed(name, features)
    symbols = {"batch": "batch", "tokens": "tokens", "words": "words"}
    capacities = ["capacity" if features == TREES else f"capacity.{i}" for i in range(LAYERS)]
    expected = managed_shapes(features, **symbols, capacities=capacities)
    shapes = {value.name: [getattr(size, "value", size) for size in value.shape] for value in graph.graph.inputs}
    assert {key: shapes[key] for key in expected} == {key: list(shape) for key, shape in expected.items()}
    inputs, outputs = interface_names(config)
    own = [key for key in expected if key != "past_length" and not key.startswith("past_received")]
    received = [f"received.{i}" for i in range(LAYERS) if features.observe]
    assert list(shapes) == [*inputs[:3], *own, *inputs[3:], *(f"past_{key}" for key in received)]
    assert [x.name for x in graph.graph.outputs] == [*outputs, *(f"present_{key}" for key in received)]
    for key, value in ((x.name, x) for x in graph.graph.outputs if x.name != "logits"):
        assert [getattr(size, "value", size) for size in value.shape] == shapes[key.replace("present", "past")]
    for tensor in cache_tensors(config):
        assert shapes[tensor.past] == list(tensor.shape("batch", capacities[tensor.layer]))
    assert all(node_features(node) == features for node in attention_nodes(graph.graph))
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)


@every_model
@every_feature
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_graph_means_what_the_decoder_does(name: str, features: Features, tokens: int) -> None:
    feeds = managed_step(name, tokens, features)
    found = specified(run(managed(name, features), feeds), feeds)
    wanted = specified(in_torch(name, features, feeds), feeds)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == np.float32
        assert reference.relative_error(found[key], value) <= TOLERANCE, key


@every_model
def test_with_rows_that_are_positions_it_is_the_graph_of_the_bundle(name: str) -> None:
    features = Features("mass", 2, True)
    feeds = managed_step(name, 4, features, capacities=(13, 13))
    feeds["past_length"] = np.array([[4, 0, 7]] * LAYERS)
    feeds["positions"] = feeds["past_length"][0][:, None] + np.arange(4)
    feeds["row_bias"][...] = 0
    found, wanted = run(managed(name, features), feeds), run(bundled(name), as_unmanaged(feeds))
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_layers_rows_are_its_own() -> None:
    """What one layer has more of than another changes nothing in the caches before it."""
    features = Features("mass", has_positions=True)
    feeds = managed_step("one of each", 2, features)
    before = run(managed("one of each", features), feeds)
    feeds["past_length"][1] -= 1
    after = run(managed("one of each", features), feeds)
    changed = {key for key, value in before.items() if not np.array_equal(after[key], value)}
    assert changed == {"logits", "present_key.1", "present_latent.1", "present_received.1"}


def test_it_is_for_graphs_that_are_not_managed() -> None:
    graph = managed("baseline", FEATURES["all"])
    with pytest.raises(ir.passes.PreconditionError, match="managed already"):
        ManageCachePass(FEATURES["all"])(graph)
    with pytest.raises(ValueError, match="needs positions"):
        ManageCachePass(Features("mass"))


def test_a_graph_without_functions_gets_none() -> None:
    """As TensorRT's is, whose plugin is the meaning."""
    graph = bundled("one of each")
    graph.functions.clear()
    ManageCachePass(FEATURES["mass"])(graph)
    assert not graph.functions
    add_attention_function(graph)
    (function,) = graph.functions.values()
    assert function.outputs[-1].name == "present_received"
