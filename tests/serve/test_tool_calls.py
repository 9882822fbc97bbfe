"""Calls of functions: found in what models say, in pieces of any size, and asked for so that an answer must be one."""

import json
import re

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.serve.tool_calls import LLAMA, MISTRAL, TAGGED, CallFormat, CallParser, ToolCall, call_grammar, format_of
from tests.helpers.service import Service

SUN = {
    "name": "sun",
    "parameters": {"$ref": "#/$defs/at", "$defs": {"at": {"properties": {"at": {"enum": ["Ré", 7]}}}}},
}
SUN["parameters"]["$defs"]["at"] |= {"type": "object", "required": ["at"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": SUN}, {"type": "function", "function": {"name": "moon"}}]
NAMES = frozenset({"sun", "moon"})
MESSAGES = [{"role": "user", "content": "?"}]
HIDDEN = {"chat_template_kwargs": {"hides_tools": True}}  # in the prompt, for which there are few positions

CALL = '{"name": "sun", "arguments": {"at": "Ré"}}'
FOUND = ToolCall("sun", '{"at": "Ré"}')
MOON = ToolCall("moon", "{}")
HALF = '{"name": "sun", "parameters": {"at": "\\ud83d"}}'
INFINITE = '{"name": "sun", "parameters": {"at": 1e999}}'
NO_JSON = '{"name": "sun", "parameters": "{\\"at\\": NaN}"}'
TAG_IN_TEXT = '{"name": "sun", "arguments": {"at": "a\\"</tool_call>b"}}'
SAID = [
    (TAGGED, f"<tool_call>\n{CALL}\n</tool_call>", [FOUND]),
    (TAGGED, f" See.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", [" See.", FOUND, FOUND]),
    (TAGGED, f'<tool_call>[{CALL}, {{"name": "moon"}}]</tool_call> and', [FOUND, MOON, " and"]),
    (TAGGED, f"<tool_call>\n{CALL}", [FOUND]),  # it ended without the tag
    (TAGGED, '<tool_call>{"name": "sun", "arguments": "{\\"at\\": \\"Ré\\"}"}</tool_call>', [FOUND]),
    (TAGGED, "a < b, <tool and 1 <tool_", ["a < b, <tool and 1 <tool_"]),
    (TAGGED, CALL, [CALL]),
    (TAGGED, " \n", [" \n"]),
    (TAGGED, '<tool_call>{"name": "sun", "argu', ['<tool_call>{"name": "sun", "argu']),
    (TAGGED, "<tool_call>no JSON</tool_call> x", ["<tool_call>no JSON</tool_call> x"]),
    (TAGGED, '<tool_call>{"name": "star"}</tool_call>', ['<tool_call>{"name": "star"}</tool_call>']),
    (TAGGED, '<tool_call>{"name": "sun", "n": NaN}</tool_call>', ['<tool_call>{"name": "sun", "n": NaN}</tool_call>']),
    (TAGGED, '<tool_call>{"name": ["sun"]}</tool_call>', ['<tool_call>{"name": ["sun"]}</tool_call>']),
    (TAGGED, f"<tool_call>{TAG_IN_TEXT}</tool_call>.", [ToolCall("sun", '{"at": "a\\"</tool_call>b"}'), "."]),
    (TAGGED, f"<tool_call>{TAG_IN_TEXT}", [ToolCall("sun", '{"at": "a\\"</tool_call>b"}')]),
    (TAGGED, f'<tool_call>"</tool_call><tool_call>{CALL}</tool_call>', ['<tool_call>"</tool_call>', FOUND]),
    (TAGGED, '<tool_call>"</tool_call> x', ['<tool_call>"</tool_call> x']),
    (LLAMA, '{"name": "sun", "parameters": {"at": "Ré"}}', [FOUND]),
    (LLAMA, f'<|python_tag|>{CALL}; {{"name": "moon", "parameters": {{}}}}', [FOUND, MOON]),
    (LLAMA, f"It is {CALL}", [f"It is {CALL}"]),
    (LLAMA, '{"name": "Bob", "age": 7}', ['{"name": "Bob", "age": 7}']),
    (LLAMA, f"{CALL} is it", [f"{CALL} is it"]),
    (LLAMA, "[" * 100_000, ["[" * 100_000]),
    (LLAMA, "", []),
    (LLAMA, HALF, [ToolCall("sun", '{"at": "\\ud83d"}')]),  # of a pair of surrogates, which UTF-8 cannot send
    (LLAMA, NO_JSON, [NO_JSON]),
    (LLAMA, INFINITE, [INFINITE]),
    (LLAMA, '{"name": "moon", "arguments": null}', [MOON]),
    (LLAMA, '{"name": "moon", "parameters": "null"}', [MOON]),
    (MISTRAL, f"[{CALL}]", [FOUND]),
    (MISTRAL, f' [TOOL_CALLS][{CALL}, {{"name": "moon", "arguments": {{}}}}]', [FOUND, MOON]),
]  # fmt: skip


def joined(parts: list[str | ToolCall]) -> list[str | ToolCall]:
    """Texts that follow each other as one."""
    found: list[str | ToolCall] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize(("form", "said", "expected"), SAID, ids=range(len(SAID)))
def test_calls_and_text_are_told_apart(form: CallFormat, said: str, expected: list[str | ToolCall]) -> None:
    parser = CallParser(form, NAMES)
    assert joined([*parser.feed(said), *parser.finish()]) == expected


@given(st.sampled_from([each for each in SAID if len(each[1]) < 1000]), st.lists(st.integers(0, 60), max_size=8))
def test_pieces_of_any_size_are_the_whole(said, cuts) -> None:
    form, text, expected = said
    parser, parts, start = CallParser(form, NAMES), list[str | ToolCall](), 0
    for cut in [*sorted(cuts), len(text)]:
        parts += parser.feed(text[start : max(start, cut)])
        start = max(start, cut)
    assert joined(parts + parser.finish()) == expected


def test_text_that_can_be_no_call_is_not_held_back() -> None:
    parser = CallParser(TAGGED, NAMES)
    assert [joined(parser.feed(each)) for each in ("a b", " <", "c", "\n", "d <tool")] == [
        ["a b"],
        [],
        [" <c"],
        [],
        ["\nd"],
    ]
    assert CallParser(LLAMA, NAMES).feed("a") == ["a"]


def test_the_format_is_that_of_the_template() -> None:
    assert format_of("x <tool_call> y") is TAGGED
    assert format_of('{%- if "ipython" %}{"name": f, "parameters": d}') is LLAMA
    assert format_of("[TOOL_CALLS]") is MISTRAL
    assert format_of("{{ tools }}") is format_of(None) is None


@pytest.mark.parametrize("form", [TAGGED, LLAMA, MISTRAL])
def test_the_grammar_of_a_call_is_what_the_parser_reads(form: CallFormat) -> None:
    """By llguidance itself, for texts that are calls and texts that are none."""
    library = pytest.importorskip("llguidance", reason="llguidance is not installed")
    functions = [{"name": 'say "é"\\', "parameters": None}, {**SUN}]
    grammar = library.grammar_from("grammar", call_grammar(functions, form))
    tokenizer = library.LLTokenizer("byte")

    def accepted(text: str) -> bool:
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
        return bool(matcher.consume_tokens(tokenizer.tokenize_str(text))) and matcher.is_accepting()

    def written(name: str, arguments: str) -> str:
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{form.arguments}": '
        return form.before + head + arguments + "}" + form.after

    for name, arguments in (("sun", '{"at": "Ré"}'), ("sun", '{"at": 7}'), ('say "é"\\', "{}")):
        assert accepted(written(name, arguments))
        parser = CallParser(form, {each["name"] for each in functions})
        assert [*parser.feed(written(name, arguments)), *parser.finish()] == [ToolCall(name, arguments)]
    for name, arguments in (("sun", "{}"), ("sun", '{"at": 8}'), ("moon", "{}"), ('say "é"\\', '{"a": 1}')):
        assert not accepted(written(name, arguments))


# --- through the service ---------------------------------------------------------------------------------------------


def test_an_answer_must_be_a_call_where_that_is_asked(service: Service):
    """Of a model of random weights, several at a time, streamed or not."""
    create = service.openai.chat.completions.create
    options = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 2.0, "n": 3, "extra_body": HIDDEN}
    named = {"type": "function", "function": {"name": "sun"}}
    for choice, names in (("required", NAMES), (named, {"sun"})):
        for answer in create(**options, tool_choice=choice).choices:
            (call,) = answer.message.tool_calls
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            assert arguments.get("at") in ("Ré", 7) if call.function.name == "sun" else arguments == {}
    pieces = [chunk.choices[0] for chunk in create(**options | {"n": 1}, tool_choice=named, stream=True)]
    (call,) = [call for piece in pieces for call in piece.delta.tool_calls or ()]
    assert (call.index, call.type, call.function.name) == (0, "function", "sun")
    assert json.loads(call.function.arguments)["at"] in ("Ré", 7)
    assert pieces[-1].finish_reason == "tool_calls"
    # nothing is sent of a token that is held
    assert [(piece.delta.role, piece.delta.content) for piece in pieces[:-1]] == [("assistant", None)]
    assert pieces[-1].delta.content is None


def test_calls_among_text_are_given_as_such(service: Service):
    """What the model says is made certain by an expression that it has to match."""
    said = 'See:\n<tool_call>{"name": "moon"}</tool_call>\n<tool_call>{"name": "moon"}</tool_call>'
    options = {"model": "tiny", "messages": MESSAGES, "extra_body": {"regex": re.escape(said), **HIDDEN}}
    create = service.openai.chat.completions.create
    message = create(**options, tools=TOOLS).choices[0].message
    assert message.content == "See:"
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    assert calls == [("moon", "{}")] * 2
    assert len({call.id for call in message.tool_calls}) == 2
    chunks = [chunk.choices[0].delta for chunk in create(**options, tools=TOOLS, stream=True)]
    assert "".join(delta.content or "" for delta in chunks) == "See:"
    assert [call.index for delta in chunks for call in delta.tool_calls or ()] == [0, 1]
    assert create(**options).choices[0].message.content == said
    assert create(**options, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "sum", "function": SUN}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tools": [*TOOLS, {"function": {"name": "sun"}}]}, "tools[2].function.name"),
        ({"tools": TOOLS, "tool_choice": "sun"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "star"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_about_tools_is_named(service: Service, change, param):
    response = service.http.post("/v1/chat/completions", json={"messages": MESSAGES, **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_schema_that_cannot_be_met_is_refused(service: Service):
    function = {"name": "a", "parameters": {"type": "number", "minimum": 2, "maximum": 1}}
    options = {"model": "tiny", "messages": MESSAGES, "extra_body": HIDDEN}
    said = r"tool 'a': the JSON schema cannot be used \(Unsatisfiable schema: minimum \(2\) is greater than maximum"
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        service.openai.chat.completions.create(
            **options, tools=[TOOLS[0], {"type": "function", "function": function}], tool_choice="required"
        )
    assert caught.value.param == "tools"
