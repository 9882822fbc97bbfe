"""The benchmark of guesses, on the small model."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

import gta_edge
from tests.helpers.benchmarks import BENCHMARKS

EXAMPLE = BENCHMARKS.parent / "examples" / "tiny-gta"


def test_guesses_are_measured(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module, bundle = script("speculation"), tmp_path / "bundle"
    gta_edge.export_model(EXAMPLE, bundle, verify=False)
    with module.loaded(bundle, "onnxruntime", None) as (session, trees):
        loop, noise = np.tile(np.arange(40, 46), 9), np.random.default_rng(0).permutation(2000)[:60]
        texts = {"a loop": (loop, 20), module.NO_REPETITION: (noise, 20)}
        found = module.measured(session, trees, texts, 1, own=False)
        assert [row["tokens"] for row in found["texts"]] == [33, 39]
        for kind in ("chains", "trees"):
            assert found["texts"][0][kind]["accepted"] <= found["texts"][0][kind]["drafted"]
            assert found["texts"][1][kind]["drafted"] == 0
    whole = {"command": "python it", "machine": module.machine(), "date": "2026-11-28T01:02:03", "GTA-1B": found}
    assert "| a loop | trees |" in module.markdown(whole)
