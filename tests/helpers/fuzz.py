"""What the fuzzers share: how many cases, where their chances come from, and what a good end is.

    make fuzz                                        many cases, by hand
    GTA_EDGE_FUZZ_CASES=5000 python -m pytest tests/fuzz

A case is named by the fuzzer and its number, so what failed once can be run again.
"""

import os
import random
import zlib
from collections.abc import Callable
from typing import Any

from gta_edge.errors import GtaEdgeError

CASES = int(os.environ.get("GTA_EDGE_FUZZ_CASES", "20"))
"""Cases of each fuzzer."""

_MAX_CHARACTERS = 600


def rng(name: str, case: int) -> random.Random:
    """The chances of a case, the same in every run."""
    return random.Random(zlib.crc32(f"{name} {case}".encode()))


def ends_well(call: Callable[[], Any]) -> GtaEdgeError | None:
    """Run what may succeed or raise an error of ours in one printable line, and return that error.

    Everything else is raised again.
    """
    try:
        call()
    except GtaEdgeError as error:
        text = str(error)
        assert text.isprintable(), f"not in one printable line: {text!r}"
        assert 0 < len(text) < _MAX_CHARACTERS, f"{len(text)} characters: {text[:2000]!r}"
        return error
    return None
