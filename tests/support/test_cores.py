"""How many cores a process may use, by files as Linux writes them, and by this machine's own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gta_edge.errors import InputError
from gta_edge.support.cores import check_threads, installed_cores, threads_for, usable_cores
from gta_edge.support.text import brief
from tests.helpers.machines import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine of eight cores; call it with how many of them this process may run on."""

    def allow(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    allow(8)
    return allow


@pytest.mark.parametrize(
    ("content", "count"),
    [("max 100000", 8), ("50000 100000", 1), ("100000 100000", 1), ("150000 100000", 2), ("1600000 100000", 8)],
)
def test_a_share_of_time_of_version_2(
    machine: Machine, eight_cores: Callable[[int], None], content: str, count: int
) -> None:
    machine.is_in("/a/b")
    machine.group("a", cpu__max=content)
    machine.group("a/b", cpu__max="max 100000")
    assert (usable_cores(machine.proc), threads_for(None, machine.proc, machine.proc)) == (count, count)
    eight_cores(3)
    assert usable_cores(machine.proc) == min(3, count)


@pytest.mark.parametrize(("quota", "count"), [(-1, 8), (50000, 1), (150000, 2), (0, 8)])
def test_a_share_of_time_of_version_1(
    machine: Machine, eight_cores: Callable[[int], None], quota: int, count: int
) -> None:
    machine.is_in("/a", "cpu,cpuacct", mount="cpu,cpuacct")
    machine.group("cpu,cpuacct/a", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    machine.group("cpu,cpuacct", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert usable_cores(machine.proc) == count


def test_two_hardware_threads_of_a_core_compute_as_one(
    machine: Machine, eight_cores: Callable[[int], None], tmp_path: Path
) -> None:
    for cpu in range(8):
        directory = tmp_path / f"cpu{cpu}" / "topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert usable_cores(machine.proc) == 8
    assert threads_for(None, machine.proc, tmp_path) == 4
    eight_cores(3)
    assert threads_for(None, machine.proc, tmp_path) == 3
    assert threads_for(None, machine.proc, tmp_path / "none") == 3
    eight_cores(5)
    assert threads_for(None, machine.proc, tmp_path) == 4


@pytest.mark.parametrize("asked", [1, 2, 8, 32])
def test_as_many_threads_as_were_asked_for(eight_cores: object, asked: int) -> None:
    assert threads_for(asked) == asked


@pytest.mark.parametrize("asked", [0, -1, 33, 100_000, 2**70])
def test_threads_that_could_be_of_no_use(eight_cores: object, asked: int) -> None:
    with pytest.raises(
        InputError, match=rf"^{brief(asked)} threads were asked for, .*8 cores 8 may be used; expected 1 to 32$"
    ):
        check_threads(asked)


@pytest.mark.parametrize("content", ["", "nonsense", "-5", "max max", "1" * 30, "1 0", "x y z"])
def test_a_share_that_says_nothing_of_use(machine: Machine, eight_cores: object, content: str) -> None:
    machine.is_in("/")
    machine.group("", cpu__max=content)
    assert usable_cores(machine.proc) == 8


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= installed_cores()
    assert 1 <= threads_for(None) <= usable_cores()
