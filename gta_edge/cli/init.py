"""``gta-edge init``: a checkpoint of random weights, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gta_edge.cli.choices import Dtype, completed
from gta_edge.cli.output import current
from gta_edge.model.presets import DEFAULT_MAX_LENGTH, PRESETS, preset

__all__ = ["init"]


def init(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PRESET", help=f"One of {', '.join(PRESETS)}.", autocompletion=completed(lambda: PRESETS)
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes.")],
    layers: Annotated[int | None, typer.Option(help="Number of layers, instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="What the weights are stored in.")] = Dtype.BFLOAT16,
    max_length: Annotated[int, typer.Option(help="The model's max context.")] = DEFAULT_MAX_LENGTH,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a random-weight checkpoint of a preset, with a byte-level tokenizer."""
    from gta_edge.formats.random_checkpoint import initialise

    output = current()
    config = preset(name).replace(dtype=dtype.value, max_position_embeddings=max_length)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    with output.progress() as progress:
        initialise(config, directory, seed=seed, force=force, progress=progress)
    if output.json:
        output.document(
            {"checkpoint": str(directory), "parameters": config.parameters, "dtype": dtype.value, "seed": seed}
        )
    else:
        print(f"{directory}: {config.parameters:,} random parameters in {dtype.value}")
