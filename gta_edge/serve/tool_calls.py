"""Calls of functions in what a model says: told apart from text, in the formats of common chat templates.

Which format a model was trained on is seen in its chat template. Hermes and Qwen put each call between tags,
``<tool_call>{"name": …, "arguments": …}</tool_call>``. An answer of Llama 3 or Mistral that calls is JSON as a whole,
``{"name": …, "parameters": …}`` or a list of calls. Of other templates nothing is known, and what they say is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LLAMA", "CallFormat", "CallParser", "ToolCall", "call_grammar", "format_of"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BEFORE_JSON = ("<|python_tag|>", "[TOOL_CALLS]")
"""What models write before an answer that is JSON as a whole, where their tokenizer shows it."""

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: JSON, an object.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call.

    Attributes:
        before: a call.
        after: likewise.
        arguments: name of the field that holds them.
        tagged: whether a call is between tags, with text before and behind it, and not the whole answer.
    """

    before: str
    after: str
    arguments: str
    tagged: bool


TAGGED = CallFormat(f"{_OPEN}\n", f"\n{_CLOSE}", "arguments", tagged=True)
LLAMA = CallFormat("", "", "parameters", tagged=False)
MISTRAL = CallFormat("[", "]", "arguments", tagged=False)


def format_of(template: str | None) -> CallFormat | None:
    """Return how a model with this chat template writes calls; None where that is not known."""
    if template is None:
        return None
    if _OPEN in template:
        return TAGGED
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template) else None


def call_grammar(functions: Sequence[Mapping[str, Any]], form: CallFormat) -> str:
    """Return a grammar, in Lark's notation, of one call of one of some functions with arguments that meet its schema.

    Args:
        functions: each with ``name``, and ``parameters``, a JSON schema; without, it takes none.
        form: how a call is written.
    """
    rules = [f"start: {json.dumps(form.before)} call {json.dumps(form.after)}".replace('"" ', "").replace(' ""', "")]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{form.arguments}": '
        schema = {**(function.get("parameters") or _NO_ARGUMENTS), "x-guidance": _ONE_LINE}
        rules.append(f'call_{i}: {json.dumps(head, ensure_ascii=False)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"


class CallParser:
    """Takes an answer as it comes, and tells calls and text apart; a call is given when it is complete.

    Args:
        form: how calls are written.
        names: functions that there are: a call of another one is text.
    """

    def __init__(self, form: CallFormat, names: Collection[str]) -> None:
        self._form, self._names = form, names
        self._held = ""  # what is not given yet, since it may be, or become, a call
        self._within = False  # a tag
        self._has_called = False
        self._is_text = False  # an answer that is no JSON

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take more of the answer; return what is certain, in order."""
        self._held += text
        return self._tagged() if self._form.tagged else self._whole()

    def finish(self) -> list[str | ToolCall]:
        """Return the rest; the answer has ended."""
        found = self._tagged(ended=True) if self._form.tagged else []
        held, self._held = self._held, ""
        if self._form.tagged and not self._within:
            return found + ([held] if held.strip() or (held and not self._has_called) else [])
        content = held.removeprefix(_OPEN)
        for mark in _BEFORE_JSON:
            content = content.strip().removeprefix(mark)
        return found + (self._calls_of(content) or ([held] if held else []))

    def _tagged(self, *, ended: bool = False) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while True:
            if self._within:
                end = self._closing(ended)
                if end < 0:
                    return found
                calls = self._calls_of(self._held[len(_OPEN) : end])
                self._has_called |= bool(calls)
                end += len(_CLOSE)
                found += calls or [self._held[:end]]
                self._held, self._within = self._held[end:], False
                continue
            text, opened, rest = self._held.partition(_OPEN)
            if opened:
                if text.strip():
                    found.append(text.rstrip())
                self._held, self._within = opened + rest, True
                continue
            certain = len(text.rstrip()) if not _begins_at_end(text) else len(text[: -_begins_at_end(text)].rstrip())
            if certain:
                found.append(text[:certain])
                self._held = text[certain:]
            return found

    def _closing(self, ended: bool) -> int:
        """Return where the tag is closed; -1 where that is not known yet, or nowhere.

        In a string of a call ``</tool_call>`` is a part of that; where there is no such call, it closes the tag.
        """
        first = end = self._held.find(_CLOSE)
        while end >= 0 and _ends_in_string(self._held[len(_OPEN) : end]):
            end = self._held.find(_CLOSE, end + 1)
        if end < 0:
            return first if ended and not self._calls_of(self._held[len(_OPEN) :]) else -1
        return end if end == first or self._calls_of(self._held[len(_OPEN) : end]) else first

    def _whole(self) -> list[str | ToolCall]:
        begin = self._held.lstrip()
        can_call = begin[:1] in ("", "{", "[") or any(
            begin.startswith(mark) or mark.startswith(begin) for mark in _BEFORE_JSON
        )
        self._is_text = self._is_text or not can_call
        if not self._is_text:
            return []
        held, self._held = self._held, ""
        return [held] if held else []

    def _calls_of(self, content: str) -> list[str | ToolCall]:
        """Return the calls that JSON holds, one behind the other or as a list; none where any of it is no call."""
        decoder, found, content = json.JSONDecoder(parse_constant=_no_constant), list[str | ToolCall](), content.strip()
        while content:
            try:
                value, end = decoder.raw_decode(content)
            except (ValueError, RecursionError):
                return []
            for each in value if isinstance(value, list) else [value]:
                call = self._call(each)
                if call is None:
                    return []
                found.append(call)
            content = content[end:].lstrip(" \r\n\t;,")
        return found

    def _call(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments, parse_constant=_no_constant)
            except (ValueError, RecursionError):
                return None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            return None
        try:
            sent = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):  # 1e999 is JSON, and read as infinity
            return None
        # half of a surrogate pair, which JSON can name and UTF-8 cannot, stays as JSON names it
        return ToolCall(name, sent.encode(errors="backslashreplace").decode())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _ends_in_string(text: str) -> bool:
    """Tell whether the beginning of some JSON ends within a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def _begins_at_end(text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a tag."""
    return next((size for size in range(min(len(text), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(text[-size:])), 0)
