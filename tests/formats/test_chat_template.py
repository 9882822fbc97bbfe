"""Chat templates: messages of every form that templates take, and bounds on what a template may take itself."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gta_edge.errors import InputError
from gta_edge.formats import template_worker
from gta_edge.formats.chat_template import ChatTemplate

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def render():
    """Render any source in one process, where it is not ended."""
    template = ChatTemplate("", cpu_seconds=0.5)

    def run(source, messages=HI, **variables):
        template._source = source
        return template.render(messages, variables)

    return run


# --- messages --------------------------------------------------------------------------------------------------------

PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
NO_CONTENT = [{"role": "assistant", "tool_calls": [CALL]}]
CALLS_BY_NULL = (
    "{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls[0].function.name + ';' }}"
    "{% else %}{{ m['content'] + ';' }}{% endif %}{% endfor %}"
)
WALKS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (WALKS, PARTS, "<one><two>"),
        ("{{ messages[0].content[1].text }}", PARTS, "two"),
        ("{{ messages[0].content[:1] | tojson }}", PARTS, '[{"type": "text", "text": "one"}]'),
        ("{{ messages[0].content | length }}", PARTS, "2"),
        # templates that take text: never Python's notation of a list
        ("{{ messages[0].content }}", PARTS, "one\ntwo"),
        ("{{ messages[0]['content'] | trim }}!", PARTS, "one\ntwo!"),
        ("{{ '<' + messages[0].content + '>' }}", PARTS, "<one\ntwo>"),
        ("{{ '<' ~ messages[0].content ~ '>' }}", PARTS, "<one\ntwo>"),
        ("{{ messages[0].content.strip() }}", PARTS, "one\ntwo"),
        ("{% set c = messages[0].content %}{{ c }}", PARTS, "one\ntwo"),
        # no content: what asks for none finds it, and what prints it prints nothing, never the word None
        ("{% if messages[0].content is none %}none{% endif %}", CALLS, "none"),
        ("{% if messages[0].content == none %}none{% endif %}", CALLS, "none"),
        ("{% if messages[0].content is not none %}some{% else %}none{% endif %}", CALLS, "none"),
        ("{% if messages[0]['content'] %}some{% else %}none{% endif %}", CALLS, "none"),
        ("{% if messages[0].content is string %}text{% else %}none{% endif %}", CALLS, "none"),
        ("{{ messages[0].content or 'none' }}", CALLS, "none"),
        ("{{ messages[0].content | tojson }}", CALLS, "null"),
        ("<{{ messages[0].content }}>", CALLS, "<>"),
        ("<{{ messages[0].content | trim }}>", CALLS, "<>"),
        ("{{ '<' + messages[0].content + '>' }}", CALLS, "<>"),
        ("{{ '<' ~ messages[0].content ~ '>' }}", CALLS, "<>"),
        ("<{{ messages[0].content }}>", NO_CONTENT, "<>"),
        ("{{ 'content' in messages[0] }}", NO_CONTENT, "False"),
        ("{% for c in messages[0].tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
         CALLS, 'f{"x": 1}'),
        ("{{ messages[0].name }}{{ messages[0].tools[0].type }}",
         [{"role": "user", "content": "x", "name": "n", "tools": [{"type": "t"}]}], "nt"),
        # calls that a template asks null for are not lost beside parts that it cannot take, nor left out with null
        (CALLS_BY_NULL, [*PARTS, *CALLS], "one\ntwo;f;"),
        (CALLS_BY_NULL, [*PARTS, *NO_CONTENT], "one\ntwo;f;"),
        (CALLS_BY_NULL, NO_CONTENT, "f;"),
        ("{{ messages[0].tool_call_id }}", [{"role": "tool", "content": "3", "tool_call_id": "7"}], "7"),
        ("{{ messages[0].content }}", [{"role": "user", "content": ""}], ""),
        ("{{ messages[0].role }}", tuple(PARTS), "user"),
    ],
)  # fmt: skip
def test_messages_as_templates_take_them(render, source, messages, text):
    assert render(source, messages) == text


def test_a_template_that_refuses_parts_in_any_form_says_why(render):
    with pytest.raises(InputError, match="the chat template failed: only one message; check it"):
        render("{{ raise_exception('only one message') }}", PARTS)


NONSENSE = [
    "Hi", b"Hi", [], {}, 3, None, ["Hi"], [None], [[]], [{}], [{"role": "user"}], [{"content": "Hi"}],
    [{"role": 3, "content": "Hi"}], [{"role": None, "content": "Hi"}], [{"role": "user", "content": 3}],
    [{"role": "user", "content": None}], [{"role": "user", "content": {}}], [{"role": "user", "content": []}],
    [{"role": "user", "content": ["Hi"]}], [{"role": "user", "content": [{"text": "Hi"}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "assistant", "content": None, "tool_calls": []}], [{"role": "assistant", "tool_calls": "f()"}],
    [{"role": "assistant", "content": "x", "tool_calls": {"a": 1}}], [{"role": "assistant", "tool_calls": [3]}],
    [{"role": "user", "content": "Hi", "name": b"x"}], [{"role": "user", "content": "Hi", "x": object()}],
    [{"role": "user", "content": "x" * 10**6, "tool_calls": 3}], [{"role": "\x1b[31m", "content": 3}],
]  # fmt: skip


@pytest.mark.parametrize("messages", NONSENSE, ids=range(len(NONSENSE)))
def test_messages_that_make_no_sense(render, messages):
    with pytest.raises(InputError, match=r"^(the messages|a message|a part of a message) .*(expected|give)") as caught:
        render("{{ messages[0].content }}", messages)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_messages_nested_without_end(render):
    nested: list = []
    for _ in range(10**5):
        nested = [nested]
    with pytest.raises(InputError, match="the messages hold what JSON cannot say"):
        render("x", [{"role": "user", "content": "Hi", "x": nested}])


# --- bounds ----------------------------------------------------------------------------------------------------------

BOMBS = {
    "a product of numbers": "{{ 10 ** (10 ** 9) }}",
    "a product of texts": "{{ 'x' * 10 ** 10 }}",
    "folded when it is compiled": "{% set x = 'ab' * (2 ** 34) %}",
    "a product of lists": "{{ ([0] * (10 ** 10)) | length }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxx{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "doubling lists": "{% set n = namespace(t=[0]) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "replacing": "{{ ('x' * 9999) | replace('x', 'y' * 99999) }}",
    "joining": "{{ range(99999) | join('x' * 99999) }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "centred": "{{ 'x' | center(10 ** 10) }}",
    "padded": "{{ 'x'.ljust(10 ** 10) }}",
    "a recursive macro": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a macro that doubles": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for x in [[[]]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a sum of products": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "a slice": "{{ [1] | slice(10 ** 10) | list }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "indenting": "{{ ('x\n' * 99999) | indent(99999) }}",
    "a long template": "x" * (2**20 + 1),
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "sums": "{{ " + "1 + " * 100_000 + "1 }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_takes_too_much(render, source):
    with pytest.raises(InputError, match=r"^the chat template failed: .+; check it and the messages$") as caught:
        render(source)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()
    assert render("{{ messages[0].content }}!") == "Hi!"  # the next one is as ever


def test_what_is_said_of_bounds(render):
    for source, reason in {
        "nested loops": "it takes more than 0.5 s of computing time",
        "a product of texts": "it takes more than 512 MiB of memory",
        "a recursive macro": "it calls itself too often",
        "a long template": "it has 1048577 characters, more than 1048576",
    }.items():
        with pytest.raises(InputError, match=reason):
            render(BOMBS[source])
    with pytest.raises(InputError, match="it writes more than 16777216 characters"):
        render("{% for a in range(1000) %}" + "x" * 20_000 + "{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__ }}",
        "{{ namespace.__globals__ }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(_a=1) %}",
        "{{ ('%s'.format).__self__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ messages | attr('__class__') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(render, source):
    with pytest.raises(InputError, match=r"the chat template failed: .*(unsafe|undefined|no loader|cannot hold)"):
        render(f"{source}{{{{ missing.name }}}}")  # what may not be seen is refused, or undefined, as this is


def test_the_worker_opens_no_files_and_starts_nothing():
    script = f"""
