"""Which steps run as CUDA graphs, how they are padded, and that padding shows nowhere: with graphs that only launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.accuracy.reference import build_decoder
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.step_costs import WIDTHS, padded_width
from gta_edge.runtime.token_tree import PREFIX
from gta_edge.runtime.torch import step_graphs
from gta_edge.runtime.torch.cuda_graph import CaptureError
from gta_edge.runtime.torch.session import TorchSession
from gta_edge.runtime.torch.step_graphs import tree_width
from tests.helpers import reference
from tests.helpers.torch_graphs import WithoutGraph

Key = tuple[int, int]
VOCAB = 31
SMALL = reference.gta_entries(vocab_size=VOCAB, max_position_embeddings=200)
IDS = np.random.default_rng(8).integers(0, VOCAB, (2, 200))
CALLS = (20, 2, 1, 3, 5, 7, -4, 8, 1, 16, -9, 11, 13, 1, 16, 6)
"""Tokens of calls for all logits, and those that are taken back."""

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Tokens and words of the graphs that are made."""
    noted: list[Key] = []

    class Noted(WithoutGraph):
        def __init__(self, *arguments: Any, tokens: int, words: int, **options: Any) -> None:
            noted.append((tokens, words))
            super().__init__(*arguments, tokens=tokens, words=words, **options)

    monkeypatch.setattr(step_graphs, "DecodeGraph", Noted)
    return noted


def opened(*, graphs: bool, **options: Any) -> TorchSession:
    session = TorchSession(build_decoder(parse_config(SMALL), reference.random_weights(SMALL).items()), **options)
    if graphs:
        session.graph_refused = None
    return session


