"""``gta-edge bench`` as a command: what it prints, what it writes, how it refuses, and how it is interrupted."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

from gta_edge.cli import bench_plot, bench_text
from tests.helpers.bench_bundles import damaged
from tests.helpers.bench_interpreters import wrong
from tests.helpers.commands import COMMAND, Result, environment
from tests.helpers.tiny import TINY

Command = Callable[..., Result]

KEYS = {
    "bundle",
    "backend",
    "precision",
    "context",
    "batch",
    "ttft_ms",
    "prefill_tokens_per_s",
    "tpot_ms",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "cache_bytes",
    "bandwidth_fraction",
    "notes",
    "agrees",
    "spread",
}
QUICK = ("--rounds", 1, "--new-tokens", 2)


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backend under an interpreter that there is not."""
    return f"torch@{tmp_path_factory.mktemp('absent')}/python"


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, absent: str) -> dict[str, Any]:
    """What the command prints of two backends that are there and one that is not; not to be changed."""
    backends = f"onnxruntime,onnxruntime@{sys.executable},{absent}"
    arguments = ["bench", tiny_bundle, "--backend", backends, "--contexts", "12,5", "--rounds", 2, "--new-tokens", 3]
    result = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"], env=environment(), capture_output=True, text=True, check=False
    )
    return Result(result.returncode, result.stdout, result.stderr).document


# --- results -------------------------------------------------------------------------------------------------------


def test_json(report: dict[str, Any], tiny_bundle: Path, absent: str) -> None:
    assert report.keys() >= {"machine", "results", "absent", "backends"}
    assert [row["context"] for row in report["results"]] == [5, 5, 12, 12]
    for row in report["results"]:
        assert row.keys() >= KEYS
        assert (row["bundle"], row["precision"], row["batch"]) == (str(tiny_bundle), "bf16", 1)
        assert row["tpot_ms"].keys() == {"p50", "p90", "p99"}
        assert row["agrees"] is True
    assert report["machine"].keys() >= {"cpu", "gpus", "board", "jetpack", "power_mode", "clocks_fixed", "warnings"}
    assert report["machine"]["clocks_hz"].keys() == {"gpu", "cpu", "memory"}
    (entry,) = report["absent"]
    assert entry["backend"] == absent
    assert "is no program" in entry["reason"]


def shown(report: dict[str, Any]) -> str:
    console = rich.console.Console(file=io.StringIO(), width=40)  # narrower than the tables, which nothing may cut
    bench_text.show_all(console, report)
    text: str = console.file.getvalue()
    return text


def test_the_short_table_fits_80_columns(report: dict[str, Any], absent: str) -> None:
    console = rich.console.Console(file=io.StringIO(), width=80)
    bench_text.show(console, report)
    lines = console.file.getvalue().splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.startswith("context "))
    rows = lines[head + 1 : head + 1 + len(report["results"])]
    assert lines[head].split()[0] == "context"
    assert max(len(line.rstrip()) for line in lines[head - 1 : head + 1 + len(rows)]) <= 80
    for row, line in zip(report["results"], rows, strict=True):
        cells = line.split()
        assert cells[0] == f"{row['context']}"
        assert cells[1] == ("onnxruntime[1]" if "@" in row["backend"] else "onnxruntime")
        assert cells[4].lstrip("~") == f"{row['tpot_ms']['p50']:.2f}"
        assert cells[5] == f"{row['decode_tokens_per_s']:.1f}"
        assert cells[-1] in ("same", "reference")
    assert f"[1] onnxruntime@{sys.executable}" in lines
    assert f"not there: {absent}" in " ".join(" ".join(lines).split())


