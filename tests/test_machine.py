"""What a machine says of itself; its files and commands are stood in for where this one is no Jetson."""

import os
from pathlib import Path

import pytest

from gta_edge import machine


def test_this_machine() -> None:
    found = machine.describe()
    assert found["cores"] == os.cpu_count()
    assert 0 < found["usable_cores"] <= found["cores"]
    assert found["memory_bytes"] > 2**28
    assert machine.package_versions()["numpy"]


@pytest.mark.parametrize(("least", "most", "fixed"), [("918000000", "918000000", True), ("1", "918000000", False)])
def test_clocks(tmp_path: Path, least: str, most: str, fixed: bool) -> None:
    assert machine.clocks_fixed(tmp_path) is None
    device = tmp_path / "17000000.gpu"
    device.mkdir()
    assert machine.clocks_fixed(tmp_path) is None
    (device / "min_freq").write_text(f"{least}\n")
    (device / "max_freq").write_text(f"{most}\n")
    assert machine.clocks_fixed(tmp_path) is fixed


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of commands that are found first."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def command(directory: Path, name: str, output: str, status: int = 0) -> None:
    (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    (directory / name).chmod(0o755)


def test_commands_of_a_jetson(commands: Path) -> None:
    command(commands, "nvpmodel", "NV Power Mode: MAXN_SUPER\n2")
    command(commands, "nvidia-smi", "Orin (nvgpu), 540.4.0, [N/A]")
    command(commands, "nvcc", "Cuda compilation tools, release 12.6, V12.6.68")
    command(commands, "dpkg-query", "6.2+b77")
    assert machine.power_mode() == "MAXN_SUPER"
    assert machine.gpus() == [{"name": "Orin (nvgpu)", "driver": "540.4.0", "memory": "[N/A]"}]
    assert machine.cuda_toolkit() == "12.6"
    assert machine.describe()["jetpack"] == "6.2+b77"


def test_commands_that_fail(commands: Path) -> None:
    for name in ("nvpmodel", "nvidia-smi", "nvcc", "dpkg-query"):
        command(commands, name, "NVIDIA-SMI has failed", status=9)
    assert (machine.power_mode(), machine.gpus(), machine.cuda_toolkit()) == (None, [], None)
    assert machine.describe()["jetpack"] is None
