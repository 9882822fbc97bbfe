"""Text into commands and out of them: files, standard input, byte order marks, chats, terminals."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from gta_edge.support.text import printable_text
from tests.helpers.bundle_files import manifest_of, relist, write
from tests.helpers.commands import COMMAND, environment, run

OPTIONS = ("--max-new-tokens", "6", "--ignore-eos")


@pytest.fixture
def chatty(copied_bundle: Path) -> Path:
    """A bundle with a chat template and values to sample with."""
    settings = json.loads((copied_bundle / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (copied_bundle / "tokenizer_config.json").write_text(json.dumps(settings))
    entries = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (copied_bundle / "generation_config.json").write_text(json.dumps(entries))
    manifest = manifest_of(copied_bundle)
    manifest["files"]["generation_config.json"] = {}
    write(copied_bundle, manifest)
    relist(copied_bundle)
    return copied_bundle


def piped(content: bytes, *arguments: object):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=content, env=environment(), capture_output=True, check=False
    )


def test_a_byte_order_mark_is_no_part_of_a_text(command, tiny_bundle, tmp_path):
    for name, encoding in ("plain", "utf-8"), ("marked", "utf-8-sig"):
        (tmp_path / name).write_text("Hé " * 20, encoding=encoding)
    generated = [
        command("generate", tiny_bundle, "--prompt-file", tmp_path / name, *OPTIONS, "--json").document
        for name in ("plain", "marked")
    ]
    assert generated[0]["ids"] == generated[1]["ids"]
    assert generated[0]["prompt_tokens"] == generated[1]["prompt_tokens"] == 80
    losses = [
        command("eval", tiny_bundle, "--text", tmp_path / name, "--json").document for name in ("plain", "marked")
    ]
    assert losses[0] == losses[1]


def test_standard_input(command, tiny_bundle, tmp_path):
    expected = command("generate", tiny_bundle, "--prompt", "Hé\n", *OPTIONS, "--json").document
    result = piped("Hé\n".encode("utf-8-sig"), "generate", tiny_bundle, "--prompt-file", "-", *OPTIONS, "--json")
    assert json.loads(result.stdout)["ids"] == expected["ids"]
    assert result.stderr == b""
    bad = piped(b"\xff", "generate", tiny_bundle, "--prompt-file", "-")
    assert (bad.returncode, bad.stdout) == (1, b"")
    assert bad.stderr.startswith(b"error: standard input: is not UTF-8 text (byte 0); ")
    empty = piped(b"", "generate", tiny_bundle, "--prompt-file", "-")
    assert empty.stderr.startswith(b"error: the prompt has no tokens")


def test_a_terminal_as_standard_input(tiny_bundle):
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, "generate", str(tiny_bundle), "--prompt-file", "-", *OPTIONS, "--json"],
            stdin=theirs, stdout=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        os.write(ours, b"Hi\n\x04")
        out, _ = process.communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert json.loads(out)["prompt_tokens"] == 3


def test_a_chat_says_what_it_takes_from_the_model(command, chatty):
    result = command("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, "--seed", 1)
    assert result.status == 0
    assert "from the model's generation_config.json: temperature 0.6, top_k 50, top_p 0.9; options" in result.err
    greedy = command("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, "--temperature", 0)
    assert "generation_config" not in greedy.err
    plain = command("generate", chatty, "--prompt", "Hi", *OPTIONS)
    assert "generation_config" not in plain.err
    quiet = command("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, "--quiet")
    assert (quiet.status, quiet.err) == (0, "")
    assert command("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, "--json").document["finish_reason"]
    for options in ("--top-k", 0), ("--top-k", 0, "--top-p", 1), ("--repetition-penalty", 1), ("--min-p", 0):
        assert command("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, *options).status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "nan"), "temperature is nan"),
        (("--temperature", "inf"), "temperature is inf"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--temperature", "1e400"), "temperature is inf"),
        (("--top-k", "-1"), "top_k is -1; expected a whole number from 0 up"),
        (("--top-p", "nan"), "top_p is nan"),
        (("--top-p", "0"), "top_p is 0"),
        (("--min-p", "2"), "min_p is 2"),
        (("--repetition-penalty", "0"), "repetition_penalty is 0"),
        (("--repetition-penalty", "nan"), "repetition_penalty is nan"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", str(2**64)), "seed is 18446744073709551616"),
        (("--seed", "9" * 1000), "seed is a whole number of more than 20 digits"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--max-new-tokens", "-5"), "max_new_tokens is -5"),
        (("--stop", ""), "a stop string is ''"),
        (("--stop", "\udcff"), "a stop string is"),
    ],
)
def test_options_of_wrong_values(command, tiny_bundle, options, message):
    error = command("generate", tiny_bundle, "--ids", "1", *options).error
    assert error.startswith(message), error
    assert len(error) < 500


@pytest.mark.parametrize(
    "ids",
    [
        "",
        ",",
        "1,",
        "a",
        "1 2",
        "1.0",
        "0x1",
        "1;2",
        "-1",
        "300",
        "9" * 5000,
        "1," * 5000,
        "9" * 30,
        "\x1b[31m",
        "\uff11",
    ],
)
def test_ids_of_wrong_values(command, tiny_bundle, ids):
    result = command("generate", tiny_bundle, f"--ids={ids}", "--max-new-tokens", 1)
    if ids == "\uff11":  # a digit of another script is a number to Python
        assert result.status == 0
        return
    assert len(result.error) < 500
    assert result.error.isprintable()


def test_a_model_that_writes_escapes_does_not_reach_the_terminal(chatty, tmp_path):
    assert printable_text("a\x1b[31m\x07\x9b中\u200d👩\n\tb\r") == "a\\x1b[31m\\x07\\x9b中\u200d👩\n\tb\\r"


def test_names_with_escapes(command, tiny_bundle, tmp_path):
    name = "\x1b[31mred\n"
    for arguments in (
        ("generate", tiny_bundle, "--prompt-file", tmp_path / name),
        ("eval", tiny_bundle, "--text", tmp_path / name),
        ("eval", tiny_bundle, "--ids", tmp_path / name),
        ("bench", tiny_bundle, "--prompt-file", tmp_path / name),
    ):
        assert "\x1b" not in command(*arguments).error


def test_a_stop_string_that_is_a_special_token(command, tiny_bundle):
    tokenizer = json.loads((tiny_bundle / "tokenizer.json").read_text())
    end = tokenizer["added_tokens"][0]["content"]
    for options in (), ("--ignore-eos",):
        options = ("--prompt", "a", "--max-new-tokens", 2, "--stop", end, *options)
        assert command("generate", tiny_bundle, *options, "--json").document["finish_reason"] in ("length", "stop")


def test_in_a_process_of_its_own(chatty):
    result = run("generate", chatty, "--prompt", "Hi", "--chat", *OPTIONS, "--temperature", 0)
    assert (result.status, result.err.count("\n")) == (0, 1)
