"""What answers look like on the wire: whole, or as chunks of a stream, in the two forms of OpenAI's API."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.serve.scheduler import Event, Request, TokenLogprobs
from gta_edge.serve.schema import Options
from gta_edge.serve.tool_calls import CallParser, ToolCall

__all__ = ["Answers", "ChatAnswers", "CompletionAnswers", "best", "usage"]

_REASONS = {"stop": "stop", "length": "length", "context": "length", "interrupted": "length"}
"""OpenAI's word for why an answer ended: of those that were cut it knows one."""

_IMPOSSIBLE = -9999.0
"""Logarithm of a probability that is told of zero, which JSON has no logarithm for; as in OpenAI's API."""


def usage(requests: Sequence[Request], n: int) -> dict[str, Any]:
    """Return the tokens of some answers; a prompt counts once, however many answers it has.

    Args:
        requests: in the order of prompts, ``n`` to each.
        n: answers to each prompt.
    """
    prompt = sum(request.prompt_tokens for request in requests[::n])
    completion = sum(request.completion_tokens for request in requests)
    cached = sum(request.cached_tokens for request in requests[::n])
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    guessed = [each for each in (request.guessed for request in requests) if each is not None]
    if guessed:
        drafted, accepted = map(sum, zip(*guessed, strict=True))
        counts = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        found["completion_tokens_details"] = counts
    return found


def best(events: Sequence[Sequence[Event]], options: Options) -> list[Sequence[Event]]:
    """Return the events of the answers that are given: all, or of those to each prompt the ``n`` most probable ones.

    What is compared is the mean log probability of an answer's tokens, the end token among them.
    """
    n, count = options.n, options.best_of
    if count == n:
        return list(events)
    found: list[Sequence[Event]] = []
    for start in range(0, len(events), count):
        found += sorted(events[start : start + count], key=_mean_logprob, reverse=True)[:n]
    if options.logprobs is None:  # they were asked for to compare by
        found = [[replace(event, logprobs=()) for event in each] for each in found]
    return found


def _mean_logprob(events: Sequence[Event]) -> float:
    values = [each.logprob for event in events for each in event.logprobs]
    return sum(values) / max(len(values), 1)