import importlib.util, subprocess, sys
spec = importlib.util.spec_from_file_location("worker", {template_worker.__file__!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker._confine()
import subprocess
for act in lambda: open("/etc/passwd"), lambda: subprocess.Popen(["/bin/true"]), lambda: bytearray(10**9):
    try:
        act()
    except (OSError, MemoryError, ImportError) as error:
        print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split()[0] == "OSError", done
    assert done.stdout.split()[-1] == "MemoryError"
    assert len(done.stdout.split()) == 3


def test_the_worker_ends_with_its_template():
    template = ChatTemplate("x")
    template.render(HI, {})
    process = template._worker._process
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


def test_a_worker_that_was_killed_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(HI, {}) == "Hi"
    os.kill(template._worker._process.pid, signal.SIGKILL)
    template._worker._process.wait()
    assert template.render(HI, {}) == "Hi"


def test_a_worker_ends_when_its_parent_is_killed():
    script = """
import os, signal
from gta_edge.formats.chat_template import ChatTemplate
template = ChatTemplate("x")
template.render([{"role": "user", "content": "Hi"}], {})
print(template._worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{parent.stdout.strip()}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        threading.Event().wait(0.05)
    else:
        raise AssertionError("the worker lives on")


def test_threads_and_forks_get_their_own_answers():
    template = ChatTemplate("{{ messages[0].content }}")
    texts: dict[int, str] = {}

    def run(i):
        texts[i] = template.render([{"role": "user", "content": str(i)}], {})

    threads = [threading.Thread(target=run, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: str(i) for i in range(8)}
    script = """
import os
from gta_edge.formats.chat_template import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}")
ask = lambda text: template.render([{"role": "user", "content": text}], {})
assert ask("before") == "before"
child = os.fork()
assert ask(f"after {child > 0}") == f"after {child > 0}"
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert ask("again") == "again"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
