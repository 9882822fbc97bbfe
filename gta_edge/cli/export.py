"""``gta-edge export``: checkpoint to bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gta_edge.cli.choices import EmbeddingPrecision, Precision, value_of
from gta_edge.cli.output import current
from gta_edge.support.text import printable

if TYPE_CHECKING:
    from gta_edge.accuracy.tolerance import Quantisation

__all__ = ["changes", "export"]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory with config.json and safetensors.")
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory to write.")],
    precision: Annotated[
        Precision | None, typer.Option(help="How weights are stored; the checkpoint's own by default.")
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32 by default for int4, a whole output channel for int8."),
    ] = None,
    embedding_precision: Annotated[
        EmbeddingPrecision | None,
        typer.Option(help="How int4 stores the embedding and the head: int8 by default."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|self|none",
            help="A text that int4 and int8 weights are rounded for (GPTQ), or one that the model writes itself: the "
            "default in int4.",
        ),
    ] = None,
    mixed: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", help="How much larger int8 may make an int4 model's layers, where it gains most."
        ),
    ] = None,
    rotate_values: Annotated[
        bool, typer.Option("--rotate-values", help="Rotate cached values in the weights, for a cache of 8 bits.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Check the result against PyTorch.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint to a bundle: an ONNX graph and its weights, checked against PyTorch."""
    from gta_edge.export import pipeline

    output = current()
    with output.progress() as progress:
        result = pipeline.export_model(
            checkpoint,
            bundle,
            precision=value_of(precision),
            block_size=block_size,
            embedding_precision=value_of(embedding_precision),
            calibrate=calibrate,
            mixed=mixed,
            rotate_values=rotate_values,
            verify=verify,
            force=force,
            progress=progress,
        )
    for note in result.notes:
        output.note(f"note: {printable(note)}")
    written = result.bundle
    if output.json:
        checked = result.report.to_dict() if result.report else None
        output.document(
            {
                "bundle": str(bundle),
                "precision": written.precision,
                "bytes": sum(written.file_bytes.values()),
                "verification": checked,
            }
        )
        return
    size = sum(written.file_bytes.values()) / 2**20
    print(f"{bundle}: {written.config.architecture} in {written.precision}, {size:.1f} MiB")
    if result.report:
        worst = max(found.max_rel_error for found in result.report.backends.values())
        print(f"agrees with PyTorch: largest error {worst:.1e} of the logits' standard deviation")
        print(changes(written.precision, result.report.quantisation))


def changes(precision: str, found: Quantisation) -> str:
    """Say what storing the weights in a precision changed, on the tokens of the check."""
    if found.max_abs_error == 0:
        return f"weights in {precision}: the checkpoint's own values"
    return (
        f"weights in {precision} against the checkpoint's, on {found.tokens or 'random ids'}:\n"
        f"  {found.top1_agreement:.1%} equal top-1 tokens, mean KL divergence {found.mean_kl_divergence:.2g} nats"
    )
