"""How much memory is free on this machine; on a Jetson, CPU and GPU share it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that new work can take without swapping, None where the system does not say.

    That is Linux' own estimate, which counts file caches that can be dropped.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) * 1024 if found else None
