"""How many threads the system lets this process start: limits of processes (``ulimit -u``, a container's) make it few.

Libraries do not ask. ONNX Runtime waits for ever where some of its threads start and others do not; OpenMP, and
OpenBLAS when numpy loads it, end the process where one does not.
"""

from __future__ import annotations

import os
import threading

from gta_edge.errors import CapacityError
from gta_edge.support.cores import threads_for

__all__ = ["compute_threads", "spare_threads", "startable_threads", "threads_to_use"]


def compute_threads(asked: int | None = None) -> int:
    """Return how many threads a library is to compute with: as many as asked for, else one for each usable core.

    Raises:
        InputError: more were asked for than could be of use.
        CapacityError: more were asked for than can be started.
    """
    return threads_to_use(threads_for(asked), asked=asked is not None)


def startable_threads(wanted: int) -> int:
    """Return how many threads can be started beside those that run, ``wanted`` at most: as many are, and end again."""
    end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:  # "can't start new thread"
        pass
    finally:
        end.set()
        for thread in started:
            thread.join()
    return len(started)


def threads_to_use(wanted: int, *, asked: bool) -> int:
    """Return how many threads a library may be told to compute with, this one included.

    Args:
        wanted: how many are of use.
        asked: whether somebody asked for this number, who then is told that there are fewer.

    Raises:
        CapacityError: there are fewer, and this number was asked for.
    """
    if wanted < 2:
        return wanted
    possible = min(wanted, max(1, startable_threads(wanted)))  # one more than it starts, for what else it may start
    if asked and possible < wanted:
        raise CapacityError(
            f"{wanted} threads were asked for, and this process may start {possible - 1} beside its own (ulimit -u, or "
            f"the container's limit of processes)",
            f"raise the limit, or give --threads {possible}",
        )
    return possible


def spare_threads() -> None:
    """Let OpenBLAS start no threads where not all can: for a program's main function, before numpy is loaded."""
    cores = os.cpu_count() or 1
    if startable_threads(cores) < cores:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
