"""The lowered graph of a managed cache: it means what the graph of the bundle does, and has no weights of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from onnx_ir.passes import common

from gta_edge.errors import BundleError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.io import load_graph, run_passes
from gta_edge.graph.manage_cache import ManageCachePass
from gta_edge.graph.pack_embedding import PackEmbeddingPass
from gta_edge.graph.share_dimensions import ShareDimensionsPass
from gta_edge.libraries.onnxruntime import EXACT_PRODUCTS, INT8_PRODUCTS
from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import Features
from gta_edge.plugins.domain import DOMAIN
from gta_edge.runtime.onnxruntime import lowered as lowered_module
from gta_edge.runtime.onnxruntime.lower import variant_graphs
from gta_edge.runtime.onnxruntime.lowered import CPU, LoweredGraph, lower, without_new_weights
from gta_edge.runtime.onnxruntime.model import model_files, open_model
from gta_edge.runtime.onnxruntime.passes.expand_attention import ExpandAttentionPass
from tests.helpers import reference
from tests.helpers.attention_models import Sizes, arrays, assert_cache, attended, managed_sizes
from tests.helpers.lowered_bundles import EXACT_GRAPH, GRAPH, RECORD, ROUNDED, flip, identities, record_of
from tests.helpers.managed_steps import FEATURES, Feeds, managed_step, specified
from tests.helpers.onnx_runs import bundled, one_attention, run
from tests.helpers.small_models import MODELS, write_bundle

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
TOLERANCE = 1e-4
every_model = pytest.mark.parametrize("name", MODELS)
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)


def lowered(name: str, features: Features) -> ir.Model:
    graph = bundled(name)
    passes = ManageCachePass(features), PackEmbeddingPass(), ExpandAttentionPass(), common.InlinePass()
    run_passes(graph, "model.onnx", *passes, ShareDimensionsPass())
    return graph


def assert_same(found: Feeds, wanted: Feeds) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert reference.relative_error(found[name], value) <= TOLERANCE, name


# --- what the attention becomes --------------------------------------------------------------------------------------


@SETTINGS
@given(sizes=managed_sizes())
def test_against_the_formula(sizes: Sizes) -> None:
    inputs = arrays(sizes)
    exact = attended(inputs, sizes)
    if sizes.features.observe == "last":  # float32 may round what is at the threshold to its other side
        assume(np.abs(inputs["query_weight"][:, :, None, None] * exact.weights - 1).min() > 1e-4)
    graph = one_attention(inputs, sizes)
    assert ExpandAttentionPass()(graph).modified
    found = run(graph, {name: x for name, x in inputs.items() if name in {v.name for v in graph.graph.inputs}})
    assert np.abs(found["output"] - exact.output).max() <= TOLERANCE * max(1, np.abs(exact.output).max())
    for name in ("key", "latent"):
        present = getattr(exact, f"present_{name}")
        assert_cache(found[f"present_{name}"], inputs[f"past_{name}"], present, sizes.past, sizes.tokens)
    for row, length in enumerate(sizes.past if sizes.features.observe else ()):
        in_use = slice(length + sizes.tokens)
        np.testing.assert_allclose(
            found["present_received"][row, in_use], exact.received[row, in_use], rtol=TOLERANCE, atol=TOLERANCE
        )


def test_more_tokens_than_a_word_has_bits_are_causal() -> None:
    sizes = Sizes(past=(3, 0), tokens=65, capacity=70, positions=90, features=TREES)
    inputs = arrays(sizes)
    graph = one_attention(inputs, sizes)
    ExpandAttentionPass()(graph)
    found = run(graph, {name: x for name, x in inputs.items() if name in {v.name for v in graph.graph.inputs}})
    assert reference.relative_error(found["output"], attended(inputs, sizes).output) <= TOLERANCE


def test_a_negative_weight_of_a_query_marks_nothing() -> None:
    sizes = Sizes(features=Features("last"))
    inputs = arrays(sizes)
    inputs["query_weight"] *= -1
    inputs["past_received"][...] = 5
    graph = one_attention(inputs, sizes)
    ExpandAttentionPass()(graph)
    found = run(graph, {name: x for name, x in inputs.items() if name in {v.name for v in graph.graph.inputs}})
    for row, past in enumerate(sizes.past):
        np.testing.assert_array_equal(
            found["present_received"][row, : past + sizes.tokens], [5] * past + [-1] * sizes.tokens
        )


@every_model
@every_feature
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_means_what_the_managed_graph_does(name: str, features: Features, tokens: int) -> None:
    managed = bundled(name)
    ManageCachePass(features)(managed)
    graph, feeds = lowered(name, features), managed_step(name, tokens, features)
    assert not [node for node in graph.graph if node.domain == DOMAIN]
    assert not graph.functions
    assert_same(specified(run(graph, feeds), feeds), specified(run(managed, feeds), feeds))


@pytest.mark.parametrize(
    ("features", "nodes"), [("positions", 11), ("mass", 26), ("last", 33), ("bias", 20), ("branches", 42)]
)
def test_two_layers_have_few_nodes_more(features: str, nodes: int) -> None:
    """What can be computed for all layers at once is."""

    def count(found: ir.Model) -> int:
        return sum(node.op_type != "Constant" for node in found.graph)

    plain = bundled("one of each")
    passes = PackEmbeddingPass(), ExpandAttentionPass(), common.InlinePass(), ShareDimensionsPass()
    run_passes(plain, "model.onnx", *passes)
    assert count(lowered("one of each", FEATURES[features])) - count(plain) <= nodes


# --- what is cached --------------------------------------------------------------------------------------------------

MANAGED, MASS = f"{CPU.directory}-managed", FEATURES["mass"]


def computed(found: LoweredGraph, bundle: Bundle, feeds: Feeds) -> Feeds:
    """What a lowered graph computes with the weights that lie in the bundle."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # a warning for every cache that is copied
    settings.add_session_config_entry(*(INT8_PRODUCTS if found.rounds_activations else EXACT_PRODUCTS))
    files = model_files(bundle, CPU.directory if found.cached else None)
    opened = open_model(onnxruntime, found.graph, files, settings, ["CPUExecutionProvider"])
    names = [value.name for value in opened.session.get_outputs()]
    results = dict(zip(names, opened.session.run(names, feeds), strict=True))
    opened.close()
    return specified(results, feeds)