class Answers(ABC):
    """The bodies of one response.

    Args:
        model: name of the model.
        tokenizer: for the tokens that probabilities are told of; None where the model has none.
        echoed: of each answer that begins with its prompt, the prompt's text and its first token.
    """

    _prefix: str
    _object: str
    _chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer | None, echoed: Sequence[tuple[str, int]] = ()) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": f"{self._prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._echoed = echoed
        self._begun: set[int] = set()

    def whole(self, events: Sequence[Sequence[Event]], used: dict[str, Any]) -> dict[str, Any]:
        """Return the body that has all answers.

        Args:
            events: of each answer, the last with a reason.
            used: what ``usage`` gives.
        """
        choices = [self._choice(index, each, whole=True) for index, each in enumerate(events)]
        return {**self._head, "object": self._object, "choices": choices, "usage": used}

    def chunk(self, index: int, event: Event) -> dict[str, Any] | None:
        """Return the body of one event of an answer; None where there is nothing to tell of it yet."""
        choice = self._choice(index, [event], whole=False)
        if choice.get("delta") == {} and choice["logprobs"] is None and choice["finish_reason"] is None:
            return None  # its token is held, since it may be a part of a call
        return {**self._head, "object": self._chunk_object, "choices": [choice]}

    def last_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        """Return the body that tells the usage behind all others."""
        return {**self._head, "object": self._chunk_object, "choices": [], "usage": used}

    def _choice(self, index: int, events: Sequence[Event], whole: bool) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        reason = events[-1].finish_reason
        first = index not in self._begun
        self._begun.add(index)
        content = self._content(index, text, first, whole, reason is not None)
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(index, events),
            "finish_reason": None if reason is None else self._reason(index, _REASONS[reason]),
        }

    def _reason(self, index: int, reason: str) -> str:
        """Return why an answer ended, of which the events gave one of ``_REASONS``."""
        return reason

    @abstractmethod
    def _content(self, index: int, text: str, first: bool, whole: bool, last: bool) -> dict[str, Any]:
        """Return the part of a choice that holds its text; ``first`` and ``last`` are said of parts of this choice."""

    @abstractmethod
    def _logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        """Return the part of a choice that tells probabilities; None where there are none."""

    def _bytes(self, token: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``.

    Args:
        model: as of ``Answers``.
        tokenizer: likewise.
        new_parser: makes what finds calls of functions in one answer; None where there are none.
    """

    _prefix, _object, _chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, tokenizer: Tokenizer | None, new_parser: Callable[[], CallParser] | None = None
    ) -> None:
        super().__init__(model, tokenizer)
        self._new_parser = new_parser
        self._parsers: dict[int, CallParser] = {}
        self._calls: Counter[int] = Counter()  # of each answer, so far

    def _content(self, index: int, text: str, first: bool, whole: bool, last: bool) -> dict[str, Any]:
        text, calls = self._told_apart(index, text, last)
        if whole:
            message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
            return {"message": message | ({"tool_calls": calls} if calls else {})}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or self._new_parser is None:
            delta["content"] = text
        numbered = [{"index": self._calls[index] - len(calls) + i, **call} for i, call in enumerate(calls)]
        return {"delta": delta | ({"tool_calls": numbered} if calls else {})}

    def _told_apart(self, index: int, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return what is certain of an answer's text, and the calls that are complete."""
        if self._new_parser is None:
            return text, []
        parser = self._parsers.setdefault(index, self._new_parser())
        found = parser.feed(text) + (parser.finish() if last else [])
        calls = [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": each.name, "arguments": each.arguments},
            }
            for each in found
            if isinstance(each, ToolCall)
        ]
        self._calls[index] += len(calls)
        return "".join(each for each in found if isinstance(each, str)), calls

    def _reason(self, index: int, reason: str) -> str:
        return "tool_calls" if self._calls[index] and reason == "stop" else reason

    def _logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        # an end token has no part in the message
        found = [each for event in events for each in event.logprobs[: len(event.ids)]]
        return {"content": [self._entry(each) for each in found], "refusal": None} if found else None

    def _entry(self, of: TokenLogprobs) -> dict[str, Any]:
        top = [self._alternative(token, logprob) for token, logprob in of.top]
        return {**self._alternative(of.token, of.logprob), "top_logprobs": top}

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        said = self._bytes(token)
        return {"token": said.decode(errors="replace"), "logprob": max(logprob, _IMPOSSIBLE), "bytes": list(said)}


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``."""

    _prefix, _object, _chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer | None, echoed: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(model, tokenizer, echoed)
        self._offsets: dict[int, int] = {}  # characters of each answer whose tokens were told of

    def _content(self, index: int, text: str, first: bool, whole: bool, last: bool) -> dict[str, Any]:
        return {"text": f"{self._echoed[index][0]}{text}" if first and self._echoed else text}

    def _logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        found: list[TokenLogprobs | None] = []
        for event in events:
            found += [*event.prompt_logprobs, *event.logprobs]
        if not found:
            return None
        # of a prompt's first token there is no probability, only the token
        names = [self._name(self._echoed[index][1] if each is None else each.token) for each in found]
        offsets, at = [], self._offsets.get(index, 0)
        for name in names:
            offsets.append(at)
            at += len(name)
        self._offsets[index] = at
        return {
            "tokens": names,
            "token_logprobs": [None if each is None else max(each.logprob, _IMPOSSIBLE) for each in found],
            "top_logprobs": [None if each is None else self._top(each) for each in found],
            "text_offset": offsets,
        }

    def _top(self, of: TokenLogprobs) -> dict[str, float]:
        return {
            self._name(token): max(logprob, _IMPOSSIBLE) for token, logprob in reversed(of.top)
        }  # of one name the likeliest

    def _name(self, token: int) -> str:
        """Return a token's text; of a part of a character its bytes, as OpenAI's API writes them."""
        said = self._bytes(token)
        try:
            return said.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)
