"""``gta-edge init``: a checkpoint of random weights, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gta_edge.cli.output import current
from gta_edge.model.presets import DEFAULT_MAX_LENGTH, PRESETS, preset

__all__ = ["init"]


def init(
    name: Annotated[str, typer.Argument(metavar="PRESET", help=f"One of {', '.join(PRESETS)}.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes.")],
    layers: Annotated[int | None, typer.Option(help="Number of layers, instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_length: Annotated[int, typer.Option(help="Positions that the model has.")] = DEFAULT_MAX_LENGTH,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a random-weight checkpoint of a preset, with a byte-level tokenizer."""
    from gta_edge.formats.random_checkpoint import initialise

    output = current()
    config = preset(name).replace(dtype=dtype, max_position_embeddings=max_length)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    with output.progress() as progress:
        initialise(config, directory, seed=seed, force=force, progress=progress)
    if output.json:
        output.document({"checkpoint": str(directory), "parameters": config.parameters, "dtype": dtype, "seed": seed})
    else:
        print(f"{directory}: {config.parameters:,} random parameters in {dtype}")
