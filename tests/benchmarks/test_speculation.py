"""The benchmark of guesses and branches, on the small model."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

import gta_edge
from gta_edge.model.kv_cache import bytes_per_token
from tests.helpers.benchmarks import BENCHMARKS

EXAMPLE = BENCHMARKS.parent / "examples" / "tiny-gta"


def test_guesses_and_branches_are_measured(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module, bundle = script("speculation"), tmp_path / "bundle"
    gta_edge.export_model(EXAMPLE, bundle, verify=False)
    with gta_edge.load(bundle, "onnxruntime") as session:
        loop, noise = np.tile(np.arange(40, 46), 9), np.random.default_rng(0).permutation(2000)[:60]
        texts = {"a loop": (loop, 20), module.NO_REPETITION: (noise, 20)}
        found = module.measured(session, texts, 1, own=False)
        assert [row["tokens"] for row in found["texts"]] == [33, 39]
        assert found["texts"][0]["accepted"] <= found["texts"][0]["drafted"]
        assert found["texts"][1]["drafted"] == 0
        per_token = bytes_per_token(session.config)
    options = argparse.Namespace(threads=1, context=200, answers=4, answer_tokens=20)
    answers = module.several(bundle, options)
    for way, rows in (("tree", 200 + 4 * 20), ("batch", 4 * (200 + 20))):
        assert rows * per_token <= answers[way]["cache_bytes"] <= (rows + 4 * 256) * per_token
    assert "| ratio |" in module.markdown({"GTA-1B": found, "answers": answers})
