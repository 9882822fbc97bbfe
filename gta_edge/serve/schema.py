"""The requests of the service: the fields of OpenAI's API that it answers, and those that this model has besides.

A field that is not here is refused by its name, so that no client believes in an option that does nothing. Some are
here only with the value that asks for nothing (``store``: false), or have no effect on an answer (``user``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gta_edge.errors import InputError
from gta_edge.plan.roofline import LARGEST_BATCH
from gta_edge.runtime.generation.request import MAX_LOGPROBS
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.serve.fields import Check, anything, either, flag, list_of, mapping, number, one_of, read, text, whole
from gta_edge.serve.request_error import RequestError
from gta_edge.support.text import brief

__all__ = ["ChatRequest", "CompletionRequest", "Options", "TokenizeRequest"]

_MAX_ENTRIES = 128  # prompts, or tools, of one request
_COMPLETION_TOKENS = 16  # OpenAI's default, for completions that leave it open
_MAX_STOPS = 16
_MAX_BIASES = 1024

_SAMPLING: dict[str, Check] = {
    "temperature": number(0),
    "top_p": number(0, 1),
    "top_k": either("a whole number from -1 up; 0 and -1 keep all", whole(-1)),
    "min_p": number(0, 1),
    "repetition_penalty": number(0),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": whole(-(2**63), 2**63 - 1),
}


def _token_ids(value: Any, name: str) -> list[int]:
    """Accept a list of token ids; quick, since it may be long."""
    if not isinstance(value, list) or not value or not all(type(entry) is int for entry in value):
        raise RequestError(400, f"{name} is {brief(value)}", "expected token ids", param=name, code="invalid_value")
    return value


def _stop(value: Any, name: str) -> tuple[str, ...]:
    found = either(f"text, or a list of up to {_MAX_STOPS} texts", text, list_of(text, most=_MAX_STOPS))(value, name)
    return (found,) if isinstance(found, str) else tuple(found)


def _logit_bias(value: Any, name: str) -> dict[int, float]:
    biases = mapping(number(-100, 100), _MAX_BIASES)(value, name)
    if wrong := [key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 12)]:
        raise RequestError(
            400, f"{name} has {brief(wrong[0])}", "expected token ids as names", param=name, code="invalid_value"
        )
    return {int(key): bias for key, bias in biases.items()}


def _stream_options(value: Any, name: str) -> dict[str, bool]:
    content = mapping(anything, _MAX_STOPS)(value, name)
    return read(content, {"include_usage": flag, "include_obfuscation": one_of(False)}, name)


_COMMON: dict[str, Check] = {
    "model": text,
    "max_tokens": whole(0),
    **_SAMPLING,
    "logit_bias": _logit_bias,
    "stop": _stop,
    "ignore_eos": flag,
    "n": whole(1, LARGEST_BATCH),
    "stream": flag,
    "stream_options": _stream_options,
    "response_format": mapping(anything, 16),
    "json_schema": mapping(anything, 4096),
    "regex": text,
    "grammar": text,
    "user": text,
}

_COMPLETION: dict[str, Check] = {
    "prompt": either(
        "text, token ids, or a list of either",
        text,
        _token_ids,
        list_of(either("text or token ids", text, _token_ids), least=1, most=_MAX_ENTRIES),
    ),
    **_COMMON,
    "echo": flag,
    "logprobs": whole(0, MAX_LOGPROBS),
    "best_of": whole(1, LARGEST_BATCH),
}


def _tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Accept functions as OpenAI's API has them; what else a tool says is for the template."""
    tools: list[dict[str, Any]] = list_of(mapping(anything, 16), most=_MAX_ENTRIES)(value, name)
    places: dict[str, str] = {}
    for i, tool in enumerate(tools):
        where = f"{name}[{i}]"
        one_of("function")(tool.get("type", "function"), f"{where}.type")
        function = mapping(anything, 16)(_required(tool, "function", where), f"{where}.function")
        if not text(_required(function, "name", f"{where}.function"), f"{where}.function.name"):
            raise RequestError(400, f"{where}.function.name is empty", "give a name", param=f"{where}.function.name")
        if (before := places.setdefault(function["name"], where)) != where:
            problem = f"{where}.function.name is {brief(function['name'])}, as {before}'s"
            raise RequestError(400, problem, "give each function a name of its own", param=f"{where}.function.name")
        if function.get("parameters") is not None:
            mapping(anything, 4096)(function["parameters"], f"{where}.function.parameters")
    return tools


def _tool_choice(value: Any, name: str) -> str | dict[str, Any]:
    """Accept which functions may or must be called: a word, or the name of one."""
    if not isinstance(value, dict):
        return str(one_of("auto", "none", "required")(value, name))
    found = read(value, {"type": one_of("function"), "function": mapping(anything, 1)}, name)
    within = f"{name}.function"
    return {"name": text(_required(_required(found, "function", name), "name", within), f"{within}.name")}


