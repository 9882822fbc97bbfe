"""What memory a process may have, by files as Linux writes them, and by this machine's own."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gta_edge.errors import CapacityError
from gta_edge.support.memory import available_bytes, installed_bytes, require_bytes, total_bytes
from tests.helpers.commands import environment
from tests.helpers.machines import Machine

MiB = 2**20
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_groups(machine: Machine) -> None:
    assert (machine.available(), machine.total()) == (5 * 2**30, 8 * 2**30)
    machine.meminfo.write_text("MemTotal: 1 kB\n")
    assert (machine.available(), machine.total()) == (None, 1024)
    machine.meminfo.unlink()
    assert (machine.available(), machine.total()) == (None, None)


def test_this_machine() -> None:
    available, total, installed = available_bytes(), total_bytes(), installed_bytes()
    assert available is not None
    assert total is not None
    assert installed is not None
    assert available > 0
    assert 0 < total <= installed


@pytest.mark.parametrize("limit", ["memory__max", "memory__high"])
def test_a_container_of_version_2(machine: Machine, limit: str) -> None:
    machine.is_in("/")
    stat = f"anon 1\ninactive_file {20 * MiB}\nactive_file {5 * MiB}\n"
    machine.group("", **{limit: 300 * MiB}, memory__current=120 * MiB, memory__stat=stat)
    assert (machine.available(), machine.total()) == (200 * MiB, 300 * MiB)


def test_a_container_of_version_1(machine: Machine) -> None:
    machine.is_in("/docker/abc", "memory", root="/docker/abc", mount="memory")
    files = {"memory__limit_in_bytes": 300 * MiB, "memory__usage_in_bytes": 120 * MiB}
    stat = f"inactive_file 7\ntotal_inactive_file {20 * MiB}\n"
    machine.group("memory", **files, memory__stat=stat)
    assert (machine.available(), machine.total()) == (200 * MiB, 300 * MiB)
    swap = {"memory__memsw__limit_in_bytes": 310 * MiB, "memory__memsw__usage_in_bytes": 280 * MiB}
    machine.group("memory", **swap)
    assert machine.available() == 50 * MiB


def test_what_can_be_reached_before_the_system_ends_a_process(machine: Machine) -> None:
    """With swap and all caches, and without limits that only slow it down."""
    assert machine.reachable() == machine.available()
    machine.meminfo.write_text(f"MemAvailable: {5 * 2**20} kB\nSwapFree: {100 * 2**10} kB\n")
    assert machine.reachable() == 5 * 2**30 + 100 * MiB
    machine.is_in("/")
    stat = f"anon 1\ninactive_file {20 * MiB}\nactive_file {5 * MiB}\n"
    machine.group("", memory__max=300 * MiB, memory__high=MiB, memory__current=120 * MiB, memory__stat=stat)
    assert machine.reachable() == 305 * MiB
    machine.group("", memory__swap__max=30 * MiB, memory__swap__current=10 * MiB)
    assert machine.reachable() == 225 * MiB
    machine.group("", memory__swap__max=0)
    assert machine.reachable() == 205 * MiB


def test_what_can_be_reached_in_version_1(machine: Machine) -> None:
    machine.meminfo.write_text(f"MemAvailable: {5 * 2**20} kB\nSwapFree: {100 * 2**10} kB\n")
    machine.is_in("/docker/abc", "memory", root="/docker/abc", mount="memory")
    files = {"memory__limit_in_bytes": 300 * MiB, "memory__usage_in_bytes": 120 * MiB}
    stat = f"active_file 9\ntotal_inactive_file {20 * MiB}\ntotal_active_file {5 * MiB}\n"
    machine.group("memory", **files, memory__stat=stat)
    assert machine.reachable() == 305 * MiB
    machine.group("memory", memory__memsw__limit_in_bytes=310 * MiB, memory__memsw__usage_in_bytes=280 * MiB)
    assert machine.reachable() == 55 * MiB


def test_what_has_no_room_is_refused_with_both_figures() -> None:
    require_bytes(1, "this", "never mind")
    with pytest.raises(
        CapacityError, match=r"^this takes at least 1,000,000,000,000 MB of memory, and [\d,]+ MB are available; rest$"
    ):
        require_bytes(10**18, "this", "rest")


@pytest.mark.parametrize("level", ["", "a", "a/b", "a/b/c"])
def test_every_group_above_counts(machine: Machine, level: str) -> None:
    machine.is_in("/a/b/c")
    for path in ("", "a", "a/b", "a/b/c"):
        machine.group(path, memory__max=2**30 if path == level else "max", memory__current=MiB, memory__stat="")
    assert (machine.available(), machine.total()) == (2**30 - MiB, 2**30)


def test_a_limit_that_nobody_set(machine: Machine) -> None:
    machine.is_in("/x", "memory", mount="memory")
    machine.is_in("/", mount="unified")
    machine.group("memory/x", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=MiB)
    machine.group("memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=MiB)
    machine.group("unified", memory__max="max", memory__current=MiB)
    assert (machine.available(), machine.total()) == (5 * 2**30, 8 * 2**30)


def test_a_group_that_is_full_or_over_its_limit_has_no_room(machine: Machine) -> None:
    machine.is_in("/")
    machine.group("", memory__max=MiB, memory__current=2 * MiB, memory__stat="inactive_file 0\n")
    assert machine.available() == 0


def test_a_path_that_is_not_mounted_here(machine: Machine) -> None:
    """A container sees the host's path and a mount of its own group, or is outside of what it sees."""
    machine.is_in("/kubepods/pod1/abc")
    machine.group("", memory__max=MiB, memory__current=0, memory__stat="")
    assert machine.available() == MiB
    (machine.proc / "cgroup").write_text("0::/../../other\n")
    assert machine.available() == MiB


def test_a_mount_with_a_space(machine: Machine) -> None:
    machine.is_in("/", mount="a b")
    machine.group("a b", memory__max=MiB, memory__current=0)
    assert machine.total() == MiB


@pytest.mark.parametrize("content", ["", "nonsense", "-5", "max max", "1" * 30])
def test_files_that_say_nothing_of_use(machine: Machine, content: str) -> None:
    machine.is_in("/")
    machine.group("", memory__max=content, memory__current=content, memory__stat=content)
    assert machine.available() == 5 * 2**30


def test_the_limit_of_address_space_counts() -> None:
    script = f"""
import resource
from gta_edge.support.memory import available_bytes
resource.setrlimit(resource.RLIMIT_AS, ({2**30}, {resource.RLIM_INFINITY}))
print(available_bytes())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert 0 <= int(result.stdout) < 2**30
