"""How a stage tells its figures: lines on its output that the campaign picks out, one JSON object each."""

from __future__ import annotations

import json
import math
import os
from typing import Any

__all__ = ["MARK", "REHEARSAL", "Verdict", "tell"]

MARK = "@@ "
"""What such a line begins with."""

REHEARSAL = os.environ.get("GTA_EDGE_REHEARSAL") == "1"
"""Whether there is no GPU and everything is to be small."""


def tell(what: str, **figures: Any) -> None:
    """Print figures now, so that they are kept whatever comes next.

    Args:
        what: kind of the figures, by which ``report.py`` finds them.
        figures: anything that is JSON; what is not finite becomes text, since JSON has no number for it.
    """
    print(MARK + json.dumps({"what": what, **_finite(figures)}), flush=True)


class Verdict:
    """What was right and what was not, of a stage that goes on after a mistake."""

    def __init__(self) -> None:
        self.wrong = 0

    def tell(self, what: str, ok: bool, **figures: Any) -> None:
        """Tell figures that are right or wrong."""
        self.wrong += not ok
        tell(what, ok=ok, **figures)

    def end(self) -> int:
        """Return the status of the process."""
        return 1 if self.wrong else 0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
