"""A conversation as ``gta-edge chat`` has it: messages, options, and what the commands with a slash do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gta_edge.cli.options import checked_options
from gta_edge.errors import InputError
from gta_edge.runtime.generation.conversation import Conversation
from gta_edge.runtime.generation.loop import Generation
from gta_edge.runtime.session import Session
from gta_edge.support.choices import unknown
from gta_edge.support.files import new_file
from gta_edge.support.json_files import read_json
from gta_edge.support.text import brief, printable

__all__ = ["COMMANDS", "Chat", "EndOfChat"]

_FORMAT = "gta-edge chat"
_VERSION = 1
_ROLES = ("system", "user", "assistant")
_NONE = "none"

COMMANDS = {
    "/help": "list these",
    "/system": "TEXT: what the model is told before the first message; none takes it away",
    "/set": "NAME VALUE: an option of sampling; none takes it away; alone, show them",
    "/regen": "answer the last message anew",
    "/reset": "forget all messages",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: go on with one",
    "/stats": "the last answer's time, the cache",
    "/exit": "end",
}
"""What a line may begin with, and what that does."""

_OPTIONS: Mapping[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}


class EndOfChat(Exception):  # noqa: N818  it ends the loop as StopIteration does, and is no error
    """The conversation is over."""


class Chat:
    """Messages to and from a model.

    Args:
        session: runs it.
        options: of ``generate``, by its names.

    Attributes:
        messages: so far, each with ``role`` and ``content``, but for the system's.
        system: what the model is told before them; None for nothing.
        pending: whether the last message waits for an answer.
        turns: figures of each answer.

    Raises:
        InputError: the model has no chat template, or an option is out of range.
    """

    def __init__(self, session: Session, options: Mapping[str, Any]) -> None:
        if session.tokenizer is None or not session.tokenizer.has_chat_template:
            raise InputError("the model has no chat template", "continue texts with it: gta-edge generate")
        self._session = session
        self._conversation = Conversation(session)
        self._options = checked_options(options)
        self.messages: list[dict[str, str]] = []
        self.system: str | None = None
        self.pending = False
        self.turns: list[dict[str, Any]] = []

    @property
    def about(self) -> str:
        """What is talked with, in one line."""
        defaults = ", ".join(f"{name} {value:g}" for name, value in self._session.chat_sampling.items())
        length = f"{self._session.max_length:,} tokens"
        return f"[{self._session.backend}] {length}{f'; by generation_config.json {defaults}' if defaults else ''}"

    @property
    def all_messages(self) -> list[dict[str, str]]:
        """The messages, with the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    # --- turns -----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Add a message of the user, which is then pending."""
        self.messages.append({"role": "user", "content": text})
        self.pending = True

    def begin_answer(self) -> Generation:
        """Return the answer to the pending message, to be iterated over and given to ``end_answer``.

        Raises:
            InputError: the chat template refuses the messages; the pending one is forgotten.
            CapacityError: they are too long; likewise.
        """
        self.pending = False
        try:
            return self._conversation.generate(self.all_messages, **self._options)
        except BaseException:
            self.messages.pop()
            raise

    def end_answer(self, generation: Generation) -> None:
        """Add what was generated; nothing of an answer that did not begin, and then not its question either."""
        if not generation.ids and generation.finish_reason in ("interrupted", "error"):
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": generation.text or ""})
        self.turns.append(
            {
                "prompt_tokens": generation.prompt_tokens,
                "reused_tokens": self._conversation.reused_tokens,
                "tokens": len(generation.ids),
                "finish_reason": generation.finish_reason,
                "seed": generation.seed,
                "timings": generation.timings,
            }
        )

    # --- commands --------------------------------------------------------------------------------------------------

    def command(self, line: str) -> str:
        """Do what a line with a slash says, and return what to tell of it.

        Raises:
            EndOfChat: it ends the conversation.
            InputError: there is no such command, what is given with it makes no sense, or a file is there already.
            OutputError: a file cannot be written.
        """
        name, _, rest = line.partition(" ")
        does: dict[str, Callable[[str], str]] = {
            "/help": self._help,
            "/system": self._set_system,
            "/set": self._set_option,
            "/regen": self._regenerate,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/exit": self._exit,
        }
        if name not in does:
            raise InputError(*unknown("no command is called {}; there are {}", name, tuple(does)))
        return does[name](rest.strip())

    def _help(self, rest: str) -> str:
        return "\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items())

    def _exit(self, rest: str) -> str:
        raise EndOfChat

    def _set_system(self, text: str) -> str:
        if text:
            self.system = None if text == _NONE else text
        return f"system: {self.system or _NONE}"

    def _set_option(self, text: str) -> str:
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            self._set(name.replace("-", "_"), self._value(name.replace("-", "_"), value.strip()))
        own = {**dict(self._session.chat_sampling), **self._options}
        return ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in own.items()
        )

    def _value(self, name: str, text: str) -> Any:
        if name not in _OPTIONS:
            raise InputError(*unknown("no option is called {}; there are {}", name, tuple(_OPTIONS)))
        try:
            return None if text == _NONE else _OPTIONS[name](text)
        except ValueError as error:
            raise InputError(f"{name} is {brief(text)}", f"expected a number, or {_NONE}") from error

    def _set(self, name: str, value: Any) -> None:
        """Set an option, or with None take it away; all stay as they are where it makes no sense."""
        options = {**self._options, name: value}
        self._options = checked_options({other: given for other, given in options.items() if given is not None})

    def _regenerate(self, rest: str) -> str:
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        if len(self.messages) <= answered:
            raise InputError("there is no message to answer", "write one")
        if answered:
            self.messages.pop()
        self.pending = True
        return ""

    def _reset(self, rest: str) -> str:
        self.messages = []
        return "all messages are forgotten"

    def _stats(self, rest: str) -> str:
        session = self._session
        lines = [
            f"cache: {int(session.length.sum()):,} of {session.max_length:,} tokens, {session.cache_bytes:,} bytes"
        ]
        if self.turns:
            last, times = self.turns[-1], self.turns[-1]["timings"]
            rate = times["decode_tokens_per_s"]
            lines.append(
                f"last answer: {last['prompt_tokens']} prompt tokens, {last['reused_tokens']} of them in the cache; "
                f"first token after {times['ttft_ms'] or 0:.0f} ms; {last['tokens']} tokens"
                f"{f' at {rate:.1f}/s' if rate else ''}; ended by {last['finish_reason']}, seed {last['seed']}"
            )
        return "\n".join(lines)

    def _save(self, name: str) -> str:
        if not name:
            raise InputError("/save needs a file's name", "give one")
        if Path(name).is_file():  # there is no --force here
            raise InputError(f"{printable(name)} already exists", "give another name, or remove it")
        content = {"format": _FORMAT, "version": _VERSION, "messages": self.all_messages}
        with new_file(Path(name)) as partial:
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return f"{len(self.messages)} messages are in {printable(name)}"

    def _load(self, name: str) -> str:
        if not name:
            raise InputError("/load needs a file's name", "give one")
        self.load(Path(name))
        return f"{len(self.messages)} messages; the next one follows them"

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file.

        Raises:
            InputError: it is none that ``/save`` wrote; everything stays as it is.
        """
        remedy = "give a file that /save wrote"
        content = read_json(path, InputError, remedy)
        name = printable(str(path))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"{name}: is no conversation", remedy)
        if content.get("version") != _VERSION:
            raise InputError(
                f"{name}: has version {brief(content.get('version'))}; this release reads {_VERSION}", remedy
            )
        messages: list[Any] = found if isinstance(found := content.get("messages"), list) else [found]
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            if fields.get("role") not in _ROLES or not isinstance(fields.get("content"), str) or len(fields) != 2:
                raise InputError(f"{name}: a message is {brief(message)}", remedy)
        self.system = next((m["content"] for m in messages if m["role"] == "system"), None)
        self.messages = [m for m in messages if m["role"] != "system"]
