"""The comparison with a peer: what it makes of the figures of single rounds, and how a measurement can fail."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gta_edge.errors import BackendError

CONTEXT = 100
STATIC = {key: {"token_bytes": 900, "cache_bytes_per_token": 1} for key in ("peer", "tuned", "gta", "gqa")}
BYTES_PER_S = 50_000.0  # so the floor is (900 + 100) / 50000 s, 20 ms


@pytest.fixture
def peer(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("cpu_peer")


@pytest.fixture
def worker(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("cpu_peer_worker")


def measured(peer: ModuleType, decode_ms: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """Return rounds with these times per token; None is a failure."""
    return [
        {
            "context": CONTEXT,
            "round": i,
            "system": system,
            "figures": None if ms is None else dict.fromkeys(sys.modules["comparison"].METRICS, 1.0)
            | {"decode_ms": ms, "decode_tokens_per_s": 1e3 / ms},
            "reason": "no memory" if ms is None else None,
        }
        for system, times in decode_ms.items()
        for i, ms in enumerate(times, start=1)
    ]  # fmt: skip


def summary(peer: ModuleType, decode_ms: dict[str, list[float | None]]) -> dict[str, Any]:
    (row,) = peer.COMPARISON.summarise(measured(peer, decode_ms), STATIC, BYTES_PER_S)
    return row


def document(peer: ModuleType, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python benchmarks/cpu_peer.py",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": peer.machine(),
        "versions": {"onnxruntime": "1.2"},
        "peer_versions": {"onnxruntime": "1.3", "onnxruntime-genai": "4.5"},
        "options": {"precision": "int4", "block_size": 32, "threads": 2, "rounds": 3},
        "bandwidth_bytes_per_s": peer.spread([BYTES_PER_S]),
        "summary": [row],
    }


def test_a_figure_is_the_median_over_the_rounds_with_its_range(peer: ModuleType) -> None:
    row = summary(peer, {"peer": [30, 90, 40], "gta": [10, 10, 10], "gqa": [20, 20, 20]})
    assert row["systems"]["peer"]["decode_ms"] == {"median": 40, "min": 30, "max": 90}
    assert row["systems"]["peer"]["floor_ms"] == pytest.approx(20)
    assert row["systems"]["peer"]["floor_fraction"] == pytest.approx(0.5)


def test_ratios_are_taken_within_a_round(peer: ModuleType) -> None:
    # the machine became slower with each round, the ratio stayed
    row = summary(peer, {"peer": [30, 60, 90], "tuned": [30, 60, 90], "gta": [10, 20, 30], "gqa": [15, 30, 45]})
    assert row["ratios"]["gta/peer"]["decode"] == pytest.approx({"median": 3, "min": 3, "max": 3})
    assert row["ratios"]["gta/gqa"]["decode"] == pytest.approx({"median": 1.5, "min": 1.5, "max": 1.5})
    assert row["ratios"]["gqa/tuned"]["decode"] == pytest.approx({"median": 2, "min": 2, "max": 2})


def test_a_round_that_failed_is_left_out(peer: ModuleType) -> None:
    row = summary(peer, {"peer": [30, None, 40], "gta": [10, 10, 10], "gqa": [20, 20, 20]})
    assert row["systems"]["peer"]["decode_ms"]["median"] == 35
    assert row["ratios"]["gta/peer"]["decode"] == pytest.approx({"median": 3.5, "min": 3, "max": 4})


def test_a_system_that_failed_has_no_figures_and_the_others_do(peer: ModuleType) -> None:
    row = summary(peer, {"peer": [None], "gta": [10], "gqa": [20]})
    assert row["systems"]["peer"] is None
    assert row["ratios"]["gta/peer"] is None
    assert row["ratios"]["gta/gqa"]["decode"]["median"] == 2
    assert row["reasons"] == {"peer": "no memory"}


def test_tables_have_a_cell_for_every_heading(peer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    made = document(peer, summary(peer, {"peer": [None], "gta": [10], "gqa": [20]}))
    text = peer.COMPARISON.markdown(made["summary"], peer.conditions(made))
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [3, 3]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "10.0 (10.0..10.0)" in text
    assert "genai GQA failed at 100: no memory" in text
    for fact in ("python benchmarks/cpu_peer.py", "2026-01-02", "onnxruntime 1.2", "onnxruntime-genai 4.5"):
        assert fact in text
    peer.COMPARISON.show(made["summary"], peer.conditions(made))
    assert "10.0 (10.0..10.0)" in capsys.readouterr().out


def test_the_command_in_the_tables_has_no_paths(peer: ModuleType) -> None:
    arguments = peer.parse(["--work", "/somewhere", "--json", "/else/where", "--contexts", "8,4", "--threads", "1"])
    assert peer._command(arguments) == (
        "python benchmarks/cpu_peer.py --contexts 4,8 --new-tokens 32 --rounds 3 --precision int4 --block-size 32 "
        "--threads 1"
    )


def test_a_worker_without_its_model_gives_a_reason(peer: ModuleType, tmp_path: Path) -> None:
    spec = {"engine": "ours", "model": str(tmp_path), "context": 4, "new_tokens": 2, "vocab_size": 2000, "threads": 1}
    figures, reason = peer.Run(Path(sys.executable), spec).measure()
    assert figures is None
    assert "is not a bundle" in reason


def test_a_killed_worker_says_so(peer: ModuleType, tmp_path: Path) -> None:
    killed = tmp_path / "worker.py"
    killed.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    sys.modules["comparison"].WORKER = killed
    figures, reason = peer.Run(Path(sys.executable), {"engine": "ours"}).measure()
    assert (figures, reason) == (None, "ended by SIGKILL, probably for lack of memory")


def test_an_interpreter_without_the_peer_is_refused(peer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot import the peer .*; without --peer-python"):
        peer.peer_python(tmp_path / "python", tmp_path)


def test_a_failed_step_shows_the_end_of_its_log(peer: ModuleType, tmp_path: Path) -> None:
    program = "import sys; print('much'); print('no room'); sys.exit(3)"
    with pytest.raises(
        BackendError, match=r"the build failed with status 3 \(much \| no room\); its output is in .*build.log"
    ):
        peer.logged([sys.executable, "-c", program], tmp_path / "build.log", "the build")


def test_times_of_single_tokens_are_summed_up(worker: ModuleType) -> None:
    steps = [10.0] * 9 + [12.0, 40.0]
    assert worker.summary(steps) == {
        "decode_ms": 10,
        "decode_p90_ms": 12,
        "decode_max_ms": 40,
        "decode_tokens_per_s": 100,
    }


def test_memory_is_in_bytes(worker: ModuleType) -> None:
    assert 2**24 < worker.memory("VmRSS") <= worker.memory("VmHWM")


def test_the_worker_measures_a_bundle(worker: ModuleType, wide_bundle: Path) -> None:
    spec = {"engine": "ours", "model": str(wide_bundle), "context": 12, "new_tokens": 3, "vocab_size": 1200}
    figures = json.loads(json.dumps(worker.measure(spec | {"threads": 1})))
    assert len(figures["steps_ms"]) == 3
    assert figures["prefill_tokens_per_s"] == pytest.approx(12 / figures["prefill_s"])
    assert figures["peak_bytes"] >= figures["end_bytes"]
    assert figures["cache_bytes"] > 0


@pytest.fixture
def wide_bundle(tmp_path: Path) -> Path:
    """A bundle whose vocabulary is large enough for the worker's prompts."""
    from gta_edge.export.pipeline import export_model
    from gta_edge.formats.random_checkpoint import initialise
    from tests.helpers.tiny import TINY

    initialise(TINY.replace(vocab_size=1200), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", verify=False)
    return tmp_path / "bundle"
