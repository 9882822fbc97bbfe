"""Records of artifacts, changed and signed again: what somebody with this machine's secret could write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gta_edge.formats import artifacts


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change what a record says, in place or, where ``change`` returns something, to that."""
    document: Any = json.loads(path.read_text())
    document.pop("signature")
    changed = change(document)
    document = document if changed is None else changed
    if sign and isinstance(document, dict):
        document["signature"] = artifacts._signature(document, artifacts.require_secret())
    path.write_text(json.dumps(document))
