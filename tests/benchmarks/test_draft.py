"""The benchmark of a draft model, with the shipped model as its own draft."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.benchmarks import BENCHMARKS

EXAMPLE = BENCHMARKS.parent / "examples" / "tiny-gta"


def test_how_often_a_guess_has_to_be_right(script: Callable[[str], ModuleType]) -> None:
    needed = script("draft").needed
    # a call of two for the price of one, with a guess at half of it: 1 + a tokens for 1.5
    assert needed({1: 1.0, 2: 1.0}, 0.5, 1.0) == pytest.approx(0.5)
    assert needed({1: 1.0, 2: 1.0}, 0.5, 1.2) == pytest.approx(0.8)
    # 1 + a + a² tokens for 2.0 need a golden ratio of them
    assert needed({1: 1.0, 2: 9.0, 3: 1.0}, 0.5, 1.0) == pytest.approx(0.618, abs=0.01)
    assert needed({1: 1.0, 2: 1.0, 3: 1.0}, 1.0, 1.0) == 1.0
    assert needed({1: 1.0, 2: 1.0, 3: 1.0}, 1.0, 1.1) is None


def test_the_model_as_its_own_draft(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("draft")
    monkeypatch.setattr(module, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(module, "SHAPES", {"2 layers of 128": module.SHAPES["2 layers of 128"]})
    options = {"work": tmp_path, "draft": EXAMPLE, "rounds": 2, "prompts": 2, "new_tokens": 8, "turns": 1, "threads": 1}
    found = module.run(argparse.Namespace(**options))
    (costs,), trained = found["costs"], found["trained"]["precisions"]["fp32"]
    assert all(ms > 0 for ms in costs["calls_ms"].values())
    assert costs["guesses"]["2 layers of 128"]["parameters"] == 787_776
    assert all(each == pytest.approx(1) for each in trained["agreement"].values())
    for row in trained["generation"]:
        assert row["draft"]["accepted"] == row["draft"]["drafted"]
    assert "| fp32 | at temperature 0.8 |" in module.markdown(found)