# --- a few tokens that continue a text -------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"cache_dtype": "int8"},
    "int4": {"cache_dtype": "int4"},
    "with trees": {"trees": True},
    "window": {"cache": policy("window", rows=24, interval=8, sinks=2, residual_rows=2)},
    "mass": {"cache": policy("h2o", rows=200)},
    "last": {"cache": policy("corm", window=8, interval=300)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_few_tokens_are_the_same_in_a_graph(kind: str, captured: list[Key]) -> None:
    """Logits, what the cache holds, and what its rows have received; of two rows, of which one is shorter."""
    options = OPTIONS[kind]
    rows = 1 if kind == "window" else 2
    found = []
    for graphs in (True, False):
        with opened(graphs=graphs, **options) as session:
            session.forward(IDS[:rows, :20], lengths=[20, 11][:rows])
            logits, at = [], 20
            for count in CALLS[1:]:
                if count > 0:
                    given = IDS[:rows, at : at + count]
                    logits.append(session.forward(given, all_logits=count > 1))
                    at += count
                elif "cache" not in options:
                    session.truncate(session.length + count)
            length = int(session.length.min())
            layers = [tensor[:, :, :length] for layer in session._caches for tensor in layer.tensors]
            if kind == "int4":  # of an open block, rows that are not in use are anybody's
                layers = [
                    tensor[:, :, : length // 32] for each in session._caches for tensor in (each.key, *each.scales)
                ]
            if session._observed:
                layers += [each[:, :at] for each in session._observed.layers]
            found.append((logits, [layer.float().numpy().copy() for layer in layers]))
    for graphed, eager in zip(found[0][0], found[1][0], strict=True):
        assert reference.relative_error(graphed, eager) <= 1e-4
    for graphed, eager in zip(found[0][1], found[1][1], strict=True):
        assert (np.abs(graphed - eager) <= 1e-5 + 1e-4 * np.abs(eager)).mean() > (0.98 if kind == "int8" else 0.999)
    widths = {padded_width(count) for count in CALLS[1:] if count > 0}
    exact = {count for count in CALLS[1:] if count in WIDTHS}
    assert sorted(captured) == sorted((width, 0) for width in (exact if kind == "int4" else widths))


def test_padding_ends_where_the_cache_does(captured: list[Key]) -> None:
    with opened(graphs=True, capacity_step=25) as session:
        session.forward(IDS[:1, :20])
        session.forward(IDS[:1, 20:25], all_logits=True)
        assert (captured, session.capacity) == ([], 25)
        session.truncate(19)
        session.forward(IDS[:1, 19:24], all_logits=True)
        assert captured == [(6, 0)]


def test_what_comes_once_is_not_captured(captured: list[Key]) -> None:
    """A prompt of a few tokens, whose last logits are wanted; a part of a batch; more tokens than graphs are for."""
    with opened(graphs=True) as session:
        session.forward(IDS[:, :5])
        session.forward(IDS[:, 5:9], lengths=[4, 0], all_logits=True)
        session.forward(IDS[:, 9:26], all_logits=True)
        assert not captured
        expected = session.forward(IDS[:, 26:30], all_logits=True)[:, 2]
        session.truncate(session.length - 4)
        found = session.forward(IDS[:, 26:30], lengths=[3, 3])  # but what there is, is used
        assert captured == [(4, 0)]
        assert reference.relative_error(found, expected) <= 1e-5


def test_graphs_are_so_many_and_take_so_much(captured: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "_MAX_LOGITS_BYTES", 4 * VOCAB * 14)
    with opened(graphs=True) as session:
        session.forward(IDS[:1, :20])
        for count in (4, 8, 3, 8, 4, 16, 1):
            session.forward(IDS[:1, :count], all_logits=True)
    # 4, 8 and 3 are one token too many, of which 4 was used longest ago, and then 3; 16 is too much alone
    assert captured == [(4, 0), (8, 0), (3, 0), (4, 0), (1, 0)]


@pytest.mark.parametrize(
    "error", [CaptureError("as a test", "run it as it is"), torch.OutOfMemoryError("CUDA out of…")]
)
def test_where_there_is_no_graph_of_a_few_there_are_those_of_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    class Refuses(WithoutGraph):
        def __init__(self, *arguments: Any, tokens: int, **options: Any) -> None:
            tries.append(tokens)
            if tokens > 1:
                raise error
            super().__init__(*arguments, tokens=tokens, **options)

    monkeypatch.setattr(step_graphs, "DecodeGraph", Refuses)
    with opened(graphs=True) as session, opened(graphs=False) as eager:
        for count in (9, 3, 1, 4):
            found, expected = (each.forward(IDS[:1, :count], all_logits=True) for each in (session, eager))
            assert reference.relative_error(found, expected) <= 1e-5
        assert tries == [12, 1]


def test_a_call_that_captures_is_no_measure_of_the_next(captured: list[Key]) -> None:
    """Neither when a width is first used, nor when the cache has grown and all graphs are made anew."""
    with opened(graphs=True, capacity_step=24) as session:
        costs = session.step_costs
        session.forward(IDS[:1, :20])
        for _ in range(2):
            costs.add(1, 1.0)
        for start, seconds in ((20, 70.0), (24, 50.0), (28, 2.0)):  # the second call lets the cache grow
            session.forward(IDS[:1, start : start + 4], all_logits=True)
            costs.add(4, seconds)
        assert captured == [(4, 0), (4, 0)]
        assert costs.seconds(4) == 2.0


# --- nodes of trees --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_trees_run_in_graphs_of_a_few_widths(captured: list[Key]) -> None:
    """Padded, with the logits of a step that is not, and nothing of a capture is left in the cache."""
    found = []
    for graphs in (True, False):
        torch.manual_seed(1)
        session = TorchSession(Decoder(parse_config(SMALL)), trees=True, spare=64)
        if graphs:
            session.graph_refused = None
        session.forward([[1, 2, 3], [4, 5, 6]], lengths=[3, 2])
        trees = [session.tree(row) for row in range(2)]
        rows = []
        for parents in ([PREFIX, PREFIX, 0], [1], [2, 2, 3, 3, 3], [4] * 3):
            for tree, own in zip(trees, (parents, parents[:1]), strict=True):
                tree.grow([min(parent, tree.next - 1) for parent in own])
            ids = np.arange(2 * len(parents)).reshape(2, -1)
            rows.append(session.forward(ids, tree=trees, all_logits=True))
        trees[0].accept(7)
        trees[0].close()
        trees[1].close()
        rows.append(session.forward([[7], [8]]))
        found.append(rows)
        session.close()
    for graphed, eager in zip(*found, strict=True):
        assert reference.relative_error(graphed, eager) <= 1e-5
    # a prompt is no reason for one, and the text goes on as one without trees
    assert captured == [(4, 1024), (1, 1024), (8, 1024), (1, 0)]


def test_widths_of_trees_are_powers_of_two() -> None:
    assert [tree_width(tokens) for tokens in (1, 2, 3, 5, 8, 9, 33, 64)] == [1, 2, 4, 8, 8, 16, 64, 64]
