"""``gta-edge chat``: a conversation on a terminal, or one message a line from a pipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheChoice, policy_of, takes_cache_policy
from gta_edge.cli.chat_commands import COMMANDS, Chat, EndOfChat, checked_options
from gta_edge.cli.chat_input import lines_of
from gta_edge.cli.choices import Backend, CacheDtype, value_of
from gta_edge.cli.output import Output, current
from gta_edge.cli.signals import Terminated
from gta_edge.errors import GtaEdgeError
from gta_edge.support.text import printable, printable_text

__all__ = ["chat"]


@takes_cache_policy
def chat(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote, to go on with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's own by default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of each answer's draws.")] = None,
    backend: Annotated[Backend, typer.Option(help="auto: the fastest that works.")] = Backend.AUTO,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Type of the cache; the backend's own by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; one per core by default.")] = None,
    verify_hashes: Annotated[bool, typer.Option("--verify-hashes", help="Hash the weights first.")] = False,
    cache: CacheChoice | None = None,
) -> None:
    """Talk with a model.

    Answers go to stdout as they are made. Ctrl-C ends an answer, Ctrl-D or /exit the conversation; /help lists what
    else there is. Of each turn the model reads only what is new.
    """
    import gta_edge

    output = current()
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    given |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    options = checked_options({name: value for name, value in given.items() if value is not None})
    with output.progress() as progress:
        session = gta_edge.load(
            bundle,
            backend.value,
            threads=threads,
            cache_dtype=value_of(cache_dtype),
            cache=policy_of(cache),
            verify_hashes=verify_hashes,
            progress=progress,
        )
    with session:
        conversation = Chat(session, options)
        if load is not None:
            conversation.load(load)
        if system is not None:
            conversation.system = system
        _talk(output, conversation)
        if output.json:
            output.document({"messages": conversation.all_messages, "turns": conversation.turns})


def _talk(output: Output, conversation: Chat) -> None:
    """Take messages and commands until there are no more."""
    on_terminal = sys.stdin is not None and sys.stdin.isatty() and not output.json
    if on_terminal:
        output.note(f"{conversation.about}; /help for commands, Ctrl-D ends")
    for line in lines_of(on_terminal, output.note, list(COMMANDS)):
        try:
            if line.startswith("/"):
                for told in conversation.command(line).splitlines():
                    output.note(told)
                if not conversation.pending:
                    continue
            else:
                conversation.say(line)
            _answer(output, conversation)
        except EndOfChat:
            return
        except GtaEdgeError as error:
            if not on_terminal:  # a script must not go on as if it had been answered
                raise
            output.note(f"error: {printable(str(error))}")


def _answer(output: Output, conversation: Chat) -> None:
    generation = conversation.begin_answer()
    try:
        for piece in generation:
            _show(output, piece)
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Terminated):
            raise
        generation.close()  # where it came while a piece was printed
    finally:
        conversation.end_answer(generation)
    _show(output, "\n")
    if generation.finish_reason == "context":
        output.note("the model has no position left: /reset begins anew")


def _show(output: Output, piece: Any) -> None:
    if not output.json:
        sys.stdout.write(printable_text(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
