"""How many cores this process may use, which a container, a batch system or ``taskset`` makes fewer than there are."""

from __future__ import annotations

import os
from pathlib import Path

from gta_edge.errors import InputError
from gta_edge.support.arguments import whole_argument
from gta_edge.support.cgroups import PROC, Group, groups
from gta_edge.support.text import brief

__all__ = ["check_threads", "installed_cores", "threads_for", "usable_cores"]

TOPOLOGY = Path("/sys/devices/system/cpu")

_MAX_PER_CORE = 4  # more only wait for each other, and each takes memory
_MAX_AT_LEAST = 16


def installed_cores() -> int:
    """Return the number of the machine's cores, whoever may use them."""
    return os.cpu_count() or 1


def usable_cores(proc: Path = PROC) -> int:
    """Return the number of cores that this process may use: by its affinity, and by its groups' share of time.

    A share of one core and a half counts as two.
    """
    return max(1, min([len(_affinity()), *_quotas(proc)]))


def threads_for(asked: int | None, proc: Path = PROC, topology: Path = TOPOLOGY) -> int:
    """Return how many threads are to compute: as many as asked for, else one for each core that may be used.

    Two hardware threads of one core count once, since they share what multiplies.

    Raises:
        InputError: more than ``check_threads`` lets pass.
    """
    check_threads(asked)
    return asked or max(1, min([_physical(_affinity(), topology), *_quotas(proc)]))


def check_threads(asked: int | None) -> None:
    """Refuse numbers of threads that could only hold each other up.

    Raises:
        InputError: less than 1, or far more than the machine has cores.
    """
    most = max(_MAX_AT_LEAST, _MAX_PER_CORE * installed_cores())
    if asked is not None and not 1 <= whole_argument(asked, "threads") <= most:
        raise InputError(
            f"{brief(asked)} threads were asked for, and of the machine's {installed_cores()} cores {usable_cores()} "
            f"may be used",
            f"expected 1 to {most}",
        )


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not on every system
        return set(range(installed_cores()))


def _physical(cpus: set[int], topology: Path) -> int:
    """Return how many cores these CPUs are on, each counted by itself where the system does not say."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii"))
        except (OSError, ValueError):
            cores.add(str(cpu))
    return len(cores)


def _quotas(proc: Path) -> list[int]:
    """Return the shares of time that the groups above this process are limited to, in whole cores, rounded up."""
    found = []
    for group in groups("cpu", proc):
        quota, period = _quota(group)
        if quota and period and quota > 0 and period > 0:
            found.append(-(-quota // period))
    return found


def _quota(group: Group) -> tuple[int | None, int | None]:
    """Return the time that a group has of each period, in microseconds; None where it is not limited."""
    if group.version == 1:
        return group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    words = group.words("cpu.max")
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(str.isdecimal, words)) else (None, None)
