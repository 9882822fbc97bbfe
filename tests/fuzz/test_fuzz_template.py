"""Chat templates that nobody would write: every one gives its text or one line, and takes no more than it may."""

import pytest

from gta_edge.formats.chat_template import ChatTemplate
from tests.helpers.fuzz import CASES, ends_well, rng

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "user", "content": "😀 \x1b[31m"},
]
ATOMS = [
    "messages", "bos_token", "none", "true", "tools", "loop", "self", "missing", "cycler", "lipsum", "joiner('x')",
    "namespace(n=1)", "dict(a=1)", "''", "'x'", "'中'", "0", "1", "-1", "7", "100", "99999", "10 ** 9", "2 ** 200",
    "1.5", "1e308", "[]", "[1, 2]", "{}", "{'a': [1]}", "(1, 2)", "range(10)", "range(99999)",
    "messages[0]", "messages[-1].content", "messages[0]['role']", "x", "y", "f",
]  # fmt: skip
BINARY = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "not in"]
FILTERS = [
    "length", "join", "join(',' * 999)", "list", "tojson", "tojson(indent=9)", "trim", "string", "upper",
    "center(99999)", "center(10 ** 9)", "repeat", "batch(3)", "slice(10 ** 8)", "sort", "unique", "reverse",
    "first", "last", "random", "indent(999)", "wordwrap(1)", "replace('', 'x' * 99)", "format(1)", "int",
    "float", "abs", "sum", "max", "groupby('a')", "map('string')", "select", "selectattr('role')",
    "default('d')", "escape", "safe", "urlize", "pprint", "xmlattr", "dictsort", "items", "truncate(3)",
    "filesizeformat", "attr('__class__')", "striptags", "round", "wordcount",
]  # fmt: skip
CALLS = [
    "{0}.upper()", "{0}.split('')", "{0}.__class__", "{0}.format({1})", "{0}['a']", "{0}[0]", "{0}[::-1]", "{0}({1})",
    "{0}.join({1})", "{0}.ljust({1})", "{0}.items()", "{0}.get({1})", "{0} if {1}", "raise_exception({0})",
    "strftime_now({0})", "strftime_now('%1000000000d')", "range({0}, {1})", "({0}, {1})", "[{0}, {1}]",
    "'%999999999s' % {0}", "'{{:>{{}}}}'.format({0}, {1})", "lipsum({1})", "{0}.zfill({1})", "{0}.expandtabs({1})",
]  # fmt: skip


def expression(random, depth):
    if depth == 0 or random.random() < 0.25:
        return random.choice(ATOMS)
    left, right = expression(random, depth - 1), expression(random, depth - 1)
    kind = random.randrange(4)
    if kind == 0:
        return f"({left} {random.choice(BINARY)} {right})"
    if kind == 1:
        return f"({left} | {random.choice(FILTERS)})"
    if kind == 2:
        return "(" + random.choice(CALLS).format(left, right) + ")"
    return f"({left} * {right})"


def block(random, depth):
    inner = "".join(block(random, depth - 1) for _ in range(random.randrange(3))) if depth else "text"
    value = expression(random, random.randrange(4))
    return random.choice([
        f"{{{{ {value} }}}}",
        f"{{% for x in {value} %}}{inner}{{{{ x }}}}{{% endfor %}}",
        f"{{% for x in range(99999) %}}{inner}{{% endfor %}}",
        f"{{% if {value} %}}{inner}{{% else %}}no{{% endif %}}",
        f"{{% set y = {value} %}}{inner}{{{{ y }}}}",
        f"{{% set y %}}{inner}{{% endset %}}{{{{ y ~ y }}}}",
        f"{{% macro f(x) %}}{inner}{{{{ f({value}) }}}}{{% endmacro %}}{{{{ f(1) }}}}",
        f"{{% set ns = namespace(a='x') %}}{{% for i in range(60) %}}{{% set ns.a = ns.a ~ ns.a %}}{{% endfor %}}"
        f"{inner}",
        f"{{% filter {random.choice(FILTERS)} %}}{inner}{{% endfilter %}}",
        f"{{% generation %}}{inner}{{% endgeneration %}}",
        f"{{% call f() %}}{inner}{{% endcall %}}",
        "{% include 'x' %}", "{% import 'os' as f %}", "{% break %}", "{#", "{% raw %}", "{{", "%}", "\0",
        "{% set ns._a = 1 %}",
    ])  # fmt: skip


@pytest.fixture(scope="module")
def template():
    return ChatTemplate("", cpu_seconds=0.3)


@pytest.mark.parametrize("part", range(4))
def test_templates(template, part):
    for case in range(part, CASES, 4):
        random = rng("template", case)
        template._source = "".join(block(random, random.randrange(4)) for _ in range(random.randint(1, 3)))
        if random.random() < 0.1:
            at = random.randrange(len(template._source))
            template._source = template._source[:at] + chr(random.randrange(0x3000)) + template._source[at + 2 :]
        error = ends_well(lambda: template.render(MESSAGES, {"bos_token": "<s>"}))
        assert error is None or str(error).startswith("the chat template failed: "), error
    template._source = "{{ messages[0].role }}"
    assert template.render(MESSAGES, {}) == "system"
