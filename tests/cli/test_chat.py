"""``gta-edge chat``: messages and commands from a pipe and on a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gta_edge
from tests.helpers.chats import with_chat_template
from tests.helpers.commands import Result, environment


@pytest.fixture(scope="module")
def chat_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat_template(tiny_bundle, tmp_path_factory.mktemp("chat") / "bundle")


@pytest.fixture
def chat(command: Callable[..., Result], chat_bundle: Path, tmp_path: Path, monkeypatch) -> Callable[..., Result]:
    """Run a chat with lines that are piped in; answers have at most 8 tokens."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *options: object) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return command("chat", chat_bundle, "--max-new-tokens", 8, *options)

    return run


def expected(bundle: Path, *said: str, system: str | None = None, **options: Any) -> list[dict[str, str]]:
    """The conversation as one gets it that reads everything anew each time."""
    messages = [{"role": "system", "content": system}] if system else []
    with gta_edge.load(bundle, "onnxruntime") as session:
        for text in said:
            messages.append({"role": "user", "content": text})
            answer = "".join(gta_edge.generate(session, messages, max_new_tokens=8, **options))
            messages.append({"role": "assistant", "content": answer})
    return messages


def test_a_conversation_reads_only_what_is_new(chat, chat_bundle):
    document = chat("Hi\n\n  Yo \n", "--json", "--system", "Be.").content
    assert document["messages"] == expected(chat_bundle, "Hi", "Yo", system="Be.")
    first, second = document["turns"]
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["prompt_tokens"] > second["reused_tokens"]


def test_commands(chat, chat_bundle):
    lines = ["Hi", "/regen", "/set temperature 1.5", "/set seed=30000001", "/regen", "/save talk.json", "/reset", "Yo"]
    result = chat("\n".join([*lines, "/stats", "/system S", "/exit", "never said"]))
    assert result.status == 0
    (first, _), hot, (yo, _) = (
        expected(chat_bundle, "Hi")[::-1],
        expected(chat_bundle, "Hi", temperature=1.5, seed=30000001),
        expected(chat_bundle, "Yo", temperature=1.5, seed=30000001)[::-1],
    )
    answers = [first["content"], first["content"], hot[1]["content"], yo["content"]]
    assert result.out == "".join(f"{answer}\n" for answer in answers)
    assert "temperature 1.5, seed 30000001" in result.err
    assert "2 messages are in talk.json" in result.err
    assert re.search(r"^cache: \d+ of 128 tokens, [\d,]+ bytes$", result.err, re.MULTILINE)
    assert "ended by" in result.err
    saved = json.loads(Path("talk.json").read_text())
    assert saved["messages"] == hot
    again = chat("Hi\n/save talk.json\n")
    assert again.status == 1
    assert again.err == "error: talk.json already exists; give another name, or remove it\n"
    assert json.loads(Path("talk.json").read_text()) == saved
    document = chat("Yo\n", "--json", "--load", "talk.json", "--temperature", 0).content
    assert document["messages"][:2] == hot
    assert len(document["messages"]) == 4


def test_several_lines_are_one_message(chat):
    document = chat('"""\nHi\n\nyou\n"""\nYo\n"""\nlast', "--json", "--quiet").content
    assert [m["content"] for m in document["messages"] if m["role"] == "user"] == ["Hi\n\nyou", "Yo", "last"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/foo", "no command is called '/foo'; there are /help, /system"),
        ("/set", None),
        ("/set heat 1", "no option is called 'heat'; there are temperature"),
        ("/set temperature hot", "temperature is 'hot'; expected a number, or none"),
        ("/set temperature -1", "temperature is -1.0; expected a number from 0 up"),
        ("/set max_new_tokens 0", "max_new_tokens is 0"),
        ("/set top_k 1.5", "top_k is '1.5'"),
        ("/regen", "there is no message to answer"),
        ("/save", "/save needs a file's name"),
        ("/save no/such/place", "no/such"),
        ("/load", "/load needs a file's name"),
        ("/load missing", "missing: cannot be read"),
        ("long " * 100, "tokens and the model 128 positions"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(chat, line, said):
    result = chat(f"{line}\n")
    if said is None:
        assert result.status == 0
    else:
        assert said in result.error


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "gta-edge chat", "version": 2, "messages": []}',
        '{"format": "gta-edge chat", "version": 1}',
        '{"format": "gta-edge chat", "version": 1, "messages": [{"role": "tool", "content": "a"}]}',
        '{"format": "gta-edge chat", "version": 1, "messages": [{"role": "user", "content": 3}]}',
        '{"format": "gta-edge chat", "version": 1, "messages": ["a"]}',
    ],
)
def test_files_that_are_no_conversation(chat, content):
    Path("talk.json").write_text(content)
    assert "talk.json" in chat("Hi\n", "--load", "talk.json").error


def test_a_model_without_a_template(command, tiny_bundle, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert command("chat", tiny_bundle).error == (
        "the model has no chat template; continue texts with it: gta-edge generate"
    )


SLOW = """
import sys, time
from gta_edge.cli import main
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession

def run_slowly(self, *arguments, run=OnnxRuntimeSession._run):
    time.sleep(0.1)
    return run(self, *arguments)

OnnxRuntimeSession._run = run_slowly
sys.argv[0] = "gta-edge"
main()
"""
"""The command, with a tenth of a second for each token."""


class Terminal:
    """A command whose input and output are a terminal."""

    def __init__(self, *arguments: object, **variables: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, arguments)],
            env=environment(TERM="xterm", COLUMNS="100", **variables),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.sent = ""

    def until(self, text: str, seconds: float = 60) -> None:
        """Read until something was printed, which is then forgotten with all before it."""
        end = time.monotonic() + seconds
        while text not in self.sent:
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, self.sent
            try:
                block = os.read(self.ours, 4096)
            except OSError as error:  # Linux's way to say that nobody has it open any more
                raise AssertionError(self.sent) from error
            if b"\x1b[6n" in block:  # the editor asks where the cursor is
                self.write("\x1b[1;1R")
            self.sent += block.decode(errors="replace")
        self.sent = self.sent.partition(text)[2]

    def write(self, text: str) -> None:
        os.write(self.ours, text.encode())


@pytest.mark.parametrize("editor", [True, False])
def test_ctrl_c_ends_an_answer_only(chat_bundle, tmp_path, editor):
    """With the editor, and without: a module of its name that cannot be imported hides it."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    if not editor:
        (hidden / "prompt_toolkit.py").write_text("raise ImportError")
    path = os.pathsep.join([str(hidden), environment()["PYTHONPATH"]])
    terminal = Terminal("chat", chat_bundle, "--backend", "onnxruntime", "--threads", 1, PYTHONPATH=path)
    try:
        terminal.until("Enter sends" if editor else "plain input")
        terminal.until(">")
        terminal.write("Hi\r")
        terminal.until("::::")  # what this model says, a tenth of a second each
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.until(">")
        terminal.write("/stats\r")
        terminal.until("ended by interrupted")
        terminal.until(">")
        terminal.write("/exit\r")
        while terminal.process.poll() is None and select.select([terminal.ours], [], [], 20)[0]:
            try:
                os.read(terminal.ours, 4096)
            except OSError:
                break
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)
