"""Every option of every command with values that make no sense: one line that says so, and nothing left behind.

Commands and options are those that the command line itself lists, so a new one is tried without a word here, unless it
belongs to a command that is not in ``CALLS``. By default each option gets every value of ``VALUES`` once, everything
else as it should be; with ``GTA_EDGE_FUZZ_CASES=N`` N random calls follow, with several wrong values each.
"""

import io
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import typer.main

from gta_edge.cli.app import app, function_of
from tests.helpers.chats import with_chat_template
from tests.helpers.commands import Result, listing

Command = Callable[..., Result]
Parameter = Any  # of click, which some versions of typer have as a part of their own
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # a group

CALLS = {
    "init": ["gta1-160m", "{tmp}/new", "--layers", "1", "--max-length", "8"],
    "export": ["{checkpoint}", "{tmp}/new", "--no-verify"],
    "build": ["{bundle}", "--onnx-only", "--output", "{tmp}/new"],
    "calibrate-cache": [
        "{bundle}",
        "--text",
        "{text}",
        "--windows",
        "1",
        "--tokens",
        "96",
        "--backend",
        "torch",
        "--force",
    ],
    "inspect": ["{bundle}"],
    "plan": ["{bundle}", "--device", "orin-nano-8gb"],
    "verify": ["{bundle}", "--checkpoint", "{checkpoint}", "--backend", "onnxruntime"],
    "eval": ["{bundle}", "--ids", "{ids}"],
    "generate": ["{bundle}", "--ids", "1,2", "--max-new-tokens", "2"],
    "chat": ["{bundle}"],
    "serve": ["{bundle}", "--unit"],
    "bench": ["{bundle}", "--backend", "onnxruntime@{missing}/python", "--contexts", "8"],
    "doctor": [],
}
"""A call of each command that ends well, or as well as it can without a process of another interpreter."""

VALUES = {
    "empty": "",
    "blank": " ",
    "zero": "0",
    "negative": "-1",
    "huge": str(10**18),
    "far beyond": "9" * 5000,
    "fraction": "0.5",
    "not a number": "nan",
    "infinite": "-inf",
    "text": "FP16",
    "list": "1,,2",
    "long": "x" * 5000,
    "controls": "\x1b[31m\r\n\x07\u202e",
    "not UTF-8": "\udcff\udcfe",
    "beyond ASCII": "naïve 日本語 ①",
    "directory": "{tmp}",
    "missing": "{missing}/file",
    "device": "/dev/null",
    "not a directory": "/dev/null/file",
    "loop": "{loop}",
    "bytes": "{bytes}",
}
NUMBERS = ("zero", "negative", "huge", "far beyond", "fraction", "not a number", "infinite", "text", "controls")
PATHS = ("empty", "long", "controls", "not UTF-8", "beyond ASCII", "text", "directory", "missing", "device")
PATHS += ("not a directory", "loop", "bytes")
TEXTS = ("empty", "blank", "negative", "far beyond", "text", "list", "long", "controls", "not UTF-8", "beyond ASCII")
TEXTS += ("missing",)
FINE = {
    # names that an export may have as well as any other; exporting takes its time
    ("export", "bundle"): ("controls", "beyond ASCII", "text"),
    # texts like any other
    ("generate", "prompt"): ("text", "list", "negative", "missing"),
    ("generate", "stop"): ("text", "list", "negative", "missing", "blank", "beyond ASCII"),
}
"""Values that make sense, and would only take time."""
SECONDS = 20


def options() -> Iterator[tuple[str, Parameter]]:
    for verb, command in COMMANDS.items():
        for parameter in command.params:
            flag = getattr(parameter, "is_flag", False) or parameter.name == "help"
            if not flag:
                yield verb, parameter


def values_for(verb: str, parameter: Parameter) -> list[str]:
    """Names of the values that a parameter of this type is tried with."""
    hint = str(get_type_hints(function_of(verb))[parameter.name])
    names = PATHS if "Path" in hint else NUMBERS if re.search(r"\b(int|float)\b", hint) else TEXTS
    return [name for name in names if name not in FINE.get((verb, str(parameter.name)), ())]


