"""What is exported can be opened: tokenizer, template and end tokens are read before any work is done."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gta_edge
from gta_edge.errors import CheckpointError
from gta_edge.export.pipeline import _no_tokenizer, export_model
from gta_edge.formats.text_files import check_text_files
from gta_edge.model.config import read_config
from tests.helpers.generation import CONFIG, byte_level


def put(name, content):
    def act(directory: Path) -> None:
        path = directory / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return act


FAULTS = {
    "a tokenizer that is none": (put("tokenizer.json", {"model": 1}), "tokenizer.json: is not a tokenizer"),
    "a tokenizer that is cut off": (put("tokenizer.json", b'{"version": "1'), "tokenizer.json: is not a tokenizer"),
    "settings that are no JSON": (put("tokenizer_config.json", b"{"), "tokenizer_config.json: is not valid JSON"),
    "settings that are a list": (put("tokenizer_config.json", []), "tokenizer_config.json: holds list"),
    "a token that is a list": (put("tokenizer_config.json", {"bos_token": ["a"]}), "bos_token is ['a']"),
    "a map that is a list": (put("special_tokens_map.json", ["a"]), "special_tokens_map.json: holds list"),
    "a template that is a number": (put("tokenizer_config.json", {"chat_template": 3}), "chat_template is 3"),
    "a template that is wrong": (put("chat_template.jinja", b"{% if %}"), "failed: Expected an expression"),
    "a template with an unknown filter": (put("chat_template.jinja", b"{{ 1 | no }}"), "No filter named 'no'"),
    "a template that divides by zero": (put("chat_template.jinja", b"{{ 1 / 0 }}"), "failed: division by zero"),
    "a template of two files": (put("chat_template.jinja", b"{% include 'x' %}"), "failed: no loader for this"),
    "a template that asks too much of a name": (put("chat_template.jinja", b"{{ a.b.c }}"), "failed: 'a' is undefined"),
    "a template that calls itself": (
        put("chat_template.jinja", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "it calls itself too often"
    ),
    "a template that writes too much": (
        put("chat_template.jinja", b"{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"), "it writes more than"
    ),
    "a template that is not UTF-8": (put("chat_template.jinja", b"\xff"), "chat_template.jinja: is not UTF-8"),
    "an end token outside": (put("generation_config.json", {"eos_token_id": 300}), "eos_token_id is 300; expected"),
    "an end token of text": (put("generation_config.json", {"eos_token_id": "a"}), "eos_token_id is 'a'"),
    "a temperature of text": (
        put("generation_config.json", {"do_sample": True, "temperature": "hot"}), "temperature is 'hot'"
    ),
    "generation that is no JSON": (put("generation_config.json", b"\xff"), "is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_whose_bundle_could_not_be_opened(copied_checkpoint, tmp_path, fault, message, verify):
    fault(copied_checkpoint)
    steps = []
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        export_model(copied_checkpoint, tmp_path / "bundle", verify=verify, progress=lambda *step: steps.append(step))
    assert str(copied_checkpoint) in str(caught.value)
    assert str(caught.value).isprintable()
    assert steps == []  # before any work
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_without_a_tokenizer_says_how_to_get_one(copied_checkpoint, tmp_path, command):
    (copied_checkpoint / "tokenizer.json").unlink()
    assert _no_tokenizer(copied_checkpoint).startswith(
        "no tokenizer.json: the bundle takes token ids only; for text, put"
    )
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        (copied_checkpoint / name).write_bytes(b"x")
    bundle = tmp_path / "bundle"
    result = command("export", copied_checkpoint, bundle, "--no-verify")
    assert result.status == 0
    (note,) = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert "no tokenizer.json, but tokenizer.model, vocab.json, merges.txt: the bundle takes token ids only" in note
    program = shlex.split(note.partition("run: ")[2].removesuffix(", then export again"))
    assert program[:2] == ["python", "-c"]
    compile(program[2], "the note", "exec")
    assert repr(str(copied_checkpoint.resolve())) in program[2]

    assert command("generate", bundle, "--ids", "1,2", "--max-new-tokens", 2).status == 0
    said = command("generate", bundle, "--prompt", "a").error
    assert "no tokenizer; give token ids, or export a checkpoint that has a tokenizer.json" in said


def test_the_remedy_makes_a_tokenizer(tmp_path):
    """The command that the note gives, on the files of a byte-level tokenizer of before tokenizer.json."""
    from tests.helpers.generation import byte_alphabet

    vocab = {character: i for i, character in enumerate([*byte_alphabet(), "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    program = shlex.split(_no_tokenizer(tmp_path).partition("run: ")[2].removesuffix(", then export again"))
    subprocess.run([sys.executable, *program[1:]], check=True, capture_output=True)
    from gta_edge.formats.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("né")) == "né"


TEMPLATES = {
    "{{ raise_exception('never') }}": "refuses a chat of one message by the user: never",
    "{% if messages[0].role != 'system' %}{{ raise_exception('no \x1bsystem') }}{% endif %}": "no \\x1bsystem",
    "{{ raise_exception('') }}": "it gives no reason",
    "{{ raise_exception('a' * 9999) }}": "one message by the user: aaa",
    "{{ messages[0].content }}": None,
    "{{ messages[0].content + '!' }}{{ bos_token + eos_token }}": None,  # names that only the files give
    "{% for part in messages[0].content %}{{ part.text + '!' }}{% endfor %}": None,  # takes parts alone
}


@pytest.mark.parametrize(("template", "message"), TEMPLATES.items())
def test_a_template_that_may_be_right(copied_checkpoint, template, message):
    put("chat_template.jinja", template.encode())(copied_checkpoint)
    put("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})(copied_checkpoint)
    notes = check_text_files(copied_checkpoint, CONFIG.replace(vocab_size=10**6)).notes
    assert len(notes) == (message is not None)
    assert all(message in note and note.isprintable() and len(note) < 600 for note in notes)


def test_tokens_that_the_model_has_no_id_for(copied_checkpoint):
    byte_level(["<|a|>", "<|b|>"]).save(str(copied_checkpoint / "tokenizer.json"))
    put("tokenizer_config.json", {"eos_token": "<|end|>", "extra_special_tokens": ["<|c|>"]})(copied_checkpoint)
    config = json.loads((copied_checkpoint / "config.json").read_text())
    cases = {262: [], 261: ["'<|c|>'"], 260: ["'<|end|>', '<|c|>'"], 259: ["'<|end|>', '<|c|>'", "'<|b|>' (259)"]}
    for size, named in cases.items():
        put("config.json", {**config, "vocab_size": size})(copied_checkpoint)
        notes = check_text_files(copied_checkpoint, CONFIG.replace(vocab_size=size, eos_token_ids=())).notes
        assert len(notes) == len(named)
        assert all(each in note for each, note in zip(named, notes, strict=True))


def test_a_tokenizer_that_is_larger_than_the_model(copied_checkpoint, tmp_path, command):
    byte_level([f"<|{i}|>" for i in range(50)]).save(str(copied_checkpoint / "tokenizer.json"))
    put("tokenizer_config.json", {"additional_special_tokens": ["<|more|>"]})(copied_checkpoint)
    put("chat_template.jinja", b"{{ raise_exception('never') }}")(copied_checkpoint)
    result = command("export", copied_checkpoint, tmp_path / "bundle", "--no-verify")
    assert result.status == 0
    assert [line for line in result.err.splitlines() if line.startswith("note: ")] == [
        "note: the chat template refuses a chat of one message by the user: never",
        "note: the tokenizer's files name '<|more|>', which tokenizer.json lacks and the model's vocabulary of 300 has "
        "no room for: such text is ordinary text",
        "note: tokenizer.json has 8 tokens that the model's vocabulary of 300 lacks, '<|42|>' (300), '<|43|>' (301), "
        "'<|44|>' (302) ...: a prompt with one of them is refused",
    ]
    refused = command("generate", tmp_path / "bundle", "--prompt", "a<|42|>")
    assert "the prompt has token id 300; expected 0 to 299, the model's vocabulary" in refused.error
    (tmp_path / "text").write_text("abc<|42|>" * 9)
    for words in ["eval", tmp_path / "bundle"], ["bench", tmp_path / "bundle", "--backend", "onnxruntime"]:
        option = "--text" if words[0] == "eval" else "--prompt-file"
        assert "token id 300" in command(*words, option, tmp_path / "text").error
    assert command("generate", tmp_path / "bundle", "--prompt", "a<|more|>", "--max-new-tokens", 1).status == 0
    assert "failed: never" in command("generate", tmp_path / "bundle", "--prompt", "a", "--chat").error


@pytest.mark.parametrize("none", [-1, -7, [], [-1], [None], [None, -2]])
def test_end_tokens_that_are_none(copied_checkpoint, none):
    """The same in both files."""
    put("generation_config.json", {"eos_token_id": none})(copied_checkpoint)
    files = check_text_files(copied_checkpoint, CONFIG)
    assert files.generation.end_token_ids == frozenset()
    config = json.loads((copied_checkpoint / "config.json").read_text())
    put("config.json", {**config, "eos_token_id": none})(copied_checkpoint)
    assert read_config(copied_checkpoint / "config.json").eos_token_ids == ()


def test_files_that_are_sound_reach_the_session(copied_checkpoint, tmp_path):
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}
    tokenizer = json.loads((copied_checkpoint / "tokenizer.json").read_text())
    end = tokenizer["added_tokens"][0]["content"]
    put("tokenizer_config.json", {**settings, "eos_token": end})(copied_checkpoint)
    put("generation_config.json", {"eos_token_id": [1, -1], "do_sample": True, "temperature": 0.5, "top_k": None})(
        copied_checkpoint
    )
    export_model(copied_checkpoint, tmp_path / "bundle", verify=False)
    with gta_edge.load(tmp_path / "bundle", "onnxruntime") as session:
        assert session.end_token_ids == {1}
        assert session.chat_end_token_ids == {1, *session.config.eos_token_ids, tokenizer["added_tokens"][0]["id"]}
        assert session.chat_sampling == {"temperature": 0.5, "top_k": 50}