_CHAT: dict[str, Check] = {
    "messages": list_of(mapping(anything, 16), least=1),
    **_COMMON,
    "max_completion_tokens": whole(0),
    "logprobs": flag,
    "top_logprobs": whole(0, MAX_LOGPROBS),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": flag,
    "chat_template_kwargs": mapping(anything, 64),
    # no effect, or the value that asks for nothing
    "metadata": mapping(anything, 16),
    "modalities": list_of(one_of("text"), least=1, most=1),
    "prompt_cache_key": text,
    "safety_identifier": text,
    "service_tier": one_of("auto", "default"),
    "store": one_of(False),
}


@dataclass(frozen=True)
class Options:
    """What requests for text have in common.

    Attributes:
        model: name that was asked for; None for whichever there is.
        max_tokens: of each answer; None for as many as there is room for.
        sampling: options as ``Sampling`` takes them, those that were given.
        logit_bias: by token id.
        seed: of the first answer; the next ones' follow it.
        stop: texts at which an answer ends.
        ignore_eos: treat end tokens as any other.
        n: answers to each prompt.
        best_of: answers to each prompt that are generated, of which the ``n`` most probable ones are given.
        logprobs: alternatives to give for each token, with their probabilities; None for no probabilities.
        stream: answer with events.
        include_usage: tell the usage in a last event.
        grammar: kind and text of what answers are held to; None for nothing.
    """

    model: str | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    best_of: int = 1
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    grammar: tuple[str, str | Mapping[str, Any]] | None = None

    def sampling_for(self, index: int, defaults: Mapping[str, float], vocab_size: int) -> Sampling:
        """Return how an answer's tokens are chosen.

        Args:
            index: of the answer among those to one prompt.
            defaults: options where the request leaves them open; of them, greedy takes the repetition penalty only.
            vocab_size: ids that the model has.

        Raises:
            RequestError: an option out of range, or a bias for a token that there is not.
        """
        if outside := [token for token in self.logit_bias if token >= vocab_size]:
            raise RequestError(
                400,
                f"logit_bias has token id {outside[0]}",
                f"expected 0 to {vocab_size - 1}, the model's vocabulary",
                param="logit_bias",
                code="invalid_value",
            )
        greedy = self.sampling.get("temperature") == 0
        left = {name: value for name, value in defaults.items() if not greedy or name == "repetition_penalty"}
        seed = None if self.seed is None else (self.seed + index) % 2**63
        given: dict[str, Any] = {**left, **self.sampling}
        if "top_k" in given:
            given["top_k"] = max(0, int(given["top_k"]))
        try:
            return Sampling(**given, logit_bias=dict(self.logit_bias), seed=seed)
        except InputError as error:
            name = error.problem.split(" ", 1)[0]
            raise RequestError(400, error.problem, error.remedy, param=name, code="invalid_value") from error


