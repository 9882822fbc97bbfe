"""Damage that the benchmark must find, and rounding that it must not take for damage: real models, really damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.evaluate.bench.agreement import ROUNDED_MEAN_BOUND, Answers, agreement, bound, mean_bound
from gta_edge.evaluate.bench.run import Settings, bench
from gta_edge.evaluate.bench.targets import Target
from gta_edge.export.pipeline import export_model
from gta_edge.runtime.registry import load
from tests.helpers.bench_bundles import damaged
from tests.helpers.bench_interpreters import wrong
from tests.helpers.tiny import TINY

HEAD = TINY.key_dim


def swapped(rows: np.ndarray) -> np.ndarray:
    """The first two query heads in each other's place."""
    return np.concatenate([rows[HEAD : 2 * HEAD], rows[:HEAD], rows[2 * HEAD :]])


DAMAGE: dict[str, tuple[str, Any]] = {
    "first layer negated": ("layers.0.self_attn.o_proj", np.negative),
    "last layer negated": ("layers.1.mlp.down_proj", np.negative),
    "two heads swapped": ("layers.0.self_attn.q_proj", swapped),
    "one row lost": ("layers.1.mlp.up_proj", lambda rows: rows * (np.arange(len(rows)) > 0)[:, None]),
}


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantised") / request.param
    export_model(tiny_checkpoint, directory, precision=request.param, verify=False)
    return directory


def answers(bundle: Path, *, exact: bool, change: str = "", rows: int = 2, steps: int = 4) -> Answers:
    """What ONNX Runtime says to a prompt, with its cache disturbed after that."""
    ids = np.random.default_rng(3).integers(0, TINY.vocab_size, (rows, 40))
    with load(bundle, "onnxruntime", exact=exact) as session:
        logits = [session.forward(ids)]
        if change == "stale cache":  # the prompt before this one
            session.reset()
            session.forward(ids[::-1] if rows > 1 else ids[:, ::-1])
        elif change == "shifted positions":
            session.truncate(session.length - 1)
        for _ in range(steps):
            logits.append(session.forward(logits[-1].argmax(-1)[:, None]))
        return Answers(np.stack(logits), session.backend, session.compute, session.rounds_activations)


def test_honest_rounding_agrees(quantised: Path) -> None:
    found = agreement(answers(quantised, exact=False), answers(quantised, exact=True))
    assert found["agrees"]
    assert 1e-4 < found["mean_error"] < ROUNDED_MEAN_BOUND / 3
    assert found["mean_error"] < found["max_rel_error"] < found["bound"] / 10


@pytest.mark.parametrize("what", ["first layer negated", "last layer negated"])
def test_a_negated_layer_shows_though_activations_are_rounded(
    quantised: Path, tiny_checkpoint: Path, tmp_path: Path, what: str
) -> None:
    other = damaged(tiny_checkpoint, tmp_path, *DAMAGE[what], precision=quantised.name)
    found = agreement(answers(other, exact=False), answers(quantised, exact=True))
    assert not found["agrees"]
    assert found["mean_error"] > found["mean_bound"]


@pytest.mark.parametrize("what", DAMAGE)
def test_any_damage_shows_in_exact_arithmetic(
    quantised: Path, tiny_checkpoint: Path, tmp_path: Path, what: str
) -> None:
    other = damaged(tiny_checkpoint, tmp_path, *DAMAGE[what], precision=quantised.name)
    found = agreement(answers(other, exact=True), answers(quantised, exact=True))
    assert not found["agrees"]


@pytest.mark.parametrize("change", ["stale cache", "shifted positions"])
def test_a_cache_that_is_another_shows_in_exact_arithmetic(quantised: Path, change: str) -> None:
    right = answers(quantised, exact=True)
    assert agreement(answers(quantised, exact=True), right)["agrees"]
    assert not agreement(answers(quantised, exact=True, change=change), right)["agrees"]


