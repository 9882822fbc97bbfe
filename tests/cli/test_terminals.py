"""What doctor shows people, and commands on terminals and with readers that go away."""

import os
import pty
import re
import select
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gta_edge
from gta_edge.cli import doctor_checks
from gta_edge.machine import info as machine
from tests.helpers.commands import COMMAND, Result, environment, run

Command = Callable[..., Result]


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    document = run("doctor", "--json").content
    assert document.keys() == {
        *("gta_edge", "machine", "gpu", "packages", "kernels", "tensorrt", "onnxruntime_providers", "backends"),
        "features",
    }
    assert list(document["backends"]) == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime", "torch"]
    assert document["gta_edge"] == gta_edge.__version__
    assert document["packages"].keys() >= {"numpy", "onnxruntime", "torch", "onnx", "onnx-ir", "onnxscript"}
    assert "CPUExecutionProvider" in document["onnxruntime_providers"]
    kernels = document["kernels"]
    assert kernels["works"] == (kernels["reason"] is None) == (kernels["gpu"] is not None)
    for name in ("onnxruntime", "torch"):
        assert document["backends"][name] == {"works": True, "reason": None, "remedy": None}
    assert document["features"].keys() == {"export", "plot"}
    assert document["features"]["export"] == {"works": True, "reason": None, "remedy": None}
    for name in ("tensorrt", "tensorrt-rtx"):
        entry = document["backends"][name]
        assert entry["works"] == (entry["reason"] is None)
        assert entry["works"] <= (kernels["works"] and document["tensorrt"][name] is not None)


def test_doctor_for_people(command: Command) -> None:
    result = command("doctor")
    assert (result.status, result.err) == (0, "")
    for name in ("onnxruntime", "torch", "export"):
        assert re.search(rf"^✓ {name}\b", result.out, re.MULTILINE), name
    lines = result.out.splitlines()
    assert re.fullmatch(r"Best backend here: \S+\. Next: gta-edge (build|export) .*", lines[-1])


def test_doctor_shows_a_jetsons_clocks(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    clock = {"min": 306000000, "max": 918000000, "now": 306000000}
    found = machine.describe() | {"clocks_hz": {"gpu": clock, "cpu": clock, "memory": None}, "clocks_fixed": False}
    found |= {"jetpack": None, "jetson_linux": None}
    monkeypatch.setattr(machine, "describe", lambda: dict(found))
    answers = doctor_checks.run(list(doctor_checks.CHECKS))
    monkeypatch.setattr(doctor_checks, "run", lambda names: answers)  # once is enough: it is the clocks that differ
    for board in (None, "Radxa ROCK 5B", "NVIDIA Jetson Orin Nano Developer Kit"):
        found["board"] = board
        text = command("doctor").out
        assert command("doctor", "--json").content["machine"]["clocks_hz"] == found["clocks_hz"]
        assert ("sudo jetson_clocks" in text) is ("memory not known" in text) is ("Jetson" in (board or ""))
    assert re.search(r"^· clocks +GPU 306 to 918 MHz, now 306; CPU 306 to 918", text, re.MULTILINE)


# --- terminals and pipes -------------------------------------------------------------------------------------------


def on_a_terminal(arguments: list[object], tmp_path: Path) -> tuple[Result, str]:
    """Run a command whose stderr is a terminal; return its result, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("w+") as out:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], env=environment(TERM="xterm", COLUMNS="100"), stdout=out, stderr=theirs
        )
        os.close(theirs)
        sent = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                sent += os.read(ours, 4096)
            except OSError:  # Linux's way to say that nobody has it open any more
                break
        os.close(ours)
        status = process.wait(60)
        out.seek(0)
        return Result(status, out.read(), ""), sent.decode()


def test_a_bar_on_a_terminal(tiny_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(300))
    arguments = ["eval", tiny_bundle, "--ids", tmp_path / "ids.npy"]
    result, sent = on_a_terminal(arguments, tmp_path)
    assert result.status == 0
    assert "evaluating" in sent
    assert "100%" in sent
    assert "perplexity" in result.out
    assert "\x1b" not in result.out
    for option in ("--quiet", "--json"):
        result, sent = on_a_terminal([*arguments, option], tmp_path)
        assert (result.status, sent) == (0, "")
        assert "perplexity" in result.out


def test_a_spinner_for_what_cannot_count(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result, sent = on_a_terminal(["export", tiny_checkpoint, tmp_path / "bundle", "--no-verify"], tmp_path)
    assert result.status == 0
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sent)
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] +tracing the model", shown)
    assert "writing weights" in shown


def test_no_progress_where_there_is_no_terminal(
    command: Command, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(300))
    for arguments in (
        ("eval", tiny_bundle, "--ids", tmp_path / "ids.npy"),
        ("verify", tiny_bundle, "--checkpoint", tiny_checkpoint),
        ("export", tiny_checkpoint, tmp_path / "bundle"),
        ("inspect", tiny_bundle, "--verify-hashes"),
    ):
        result = command(*arguments)
        assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect gta-1b",
        "inspect gta-1b --json",
        "generate {} --ids 1 --ignore-eos",
        "generate {} --ids 1 --ignore-eos --json",
        "generate --help",
    ],
)
def test_a_reader_that_goes_away(tiny_bundle: Path, arguments: str) -> None:
    words = [word.format(tiny_bundle) for word in arguments.split()]
    ours, theirs = os.pipe()
    os.close(ours)  # as `| head -c 0` does, but for sure before anything is written
    result = subprocess.run(
        [*COMMAND, *words], env=environment(), stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert "error" not in result.stderr


def test_head_gets_what_it_wants(tiny_bundle: Path) -> None:
    head = shutil.which("head")
    assert head is not None
    with subprocess.Popen(
        [*COMMAND, "generate", tiny_bundle, "--ids", "1", "--ignore-eos"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        taken = subprocess.run([head, "-c", "10"], stdin=process.stdout, capture_output=True, check=True).stdout
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert len(taken) == 10
