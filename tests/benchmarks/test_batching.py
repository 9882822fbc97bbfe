"""Texts at once beside one after another: what is counted, and a small run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def test_a_small_run(
    script: Script, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    module = script("batching")
    words = [tiny_bundle, "--requests", "1,3", "--prompt", 5, "--new-tokens", 4, "--rounds", 2, "--history", 40]
    monkeypatch.setattr("sys.argv", ["batching.py", *map(str, words), "--json", str(tmp_path / "a.json")])
    module.main()
    document = json.loads((tmp_path / "a.json").read_text())
    (model,) = document["models"]
    assert [row["texts"] for row in model["rows"]] == [1, 3]
    for row in model["rows"]:
        assert row["together_tokens_per_s"]["min"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert model["turn"]["read"]["median"] > 0
    shown = capsys.readouterr().out
    assert "| bundle, onnxruntime | 3 | " in shown
    assert "| bundle | 40 | 32 | " in shown