@pytest.mark.parametrize(("name", "precision"), [("more keys", "int4"), ("baseline", "fp32"), ("as many", "int8")])
def test_a_cached_graph_reads_the_weights_of_the_one_without_management(
    name: str, precision: str, tmp_path: Path
) -> None:
    directory = write_bundle(tmp_path / "bundle", name, precision)
    bundle, feeds = Bundle.open(directory), managed_step(name, 3, MASS)
    plain = lower(bundle).graph
    before = identities(directory)
    found = lower(bundle, exact=True, features=MASS)
    assert found.cached and not found.rounds_activations
    new = identities(directory).keys() - before.keys()
    assert new == {f"{MANAGED}/mass-0/{name}" for name in (EXACT_GRAPH, RECORD, GRAPH)}
    assert {key: value for key, value in identities(directory).items() if key not in new} == before
    exact, wanted = computed(found, bundle, feeds), run(_managed_bundle(bundle), feeds)
    assert_same(exact, specified(wanted, feeds))
    assert lower(bundle).graph == plain
    kept = identities(directory)
    rounding = lower(bundle, features=MASS)
    assert rounding.rounds_activations == (precision != "fp32")
    assert reference.relative_error(computed(rounding, bundle, feeds)["logits"], wanted["logits"]) <= ROUNDED
    assert identities(directory) == kept  # both were made at once


