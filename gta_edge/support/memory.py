"""How much memory there is for this process: the machine's, as far as its control groups and limits let it have it.

On a Jetson, CPU and GPU share it.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

from gta_edge.errors import CapacityError
from gta_edge.support.cgroups import PROC, Group, groups

__all__ = ["available_bytes", "installed_bytes", "reachable_bytes", "require_bytes", "total_bytes"]

MEMINFO = Path("/proc/meminfo")

# A limit that nobody set is a huge number in version 1: 2**63 rounded to pages.
_UNLIMITED = 2**60


def available_bytes(meminfo: Path = MEMINFO, proc: Path = PROC) -> int | None:
    """Return the bytes that new work can take without swapping or being killed, None where the system does not say.

    That is the least of Linux' own estimate, which counts file caches that can be dropped, of the room that every
    control group above the process leaves, likewise, and of the process's own limit of address space.
    """
    rooms = [_meminfo(meminfo, "MemAvailable"), _address_space()]
    rooms += [room for group in groups("memory", proc) for room in _rooms(group)]
    return _least(rooms)


def reachable_bytes(meminfo: Path = MEMINFO, proc: Path = PROC) -> int | None:
    """Return the bytes that new work can take before the system ends it, however slow that gets.

    As ``available_bytes``, with swap and with every file cache. None where the system does not say.
    """
    free, swap = _meminfo(meminfo, "MemAvailable"), _meminfo(meminfo, "SwapFree") or 0
    rooms = [None if free is None else free + swap, _address_space()]
    rooms += [room for group in groups("memory", proc) for room in _last_rooms(group, swap)]
    return _least(rooms)


def require_bytes(needed: int, what: str, remedy: str) -> None:
    """Refuse work that the system would end halfway, without a word, for want of memory.

    Args:
        needed: bytes that it takes at the very least.
        what: the work, as the subject of a sentence.
        remedy: what to do.

    Raises:
        CapacityError: there are fewer.
    """
    free = reachable_bytes()
    if free is not None and needed > free:
        raise CapacityError(
            f"{what} takes at least {needed / 1e6:,.0f} MB of memory, and {free / 1e6:,.0f} MB are available",
            f"{remedy}",
        )


def total_bytes(meminfo: Path = MEMINFO, proc: Path = PROC) -> int | None:
    """Return the bytes of memory that this process and what it shares it with may take, None where nothing says."""
    limits = [limit for group in groups("memory", proc) for limit, _ in _limits(group)]
    return _least([installed_bytes(meminfo), *limits])


def installed_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Return the bytes of the machine's memory, whoever may have it."""
    return _meminfo(meminfo, "MemTotal")


def _least(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(0, min(known)) if known else None


def _meminfo(path: Path, key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) * 1024 if found else None


def _limits(group: Group) -> list[tuple[int, int | None]]:
    """Return the limits of a group that are set, each with what counts against it."""
    if group.version == 1:
        pairs = [("memory.limit_in_bytes", "memory.usage_in_bytes")]
        pairs += [("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")]  # with swap
    else:
        # above high it is not killed, but held up until it crawls
        pairs = [("memory.max", "memory.current"), ("memory.high", "memory.current")]
    found = [(group.number(limit), group.number(usage)) for limit, usage in pairs]
    return [(limit, used) for limit, used in found if limit is not None and 0 <= limit < _UNLIMITED]


def _rooms(group: Group) -> list[int]:
    """Return what each limit of a group leaves; file caches that nobody has used twice can be dropped."""
    droppable = group.entry("memory.stat", "total_inactive_file" if group.version == 1 else "inactive_file")
    return [limit - max(0, (used or 0) - droppable) for limit, used in _limits(group)]


def _last_rooms(group: Group, swap: int) -> list[int]:
    """Return what the limits of a group leave at which the system ends processes, with ``swap`` bytes of it free."""
    if group.version == 1:
        caches = "total_inactive_file", "total_active_file"
        limits = [("memory.limit_in_bytes", "memory.usage_in_bytes", swap)]
        limits += [("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes", 0)]
    else:
        caches = "inactive_file", "active_file"
        most = group.number("memory.swap.max")
        if most is not None:
            swap = min(swap, max(0, most - (group.number("memory.swap.current") or 0)))
        limits = [("memory.max", "memory.current", swap)]
    droppable = sum(group.entry("memory.stat", cache) for cache in caches)
    found = [(group.number(limit), group.number(usage), more) for limit, usage, more in limits]
    return [
        limit - max(0, (used or 0) - droppable) + more
        for limit, used, more in found
        if limit is not None and 0 <= limit < _UNLIMITED
    ]


def _address_space() -> int | None:
    """Return what ``ulimit -v`` leaves of this process's addresses, None where it is not set."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return int(limit)
    return int(limit) - pages * resource.getpagesize()