def test_a_near_tie_is_no_error() -> None:
    right = np.random.default_rng(0).normal(size=(5, 1, 50)).astype(np.float32)
    first, second = np.argsort(right[2, 0])[:-3:-1]
    right[2, 0, second] = right[2, 0, first] - 0.01
    other = right + np.random.default_rng(1).normal(scale=0.03, size=right.shape).astype(np.float32)
    other[2, 0, [first, second]] = right[2, 0, [second, first]]
    other[3:] = -right[3:]  # what follows another choice
    found = agreement(Answers(other, "onnxruntime", "fp32", rounds=True), Answers(right, "torch", "fp32"))
    assert found["agrees"]
    assert (found["same_tokens"], found["compared_tokens"]) == (2, 5)


@pytest.mark.parametrize("options", [{"rounds": True}, {"quantised_cache": True}])
def test_answers_that_have_nothing_to_do_with_the_reference(options: dict[str, bool]) -> None:
    rng = np.random.default_rng(0)
    right = rng.normal(size=(3, 1, 1000)).astype(np.float32)
    for other in (-right, right[:, :, ::-1], rng.normal(size=right.shape).astype(np.float32), right * 0, right * 1.3):
        for compute in ("fp32", "fp16", "bf16"):
            found = agreement(Answers(other, "tensorrt", compute, **options), Answers(right, "torch", "fp32"))
            assert not found["agrees"]
            assert found["mean_bound"] <= ROUNDED_MEAN_BOUND < found["mean_error"]


def test_caches_of_fewer_bits_are_held_to_their_own_noise() -> None:
    """Noise as PyTorch's caches have it in a trained model, and answers to another prompt."""
    rng = np.random.default_rng(0)
    right, other = rng.normal(size=(2, 3, 1, 1000)).astype(np.float32)
    right[..., 0] = 9  # the same choice
    noise = rng.normal(size=right.shape).astype(np.float32)

    def agrees(logits: np.ndarray, cache: str) -> bool:
        given = Answers(logits, "torch", "fp32", quantised_cache=True, cache_dtype=cache)
        return bool(agreement(given, Answers(right, "torch", "fp32"))["agrees"])

    for cache, scale in (("int8", 0.03), ("fp8", 0.04), ("int4", 0.18), ("int4v2", 0.37)):
        assert agrees(right + scale * noise, cache)
        assert not agrees(right + 6 * scale * noise, cache)
        assert not agrees(other, cache)


def test_a_mean_is_held_to_no_more_than_the_largest() -> None:
    for compute in ("fp32", "fp16", "bf16"):
        of = Answers(np.zeros((1, 1, 1), np.float32), "tensorrt", compute)
        assert mean_bound(of) == bound(of)


@pytest.mark.parametrize("quantised", ["int4"], indirect=True)
def test_a_run_finds_what_rounding_hides(quantised: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two heads that changed places move logits by less than rounding does."""
    other = damaged(tiny_checkpoint, tmp_path, *DAMAGE["two heads swapped"], precision=quantised.name)
    python = wrong(tmp_path / "wrong", quantised.resolve(), other.resolve())
    targets = [Target("torch"), Target("onnxruntime"), Target("onnxruntime", str(python))]
    hidden = agreement(answers(other, exact=False), answers(quantised, exact=True))
    assert hidden["agrees"]
    found = bench([quantised], targets, Settings(contexts=(6, 20), new_tokens=2, rounds=1))
    by_name = {(row["backend"], row["context"]): row for row in found["results"]}
    for context in (6, 20):
        honest, liar = by_name["onnxruntime", context], by_name[targets[2].label, context]
        assert (honest["agrees"], honest["bound"], honest["reference"]) == (True, 2.0, "torch")
        assert "max_rel_error" not in honest["notes"]
        assert (liar["agrees"], liar["rank"]) == (False, None)
        assert liar["max_rel_error"] > liar["bound"] == 1e-4
        assert "in exact arithmetic" in liar["notes"]["max_rel_error"]
