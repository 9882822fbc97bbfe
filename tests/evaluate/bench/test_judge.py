"""Two right backends that are far apart at an ill-conditioned position, and wrong ones that are as far."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.evaluate.bench.agreement import Answers, agreement
from gta_edge.evaluate.bench.judge import judged
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.registry import load
from tests.helpers.ill_conditioned import ill_conditioned

pytest.importorskip("torch", reason="PyTorch is the judge")

STEPS = 3


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A bundle, and a prompt [2, 1] of which the first row is the token that no float32 gets right."""
    directory = tmp_path_factory.mktemp("judged")
    token = ill_conditioned(directory, leaves=1e-4)
    export_model(directory / "checkpoint", directory / "bundle", precision="fp32")
    return directory / "bundle", np.array([token, (token + 1) % 300])


def answers(bundle: Path, backend: str, prompt: np.ndarray) -> Answers:
    with load(bundle, backend) as session:
        logits = [session.forward(prompt)]
        for _ in range(STEPS):
            logits.append(session.forward(logits[-1].argmax(-1)[:, None]))
        return Answers(np.stack(logits), session.backend, session.compute, cache_dtype=session.cache_dtype)


def changed(of: Answers, change: Any) -> Answers:
    return Answers(change(of.logits).astype(np.float32), of.backend, of.compute, cache_dtype=of.cache_dtype)


def test_right_answers_that_are_far_apart_agree(prompt: tuple[Path, np.ndarray]) -> None:
    bundle, ids = Bundle.open(prompt[0]), prompt[1]
    theirs, ours = (answers(prompt[0], backend, ids) for backend in ("torch", "onnxruntime"))
    found = agreement(ours, theirs)
    assert not found["agrees"]  # by a bound that is the same everywhere
    after = judged(bundle, ids, ours, theirs, found)
    assert after["agrees"]
    assert found["max_rel_error"] == after["max_rel_error"] <= after["bound"] < 0.5
    assert after["mean_error"] <= after["mean_bound"]


@pytest.mark.parametrize("factor", [1.01, 1.3, -1.0])
def test_wrong_answers_do_not(prompt: tuple[Path, np.ndarray], factor: float) -> None:
    bundle, ids = Bundle.open(prompt[0]), prompt[1]
    theirs = answers(prompt[0], "torch", ids)
    ours = changed(theirs, lambda logits: logits * factor)
    found = agreement(ours, theirs)
    assert not found["agrees"]
    assert judged(bundle, ids, ours, theirs, found) == found


def test_one_wrong_step_is_found(prompt: tuple[Path, np.ndarray]) -> None:
    bundle, ids = Bundle.open(prompt[0]), prompt[1]
    theirs = answers(prompt[0], "torch", ids)

    def change(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[1, 1] += 0.01 * logits.std()  # which changes no choice
        return logits

    ours = changed(theirs, change)
    assert not judged(bundle, ids, ours, theirs, agreement(ours, theirs))["agrees"]


def test_what_agrees_is_not_judged(prompt: tuple[Path, np.ndarray]) -> None:
    """It would take long."""
    ids = prompt[1]
    found = {"agrees": True}
    other: Any = None  # which nothing may be asked of
    assert judged(other, ids, other, other, found) is found


def test_a_prompt_that_would_take_too_long(prompt: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, ids = Bundle.open(prompt[0]), prompt[1]
    monkeypatch.setattr("gta_edge.evaluate.bench.judge._MAX_FLOPS", 1.0)
    other: Any = None
    found = {"agrees": False}
    assert judged(bundle, ids, other, other, found) is found
