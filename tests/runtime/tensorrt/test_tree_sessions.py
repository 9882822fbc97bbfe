"""Sessions of an engine with room for trees of tokens, on the simulation of TensorRT and CUDA, against float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gta_edge.errors import BackendError, CapacityError, EngineError, InputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import TREES
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.registry import open_session
from gta_edge.runtime.tensorrt.build import check_spec, lower_only, profile_shapes
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.session import TensorRTSession
from gta_edge.runtime.token_tree import PREFIX, TokenTree
from tests.helpers import reference
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import MODELS, VOCAB, bundle_of, prompt, weights_of
from tests.helpers.tensorrt_simulator import Driver, open_simulated

LENGTH, ROWS, CHUNK, TREE = 90, 2, 70, 100
SPEC = EngineSpec("tensorrt", "fp32", "fp32", max_length=LENGTH, max_batch=ROWS, chunk_size=CHUNK, tree_rows=TREE)
SMALL = EngineSpec("tensorrt", "fp16", "fp16", max_length=64, max_batch=1, chunk_size=32, tree_rows=64)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("trees")
    shutil.copytree(bundle_of("gta"), directory / "bundle", ignore=shutil.ignore_patterns("engines"))
    opened = Bundle.open(directory / "bundle")
    simulator.build(opened, SPEC, directory / "lowered")
    return opened


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of a model whose attention is the plugin."""
    entries = reference.gta_entries(d_k=16, d_l=32, num_hidden_layers=1, vocab_size=VOCAB, max_position_embeddings=64)
    directory = tmp_path_factory.mktemp("kernels")
    write_checkpoint(directory / "checkpoint", entries, reference.random_weights(entries))
    return export_model(directory / "checkpoint", directory / "bundle", verify=False).bundle


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def session(bundle: Bundle, driver: Driver) -> Iterator[TensorRTSession]:
    with open_simulated(bundle, SPEC.engine, driver, trees=True) as opened:
        yield opened


def grown(session: Any, tree: TokenTree, parents: list[int], seed: int) -> np.ndarray:
    """Grow nodes with random tokens, run them, and return their logits [N, V]."""
    tree.grow(parents)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (1, len(parents)))
    logits: np.ndarray = session.forward(ids, tree=tree, all_logits=True)[0]
    return logits


def assert_alone(tree: TokenTree, text: list[int], found: dict[int, np.ndarray]) -> None:
    """Nodes have the logits of the text and their path alone."""
    for node, logits in found.items():
        expected = ManagedModel(MODELS["gta"], weights_of("gta")).call(text + tree.ids(node))[-1]
        assert reference.relative_error(logits, expected) <= TOLERANCE, node


def test_each_node_is_its_path_alone(session: TensorRTSession, driver: Driver) -> None:
    """Grown in several calls, more than logits are given for at once; a path is accepted and text goes on."""
    assert session.trees
    text = prompt(1, CHUNK)[0].tolist()  # more tokens than a word has bits
    expected = ManagedModel(MODELS["gta"], weights_of("gta")).call(text)
    assert reference.relative_error(session.forward([text], all_logits=True)[0], expected) <= TOLERANCE
    session.truncate(11)
    del text[11:]
    before = [call for call in driver.calls if call.startswith("allocate")]
    tree = session.tree()
    first = grown(session, tree, [PREFIX, PREFIX, 0, 2, 0, 1, *range(5, 21)], seed=1)
    assert_alone(tree, text, {3: first[3], 5: first[5], 15: first[15], 21: first[21]})
    tree.drop([1])
    second = grown(session, tree, [3, 4, 3], seed=2)
    assert_alone(tree, text, {22: second[0], 24: second[2]})
    text += tree.ids(3)
    tree.accept(3)
    assert tree.nodes == [22, 24] and session.length.tolist() == [len(text)]
    assert_alone(tree, text, {25: grown(session, tree, [24], seed=3)[0]})
    text += tree.ids(25)
    tree.accept(25)
    tree.close()
    for token in (5, 9, 7):  # the second is captured, the third replayed
        text.append(token)
        expected = ManagedModel(MODELS["gta"], weights_of("gta")).call(text)[-1]
        assert reference.relative_error(session.forward([[token]])[0], expected) <= TOLERANCE
    assert driver.calls[-1] == "replay" and len(driver.graphs) == 4  # of 16, 6, 3 tokens, and of one
    assert [call for call in driver.calls if call.startswith("allocate")][len(before) :] in ([], ["allocate pinned"])


