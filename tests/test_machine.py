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


def test_cpu_clock_and_caches(tmp_path: Path) -> None:
    assert (machine.cpu_governor(tmp_path), machine.cpu_cache_bytes(tmp_path)) == (None, None)
    for i, governor in enumerate(("schedutil", "performance", "schedutil")):
        (tmp_path / f"cpu{i}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{i}" / "cpufreq" / "scaling_governor").write_text(f"{governor}\n")
    for i, size in enumerate(("32K", "2M", "1024K", "many")):
        (tmp_path / "cpu0" / "cache" / f"index{i}").mkdir(parents=True)
        (tmp_path / "cpu0" / "cache" / f"index{i}" / "size").write_text(f"{size}\n")
    assert machine.cpu_governor(tmp_path) == "performance, schedutil"
    assert machine.cpu_cache_bytes(tmp_path) == 2 * 2**20


@pytest.mark.parametrize(
    ("changes", "load", "words"),
    [
        ({}, 0.1, []),
        ({"clocks_fixed": True, "cpu_governor": "schedutil"}, 0.1, []),
        ({"clocks_fixed": False}, 0.1, ["sudo jetson_clocks"]),
        ({"board": "NVIDIA Jetson Orin Nano"}, 0.1, ["nvpmodel"]),
        ({"board": "NVIDIA Jetson Orin Nano", "power_mode": "MAXN"}, 0.1, []),
        ({"cpu_governor": "schedutil"}, 0.1, ["(schedutil)"]),
        ({"cpu_governor": "performance"}, 0.1, []),
        ({}, 3.25, ["3.2 of 8 cores"]),
    ],
)
def test_what_makes_times_vary(changes: dict[str, object], load: float, words: list[str]) -> None:
    nothing = {"clocks_fixed": None, "board": None, "power_mode": None, "cpu_governor": None, "usable_cores": 8}
    found = machine.timing_warnings(nothing | changes, load)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
