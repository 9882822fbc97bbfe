"""``gta-edge verify``: logits of every backend at hand against PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import value_of
from gta_edge.cli.export import changes
from gta_edge.cli.options import BundleArgument, CacheDtypeOption, VerifyHashes, backends_option
from gta_edge.cli.output import FAILED, current

__all__ = ["verify"]


def verify(
    bundle: BundleArgument,
    *,
    checkpoint: Annotated[Path, typer.Option(metavar="DIR", help="What it was exported from.")],
    backend: Annotated[str | None, backends_option("A,B", "all that work here by default.")] = None,
    cache_dtype: CacheDtypeOption = None,
    verify_hashes: VerifyHashes = False,
    cache: CacheOptions,
) -> None:
    """Compare logits with the PyTorch model's; the exit status is 1 when a bound does not hold."""
    import rich.table

    from gta_edge.evaluate import verify as verification

    output = current()
    names = [name.strip() for name in backend.split(",")] if backend else None
    with output.progress() as progress:
        report = verification.verify(
            bundle,
            checkpoint,
            names,
            cache_dtype=value_of(cache_dtype),
            cache=cache.policy(),
            verify_hashes=verify_hashes,
            progress=progress,
        )
    if output.json:
        output.document(report.to_dict() | {"cache_policy": cache.choice})
    else:
        table = rich.table.Table("", "max abs error", "max rel error", "top-1 agreement", box=None)
        rounded = {f"{name}, int8 activations": d for name, d in report.int8_activations.items()}
        for name, d in {**report.backends, **rounded}.items():
            table.add_row(name, f"{d.max_abs_error:.2e}", f"{d.max_rel_error:.2e}", f"{d.top1_agreement:.4f}")
        output.console.print(table)
        print(changes(report.precision, report.quantisation))
        for name, reason in report.unavailable.items():
            print(f"not verified: {name}: {reason}")
        print("passed" if report.passed else "failed")
    if not report.passed:
        print("error:", "; ".join(report.failures), file=sys.stderr)
        sys.exit(FAILED)
