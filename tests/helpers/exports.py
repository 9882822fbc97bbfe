"""Exports that are refused."""

from pathlib import Path
from typing import Any

import pytest

from gta_edge.export.pipeline import export_model


def export_refused(checkpoint: Path, kind: type[Exception], **options: Any) -> str:
    """What is said of an export that is refused: one line; and nothing is left of it."""
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        export_model(checkpoint, checkpoint.parent / "bundle", **options)
    assert sorted(checkpoint.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
