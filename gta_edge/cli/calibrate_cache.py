"""``gta-edge calibrate-cache``: rows for each layer of a managed cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.choices import Backend
from gta_edge.cli.options import BackendOption, Threads, VerifyHashes
from gta_edge.cli.output import current
from gta_edge.support.text import printable
from gta_edge.support.text_files import read_text_or_stdin

__all__ = ["calibrate_cache"]


def calibrate_cache(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, which keeps the result.")],
    text: Annotated[Path, typer.Option(help="A text file, UTF-8, like what will be read; - is standard input.")],
    share: Annotated[float, typer.Option(help="Of a prompt's rows, that stay in the mean over the layers.")] = 0.2,
    rule: Annotated[str, typer.Option(metavar="POLICY", help="What decides which rows stay.")] = "zsmerge",
    windows: Annotated[int, typer.Option(help="Of the text; more take longer and tell more.")] = 4,
    tokens: Annotated[
        int | None, typer.Option(help="Of each window; 768 by default. Two thirds of them are evicted from.")
    ] = None,
    backend: BackendOption = Backend.AUTO,
    threads: Threads = None,
    verify_hashes: VerifyHashes = False,
    force: Annotated[bool, typer.Option("--force", help="Replace budgets that are there.")] = False,
) -> None:
    """Measure how many rows of a managed cache each layer needs, for --cache-policy measured and --cache-budgets."""
    import rich.table

    from gta_edge.evaluate.cache_budgets import calibrate, check_options
    from gta_edge.formats.bundle import Bundle
    from gta_edge.runtime.cache_policies.budgets import FILE, PLACE, budgets_output, write_budgets

    output = current()
    content = read_text_or_stdin(text)
    with output.progress() as progress:
        opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
        measuring: dict[str, Any] = {"rule": rule, "share": share, "windows": windows, "tokens": tokens}
        check_options(opened, **measuring)
        with budgets_output(opened, force=force) as directory:
            found = calibrate(opened, content, **measuring, backend=backend.value, threads=threads, progress=progress)
            write_budgets(directory, opened, found)
    path = opened.directory / PLACE / FILE
    document = {"written": str(path), "budgets": list(found.rows), **found.measured}
    if output.json:
        output.document(document)
        return
    sizes = found.measured["rows"]
    table = rich.table.Table("layer", "rows", *(f"cost at {count}" for count in sizes), box=None)
    for layer, (rows, costs) in enumerate(zip(found.rows, found.measured["costs"], strict=True)):
        table.add_row(f"{layer}", f"{rows}", *(f"{cost:+.4f}" for cost in costs))
    output.console.print(table)
    print(f"rows of {found.measured['prompt']} that stay, and what cutting a layer alone costs, in nats per token")
    print(f"{printable(str(path))}: for --cache-policy measured, or any policy with --cache-budgets")
