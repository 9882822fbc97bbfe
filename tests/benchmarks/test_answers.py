"""The benchmark of several answers: both ways run the same tokens, and a small run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession

Script = Callable[[str], ModuleType]


def test_both_ways_run_the_same_tokens(script: Script, tiny_bundle: Path) -> None:
    module, rng = script("answers"), np.random.default_rng(1)
    prompt, answers = rng.integers(0, 50, (1, 9)), rng.integers(0, 50, (3, 4))
    with OnnxRuntimeSession(Bundle.open(tiny_bundle), trees=True) as session:
        assert all(seconds > 0 for seconds in module.as_branches(session, prompt, answers))
        assert session.length.tolist() == [9] and session.rows.max() == 9 + 3 * 4
        assert all(seconds > 0 for seconds in module.as_rows(session, prompt, answers))
        assert session.length.tolist() == [13] * 3


def test_a_small_run(
    script: Script,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("answers")
    monkeypatch.setattr(module, "make_bundles", lambda *arguments: {"int4": tiny_bundle})
    words = ["--work", tmp_path, "--prompt", 70, "--answers", 2, "--new-tokens", 3, "--rounds", 1, "--threads", 1]
    monkeypatch.setattr("sys.argv", ["answers.py", *map(str, words)])
    module.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["answers"], found["prompt"]) == (2, 70) and found["time_ratio"] > 0
    assert found["tree_cache_MB"] <= found["batch_cache_MB"]