def _managed_bundle(bundle: Bundle) -> ir.Model:
    graph = load_graph(bundle.model_path, bundle.config)
    ManageCachePass(MASS)(graph)
    for value in graph.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
    return graph


def test_each_set_of_features_has_a_graph_of_its_own(bundle: Path) -> None:
    graphs = {lower(Bundle.open(bundle), features=features).graph for features in FEATURES.values()}
    assert len(graphs) == len(FEATURES) == len(list((bundle / MANAGED).iterdir()))


def test_what_is_damaged_or_of_another_bundle_is_made_anew(bundle: Path, other: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    graph = lower(opened, features=MASS).graph
    flip(bundle / MANAGED / "mass-0" / GRAPH)
    assert lower(Bundle.open(bundle, verify_hashes=True), features=MASS).graph == graph
    foreign = shutil.copytree(other, tmp_path / "foreign")
    lower(Bundle.open(foreign), features=MASS)
    shutil.rmtree(bundle / MANAGED)
    shutil.copytree(foreign / MANAGED, bundle / MANAGED)
    lower(opened, features=MASS)
    content = json.loads((bundle / MANAGED / "mass-0" / RECORD).read_text())["content"]
    assert content["made_from"] == record_of(bundle)["content"]["made_from"]


def test_a_graph_whose_weights_lie_elsewhere_is_made_anew(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a release under development that lays them out in another way."""
    opened = Bundle.open(bundle)
    lower(opened, features=MASS)
    before = identities(bundle / MANAGED)
    plain = onnx.ModelProto.FromString(lower(opened).graph)
    plain.producer_version = "other"
    made = lowered_module.cached_graph
    monkeypatch.setattr(
        lowered_module,
        "cached_graph",
        lambda bundle, form, *rest: plain.SerializeToString() if form == CPU else made(bundle, form, *rest),
    )
    lower(opened, features=MASS)
    after = identities(bundle / MANAGED)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_a_bundle_that_cannot_be_written_has_a_graph_too(bundle: Path) -> None:
    opened, feeds = Bundle.open(bundle), managed_step("more keys", 3, MASS)
    found = without_new_weights(opened, exact=True, features=MASS)
    assert not found.cached
    assert_same(computed(found, opened, feeds), specified(run(_managed_bundle(opened), feeds), feeds))
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("change", ["absent", "another shape", "another type"])
def test_a_weight_that_was_not_written_is_missed(bundle: Path, change: str) -> None:
    opened = Bundle.open(bundle)
    plain = onnx.ModelProto.FromString(lower(opened).graph)
    for tensor in [each for each in plain.graph.initializer if each.external_data]:
        if change == "absent":
            plain.graph.initializer.remove(tensor)
        elif change == "another shape":
            tensor.dims[0] += 1
        else:
            tensor.data_type = onnx.TensorProto.INT8
    with pytest.raises(BundleError, match="was not written for the graph beside it; export the bundle again"):
        variant_graphs(opened, MASS, "fp32", plain.SerializeToString())


@every_feature
def test_past_and_present_may_be_one_memory(features: Features, bundle: Path) -> None:
    """As sessions bind them."""
    opened = Bundle.open(bundle)
    feeds = managed_step("more keys", 3, features)
    found = lower(opened, exact=True, features=features)
    wanted = computed(found, opened, feeds)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(*EXACT_PRODUCTS)
    run_options = onnxruntime.RunOptions()
    run_options.log_severity_level = 3
    model = open_model(onnxruntime, found.graph, model_files(opened, CPU.directory), settings, ["CPUExecutionProvider"])
    binding, memory = model.session.io_binding(), {name: array.copy() for name, array in feeds.items()}
    for name, array in memory.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    outputs = {name: memory[name.replace("present", "past")] for name in wanted if name != "logits"}
    outputs["logits"] = np.zeros_like(wanted["logits"])
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    model.session.run_with_iobinding(binding, run_options)
    for name, array in specified(outputs, feeds).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    model.close()
