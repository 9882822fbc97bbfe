"""Told to end: every command leaves nothing behind, and its exit status says what ended it."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.commands import COMMAND, environment


def started(*arguments: object, cwd: Path, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(directory: Path, pattern: str, process: subprocess.Popen) -> None:
    while not list(directory.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with started("init", "gta1-160m", "checkpoint", cwd=tmp_path) as process:
        wait_for(tmp_path, ".gta-edge-*.partial/model*", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_goes_with_the_next(tmp_path: Path) -> None:
    with started("init", "gta1-160m", "checkpoint", cwd=tmp_path) as process:
        wait_for(tmp_path, ".gta-edge-*.partial/model*", process)
        process.kill()
        process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) != []
    with started("init", "gta1-160m", "another", "--layers", 1, cwd=tmp_path) as process:
        process.communicate(timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    ignore = ("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); ", "")
    command = [*COMMAND[:2], ignore[0] + COMMAND[2], "init", "gta1-160m", "checkpoint", "--layers", "4"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as process:
        wait_for(tmp_path, ".gta-edge-*.partial", process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_signal_while_arguments_are_parsed_is_no_ctrl_c(tmp_path: Path) -> None:
    """The library that parses them takes every KeyboardInterrupt for Ctrl-C, and its status is 130."""
    script = """
import os, signal, sys
import typer.core
parse = typer.core.TyperCommand.parse_args
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return parse(*arguments)
typer.core.TyperCommand.parse_args = interrupted
sys.argv[0] = "gta-edge"
from gta_edge.cli import main
main()
"""
    command = [COMMAND[0], "-c", script, "inspect", "gta-1b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (143, b"", b"")