def _options(content: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> Options:
    if "stream_options" in content and not content.get("stream"):
        raise RequestError(400, "stream_options is given without stream", "set stream to true", param="stream_options")
    return Options(
        model=content.get("model"),
        max_tokens=max_tokens,
        sampling={name: content[name] for name in _SAMPLING if name in content and name != "seed"},
        logit_bias=content.get("logit_bias", {}),
        seed=content.get("seed"),
        stop=content.get("stop", ()),
        ignore_eos=content.get("ignore_eos", False),
        n=content.get("n", 1),
        best_of=_best_of(content),
        logprobs=logprobs,
        stream=content.get("stream", False),
        include_usage=content.get("stream_options", {}).get("include_usage", False),
        grammar=_grammar(content),
    )


def _best_of(content: Mapping[str, Any]) -> int:
    """Return how many answers to each prompt are to be generated."""
    n = int(content.get("n", 1))
    found = int(content.get("best_of", n))
    if found < n:
        raise RequestError(400, f"best_of is {found} and n {n}", "give at least as many", param="best_of")
    if found > n and content.get("stream"):
        problem = f"best_of is {found} with stream, and the best are known in the end"
        raise RequestError(400, problem, "leave one of both out", param="best_of")
    return found


def _grammar(content: Mapping[str, Any]) -> tuple[str, str | Mapping[str, Any]] | None:
    """Return kind and text of the grammar that a body asks for, by OpenAI's field or by one of ours."""
    given = [(kind, content[kind]) for kind in ("json_schema", "regex", "grammar") if kind in content]
    if "response_format" in content:
        given += _response_format(content["response_format"])
    if len(given) > 1:
        raise RequestError(400, f"{given[0][0]} is given beside another grammar", "give one", param=given[0][0])
    return given[0] if given else None


def _response_format(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    name = "response_format"
    kind = one_of("text", "json_object", "json_schema")(value.get("type"), f"{name}.type")
    found = read(
        value, {"type": anything, **({"json_schema": mapping(anything, 16)} if kind == "json_schema" else {})}, name
    )
    if kind == "text":
        return []
    if kind == "json_object":
        return [("json_schema", {"type": "object"})]
    within = f"{name}.json_schema"
    fields = {"name": text, "description": text, "schema": mapping(anything, 4096), "strict": flag}
    return [
        ("json_schema", read(_required(found, "json_schema", name), fields, within).get("schema", {"type": "object"}))
    ]


def _required(content: Mapping[str, Any], name: str, within: str = "") -> Any:
    if name not in content:
        where = f"{within}.{name}" if within else name
        raise RequestError(400, f"the field {where} is missing", "give it", param=where, code="missing_field")
    return content[name]


@dataclass(frozen=True)
class CompletionRequest:
    """A body of ``/v1/completions``.

    Attributes:
        prompts: texts or lists of ids, each continued by itself.
        echo: give the prompt before its continuation.
        options: see there.
    """

    prompts: tuple[str | list[int], ...]
    echo: bool
    options: Options

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> CompletionRequest:
        """Read a body.

        Raises:
            RequestError: it is not as it must be.
        """
        found = read(content, _COMPLETION)
        prompt = _required(found, "prompt")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        options = _options(found, found.get("max_tokens", _COMPLETION_TOKENS), found.get("logprobs"))
        return cls(tuple(prompt) if several else (prompt,), found.get("echo", False), options)


@dataclass(frozen=True)
class ChatRequest:
    """A body of ``/v1/chat/completions``.

    Attributes:
        messages: as chat templates take them.
        tools: functions that the model may call, for the template; None where it may call none.
        forced: those of them of which the answer must be a call; none where it may be text.
        template_options: variables for the template.
        options: see there.
    """

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None
    forced: tuple[Mapping[str, Any], ...]
    template_options: Mapping[str, Any]
    options: Options

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> ChatRequest:
        """Read a body.

        Raises:
            RequestError: it is not as it must be.
        """
        found = read(content, _CHAT)
        messages = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(_required(found, "messages")))
        tools = found.get("tools") or None
        if "tool_choice" in found and tools is None and found["tool_choice"] != "none":
            raise RequestError(
                400, "tool_choice is given without tools", "give tools, or leave it out", param="tool_choice"
            )
        if "top_logprobs" in found and not found.get("logprobs"):
            raise RequestError(
                400, "top_logprobs is given without logprobs", "set logprobs to true", param="top_logprobs"
            )
        logprobs = found.get("top_logprobs", 0) if found.get("logprobs") else None
        options = _options(found, found.get("max_completion_tokens", found.get("max_tokens")), logprobs)
        forced = _forced(found.get("tool_choice"), tools or [])
        if forced and options.grammar is not None:
            problem = "tool_choice asks for a call, and another field for something else"
            raise RequestError(400, problem, "leave one of both out", param="tool_choice")
        return cls(
            messages,
            None if found.get("tool_choice") == "none" else tools,
            forced,
            found.get("chat_template_kwargs", {}),
            options,
        )


def _forced(choice: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return the functions of which the answer must be a call, by a tool_choice that was accepted."""
    functions = tuple(tool["function"] for tool in tools)
    if choice == "required":
        return functions
    if not isinstance(choice, Mapping):
        return ()
    named = tuple(function for function in functions if function["name"] == choice["name"])
    if not named:
        raise RequestError(
            400, f"tool_choice names {brief(choice['name'])}, which is none of tools", "name one", param="tool_choice"
        )
    return named[:1]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a message as templates take it: a developer speaks as the system, and calls have their arguments as such.

    OpenAI's API has the arguments of calls as JSON within a text; templates, as transformers has it, take objects.
    """
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(400, f"{name}.role is {brief(role)}", "expected text", param=f"{name}.role")
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    if role == "developer":
        found["role"] = "system"
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return found


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(
            400, f"{name} is {brief(call)}", "expected {'function': {'name': …, 'arguments': …}}", param=name
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            return dict(call)  # the model wrote it, and sees it as it was
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True)
class TokenizeRequest:
    """A body of ``/tokenize``, by llama.cpp's names.

    Attributes:
        content: the text.
        add_special: put the special tokens around it that the tokenizer has for a text.
        with_pieces: give each token's text too.
    """

    content: str
    add_special: bool
    with_pieces: bool

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> TokenizeRequest:
        """Read a body.

        Raises:
            RequestError: it is not as it must be.
        """
        found = read(content, {"content": text, "add_special": flag, "with_pieces": flag, "model": text})
        return cls(_required(found, "content"), found.get("add_special", False), found.get("with_pieces", False))
