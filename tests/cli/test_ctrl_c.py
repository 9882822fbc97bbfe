"""Ctrl-C: exit status 130, what was printed until then stays, and nothing else is left."""

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.runtime.generation.sampling import Sampler
from tests.helpers.commands import COMMAND, Result, environment


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_interrupted_generation(tiny_bundle: Path) -> None:
    # The command waits in the middle of its text, since the pipe that it writes to has room for ten bytes only.
    arguments = [*COMMAND, "generate", tiny_bundle, "--ids", "1,2,3", "--ignore-eos"]
    ours, theirs = os.pipe()
    size = fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    filling = size - 10
    os.write(theirs, b"x" * filling)

    def waiting() -> bool:
        buffer = bytearray(4)
        fcntl.ioctl(ours, termios.FIONREAD, buffer)
        return struct.unpack("i", buffer)[0] > size - 4  # a character has up to four bytes, and is written at once

    with subprocess.Popen(arguments, env=environment(), stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        try:
            wait_for(waiting)
            process.send_signal(signal.SIGINT)
            with os.fdopen(ours, "rb") as stream:
                out = stream.read()[filling:]
            assert process.stderr is not None
            err = process.stderr.read().decode()
            assert process.wait(60) == 130, err
        finally:
            process.kill()
    assert 7 < len(out) < 100  # of more than a hundred
    assert out.endswith(b"\n")
    assert re.fullmatch(r"\[onnxruntime\] 3 prompt tokens, .*; \d+ tokens.*; ended by interrupted\n", err)


def test_interrupted_generation_as_json(tiny_bundle: Path) -> None:
    script = """
import os, signal, sys
from gta_edge.cli import main
from gta_edge.runtime.generation.sampling import Sampler

sample, drawn = Sampler.sample, []

def interrupted(*arguments):
    drawn.append(sample(*arguments))
    if len(drawn) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return drawn[-1]

Sampler.sample = interrupted
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", script, "generate", tiny_bundle, "--ids", "1,2,3", "--ignore-eos", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (130, "")
    document = json.loads(process.stdout)
    assert document["finish_reason"] == "interrupted"
    assert len(document["ids"]) in (2, 3)


def test_interrupted_before_the_first_token(tiny_bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompt")  # waits for its text
    arguments = [*COMMAND, "generate", tiny_bundle, "--prompt-file", tmp_path / "prompt"]
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with (tmp_path / "prompt").open("wb"):  # returns when the command has opened it
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize("moment", ["at once", "a little later"])
def test_interrupted_export(tiny_checkpoint: Path, tmp_path: Path, moment: str) -> None:
    arguments = [*COMMAND, "export", tiny_checkpoint, tmp_path / "out"]
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: any(tmp_path.iterdir()))
        partial = next(tmp_path.iterdir())
        if moment == "a little later":
            wait_for(lambda: any(partial.iterdir()))  # the graph is being written, or checked already
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_while_the_program_starts() -> None:
    script = """
import os, signal, sys
from gta_edge.cli import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", script, "doctor"], env=environment(), capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "lost",
    [
        "raise ImportError('initialization failed') from error",  # what modules in C make of it
        "raise SystemError('something else')",
        "sys.exit(1)",
    ],
)
def test_an_interrupt_that_a_library_makes_an_error_of(
    command: Callable[..., Result], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def sample(*arguments: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt as error:
            exec(lost, {"sys": sys, "error": error})

    monkeypatch.setattr(Sampler, "sample", sample)
    result = command("generate", tiny_bundle, "--ids", "1,2,3", "--backend", "torch")
    assert (result.status, result.out, result.err) == (130, "", "")


def test_an_interrupt_in_a_finalizer_is_not_lost(
    command: Callable[..., Result], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python prints an exception of a finalizer and goes on."""

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    sample, drawn = Sampler.sample, []

    def finalizing(*arguments: Any) -> Any:
        drawn.append(sample(*arguments))
        if len(drawn) == 3:
            Finalized()
            time.sleep(5)  # until it arrives
        return drawn[-1]

    monkeypatch.setattr(Sampler, "sample", finalizing)
    result = command("generate", tiny_bundle, "--ids", "1,2,3", "--ignore-eos", "--backend", "torch")
    assert result.status == 130
    assert re.fullmatch(r"\[torch\] 3 prompt tokens, .*; \d tokens.*; ended by interrupted\n", result.err)
