"""Public functions called with an argument of a type that makes no sense: one line says which."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gta_edge
from gta_edge.errors import GtaEdgeError
from gta_edge.runtime.cache_policies import policy

WRONG = [5, 2.5, None, b"bytes", [None], {}, object()]


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Any]:
    with gta_edge.load(tiny_bundle, "onnxruntime") as opened:
        yield opened


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
def test_what_is_wrong_is_named(
    session: Any, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, wrong: Any
) -> None:
    calls: dict[str, Any] = {
        "the bundle is": lambda: gta_edge.load(wrong),
        "the checkpoint is": lambda: gta_edge.export_model(wrong, tmp_path / "new"),
        "the path to write is": lambda: gta_edge.export_model(tiny_checkpoint, wrong),
        "the session is": lambda: gta_edge.generate(wrong, "text"),
        "the session is ": lambda: gta_edge.Conversation(wrong),
        "the prompt cache is": lambda: gta_edge.Conversation(session).load(wrong),
        "the prompt cache is ": lambda: gta_edge.Conversation(session).save(wrong),
        "the path to write is ": lambda: gta_edge.Conversation(session).resume(wrong),
        "no preset is called": lambda: gta_edge.preset(wrong),
        "no cache policy is called": lambda: policy(wrong),
        "no backend is called": lambda: gta_edge.load(tiny_bundle, wrong),
        "id": lambda: session.forward(wrong),
        "truncate": lambda: session.truncate(wrong),
        "prompt": lambda: gta_edge.generate(session, wrong),
    }
    if wrong is not None:
        calls["cache is"] = lambda: gta_edge.load(tiny_bundle, cache=wrong)
        calls["conversation is"] = lambda: gta_edge.generate(session, [1], conversation=wrong)
        calls["draft model is"] = lambda: gta_edge.generate(session, [1], draft=wrong)
        calls["lengths are"] = lambda: session.forward([[1]], lengths=wrong)
        if wrong != {}:
            calls["logit_bias is"] = lambda: gta_edge.generate(session, [1], logit_bias=wrong)
    if wrong not in (5, None):
        calls["threads is"] = lambda: gta_edge.load(tiny_bundle, "onnxruntime", threads=wrong)
        calls["chunk_size is"] = lambda: gta_edge.load(tiny_bundle, "onnxruntime", chunk_size=wrong)
    for told, call in calls.items():
        with pytest.raises(GtaEdgeError) as raised:
            call()
        assert told.strip() in raised.value.problem
        assert "\n" not in str(raised.value)


def test_ids_beyond_64_bits_are_named(session: Any) -> None:
    for large in (2**64, 10**5000):
        for call in (lambda x=large: session.forward([[1, x]]), lambda x=large: gta_edge.generate(session, [1, x])):
            with pytest.raises(GtaEdgeError, match="token id"):
                call()
