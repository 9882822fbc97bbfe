"""Documents are as docs/json.md has them, key by key and type by type, and JSON on any stream."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.cli.app import VERBS
from gta_edge.cli.output import SCHEMA_VERSION
from tests.helpers.chats import with_chat_template
from tests.helpers.commands import COMMAND, ROOT, Result, environment

Command = Callable[..., Result]
Schema = dict[str, str]
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "object": (dict,),
    "list": (list,),
    "null": (type(None),),
}
PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")


def schema(verb: str) -> Schema:
    """The types of a command's keys, as the page has them."""
    section = re.search(rf"^## {verb}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section
    return dict(re.findall(r"^\| `(.+?)` \| (.+?) \| .*\|$", section[1], re.MULTILINE))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document by its key as the page writes keys, containers too."""
    if key:
        yield key, value
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from leaves(entry, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for entry in value:
            yield from leaves(entry, f"{key}[]")


def pattern(key: str) -> str:
    # what a star stands for may have dots in it, as names of files have
    return "".join(".+" if part == "*" else re.escape(part) for part in re.split(r"(\*)", key))


def problems(verb: str, document: dict[str, Any]) -> list[str]:
    """What of a document is not as the page says."""
    found, known, seen = [], schema(verb), set()
    for key, value in leaves(document):
        names = [name for name in known if re.fullmatch(pattern(name), key)]
        if names:
            seen.update(names)
            kinds = {kind for name in names for kind in known[name].removesuffix(", optional").split(" or ")}
            if not any(type(value) in TYPES[kind] for kind in kinds):
                found.append(f"{key} is {value!r}, documented as {kinds}")
        elif not (isinstance(value, (dict, list)) and any(_lies_in(name, key) for name in known)):
            found.append(f"{key} is not documented")
    whole = {name for name, kind in known.items() if not kind.endswith(", optional")}
    empty = {key for key, value in leaves(document) if value in ({}, [])}
    missing = {name for name in whole - seen if not any(_lies_in(name, key) for key in empty)}
    return found + [f"{name} is missing" for name in sorted(missing)]


def _lies_in(name: str, key: str) -> bool:
    """Whether a documented name is of something inside of what this key names."""
    parts, own = re.findall(r"\[\]|[^.\[\]]+", name), re.findall(r"\[\]|[^.\[\]]+", key)
    return len(parts) > len(own) and all(a in ("*", b) for a, b in zip(parts, own, strict=False))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.arange(9))
    return path


CALLS = {
    "init": ["gta1-160m", "{tmp}/init", "--layers", "1", "--max-length", "8"],
    "export": ["{checkpoint}", "{tmp}/export"],
    "build": ["{bundle}", "--onnx-only", "--output", "{tmp}/build"],
    "calibrate-cache": ["{copied}", "--text", "{text}", "--windows", "1", "--tokens", "96", "--backend", "torch"],
    "inspect": ["{bundle}"],
    "plan": ["{bundle}", "--device", "orin-nano-8gb"],
    "verify": ["{bundle}", "--checkpoint", "{checkpoint}"],
    "eval": ["{bundle}", "--ids", "{ids}"],
    "generate": ["{bundle}", "--ids", "1,2", "--max-new-tokens", "3"],
    "chat": ["{chat}"],
    "serve": ["{bundle}", "--unit"],
    "bench": [
        "{bundle}",
        "--backend",
        "onnxruntime,tensorrt",
        "--contexts",
        "8",
        "--rounds",
        "1",
        "--n",
        "2",
        "--speculate",
        "lookup",
    ],
    "doctor": [],
}


def test_every_command_is_on_the_page() -> None:
    assert VERBS.keys() == CALLS.keys() == set(re.findall(r"^## ([\w-]+)$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("verb", CALLS)
def test_documents_are_as_documented(
    command: Command,
    tiny_bundle: Path,
    copied_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    ids: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    (tmp_path / "text").write_text("A text to measure with. " * 20)
    places = {"bundle": tiny_bundle, "checkpoint": tiny_checkpoint, "tmp": tmp_path, "ids": ids}
    places |= {"copied": copied_bundle, "text": tmp_path / "text"}
    if verb == "chat":
        places["chat"] = with_chat_template(tiny_bundle, tmp_path / "chat")
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    document = command(verb, "--json", *(word.format(**places) for word in CALLS[verb])).document
    assert document["schema_version"] == SCHEMA_VERSION == 1
    assert next(iter(document)) == "schema_version"
    assert problems(verb, document) == []


@pytest.mark.parametrize("what", ["gta1-160m", "{checkpoint}"])
def test_what_is_inspected_may_be_no_bundle(command: Command, tiny_checkpoint: Path, what: str) -> None:
    assert problems("inspect", command("inspect", "--json", what.format(checkpoint=tiny_checkpoint)).document) == []


@pytest.mark.parametrize("options", [["--n", "2"], ["--beams", "2"]])
def test_several_answers_are_as_documented(command: Command, tiny_bundle: Path, options: list[str]) -> None:
    call = ["--ids", "1,2", "--max-new-tokens", "3", *options]
    assert problems("generate", command("generate", tiny_bundle, "--json", *call).document) == []


def test_the_list_of_devices_is_as_documented(command: Command) -> None:
    assert problems("plan --devices", command("plan", "--devices", "--json").document) == []


def test_a_deviation_would_be_seen() -> None:
    good = {"schema_version": 1, "tokens": 8, "loss": 1.5, "perplexity": None, "backend": "torch"}
    assert problems("eval", good) == []
    assert problems("eval", good | {"tokens": 8.5}) == ["tokens is 8.5, documented as {'int'}"]
    assert problems("eval", good | {"tokens": True}) == ["tokens is True, documented as {'int'}"]
    assert problems("eval", good | {"more": {}}) == ["more is not documented"]
    del good["backend"]
    assert problems("eval", good) == ["backend is missing"]


@pytest.mark.parametrize(
    "changes",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
        {},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_json_on_any_stream(tiny_bundle: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    """Names with letters of any alphabet, and with bytes that are none."""
    name = os.fsencode(tmp_path) + "/naïve 日本 𝄞 ".encode() + b"\xff\xfe"
    Path(os.fsdecode(name)).symlink_to(tiny_bundle)
    process = subprocess.run(
        [*COMMAND, "plan", "--json", "--device", "orin-nano-8gb", name],
        env=environment(**changes),
        capture_output=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    encoding = changes.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    text = process.stdout.decode(encoding if encoding != "ascii" else "utf-8")
    assert os.fsencode(json.loads(text)["model"]) == name
    assert text.count("\n") == 1
