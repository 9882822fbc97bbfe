"""``gta-edge generate``: text from a prompt, as it is made."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheChoice, policy_of, takes_cache_policy
from gta_edge.cli.choices import Backend, CacheDtype, Speculate, value_of
from gta_edge.cli.output import Output, current
from gta_edge.cli.signals import exit_status
from gta_edge.errors import InputError
from gta_edge.support.text import brief, printable
from gta_edge.support.text_files import STANDARD_INPUT, read_text_or_stdin

__all__ = ["generate"]


@takes_cache_policy
def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without one, standard input is read.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with it; - is standard input.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue: 1,2,3.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default outside chats.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    speculate: Annotated[
        Speculate | None, typer.Option(help="Guess tokens: from the text so far, or by --draft; off by default.")
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="A smaller model with the same tokenizer, to guess tokens.")
    ] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from this file's cache, and keep the new one there.")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="auto: the fastest that works.")] = Backend.AUTO,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Type of the cache; the backend's own by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; one per core by default.")] = None,
    verify_hashes: Annotated[bool, typer.Option("--verify-hashes", help="Hash the weights first.")] = False,
    cache: CacheChoice | None = None,
) -> None:
    """Continue a prompt.

    Text goes to stdout as it is made, timings to stderr at the end. The prompt may be piped in.
    """
    import gta_edge

    output = current()
    given = _prompt(prompt, prompt_file, ids)
    if (draft is None) == (speculate is Speculate.DRAFT):
        if draft is None:
            raise typer.BadParameter("--speculate draft needs a model: give --draft BUNDLE")
        if speculate is not None:
            raise typer.BadParameter("--draft is for --speculate draft")
    with ExitStack() as opened:
        with output.progress() as progress:
            common: dict[str, Any] = {
                "threads": threads,
                "cache_dtype": value_of(cache_dtype),
                "verify_hashes": verify_hashes,
                "progress": progress,
            }
            session = opened.enter_context(gta_edge.load(bundle, backend.value, cache=policy_of(cache), **common))
            small = None if draft is None else opened.enter_context(gta_edge.load(draft, backend.value, **common))
        conversation = gta_edge.Conversation(session)
        if prompt_cache is not None:
            conversation.resume(prompt_cache)
        generation = conversation.generate(
            given,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
            seed=seed,
            chat=chat,
            ignore_eos=ignore_eos,
            speculate=None if speculate is None else speculate.value,
            draft=small,
        )
        if generation.defaults:
            taken = ", ".join(f"{name} {value:g}" for name, value in generation.defaults.items())
            output.note(f"from the model's generation_config.json: {taken}; options of the command come first")
        try:
            for piece in generation:
                _show(output, piece, generation)
        except KeyboardInterrupt as interrupt:
            generation.close()  # where it came while a piece was printed
            _finish(output, generation, session.backend, _kept(conversation, prompt_cache))
            sys.exit(exit_status(interrupt))
        _finish(output, generation, session.backend, _kept(conversation, prompt_cache))


def _kept(conversation: Any, path: Path | None) -> dict[str, Any] | None:
    """Keep the cache in a file, and return what is said of it."""
    if path is None or not len(conversation.ids):
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
    try:
        return [int(part) for part in str(ids).split(",")]
    except ValueError as error:
        raise InputError(
            f"--ids is {brief(ids)}", "expected whole numbers with commas between, such as 1,2,3"
        ) from error


def _piped() -> str:
    """Return what another program writes into standard input, nothing where that is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return read_text_or_stdin(Path(STANDARD_INPUT))


def _show(output: Output, piece: str, generation: Any) -> None:
    """Print what is new: text, or without a tokenizer the ids."""
    if output.json:
        return
    if generation.text is None and generation.ids:
        piece = f"{',' if len(generation.ids) > 1 else ''}{generation.ids[-1]}"
    sys.stdout.write(_shown(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _shown(text: str) -> str:
    """Return a model's text as a terminal may have it: control characters escaped, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or ord(c) > 0x9F else printable(c) for c in text)


def _finish(output: Output, generation: Any, backend: str, kept: dict[str, Any] | None) -> None:
    timings = generation.timings
    if output.json:
        output.document(
            {
                "text": generation.text,
                "ids": generation.ids,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "seed": generation.seed,
                "backend": backend,
                "timings": timings,
                **({} if kept is None else {"prompt_cache": kept}),
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    rate, steps = timings["decode_tokens_per_s"], timings["tokens_per_step"]
    pace = f" at {rate:.1f}/s" if rate else ""
    if steps:
        pace += f" ({steps:.1f} a step)"
    output.note(
        f"[{backend}] {generation.prompt_tokens} prompt tokens, first token after {timings['ttft_ms'] or 0:.0f} ms; "
        f"{len(generation.ids)} tokens{pace}; ended by {generation.finish_reason}"
    )
    if kept is not None:
        beside = f", as GQA {kept['gqa_bytes'] / 1e6:.2f} MB" if kept["gqa_bytes"] else ""
        output.note(
            f"prompt cache: {kept['reused_tokens']} prompt tokens were in it; now it holds {kept['tokens']}, "
            f"{kept['bytes'] / 1e6:.2f} MB{beside}"
        )
