"""The small models that tests of engines run: made here where torch is, or brought along.

A board need not have torch. There, bundles come from a workstation:

    python -m tests.helpers.engine_bundles build/test-bundles

and ``GTA_EDGE_TEST_BUNDLES`` says where they lie (``make test-jetson`` looks in ``build/test-bundles`` by itself).
"""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from gta_edge.export.pipeline import export_model
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.model.presets import preset

MODEL = preset("gta1-160m").replace(num_hidden_layers=2, vocab_size=500, max_position_embeddings=256)
COMPUTE = {"bf16": "bf16", "int4": "fp16", "int8": "fp16"}
"""By what the weights are stored in, what engines of it compute in."""


def write(directory: Path, precisions: Iterable[str] = COMPUTE) -> dict[str, Path]:
    """Export a model of random weights, once per precision."""
    reason = "no torch here to export with, and GTA_EDGE_TEST_BUNDLES is not set: see docs/jetson/board.md"
    pytest.importorskip("torch", reason=reason)
    initialise(MODEL, directory / "checkpoint")
    made = {precision: directory / precision for precision in precisions}
    for precision, path in made.items():
        export_model(directory / "checkpoint", path, precision=precision, verify=False)
    shutil.rmtree(directory / "checkpoint")
    return made


def prepared(precision: str, directory: Path) -> Path | None:
    """Return a copy, in this directory, of a bundle that was made elsewhere; None where there are none."""
    source = os.environ.get("GTA_EDGE_TEST_BUNDLES")
    if not source:
        return None
    ignore = shutil.ignore_patterns("engines")
    return Path(shutil.copytree(Path(source) / precision, directory / precision, ignore=ignore))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    for path in write(target).values():
        print(path)
