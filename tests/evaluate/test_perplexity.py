"""Loss and perplexity, and verification of a bundle that exists."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.errors import BackendError, BundleError, CheckpointError, InputError
from gta_edge.evaluate.perplexity import evaluate, read_ids
from gta_edge.evaluate.verify import verify
from gta_edge.export.pipeline import export_model
from gta_edge.runtime.registry import load
from gta_edge.runtime.session import Session
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.generation import ScriptedSession

ENTRIES = reference.gta_entries(heads=4, n_q=2, e=2, vocab_size=61, max_position_embeddings=24)
WEIGHTS = reference.random_weights(ENTRIES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    write_checkpoint(directory / "checkpoint", ENTRIES, WEIGHTS)
    export_model(directory / "checkpoint", directory / "bundle", precision="bf16")
    export_model(directory / "checkpoint", directory / "exact", precision="fp32", verify=False)
    return directory


@pytest.fixture(params=["onnxruntime", "torch"])
def session(request: pytest.FixtureRequest, directory: Path) -> Iterator[Session]:
    with load(directory / "exact", request.param, chunk_size=5) as session:
        yield session


def exact_loss(ids: np.ndarray, window: int) -> float:
    """Mean of -log p over all tokens but the first, each given those before it in its window."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        logits = reference.gta_logits(ENTRIES, WEIGHTS, part[:-1])
        for row, target in zip(logits, part[1:], strict=True):
            shifted = row - row.max()
            total += math.log(np.exp(shifted).sum()) - shifted[target]
    return total / (len(ids) - 1)


@pytest.mark.parametrize(("tokens", "window"), [(2, 24), (24, 24), (25, 24), (26, 24), (40, 7), (13, 1)])
def test_loss_is_that_of_the_formula(session: Session, tokens: int, window: int) -> None:
    ids = np.random.default_rng(tokens).integers(0, 61, tokens)
    result = evaluate(session, ids, window=window)
    assert result.tokens == tokens - 1
    assert result.loss == pytest.approx(exact_loss(ids, window), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_default_window_is_all_positions(session: Session) -> None:
    ids = np.random.default_rng(0).integers(0, 61, 50)
    assert evaluate(session, ids) == evaluate(session, ids, window=24)


def test_what_makes_no_sense(session: Session) -> None:
    for ids, message in (
        ([3], "at least two"),
        ([[1, 2]], "at least two"),
        ([1, 61], "61 is outside"),
        ([1, -1], "-1"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(session, np.array(ids))
    for window in (0, 25):
        with pytest.raises(InputError, match=f"window is {window}; expected 1 to 24"):
            evaluate(session, np.array([1, 2]), window=window)


def test_ids_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.array([1, 2, 3], np.int32))
    np.testing.assert_array_equal(read_ids(tmp_path / "good.npy"), [1, 2, 3])
    np.save(tmp_path / "float.npy", np.array([1.0]))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", ids=np.array([1]))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-4])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("{}")
    for name in ("float.npy", "object.npy", "archive.npz", "cut.npy", "empty.npy", "none.npy", "text.npy"):
        with pytest.raises(InputError, match=name) as raised:
            read_ids(tmp_path / name)
        assert "unsafely" not in str(raised.value)  # as numpy says how to load what is a program


def test_verify_passes_and_says_what_storage_changed(directory: Path) -> None:
    report = verify(directory / "bundle", directory / "checkpoint")
    assert report.passed
    assert report.backends.keys() == {"onnxruntime", "torch"}
    assert all(d.max_rel_error <= 1e-4 and d.top1_agreement == 1 for d in report.backends.values())
    assert 0 < report.quantisation.max_rel_error <= 8e-2
    assert verify(directory / "exact", directory / "checkpoint", ["torch"]).quantisation.max_abs_error == 0


def test_verify_against_another_checkpoint(directory: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other weights", ENTRIES, reference.random_weights(ENTRIES, seed=1))
    report = verify(directory / "exact", tmp_path / "other weights", ["onnxruntime"])
    assert not report.passed
    assert "weights stored in fp32" in report.failures[0]
    other = {**ENTRIES, "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "other model", other, reference.random_weights(other))
    with pytest.raises(CheckpointError, match="is another model"):
        verify(directory / "exact", tmp_path / "other model")


def test_verify_of_what_is_not_there(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no backend is called 'tensorflow'"):
        verify(directory / "bundle", directory / "checkpoint", ["tensorflow"])
    with pytest.raises(BundleError, match="does not exist"):
        verify(tmp_path / "none", directory / "checkpoint")


class NanSession(ScriptedSession):
    def _run(self, input_ids, past_length, logit_positions):
        return super()._run(input_ids, past_length, logit_positions) * np.float32("nan")


def test_logits_that_are_nan_are_no_loss() -> None:
    with pytest.raises(BackendError, match="the model's logits hold NaN"):
        evaluate(NanSession([1]), np.arange(5))


@pytest.mark.parametrize("window", [True, 2.5, "4", 0, -1, 10**30])
def test_windows_of_any_other_kind(window: Any) -> None:
    with pytest.raises(InputError, match=r"window is .*; expected 1 to 64"):
        evaluate(ScriptedSession([]), np.arange(5), window=window)


@pytest.mark.parametrize("ids", [np.arange(5.0), [[1], [2, 3]], ["a", "b"], np.array([True, False]), 3, None])
def test_ids_of_any_other_kind(ids: Any) -> None:
    with pytest.raises(InputError, match=r"the ids|at least two"):
        evaluate(ScriptedSession([]), ids)


def test_ids_that_are_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ids.npy")
    with pytest.raises(InputError, match="is not a regular file"):
        read_ids(tmp_path / "ids.npy")
