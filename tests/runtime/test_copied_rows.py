"""Rows of a batch copied to others: what follows there is what follows in the row itself, with every kind of cache."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from gta_edge.errors import BackendError, InputError
from gta_edge.runtime.session import Session
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.managed_sessions import VOCAB, make, open_session

CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "onnxruntime": ("onnxruntime", {"chunk_size": 16, "capacity_step": 16}),
    "onnxruntime, int8": ("onnxruntime", {"cache_dtype": "int8"}),
    "onnxruntime, zsmerge": ("onnxruntime", {"cache": "zsmerge, merged twice"}),
    "onnxruntime-cuda, h2o": ("onnxruntime-cuda", {"cache": "h2o"}),
    "tensorrt": ("tensorrt", {}),
    "torch, int4": ("torch", {"cache_dtype": "int4"}),
    "torch, h2o": ("torch", {"cache": "h2o"}),
    "torch, trees": ("torch", {"trees": True}),
}
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 64)  # two whole blocks of a cache in blocks


def opened(kind: str) -> Session:
    backend, options = CACHES[kind]
    return open_session(backend, "gta", **options | ({"cache": make(options["cache"])} if "cache" in options else {}))


@pytest.mark.parametrize("kind", CACHES)
def test_what_follows_in_a_copy_is_what_follows_in_the_row(kind: str) -> None:
    ids, lengths = np.zeros((3, 64), np.int64), np.array([0, 64, 0])
    ids[1] = PROMPT
    with opened(kind) as session, opened(kind) as alone:
        session.forward([[5], [6], [7]])  # something that goes
        session.truncate(0)
        session.forward(ids, lengths=lengths)
        session.copy_cache(1, [2, 0])
        assert session.length.tolist() == [64] * 3
        assert (session.rows == session.rows[:, 1:2]).all()
        alone.forward(PROMPT[None])
        if "cache" not in CACHES[kind][1]:  # no policy has dropped any
            for each in (session, alone):
                each.truncate(60)  # into what a cache in blocks still holds open
        for token in np.random.default_rng(2).integers(0, VOCAB, 14).tolist():  # a policy evicts meanwhile
            found, expected = session.forward([[token]] * 3), alone.forward([[token]])
            np.testing.assert_allclose(found, np.repeat(expected, 3, 0), atol=2e-5)
        assert (session.rows == alone.rows).all()
        found = session.forward([[1, 2], [3, 4], [5, 6]])  # and each goes on by itself
        expected = alone.forward([[3, 4]])
        np.testing.assert_allclose(found[1], expected[0], atol=2e-5)
        assert np.abs(found[[0, 2]] - expected).max() > 1e-2


def test_what_is_no_row_and_no_number_is_said_in_one_line() -> None:
    session: Any = opened("torch, trees")
    session.forward([[1, 2, 3], [4, 0, 0]], lengths=[3, 1])
    saved = session.export_cache()
    for call, problem in (
        (lambda: session.copy_cache("a", [1]), "the row is 'a'; expected a whole number"),
        (lambda: session.copy_cache(0, [1.0]), "the row is 1.0; expected a whole number"),
        (lambda: session.copy_cache(0, 1), "rows to copy to are 1; expected a list of their numbers"),
        (lambda: session.export_cache(True), "the row is True; expected a whole number"),
        (lambda: session.export_cache(0, 1.5), "tokens is 1.5; expected a whole number"),
        (lambda: session.import_cache(None), r"the saved cache is None; expected what export_cache\(\) returned"),
        (lambda: session.import_cache(saved, "0"), "the row is '0'; expected a whole number"),
        (lambda: session.import_cache(saved, 0, "2"), "tokens is '2'; expected a whole number"),
        (lambda: session.claim(0), "batch is 0; expected at least one row"),
        (lambda: session.claim(1.5), "batch is 1.5; expected a whole number"),
    ):
        with pytest.raises(InputError, match=problem):
            call()
        assert session.length.tolist() == [3, 1]


def test_copies_that_make_no_sense_are_refused_and_change_nothing(monkeypatch) -> None:
    session = opened("torch, int4")
    assert isinstance(session, TorchSession)
    session.forward([[1, 2, 3], [4, 0, 0], [0, 0, 0]], lengths=[3, 1, 0])
    for source, targets, problem in [
        (0, [3], "the cache has no row 3"),
        (-1, [0], "the cache has no row -1"),
        (0, [1, 0], "row 0 would be copied to itself"),
        (2, [0], "row 2 of the cache holds no tokens"),
    ]:
        with pytest.raises(InputError, match=problem):
            session.copy_cache(source, targets)
    claim = session.claim(2)
    claim.forward([[1], [2]])
    claim.copy_cache(0, [])
    claim.copy_cache(0, [1])
    assert claim.holds
    monkeypatch.setattr(session, "copies_rows", False)
    with pytest.raises(BackendError, match="copies no rows of a batch"):
        claim.copy_cache(0, [1])
    session.reset()
    with pytest.raises(InputError, match="something else used it"):
        claim.copy_cache(0, [1])


@pytest.mark.parametrize("step", ["_copy_row", "_write_row"])
def test_no_row_is_left_half_replaced(step: str, monkeypatch) -> None:
    with opened("torch, trees") as session:
        session.forward([[1, 2, 3], [4, 5, 6]])
        saved, whole = session.export_cache(0), getattr(session, step)

        def interrupted(*given: Any) -> None:
            whole(*given)
            raise KeyboardInterrupt

        monkeypatch.setattr(session, step, interrupted)
        call = partial(session.copy_cache, 0, [1]) if step == "_copy_row" else partial(session.import_cache, saved, 1)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert session.length.tolist() == [0, 0]
