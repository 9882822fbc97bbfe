"""What ``gta-edge generate`` prints: text as it is made, several answers with their headings, and what it took."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from gta_edge.cli.output import Output
from gta_edge.support.text import printable_text

__all__ = ["finish", "show"]


def show(output: Output, piece: str, generation: Any) -> None:
    """Print what is new: text, or without a tokenizer the ids."""
    if output.json:
        return
    if generation.text is None and generation.ids:
        piece = f"{',' if len(generation.ids) > 1 else ''}{generation.ids[-1]}"
    sys.stdout.write(printable_text(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def finish(output: Output, generation: Any, backend: str, kept: dict[str, Any] | None) -> None:
    """Print what is left to say.

    Args:
        output: of the command.
        generation: a ``Generation``, or ``Answers``, of which nothing was printed yet.
        backend: that ran.
        kept: of a prompt cache, what is said of it.
    """
    answers = getattr(generation, "answers", None)
    if output.json:
        own = _entries(generation) if answers is None else {"answers": [_scored(each) for each in answers]}
        document = own | {
            "prompt_tokens": generation.prompt_tokens,
            "backend": backend,
            "timings": generation.timings,
            **({} if kept is None else {"prompt_cache": kept}),
        }
        output.document(document)
        return
    if answers is None:
        sys.stdout.write("\n")
    else:
        _print_answers(answers)
    sys.stdout.flush()
    _note(output, generation, backend, [generation] if answers is None else answers)
    if kept is not None:
        beside = f", as GQA {kept['gqa_bytes'] / 1e6:.2f} MB" if kept["gqa_bytes"] else ""
        output.note(
            f"prompt cache: {kept['reused_tokens']} prompt tokens were in it; now it holds {kept['tokens']}, "
            f"{kept['bytes'] / 1e6:.2f} MB{beside}"
        )


def _entries(answer: Any) -> dict[str, Any]:
    return {"text": answer.text, "ids": answer.ids, "finish_reason": answer.finish_reason, "seed": answer.seed}


def _scored(answer: Any) -> dict[str, Any]:
    return _entries(answer) | {"score": answer.score}


def _print_answers(answers: Sequence[Any]) -> None:
    """Print each answer, below a line that says which it is where there are several."""
    for i, each in enumerate(answers, 1):
        how = f"seed {each.seed}" if each.score is None else f"score {each.score:.4f}"
        text = ",".join(map(str, each.ids)) if each.text is None else each.text
        if len(answers) > 1:
            sys.stdout.write(f"--- {i} of {len(answers)}, {how}, ended by {each.finish_reason}\n")
        sys.stdout.write((printable_text(text) if sys.stdout.isatty() else text) + "\n")


def _note(output: Output, generation: Any, backend: str, answers: Sequence[Any]) -> None:
    """Say what it took."""
    timings, tokens = generation.timings, sum(len(each.ids) for each in answers)
    ends = ", ".join(dict.fromkeys(each.finish_reason for each in answers))
    rate, steps = timings["decode_tokens_per_s"], timings["tokens_per_step"]
    pace = f" at {rate:.1f}/s" if rate else ""
    if steps:
        pace += f" ({steps:.1f} a step)"
    output.note(
        f"[{backend}] {generation.prompt_tokens} prompt tokens, first token after {timings['ttft_ms'] or 0:.0f} ms; "
        f"{tokens} tokens{pace}; ended by {ends}"
    )
