"""``gta-edge eval``: loss and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gta_edge.cli.options import BundleArgument, SessionOptions
from gta_edge.cli.output import current, key_value_table
from gta_edge.errors import InputError
from gta_edge.support.text import printable
from gta_edge.support.text_files import read_text_or_stdin

__all__ = ["evaluate"]


def evaluate(
    bundle: BundleArgument,
    *,
    text: Annotated[Path | None, typer.Option(help="A text file, UTF-8; - is standard input.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Token ids: a .npy file of integers.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens attended at most; the model's max context by default.")
    ] = None,
    opening: SessionOptions,
) -> None:
    """Print the mean loss per token and the perplexity of a text."""
    import numpy as np

    from gta_edge.evaluate.perplexity import evaluate as run
    from gta_edge.evaluate.perplexity import read_ids, tokens_at_once
    from gta_edge.formats.tokenizer import NO_TOKENIZER

    if (text is None) == (ids is None):
        raise typer.BadParameter("give one of --text and --ids")
    output = current()
    content = None if text is None else read_text_or_stdin(text)
    tokens = None if ids is None else read_ids(ids)
    with output.progress() as progress, opening.load(bundle, progress=progress) as session:
        if content is not None:
            if session.tokenizer is None:
                raise InputError(f"{printable(str(bundle))} has no tokenizer", NO_TOKENIZER)
            tokens = np.asarray(session.tokenizer.encode(content), np.int64)
        assert tokens is not None  # one of the two was given
        result = run(session, tokens, window=window, progress=progress)
        name, chunk = session.backend, tokens_at_once(session)
        if opening.cache.choice is not None and min(window or session.max_length, result.tokens) <= chunk:
            output.note(
                f"note: the cache policy changed nothing: rows are evicted after each chunk of {chunk} tokens, and no "
                "window of the text is longer"
            )
    document = {"tokens": result.tokens, "loss": result.loss, "perplexity": result.perplexity, "backend": name}
    if content:
        document["bits_per_byte"] = result.loss * result.tokens / np.log(2) / len(content.encode())
    if output.json:
        output.document(document)
    else:
        rows = {key: f"{value:.4f}" if isinstance(value, float) else f"{value}" for key, value in document.items()}
        output.console.print(key_value_table(rows))
