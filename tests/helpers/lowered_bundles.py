"""Bundles with the graph that is made for ONNX Runtime: what sessions on them compute, and what is cached in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.onnxruntime.lowered import lower
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.small_models import IDS, formula_logits

EXACT, ROUNDED = 1e-4, 0.5  # bounds for the largest error over the standard deviation of the exact logits
KEPT = "engines/onnxruntime"
RECORD, GRAPH, EXACT_GRAPH, PACKED = "graph.json", "model.onnx", "exact.onnx", "weights.data"
KEPT_FILES = [EXACT_GRAPH, RECORD, GRAPH, PACKED]  # in order


def logits(directory: Path, **options: Any) -> np.ndarray:
    """Logits [2, 10, V] of a prompt and single tokens after it."""
    with load(directory, "onnxruntime", threads=1, **options) as session:
        parts = [session.forward(IDS[:, :7], all_logits=True)]
        parts += [session.forward(IDS[:, i : i + 1], all_logits=True) for i in range(7, 10)]
    return np.concatenate(parts, axis=1)


def assert_right(directory: Path) -> None:
    """Sessions of both arithmetics give the right logits."""
    wanted = formula_logits(directory)
    assert reference.relative_error(logits(directory, exact=True), wanted) <= EXACT
    assert reference.relative_error(logits(directory), wanted) <= ROUNDED


def assert_kept(directory: Path) -> None:
    """All that belongs there is kept, nothing else, and it is what sessions take."""
    assert names(directory / "engines") == ["onnxruntime"]
    assert names(directory / KEPT) == KEPT_FILES
    before = identities(directory / KEPT)
    for name in (GRAPH, EXACT_GRAPH):
        assert lower(Bundle.open(directory), exact=name == EXACT_GRAPH).graph == before[name][2]
    assert identities(directory / KEPT) == before
    assert_right(directory)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def identities(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: what it is, when it was written, and its content."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / KEPT / RECORD).read_text())


def flip(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