def test_the_short_table_says_what_is_wrong(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    changed["results"][0] |= {"agrees": False, "max_rel_error": 3.5}
    changed["results"][1] |= {"tpot_ms": None, "agrees": None}
    changed["results"][1]["notes"] = {"ttft_ms": "it was ended by SIGKILL"}
    console = rich.console.Console(file=io.StringIO(), width=80)
    bench_text.show(console, changed)
    text = console.file.getvalue()
    assert text.count("WRONG") == 1
    assert text.count("failed") == 1
    assert "it was ended by SIGKILL" in " ".join(text.split())


def test_tables(report: dict[str, Any], absent: str) -> None:
    text = shown(report)
    assert text.index("weights read/token") < text.index("\nmeasured") < text.index("\ndistance")
    assert text.index("\ndistance") < text.index(f"not there: {absent}")
    assert "…" not in text
    assert text.count(f"onnxruntime@{sys.executable} ") == 1 + 2 + 2
    for row in report["results"]:
        assert f" {row['tpot_ms']['p99']:.2f} ms" in text
        assert f"{row['bandwidth_fraction']:.2f}" in text


def test_the_floor_stands_above_what_was_measured(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    named, gone = (changed["backends"][place]["backend"] for place in range(2))
    for row in changed["results"]:
        row["floor_ms"] = (0.25 if row["context"] == 5 else 70.5) if row["backend"] == named else None
    changed["results"] = [row for row in changed["results"] if (row["backend"], row["context"]) != (gone, 12)]
    static, measured, distance = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
        for part in bench_text.as_markdown(changed).split("\n\n")
        if part.startswith("|")
    )
    assert static[0][-4:] == ["bandwidth", "floor at 5", "floor at 12", "runs on"]
    cells = {line[1]: line[-3:-1] for line in static[2:]}
    assert cells == {named: ["0.25 ms", "70.50 ms"], gone: ["n/a", "n/a"]}
    assert not any("floor" in head for head in measured[0])
    assert [head for head in distance[0] if "floor" in head] == ["times floor"]
    for line, row in zip(distance[2:], changed["results"], strict=True):
        if row["backend"] == gone:
            assert line[2:4] == ["n/a", "n/a"]
        else:
            assert line[2:4] == [f"{row['times_floor']:.2f}", f"{row['bandwidth_fraction']:.2f}"]


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, "a CPU, "),
        ({"board": "Raspberry Pi 5"}, "Raspberry Pi 5; a CPU, "),
        ({"board": "NVIDIA Jetson", "jetpack": "6.2"}, "NVIDIA Jetson, JetPack 6.2; a CPU, "),
        ({"board": "NVIDIA Jetson", "power_mode": "MAXN"}, "NVIDIA Jetson, power mode MAXN; a CPU, "),
    ],
)
def test_a_board_shows_with_what_is_known_of_it(report: dict[str, Any], changes: dict[str, str], begins: str) -> None:
    changed, unknown = copy.deepcopy(report), dict.fromkeys(("board", "jetpack", "jetson_linux", "power_mode"))
    clock = {"min": 306000000, "max": 918000000, "now": None}
    changed["machine"] |= unknown | {"cpu": "a CPU", "clocks_hz": {"gpu": clock, "cpu": None, "memory": None}} | changes
    text = shown(changed)
    assert text.startswith(begins)
    clocks = "\nclocks: GPU 306 to 918 MHz, now ?; CPU not known; memory not known\n"
    assert (clocks in text) is ("Jetson" in changes.get("board", ""))


def test_the_ratio_to_the_fastest_shows(report: dict[str, Any]) -> None:
    slower = next(row for row in report["results"] if row["rank"] == 2)
    found = slower["times_first"]["tpot"]
    assert f" {found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" in shown(report)


@pytest.mark.parametrize(
    ("graph", "text"), [(True, "fp32, CUDA graph "), (False, "fp32, no CUDA graph "), (None, "fp32 ")]
)
def test_whether_tokens_are_replays_shows(report: dict[str, Any], graph: bool | None, text: str) -> None:
    changed = copy.deepcopy(report)
    for entry in changed["backends"]:
        entry["cuda_graph"] = graph
    assert text in shown(changed)
    assert ("CUDA graph" in shown(changed)) is (graph is not None)


