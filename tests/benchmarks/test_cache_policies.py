"""The benchmarks of cache policies: what is planted, what is divided by what, tables and pictures."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gta_edge.runtime.cache_policies import POLICIES


@pytest.fixture
def quality(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("cache_policies")


@pytest.fixture
def speed(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("cache_policies_speed")


# --- quality ---------------------------------------------------------------------------------------------------------


def test_every_policy_is_measured(quality: ModuleType) -> None:
    assert {case.name for case in quality.CASES} == set(POLICIES)
    for case in quality.CASES:
        chosen = case.policy(100)
        assert chosen.rows == (None if case.decides else 100)
    found = list(quality.cases([0.5, 0.2], ["window", "corm"]))
    assert [share for case, share in found if case.name == "window"] == [0.5, 0.2] * 2
    assert all(share == 0.5 for case, share in found if case.name == "corm")


def test_a_passage_lies_in_the_prompt_and_comes_again(quality: ModuleType) -> None:
    source = quality.material(Path("bundle"), np.arange(5000), 6, "torch")
    assert source.windows.shape == (6, quality.PROMPT + quality.FOLLOWING)
    for repeated, unseen in zip(source.repeated, source.unseen, strict=True):
        prompt, passage = repeated[: quality.PROMPT], repeated[quality.PROMPT :]
        (places,) = np.nonzero(np.lib.stride_tricks.sliding_window_view(prompt, quality.PASSAGE)[:, 0] == passage[0])
        start = next(place for place in places if (prompt[place : place + quality.PASSAGE] == passage).all())
        assert start + quality.PASSAGE <= quality.PROMPT - 64
        others = np.r_[: quality.PROMPT]
        outside = (others < start) | (others >= start + quality.PASSAGE)
        assert (prompt[outside] == unseen[: quality.PROMPT][outside]).all()
        assert (unseen[quality.PROMPT :] == passage).all()


@pytest.fixture
def found(quality: ModuleType) -> dict[str, Any]:
    base = {"perplexity": 10.0, "perplexity_forgotten": 12.0, "passage_loss": 1.0, "passage_loss_unseen": 3.0}
    results = []
    for case, share in quality.cases([0.5, 0.2], None):
        values = {"rows_share": share, "perplexity": 10.5, "rise_percent": 5.0, "passage_loss": 2.0, "retrieved": 0.5}
        kind = {"policy": case.name, "options": case.options, "share": None if case.decides else share}
        results.append({"label": case.label} | kind | values)
    return {
        "command": "python benchmarks/cache_policies.py",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_bytes": 2**34, "os": "Linux"},
        "windows": 4,
        "prompt": 512,
        "following": 256,
        "passage": 48,
        "budgets": {"budgets": [90, 12], "share": 0.2, "prompt": 512},
        "base": base,
        "shares": [0.5, 0.2],
        "results": results,
    }


def test_a_measurement_is_of_the_gain_that_a_copy_has(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    """With every row a policy retrieves all, and perplexity does not rise; with few it is between."""
    monkeypatch.setattr(quality, "PROMPT", 64)
    monkeypatch.setattr(quality, "FOLLOWING", 32)
    monkeypatch.setattr(quality, "PASSAGE", 6)
    source = quality.material(tiny_bundle, np.random.default_rng(0).integers(0, 250, 400), 2, "torch", 1)
    base = quality.without(source)
    assert all(math.isfinite(value) for value in base.values())
    whole = quality.measure(source, quality.Case("", "window"), 1.0, base)
    assert whole["rows_share"] == 1 and whole["passage_loss"] == pytest.approx(base["passage_loss"], rel=1e-5)
    assert whole["perplexity"] == pytest.approx(base["perplexity"], rel=1e-5) and abs(whole["rise_percent"]) < 1e-3
    few = quality.measure(source, quality.Case("", "zsmerge"), 0.25, base)
    assert few["rows_share"] == pytest.approx(0.25) and few["perplexity"] != base["perplexity"]
    unseen = base["passage_loss_unseen"]
    assert few["retrieved"] == pytest.approx((unseen - few["passage_loss"]) / (unseen - base["passage_loss"]))
    own = quality.measure(source, quality.Case("", "corm", decides=True), 0.25, base)
    assert own["share"] is None and 0 < own["rows_share"] <= 1


def test_tables_and_picture(quality: ModuleType, found: dict[str, Any], tmp_path: Path) -> None:
    page = quality.markdown(found)
    assert page.count("| recent window | 10.500 | 10.500 | 50% | 50% |") == 1
    assert "| CORM, 16 | 50.0% | 10.500 | +5.00% | 50% |" in page
    assert "All rows: 10.000; nothing of the prompt: 12.000" in page and "2.000 nats per token" in page
    assert "90, 12" in page and "2026-01-02" in page
    assert "Measured budgets" not in quality.markdown(found | {"budgets": None})
    quality.plot(found, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "CORM" in drawn and "ZSMerge" in drawn
    json.dumps(found)
    quality.show(found)


def test_fewer_positions_of_the_same_model(quality: ModuleType, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert quality.shortened(tiny_checkpoint, tmp_path / "short") == tiny_checkpoint
    quality.POSITIONS = 64
    short = quality.shortened(tiny_checkpoint, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    assert config == json.loads((tiny_checkpoint / "config.json").read_text()) | {"max_position_embeddings": 64}
    assert (short / "model.safetensors").read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes()


def test_the_command_has_what_the_figures_depend_on(quality: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["there/model", "--shares", "0.2,0.5", "--windows", "8", "--policies", "window,corm", "--text", "prose"]
    words += ["--json", "a.json", "--threads", "1"]
    arguments = quality.parse(words)
    assert quality._command(arguments) == (
        "python benchmarks/cache_policies.py model --text prose --shares 0.5,0.2 --windows 8 --policies window,corm"
    )
    assert quality._command(quality.parse([])) == "python benchmarks/cache_policies.py"
    for wrong in (["--shares", "1"], ["--shares", "x"], ["--policies", "lru"], ["--windows", "0"]):
        with pytest.raises(SystemExit):
            quality.parse(wrong)
    capsys.readouterr()


# --- speed -----------------------------------------------------------------------------------------------------------


def test_a_policy_is_divided_by_its_own_model(speed: ModuleType) -> None:
    pairs = speed.COMPARISON.ratios
    assert len(pairs) == 4 and all(under == f"{key.partition('/')[0]}/none" for key, (_, under) in pairs.items())
    assert speed.cache_options(speed.System("gta-1b", "none"), 64) is None
    assert speed.cache_options(speed.System("gta-1b", "window"), 64) == {"name": "window", "rows": 64}


def test_by_default_little_is_measured_and_all_on_demand(speed: ModuleType) -> None:
    small, whole = speed.parse([]), speed.parse(["--whole", "--layers", "3"])
    assert (small.contexts, small.models, small.layers) == ([8192], ["gta-1b"], 6)
    assert (whole.contexts, whole.models, whole.layers) == ([8192, 32000], list(speed.PRESETS), 3)
    command = "python benchmarks/cache_policies_speed.py"
    assert (speed._command(small), speed._command(whole)) == (command, f"{command} --whole --layers 3")


def test_the_worker_runs_a_policy(script: Callable[[str], ModuleType], tiny_bundle: Path) -> None:
    worker = script("cpu_peer_worker")
    worker._SPECIAL_IDS = 0
    spec = {"engine": "ours", "model": str(tiny_bundle), "threads": 1, "context": 60, "new_tokens": 3}
    spec |= {"vocab_size": 250, "cache": {"name": "window", "rows": 16, "interval": 4}}
    figures = worker.measure(spec)
    assert len(figures["steps_ms"]) == 3 and figures["cache_bytes"] > 0
    assert 0 < figures["policy_share"] < 1


def test_the_table_of_speeds(speed: ModuleType, tmp_path: Path) -> None:
    figures = {"decode_ms": 20.0, "decode_tokens_per_s": 50.0, "decode_max_ms": 30.0, "prefill_tokens_per_s": 100.0}
    metrics = dict.fromkeys(sys.modules["comparison"].METRICS, 1.0) | figures
    rows = []
    for key in ("gta-1b/none", "gta-1b/window"):
        own = metrics | ({"decode_ms": 10.0, "decode_tokens_per_s": 100.0} if key.endswith("window") else {})
        rows.append({"context": 8192, "round": 1, "system": key, "figures": own, "reason": None})
    static = {row["system"]: {"token_bytes": 900, "cache_bytes_per_token": 1} for row in rows}
    summary = speed.COMPARISON.summarise(rows, static, 1e6)
    speed.COMPARISON.plot(summary, tmp_path / "picture.svg")  # some of the systems
    assert "GTA-1B, window" in (tmp_path / "picture.svg").read_text()
    page = speed.COMPARISON.markdown(summary, "Said.")
    assert "| 8,192 | GTA-1B, window | 10.0 (10.0..10.0) |" in page and "| 2.00 (2.00..2.00) |" in page
    assert "| 8,192 | GTA-1B, every token | 20.0 (20.0..20.0) |" in page and page.startswith("Said.")
