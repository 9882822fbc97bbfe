"""The onnxruntime-cuda backend with trees of tokens, and with calls of a few: on the CPU provider, against float64.

Which operators the graph takes, and that all have kernels on a GPU, ``test_cuda_session`` checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gta_edge.errors import BackendError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries import onnxruntime as ort
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.onnxruntime import cuda_steps
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.onnxruntime.cuda_steps import NO_GRAPH
from gta_edge.runtime.token_tree import PREFIX
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import MODELS, VOCAB, bundle_of, prompt, weights_of

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 0.3}


def opened(model: str, compute: str = "fp32", device: str = "cpu", **options: Any) -> OnnxRuntimeCudaSession:
    session = OnnxRuntimeCudaSession(Bundle.open(bundle_of(model)), compute=compute, device=device, **options)
    if device == "cpu":
        session.graph_refused = None  # steps are bound and padded as for graphs, whose numbers the provider ignores
    return session


def check_trees(session: OnnxRuntimeCudaSession, model: str, compute: str) -> None:
    """Nodes have the logits of the text and their path alone: of a few, and of as many as a word has bits."""

    def expect(logits: np.ndarray, tokens: list[int]) -> None:
        expected = ManagedModel(MODELS[model], weights_of(model)).call(tokens)
        assert np.abs(logits - expected[-1]).max() <= TOLERANCE[compute] * expected.std()

    rng, text = np.random.default_rng(7), prompt(1, 70)[0].tolist()  # a prompt of more tokens than bits
    expect(session.forward([text])[0], text)
    session.truncate(9)
    del text[9:]
    tree = session.tree()
    for parents in ([PREFIX, PREFIX, 0, 1, 1], [2], [int(p) for p in rng.integers(0, 6, 64)], [69, 30, 69]):
        tree.grow(parents)
        ids = rng.integers(0, VOCAB, (1, len(parents)))
        found = session.forward(ids, tree=tree, all_logits=True)[0]
        nodes = tree.nodes[-len(parents) :]
        for at in {0, len(parents) // 2, len(parents) - 1}:
            expect(found[at], text + tree.ids(nodes[at]))
    text += tree.ids(70)
    tree.accept(70)
    tree.close()
    for token in (5, 6, 7):
        text.append(token)
        expect(session.forward([[token]])[0], text)


@pytest.mark.parametrize(("model", "compute"), [("gta", "fp32"), ("gqa", "fp16")])
def test_each_node_is_its_path_alone(model: str, compute: str) -> None:
    with opened(model, compute, trees=True, chunk_size=128) as session:
        check_trees(session, model, compute)
        shapes = [shape[1:3] for shape in session._steps.shapes]
        assert shapes == [(6, 6), (3, 3), (1, 1)]  # of 64 there is none
    assert (bundle_of(model) / "engines" / "onnxruntime-cuda" / f"{compute}-trees").is_dir()


def test_sequences_of_a_batch_have_trees_of_their_own() -> None:
    texts = prompt(2, 9)
    with opened("gta", trees=True) as session:
        session.forward(texts, lengths=[9, 5])
        trees = [session.tree(row) for row in range(2)]
        trees[0].grow([PREFIX, 0, 0])
        trees[1].grow([PREFIX])
        found = session.forward([[1, 2, 3], [4, 0, 0]], tree=trees, all_logits=True)
    for row, node, tokens in ((0, 2, [*texts[0], 1, 3]), (1, 0, [*texts[1, :5], 4])):
        expected = ManagedModel(MODELS["gta"], weights_of("gta")).call([int(token) for token in tokens])[-1]
        assert reference.relative_error(found[row, node], expected) <= TOLERANCE["fp32"]


# --- a few tokens ----------------------------------------------------------------------------------------------------


def test_a_few_tokens_run_in_a_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, with the logits of other sessions; and attention counts once, though a capture runs a step twice."""
    launch, launched = OnnxRuntimeCudaSession._launch, []

    def twice(session: OnnxRuntimeCudaSession, step: Any) -> None:
        if step.graph_id not in (*launched, NO_GRAPH):
            launch(session, step)
        launched.append(step.graph_id)
        launch(session, step)

    monkeypatch.setattr(OnnxRuntimeCudaSession, "_launch", twice)
    ids, h2o = prompt(1, 90), policy("h2o", rows=150)
    with opened("gta", cache=h2o) as session, opened("gta", cache=h2o) as plain:
        plain.graph_refused = "this is what graphs are compared with"
        start = 20
        for each in (session, plain):
            each.forward(ids[:, :start])
        for count in (2, 5, 1, 6, 2, 13, 16):
            part = ids[:, start : start + count]
            found, expected = (each.forward(part, all_logits=True) for each in (session, plain))
            assert reference.relative_error(found, expected) <= 1e-5
            start += count
        for found, expected in zip(session._received(), plain._received(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert [shape[1] for shape in session._steps.shapes] == [1, 6, 2, 16]
        assert len({number for number in launched if number != NO_GRAPH}) == 4


def test_so_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_steps, "_GRAPHS_KEPT", 2)
    with opened("gqa") as session:
        session.forward(prompt(1, 7))
        for count in (1, 2, 1, 4):
            session.forward(prompt(1, count), all_logits=True)
        assert [shape[1] for shape in session._steps.shapes] == [1, 4]


# --- on a GPU --------------------------------------------------------------------------------------------------------


def why_not() -> str:
    try:
        ort.load_onnxruntime_cuda()
    except BackendError as error:
        return str(error)
    return ""


NO_GPU = why_not()
on_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("model", "compute"), [("gta", "fp32"), ("gqa", "bf16")])
def test_on_a_gpu_each_node_is_its_path_alone(model: str, compute: str) -> None:
    with opened(model, compute, "cuda", trees=True, chunk_size=128) as session:
        check_trees(session, model, compute)
        assert session.cuda_graph is True, session.graph_refused


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cache", [None, policy("h2o", rows=150)], ids=["all rows", "h2o"])
def test_on_a_gpu_a_few_tokens_are_replays(cache: Any) -> None:
    ids, options = prompt(1, 90), {} if cache is None else {"cache": cache}
    with opened("gta", "fp32", "cuda", **options) as session, opened("gta", "fp32", **options) as plain:
        plain.graph_refused = "there is no GPU"
        start = 20
        for each in (session, plain):
            each.forward(ids[:, :start])
        for count in (2, 5, 1, 6, 2, 13, 16, 1, 5):
            part = ids[:, start : start + count]
            found, expected = (each.forward(part, all_logits=True) for each in (session, plain))
            assert np.abs(found - expected).max() <= 1e-3 * expected.std()
            start += count
        assert session.cuda_graph is True, session.graph_refused
        assert len(session._steps.shapes) == 4
        for found, expected in zip(session._received(), plain._received(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