def test_a_wrong_answer_shows(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    row = changed["results"][0]
    row |= {"agrees": False, "max_rel_error": 3.5, "rank": None}
    assert "WRONG, error 3.5e+00" in shown(changed)
    assert f"{row['backend']} at 5 answers wrongly: its logits are 3.5 of their spread away" in shown(changed)
    row["max_rel_error"] = float("inf")
    assert "WRONG, not finite" in shown(changed)


def test_rounds_that_lie_far_apart_show(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    for row, spread in zip(changed["results"], (0.1, None, 0.5, 0.4), strict=True):
        row["spread"]["tpot"] = spread
        row["notes"].pop("spread.tpot", None)
    changed["results"][1]["notes"]["spread.tpot"] = "one round has no spread"
    assert "not settled" not in shown(changed)
    changed["results"][2]["notes"]["spread.tpot"] = "the rounds lie 50% apart, and …"
    assert "have not settled in 1 of 4 rows" in shown(changed)


def test_what_was_not_measured_shows(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    row = changed["results"][-1]
    row |= dict.fromkeys(
        [key for key in row if key.endswith(("_ms", "_bytes", "fraction")) or key in ("agrees", "spread")]
    )
    row["notes"] = {"ttft_ms": "it was ended by SIGKILL"}
    row["rank"] = None
    for text in (shown(changed), bench_text.as_markdown(changed)):
        assert "not measured" in text
        assert "it was ended by SIGKILL" in text


def test_markdown(report: dict[str, Any], absent: str) -> None:
    text = bench_text.as_markdown(report)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [2 + 2, 2 + 4, 2 + 4]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert f"- not there: {absent}" in text


def test_several_bundles_and_a_prompt(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_bundle)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("abcdef")  # a byte is a token
    result = command(
        "bench", tiny_bundle, link, "--backend", "onnxruntime", "--prompt-file", prompt, "--markdown", *QUICK
    )
    assert (result.status, result.err) == (0, "")
    lines = [line.split(" | ") for line in result.out.splitlines() if line.startswith(("| /", "| bundle"))]
    assert {line[0] for line in lines} == {"| bundle", f"| {tiny_bundle}", f"| {link}"}
    assert {line[1] for line in lines[-2:]} == {"6"}


def test_plot(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "latency.png"
    arguments = ("--backend", "onnxruntime", "--ids", "1,2,3,4,5", "--contexts", "2,5", "--plot", picture)
    document = command("bench", tiny_bundle, *arguments, *QUICK, "--json").document
    assert [row["context"] for row in document["results"]] == [2, 5]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["latency.png"]


def test_a_plot_of_wrong_answers_says_so(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    changed = copy.deepcopy(report)
    changed["results"][0]["agrees"] = False
    bench_plot.draw(tmp_path / "latency.svg", changed, force=False)
    text = (tmp_path / "latency.svg").read_text()
    assert f">{changed['results'][0]['backend']} (wrong answers)<" in text


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", "16,nine"), "--contexts is '16,nine'; expected whole numbers"),
        (("--contexts", TINY.max_position_embeddings), "leaves no room for a new token"),
        (("--contexts", "0"), "--contexts has 0"),
        (("--batch", 0), "--batch is 0"),
        (("--new-tokens", 0), "--new-tokens is 0"),
        (("--rounds", 0), "--rounds is 0"),
        (("--ids", "1,x"), "--ids is '1,x'"),
        (("--ids", "1,2", "--contexts", "3"), "the prompt has 2 tokens"),
        (("--prompt-file", "{tmp}/missing"), "/missing: cannot be read"),
        (("--plot", "{tmp}/missing/x.png"), "its directory does not exist"),
        (("--plot", "{tmp}/x.txt"), "expected a name that ends in .png"),
        (("--batch", 10**9), "GB are free; give a smaller --batch or --contexts"),
        (("--batch", 10**300), "GB are free; give a smaller --batch or --contexts"),
        (("--threads", 100_000), "100000 threads were asked for"),
        (("--rounds", 10**9), "--rounds is 1000000000; expected 1 to"),
    ],
)
def test_refused_before_anything_starts(
    command: Command,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr("gta_edge.evaluate.bench.case.Worker", None)  # starting a process would fail
    assert message in command("bench", tiny_bundle, *(str(word).format(tmp=tmp_path) for word in arguments)).error


def test_a_bundle_that_does_not_exist(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "does not exist" in command("bench", tiny_bundle, tmp_path / "missing").error


@pytest.mark.parametrize("options", [("--markdown", "--json"), ("--ids", "1", "--prompt-file", "x")])
def test_options_that_exclude_each_other(command: Command, tiny_bundle: Path, options: tuple[str, ...]) -> None:
    assert "give one of" in command("bench", tiny_bundle, *options).usage


def test_nobody_could_be_measured(command: Command, tiny_bundle: Path, absent: str) -> None:
    result = command("bench", tiny_bundle, "--backend", absent, "--json")
    assert result.status == 1
    assert result.err == "error: no backend could be measured; the report says why of each\n"
    document = json.loads(result.out)
    assert document["results"] == []
    assert [entry["backend"] for entry in document["absent"]] == [absent]


@pytest.fixture(scope="module")
def liar(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backend that has a layer's sign changed."""
    directory = tmp_path_factory.mktemp("liar")
    other = damaged(tiny_checkpoint, directory, "layers.1.mlp.down_proj", np.negative)
    return f"onnxruntime@{wrong(directory / 'wrong', tiny_bundle.resolve(), other.resolve())}"


@pytest.mark.parametrize("options", [(), ("--json",), ("--markdown",)])
def test_wrong_answers_are_an_error_after_the_report(
    command: Command, tiny_bundle: Path, liar: str, options: tuple[str, ...]
) -> None:
    result = command("bench", tiny_bundle, "--backend", f"onnxruntime,{liar}", "--contexts", "8", *QUICK, *options)
    assert result.status == 1
    assert result.err.startswith(f"error: {liar} at 8 answers wrongly: its logits are ")
    assert len(result.err.splitlines()) == 1
    assert len(result.err) < 600
    if "--json" in options:
        agrees = {row["backend"]: row["agrees"] for row in json.loads(result.out)["results"]}
        assert agrees == {"onnxruntime": True, liar: False}
    else:
        assert "WRONG" in result.out


# --- Ctrl-C --------------------------------------------------------------------------------------------------------


def workers(parent: int) -> list[int]:
    """Processes that a process has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, started_by = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(started_by) == parent and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("bench", tiny_bundle, "--backend", "onnxruntime", "--contexts", "8", "--rounds", 100000)
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("prompt.npy")) and time.monotonic() < deadline:
            time.sleep(0.02)  # until it measures
        started = workers(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert started
    assert (process.returncode, out, err) == (130, "", "")
    assert not [pid for pid in started if Path(f"/proc/{pid}/cmdline").exists() and os.getpgid(pid) == pid]
    assert list(tmp_path.iterdir()) == []
