"""Bundles of random weights, made once and used again: what a model costs does not depend on what it has learned."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import gta_edge
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.model.config import ModelConfig
from gta_edge.model.presets import preset
from gta_edge.support.progress import Progress, silent


def make_bundles(
    work: Path,
    name: str,
    layers: int | None,
    precisions: Sequence[str],
    *,
    config: ModelConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Return a bundle for each precision, ``work/NAME-LAYERS-PRECISION``; made unless it is there.

    They are made from one checkpoint in bf16, which is removed once its bundles are there.

    Args:
        work: where they are kept.
        name: of a preset, and of the directories.
        layers: instead of the model's.
        precisions: what the weights are stored in.
        config: the model, where it is no preset.
        progress: told of what is written.

    Raises:
        InputError: no preset of this name, or no such precision.
        OutputError: the disk is full.
    """
    config = preset(name) if config is None else config
    config = config if layers is None else config.replace(num_hidden_layers=layers)
    stem = f"{name}-{config.num_hidden_layers}"
    bundles = {precision: work / f"{stem}-{precision}" for precision in precisions}
    checkpoint = work / stem
    for precision, path in bundles.items():
        if path.exists():
            continue
        if not checkpoint.exists():
            initialise(config, checkpoint, progress=progress)
        gta_edge.export_model(checkpoint, path, precision=precision, verify=False, progress=progress)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    return bundles
