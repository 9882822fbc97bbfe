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
from gta_edge.export.pipeline import _no_tokenizer, export


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
        export(copied_checkpoint, tmp_path / "bundle", verify=verify, progress=lambda *step: steps.append(step))
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
    from tests.runtime.helpers_generation import byte_alphabet

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


def test_files_that_are_sound_reach_the_session(copied_checkpoint, tmp_path):
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}
    tokenizer = json.loads((copied_checkpoint / "tokenizer.json").read_text())
    end = tokenizer["added_tokens"][0]["content"]
    put("tokenizer_config.json", {**settings, "eos_token": end})(copied_checkpoint)
    put("generation_config.json", {"eos_token_id": [1, -1], "do_sample": True, "temperature": 0.5, "top_k": None})(
        copied_checkpoint
    )
    export(copied_checkpoint, tmp_path / "bundle", verify=False)
    with gta_edge.load(tmp_path / "bundle", "onnxruntime") as session:
        assert session.end_token_ids == {1}
        assert session.chat_end_token_ids == {1, *session.config.eos_token_ids, tokenizer["added_tokens"][0]["id"]}
        assert session.chat_sampling == {"temperature": 0.5, "top_k": 50}
