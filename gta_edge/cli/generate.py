"""``gta-edge generate``: text from a prompt, as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import Backend, Speculate, value_of
from gta_edge.cli.generate_text import finish, show
from gta_edge.cli.grammar_options import given_grammar
from gta_edge.cli.options import BundleArgument, SamplingOptions, SessionOptions, checked_options, whole_numbers
from gta_edge.cli.output import current
from gta_edge.cli.signals import exit_status
from gta_edge.errors import GtaEdgeError
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES
from gta_edge.plan.roofline import LARGEST_BATCH
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.runtime.generation.several import MAX_BEAMS, check_answers
from gta_edge.runtime.generation.stopping import StopStrings
from gta_edge.support.text_files import STANDARD_INPUT, read_text_or_stdin

__all__ = ["generate"]


def generate(
    bundle: BundleArgument,
    *,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without one, standard input is read.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with it; - is standard input.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue: 1,2,3.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    sampling: SamplingOptions,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    n: Annotated[
        int, typer.Option("--n", min=1, max=LARGEST_BATCH, help="Answers; number i is drawn with the seed plus i.")
    ] = 1,
    beams: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BEAMS, help="Search for the most probable answers, following so many at once."),
    ] = None,
    length_penalty: Annotated[float, typer.Option(help="Of that search: above 0 it favours long answers.")] = 1.0,
    speculate: Annotated[
        Speculate | None, typer.Option(help="Guess tokens: from the text so far, or by --draft; off by default.")
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="A smaller model with the same tokenizer, to guess tokens.")
    ] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from this file's cache, and keep the new one there.")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Write JSON that meets this schema; @FILE for one in a file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(metavar="TEXT", help="Write what matches this expression.")] = None,
    grammar: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Write what this grammar allows, in Lark's notation or GBNF.")
    ] = None,
    opening: SessionOptions,
) -> None:
    """Continue a prompt.

    Text goes to stdout as it is made, timings to stderr at the end. The prompt may be piped in.
    """
    import gta_edge

    output = current()
    given = _prompt(prompt, prompt_file, ids)
    several = n > 1 or beams is not None
    held = given_grammar(json_schema, regex, grammar)
    if held is not None and several:
        raise typer.BadParameter("a grammar is for one answer: leave out --n and --beams")
    _check_speculation(speculate, draft)
    if several and (draft is not None or prompt_cache is not None):
        raise typer.BadParameter("--draft and --prompt-cache are for one answer: leave out --n and --beams")
    if beams is not None and speculate not in (None, Speculate.OFF):
        raise typer.BadParameter("--beams guesses nothing: leave out --speculate")
    if beams is not None and opening.cache.choice is not None:
        raise typer.BadParameter("--beams needs every row of the cache: leave out --cache-policy")
    if beams is not None and value_of(opening.cache_dtype) in BLOCK_CACHE_TYPES:
        raise typer.BadParameter("--beams copies single rows of the cache: take another --cache-dtype, such as int8")
    if prompt_cache is not None:
        opening.cache.require_whole("--prompt-cache")
    _check_options(sampling, max_new_tokens, seed, stop or (), n if several else None, beams, length_penalty)
    with ExitStack() as opened:
        with output.progress() as progress:
            guesses = draft is not None or speculate not in (None, Speculate.OFF)
            # guesses of several answers are run in a batch
            trees = beams is not None or (several != guesses and _holds_branches(opening, free=guesses))
            session = opened.enter_context(opening.load(bundle, progress=progress, trees=trees))
            unmanaged = replace(opening, cache=CacheOptions())
            small = None if draft is None else opened.enter_context(unmanaged.load(draft, progress=progress))
        conversation = gta_edge.Conversation(session)
        if prompt_cache is not None:
            conversation.resume(prompt_cache)
        generation: Any = gta_edge.generate(
            session,
            given,
            max_new_tokens=max_new_tokens,
            **sampling.given(),
            stop=stop or (),
            seed=seed,
            chat=chat,
            ignore_eos=ignore_eos,
            speculate=None if speculate is None else speculate.value,
            draft=small,
            n=n if several else None,
            beams=beams,
            length_penalty=length_penalty,
            conversation=None if several else conversation,
            constraint=None if held is None else held.constraint(session),
        )
        if generation.defaults:
            taken = ", ".join(f"{name} {value:g}" for name, value in generation.defaults.items())
            output.note(f"from the model's generation_config.json: {taken}; options of the command come first")
        if n > 1 and beams is None and Sampling(**generation.defaults | sampling.given()).greedy:
            output.note("note: greedy answers are all the same; --temperature draws others")
        try:
            for piece in generation:
                if not several:
                    show(output, piece, generation)
        except KeyboardInterrupt as interrupt:
            generation.close()  # where it came while a piece was printed
            _finish(generation, session.backend, conversation, prompt_cache)
            sys.exit(exit_status(interrupt))
        _finish(generation, session.backend, conversation, prompt_cache)


def _finish(generation: Any, backend: str, conversation: Any, prompt_cache: Path | None) -> None:
    """Keep the cache and print what is left to say: an answer that is there is not lost with a file that cannot be."""
    try:
        kept = _kept(conversation, prompt_cache)
    except GtaEdgeError:
        finish(current(), generation, backend, None)
        raise
    finish(current(), generation, backend, kept)


def _check_options(
    sampling: SamplingOptions,
    max_new_tokens: int,
    seed: int | None,
    stop: Sequence[str],
    n: int | None,
    beams: int | None,
    length_penalty: float,
) -> None:
    """Refuse what makes no sense with any model, before one is loaded."""
    checked_options({"max_new_tokens": max_new_tokens, **sampling.given(), "seed": seed})
    StopStrings(stop, {})
    check_answers(n, beams, length_penalty, Sampling(**sampling.given()), has_stop_strings=bool(stop))


def _check_speculation(speculate: Speculate | None, draft: Path | None) -> None:
    if speculate is Speculate.DRAFT and draft is None:
        raise typer.BadParameter("--speculate draft needs a model: give --draft BUNDLE")
    if speculate not in (None, Speculate.DRAFT) and draft is not None:
        raise typer.BadParameter("--draft is for --speculate draft")


def _holds_branches(opening: SessionOptions, *, free: bool) -> bool:
    """Tell whether answers can be branches of a tree, and guesses where that costs other calls nothing.

    Otherwise answers are rows of a batch, and guesses are chains.
    """
    from gta_edge.runtime.registry import BACKENDS

    # an engine that was built for trees holds them in any case, and one that was not has none
    descriptor = None if opening.backend is Backend.AUTO else BACKENDS[opening.backend.value]
    can = descriptor is None or (descriptor.has_trees and not descriptor.builds_engine)
    if free:  # which ``auto`` may be one of is not known yet
        can = descriptor is not None and descriptor.has_free_trees
    return can and opening.cache.choice is None and value_of(opening.cache_dtype) not in BLOCK_CACHE_TYPES


def _kept(conversation: Any, path: Path | None) -> dict[str, Any] | None:
    """Keep the cache in a file, and return what is said of it; None where there is none to keep."""
    if path is None:
        return None
    if not len(conversation.ids):
        current().note("prompt cache: not written, as the cache is lost where a step is interrupted; run it again")
        return None
    size = conversation.save(path)
    reused = conversation.reused_tokens
    return {"tokens": size.tokens, "reused_tokens": reused, "bytes": size.nbytes, "gqa_bytes": size.gqa_bytes}


def _prompt(text: str | None, file: Path | None, ids: str | None) -> Any:
    given = sum(entry is not None for entry in (text, file, ids))
    if not given and (piped := _piped()):
        return piped
    if given != 1:
        raise typer.BadParameter("give exactly one of --prompt, --prompt-file and --ids, or pipe a text in")
    if text is not None:
        return text
    if file is not None:
        if str(file) == STANDARD_INPUT and sys.stdin is not None and sys.stdin.isatty():
            current().note("type the prompt; Ctrl-D on a line of its own ends it")
        return read_text_or_stdin(file)
    return list(whole_numbers("--ids", str(ids), "1,2,3"))


def _piped() -> str:
    """Return what another program writes into standard input, nothing where that is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return read_text_or_stdin(Path(STANDARD_INPUT))