def test_a_prompt_and_sequences_of_a_batch(session: TensorRTSession) -> None:
    """A chunk of more tokens than a word has bits; trees of two sequences in one call, and one token of each."""
    texts = prompt(2, 75)
    session.forward(texts, lengths=[75, 9])
    held = [texts[0].tolist(), texts[1, :9].tolist()]
    trees = [session.tree(b) for b in range(2)]
    trees[0].grow([PREFIX, 0])
    trees[1].grow([PREFIX, PREFIX])
    ids = np.random.default_rng(5).integers(0, VOCAB, (2, 2))
    found = session.forward(ids, tree=trees, all_logits=True)
    for tree, text, logits in zip(trees, held, found, strict=True):
        assert_alone(tree, text, {0: logits[0], 1: logits[1]})
    trees[0].grow([1])
    trees[1].grow([0])
    last = session.forward(ids[:, :1], tree=trees)
    for tree, text, logits in zip(trees, held, last, strict=True):
        assert_alone(tree, text, {2: logits})


def test_rows_are_bounded(session: TensorRTSession) -> None:
    session.forward(prompt(1, 20))
    tree = session.tree()
    grown(session, tree, [PREFIX] * 60, seed=1)
    grown(session, tree, [PREFIX] * 60, seed=2)
    tree.grow([PREFIX] * 20)  # words are whole sixty-fours: 128
    with pytest.raises(CapacityError, match=r"takes .* rows, and the engine was built for 128; drop nodes of it"):
        session.forward(prompt(1, 20), tree=tree)
    assert len(tree) == 120  # as before
    session.reset()
    with pytest.raises(CapacityError, match=f"--max-length {LENGTH}"):
        session.forward(prompt(1, LENGTH + 1))


def test_what_an_engine_is_built_for(bundle: Bundle) -> None:
    spec = replace(SPEC, compute="fp16", cache_dtype="int8")
    assert spec.features == TREES and spec.tree_words == 128
    assert spec.capacities(bundle.config) == (192,) * 2  # 90 + 100 + 1, in sixteens
    for profile in profile_shapes(bundle, spec):
        assert profile["branches"] == ((1, 128), (1, 128), (ROWS, 128))
        assert profile["past_length"] == profile["branch_start"] == ((1,), (1,), (ROWS,))
    text = spec.command(bundle.directory)
    assert text.endswith("--cache-dtype int8 --max-length 90 --max-batch 2 --trees 100 --force")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tree_rows": 10**6}, "--trees is 1000000; expected 1 to 8192 rows"),
        (
            {"engine": "tensorrt-rtx"},
            "take the attention's plugin, which tensorrt-rtx does not have for this model; leave",
        ),
        ({"cache_dtype": "int4"}, "an engine with --trees has no --cache-dtype int4; leave out one of both"),
    ],
)
def test_engines_that_there_are_not(with_kernels: Bundle, changes: dict[str, Any], text: str) -> None:
    check_spec(with_kernels, SMALL)
    with pytest.raises(InputError) as raised:
        check_spec(with_kernels, replace(SMALL, **changes))
    assert text in str(raised.value)


def test_the_plugins_nodes_have_branches(with_kernels: Bundle, tmp_path: Path) -> None:
    """And more rows than the model has positions."""
    graph = onnx.load(lower_only(with_kernels, SMALL, tmp_path / "model"), load_external_data=False).graph
    sizes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.input}
    assert sizes["past_key.0"][2] == 144  # 64 + 64 + 1, in sixteens
    assert {"positions", "branch_start", "branches"} <= {value.name for value in graph.input}
    for node in (node for node in graph.node if node.domain == "gta"):
        assert list(node.input[-3:]) == ["positions", "branch_start", "branches"]


def test_sessions_that_are_refused(bundle: Bundle, tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no engine; run: gta-edge build .* --engine tensorrt --trees 256$"):
        open_session(Bundle.open(tiny_bundle), "tensorrt", trees=True)
    with pytest.raises(BackendError, match="tensorrt-rtx cannot hold trees of tokens"):
        open_session(bundle, "tensorrt-rtx", trees=True)
    with pytest.raises(InputError, match="trees of tokens do not go with cache policy h2o"):
        open_session(bundle, "tensorrt", trees=True, cache=policy("h2o", rows=20))
    with pytest.raises(EngineError, match=r"was built without a cache policy; run: .* --cache-policy h2o .*--force$"):
        open_simulated(bundle, "tensorrt", cache=policy("h2o", rows=20))
