"""``gta-edge chat``: a conversation on a terminal, or one message a line from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.chat_commands import COMMANDS, Chat, EndOfChat
from gta_edge.cli.chat_input import lines_of
from gta_edge.cli.options import BundleArgument, SamplingOptions, SessionOptions, checked_options
from gta_edge.cli.output import Output, current
from gta_edge.cli.signals import Terminated, answered
from gta_edge.errors import GtaEdgeError
from gta_edge.support.text import printable, printable_text

__all__ = ["chat"]


@dataclass(frozen=True)
class _Sampling(SamplingOptions):
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's own by default.")] = None


def chat(
    bundle: BundleArgument,
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    load: Annotated[Path | None, typer.Option(help="A conversation that /save wrote, to go on with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    sampling: _Sampling,
    seed: Annotated[int | None, typer.Option(help="Seed of each answer's draws.")] = None,
    opening: SessionOptions,
) -> None:
    """Talk with a model.

    Answers go to stdout as they are made. Ctrl-C ends an answer, Ctrl-D or /exit the conversation; /help lists what
    else there is. Of each turn the model reads only what is new.
    """
    output = current()
    seeded = {} if seed is None else {"seed": seed}
    options = checked_options({"max_new_tokens": max_new_tokens, **sampling.given(), **seeded})
    with output.progress() as progress:
        session = opening.load(bundle, progress=progress)
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
        answered()
    finally:
        conversation.end_answer(generation)
    _show(output, "\n")
    if generation.finish_reason == "context":
        output.note("the model has no position left: /reset begins anew")


def _show(output: Output, piece: Any) -> None:
    if not output.json:
        sys.stdout.write(printable_text(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
