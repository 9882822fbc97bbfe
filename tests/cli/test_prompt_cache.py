"""``generate --prompt-cache``."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.commands import Result

Command = Callable[..., Result]


def test_a_file_holds_what_was_read(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    common = (tiny_bundle, "--max-new-tokens", 6, "--ignore-eos", "--backend", "torch")
    ids = ",".join(map(str, range(40)))
    alone = [command("generate", *common, "--ids", each, "--json").content for each in (ids, f"{ids},7,8")]
    found = [
        command("generate", *common, "--ids", each, "--prompt-cache", file, "--json").content
        for each in (ids, f"{ids},7,8", f"{ids},7,8", "1")
    ]
    assert [each["ids"] for each in found[:3]] == [alone[0]["ids"], alone[1]["ids"], alone[1]["ids"]]
    assert [each["prompt_cache"]["reused_tokens"] for each in found] == [0, 40, 41, 0]
    assert [each["prompt_cache"]["tokens"] for each in found] == [45, 47, 47, 6]
    assert "prompt_cache" not in alone[0]
    shown = command("generate", *common, "--ids", "1,2", "--prompt-cache", file)
    assert re.search(r"\nprompt cache: 1 prompt tokens were in it; now it holds 7, 0\.\d\d MB, as GQA 0", shown.err)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_cache_that_an_interruption_takes_is_told(
    command: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a step."""
    file, steps, run = tmp_path / "cache", itertools.count(), TorchSession._run

    def interrupted(self: Any, *given: Any) -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(TorchSession, "_run", interrupted)
    result = command("generate", tiny_bundle, "--ids", "1,2,3", "--backend", "torch", "--prompt-cache", file)
    assert result.status == 130
    assert "prompt cache: not written, as the cache is lost where a step is interrupted; run it again" in result.err
    assert not any(tmp_path.iterdir())


def test_an_answer_is_not_lost_with_a_file_that_cannot_be_written(
    command: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory goes while tokens are generated."""
    file, run = tmp_path / "gone" / "cache", TorchSession._run
    file.parent.mkdir()

    def removed(self: Any, *given: Any) -> Any:
        shutil.rmtree(file.parent, ignore_errors=True)
        return run(self, *given)

    common = ("generate", tiny_bundle, "--ids", "1,2,3", "--backend", "torch", "--max-new-tokens", 4, "--json")
    expected = command(*common).content["ids"]
    monkeypatch.setattr(TorchSession, "_run", removed)
    result = command(*common, "--prompt-cache", file)
    assert (result.status, json.loads(result.out)["ids"]) == (1, expected)
    assert "cannot be written" in result.err


def test_what_cannot_be_kept_is_said_before_anything_runs(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a text")
    common = ("generate", tiny_bundle, "--ids", "1,2,3", "--backend", "torch", "--max-new-tokens", 2)
    for file, options, message in [
        (tmp_path / "mine", (), "mine: is no prompt cache; give another file, or remove it"),
        (tmp_path / "nowhere" / "cache", (), "cannot be written; give a file in a directory"),
        (tmp_path, (), "exists and is no regular file"),
    ]:
        assert message in command(*common, "--prompt-cache", file, *options).error
    assert command(*common, "--prompt-cache", tmp_path / "new").status == 0
    refused = command(*common, "--prompt-cache", tmp_path / "new", "--cache-dtype", "int8").error
    assert "is of the type of the cache fp32, and the session has int8; give another file" in refused
    assert (tmp_path / "mine").read_text() == "a text"
