"""``gta-edge bench``: the backends side by side on the same bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import Speculate, value_of
from gta_edge.cli.options import Batch, CacheDtypeOption, ReplacePicture, Threads, backends_option, whole_numbers
from gta_edge.cli.output import FAILED, current
from gta_edge.errors import InputError
from gta_edge.support.text import one_line, printable
from gta_edge.support.text_files import read_text_or_stdin

__all__ = ["bench"]

_MAX_MESSAGE = 500


def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="The bundles.")],
    *,
    backend: Annotated[
        str | None,
        backends_option("A,B@PYTHON", "NAME@PYTHON runs one under another interpreter. All by default."),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Tokens of the prompt: 128,2048, the default, or what fits the model.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Steps timed after it; 32, or what fits the model.")] = None,
    batch: Batch = 1,
    rounds: Annotated[
        int | None, typer.Option(help="Repeats; by default at least 3, and up to 15 until medians settle.")
    ] = None,
    speculate: Annotated[
        Speculate | None, typer.Option(help="Time prompt lookup beside plain decoding; give a text to begin with.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Time so many answers to one prompt beside it.")] = 1,
    prompt_file: Annotated[Path | None, typer.Option(help="A text to begin with; random tokens by default.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to begin with: 1,2,3.")] = None,
    cache_dtype: CacheDtypeOption = None,
    threads: Threads = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="Print all tables: floors, percentiles, ranks; wider than 80 columns.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all tables, in Markdown.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency against context, a line per backend: a .png, .svg or .pdf.")
    ] = None,
    force: ReplacePicture = False,
    cache: CacheOptions,
) -> None:
    """Measure every backend at hand on the same bundles, in turns, and compare their answers."""
    from gta_edge.evaluate.bench.run import DEFAULT_NEW_TOKENS, Settings
    from gta_edge.evaluate.bench.run import bench as run
    from gta_edge.evaluate.bench.targets import parse_targets

    output = current()
    if markdown and output.json:
        raise typer.BadParameter("give one of --markdown and --json")
    if speculate is Speculate.DRAFT:
        raise typer.BadParameter("--speculate is lookup or off here: no draft model is measured")
    if prompt_file is not None and ids is not None:
        raise typer.BadParameter("give one of --prompt-file and --ids")
    if plot is not None:
        from gta_edge.cli.plot import check

        check(plot, force=force, inputs=[*bundles, *([prompt_file] if prompt_file else [])])
    cache.policy()  # what makes no sense is said before any process starts
    targets = parse_targets(backend or None)
    settings = Settings(
        contexts=None if contexts is None else whole_numbers("--contexts", contexts, "128,2048"),
        new_tokens=DEFAULT_NEW_TOKENS if new_tokens is None else new_tokens,
        batch=batch,
        rounds=rounds,
        threads=threads,
        cache_dtype=value_of(cache_dtype),
        cache=cache.choice,
        speculate=speculate is Speculate.LOOKUP,
        answers=n,
        compare=cache.choice is None,  # where a policy decides, backends that round otherwise may keep other rows
        prompt=_prompt(bundles, prompt_file, ids),
    )
    with output.progress() as progress:
        report = run(bundles, targets, settings, progress=progress)
    _show(report, wide=wide, markdown=markdown)
    if plot is not None:
        from gta_edge.cli.bench_plot import draw

        draw(plot, report, force=force)
        output.note(f"drawn: {plot}")
    if not any(row["tpot_ms"] for row in report["results"]):
        _fail("no backend could be measured; the report says why of each")
    wrong = [row for row in report["results"] if row["agrees"] is False]
    if wrong:
        from gta_edge.cli.bench_text import how_wrong

        names = ", ".join(dict.fromkeys(row["backend"] for row in wrong))
        _fail(f"{how_wrong(wrong[0])}; do not use {names} for this bundle: run `gta-edge verify`, or export it again")


def _fail(message: str) -> None:
    """End after a report that is there but not good, which is printed all the same."""
    sys.stdout.flush()
    print(f"error: {one_line(message, _MAX_MESSAGE)}", file=sys.stderr)
    sys.exit(FAILED)


def _show(report: dict[str, Any], *, wide: bool, markdown: bool) -> None:
    output = current()
    if output.json:
        output.document(report)
        return
    from gta_edge.cli.bench_text import as_markdown, show, show_all

    if markdown:
        print(as_markdown(report))
    else:
        (show_all if wide else show)(output.console, report)


def _prompt(bundles: list[Path], file: Path | None, ids: str | None) -> tuple[int, ...] | None:
    """Return the ids to begin with; a text goes through the first bundle's tokenizer."""
    if ids is not None:
        return whole_numbers("--ids", ids, "1,2,3")
    if file is None:
        return None
    from gta_edge.formats.bundle import Bundle
    from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer

    text = read_text_or_stdin(file)
    tokenizer = Tokenizer.load(Bundle.open(bundles[0]).directory)
    if tokenizer is None:
        raise InputError(f"{printable(str(bundles[0]))} has no tokenizer", NO_TOKENIZER)
    return tuple(int(i) for i in tokenizer.encode(text))
