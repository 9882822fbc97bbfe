"""How many cases, where their randomness comes from, and how each may end.

``GTA_EDGE_FUZZ_CASES=5000 pytest tests/fuzz`` runs many. A case is the same in every run, and the name of its test has
its number.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from gta_edge.errors import GtaEdgeError

CASES = int(os.environ.get("GTA_EDGE_FUZZ_CASES", "60"))


def rng(name: str, case: int) -> random.Random:
    """The source of one case."""
    return random.Random(f"{name} {case}")


def ends_well(action: Callable[[], object]) -> GtaEdgeError | None:
    """Run ``action``; return its error, which must be one of ours in one printable line. Any other is raised."""
    try:
        action()
    except GtaEdgeError as error:
        caught = error
    else:
        return None
    assert str(caught).isprintable(), repr(caught)
    assert 0 < len(str(caught)) < 600, repr(caught)
    return caught
