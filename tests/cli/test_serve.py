"""``gta-edge serve`` as a process: how it begins, how it ends, and what it refuses before it begins."""

import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.commands import COMMAND, Result, environment

Command = Callable[..., Result]
DOCUMENT = {"schema_version", "url", "model", "backend", "slots", "max_length", "sampling", "pid"}


@contextmanager
def started(*arguments: object, **variables: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a service and yield its process and what it says when it is ready."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--json", "--port", "0", *map(str, arguments)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_a_service_ends_when_it_has_answered(tiny_bundle: Path) -> None:
    body = {"prompt": [1, 2], "max_tokens": 110, "ignore_eos": True, "stream": True}
    with started(tiny_bundle, "--threads", 1, "--speculate", "lookup") as (process, said):
        assert said.keys() == DOCUMENT
        assert (said["model"], said["pid"]) == ("bundle", process.pid)
        with httpx.stream("POST", f"{said['url']}/v1/completions", json=body, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) == 110
        assert process.wait(20) == 143
        assert process.communicate() == ("", "")


def test_keys_of_the_environment_and_the_end_by_ctrl_c(tiny_bundle: Path) -> None:
    with started(tiny_bundle, "--alias", "some/name", GTA_EDGE_API_KEY="0123456789") as (process, said):
        url = f"{said['url']}/v1/models"
        assert httpx.get(url, trust_env=False).status_code == 401
        found = httpx.get(url, trust_env=False, headers={"authorization": "Bearer 0123456789"}).json()
        assert found["data"][0]["id"] == "some/name"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.communicate() == ("", "")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (None, "cannot be read"),
        (b"# nothing\n\n", "has no API key"),
        (b"short\n", "API key 1 cannot be used"),
        (b"0123456789\nwith a space\n", "API key 2 cannot be used"),
        ("schlüssel\n".encode(), "API key 1 cannot be used"),
    ],
)
def test_files_of_keys_that_are_refused(
    failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, keys, said
) -> None:
    if keys is not None:
        (tmp_path / "keys").write_bytes(keys)
    message = failing("serve", tiny_bundle, "--port", 0, "--api-key-file", tmp_path / "keys")
    assert said in message
    assert "0123456789" not in message


def test_addresses_that_are_refused(failing: Callable[..., str], tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failing("serve", tiny_bundle, "--port", port).startswith(
            f"the service cannot listen at '127.0.0.1' port {port} (Address already in use)"
        )
    assert "cannot listen at '192.0.2.1' port" in failing("serve", tiny_bundle, "--host", "192.0.2.1")
    assert failing("serve", tiny_bundle, "--top-p", 2).startswith("top_p is 2")


def test_a_unit_runs_the_same_command(command: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "keys").write_text("0123456789\n")
    (tmp_path / 'a $100% "bundle"').symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    options = ["--unit", "--port", 80, "--api-key-file=keys", "--alias", "a\\b"]
    assert command("serve", 'a $100% "bundle"', *options).err == ""
    monkeypatch.setenv("GTA_EDGE_API_KEY", "abcdefghij")
    printed = command("serve", 'a $100% "bundle"', *options)
    assert "the unit does not have the key of GTA_EDGE_API_KEY: give it a file with --api-key-file" in printed.err
    unit = printed.out
    assert "abcdefghij" not in unit
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    # what systemd undoes: specifiers and variables, then its quotes, which are those of a shell here
    words = shlex.split(lines["ExecStart"].replace("%%", "%").replace("$$", "$"))
    name = f'{tmp_path}/a $100% "bundle"'
    keys = f"--api-key-file={tmp_path}/keys"
    assert words == [sys.executable, "-m", "gta_edge", "serve", name, "--port", "80", keys, "--alias", "a\\b"]
    assert lines["SuccessExitStatus"] == "143"
    # no variables here; and a directory that is not there yet keeps no service from starting
    writable = shlex.split(lines["ReadWritePaths"].replace("%%", "%"))
    assert writable[0] == f"-{name}"
    assert all(path.startswith("-/") for path in writable)