def call(verb: str, changes: dict[Parameter, str]) -> list[str]:
    """The words of a command with some of its parameters changed."""
    given, arguments, words = [*CALLS[verb]], [], []
    positions = [p for p in COMMANDS[verb].params if p.param_type_name == "argument"]
    for position in positions:
        word = given.pop(0)
        arguments.append(changes.get(position, word))
    options_ = {p: changes[p] for p in changes if p.param_type_name == "option"}
    names = {name for p in options_ for name in (*p.opts, *p.secondary_opts)}
    while given:
        name = given.pop(0)
        value = [given.pop(0)] if given and not given[0].startswith("--") else []
        if name not in names:
            words += [name, *value]
    words += [f"{max(p.opts, key=len)}={value}" for p, value in options_.items()]
    return [verb, *words, "--", *arguments]


@pytest.fixture(scope="module")
def places(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("places")
    np.save(directory / "ids.npy", np.arange(5))
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "bytes").write_bytes(bytes(range(256)))
    (directory / "text").write_text("A text to measure with. " * 20)
    bundle = with_chat_template(tiny_bundle, directory / "bundle")
    found = {"bundle": bundle, "checkpoint": tiny_checkpoint, "ids": directory / "ids.npy", "text": directory / "text"}
    return found | {"missing": directory / "missing", "loop": directory / "loop", "bytes": directory / "bytes"}


@pytest.fixture
def crawl(
    command: Command, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[list[str]], None]]:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    inputs = {path: listing(path) for name, path in places.items() if name in ("bundle", "checkpoint")}

    def over(number: int, frame: Any) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    def run(words: list[str]) -> None:
        before = listing(work)
        filled = [word.format(tmp=work, **places) if "{" in word else word for word in words]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            result = command(*filled)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        check(result, filled)
        if result.status:
            assert listing(work) == before, filled
        else:
            assert not [name for name in listing(work) if "partial" in name], filled
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in inputs.items():
            assert {k: v for k, v in listing(path).items() if not k.startswith("engines")} == {
                k: v for k, v in content.items() if not k.startswith("engines")
            }, filled

    monkeypatch.setattr(signal, "SIGALRM", signal.SIGALRM)
    previous = signal.signal(signal.SIGALRM, over)
    yield run
    signal.signal(signal.SIGALRM, previous)


def check(result: Result, words: list[str]) -> None:
    """What any end of a command has to be."""
    said = (words, result)
    assert result.status in (0, 1, 2), said
    assert "unexpected" not in result.err.replace("unexpected extra argument", ""), said
    assert "Traceback" not in result.err, said
    assert len(result.err) < 1000, said
    assert all(c.isprintable() for c in result.err.replace("\n", "")), said
    if result.status == 1:
        lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, said
        assert lines[0].startswith("error: "), said
        assert len(lines[0]) < 600, said
        assert len(lines[0]) > len("error: ") + 10, said
    if result.status == 2:
        assert "Error: " in result.err, said
        assert result.out == "", said
    if "--json" in words and result.out:
        json.loads(result.out)


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() == CALLS.keys()


@pytest.mark.parametrize("verb", sorted(set(CALLS) - {"doctor"}))
def test_a_call_without_a_wrong_value(crawl: Callable[[list[str]], None], verb: str) -> None:
    crawl(call(verb, {}))


PARAMETERS = list(options())


@pytest.mark.parametrize(
    ("verb", "parameter"), PARAMETERS, ids=[f"{verb}-{parameter.name}" for verb, parameter in PARAMETERS]
)
def test_a_wrong_value(crawl: Callable[[list[str]], None], verb: str, parameter: Parameter) -> None:
    for i, name in enumerate(values_for(verb, parameter)):
        words = call(verb, {parameter: VALUES[name]})
        crawl([words[0], "--json", *words[1:]] if i % 2 else words)


@pytest.mark.skipif("GTA_EDGE_FUZZ_CASES" not in os.environ, reason="a deep crawl is asked for by number")
def test_several_wrong_values(crawl: Callable[[list[str]], None]) -> None:
    rng = random.Random(0)  # nothing is secret
    for _ in range(int(os.environ["GTA_EDGE_FUZZ_CASES"])):
        verb = rng.choice(sorted({verb for verb, _ in PARAMETERS}))
        own = [parameter for other, parameter in PARAMETERS if other == verb]
        chosen = rng.sample(own, min(len(own), rng.randint(1, 3)))
        crawl(call(verb, {parameter: rng.choice(list(VALUES.values())) for parameter in chosen}))
