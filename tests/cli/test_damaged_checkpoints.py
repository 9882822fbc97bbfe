"""Checkpoints that are damaged, through export: one line that says what, and nothing left behind."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import listing, run
from tests.helpers.pickles import Trap


def set_config(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def set_file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_bytes(content)

    return damage


def set_tensors(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def cut(fraction: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * fraction))

    return damage


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def pipe(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return damage


NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
HUGE = struct.pack("<Q", 2**62)
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "half": (cut(0.5), "model.safetensors"),
    "all but a byte": (cut(0.99999), "model.safetensors"),
    "empty": (cut(0), "is empty"),
    "header alone": (set_file("model.safetensors", struct.pack("<Q", 2) + b"{}"), "too few"),
    "huge header": (set_file("model.safetensors", HUGE + b"{}"), "no valid safetensors"),
    "text": (set_file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "no valid safetensors"),
    "pickle by another name": (set_file("model.safetensors", pickle.dumps(Trap())), "pickle"),
    "pickles only": (only_pickles, "pickle"),
    "no weights": (set_file("model.safetensors", None), "model.safetensors"),
    "weights are a pipe": (pipe("model.safetensors"), "not a regular file"),
    "config is a pipe": (pipe("config.json"), "not a regular file"),
    "tokenizer is a pipe": (pipe("tokenizer.json"), "not a regular file"),
    "no config": (set_file("config.json", None), "config.json"),
    "empty config": (set_file("config.json", b""), "not valid JSON"),
    "config is no JSON": (set_file("config.json", b"{'vocab_size': 3}"), "not valid JSON"),
    "config is no object": (set_file("config.json", b"[1, 2]"), "expected a JSON object"),
    "config is nested": (set_file("config.json", b"[" * 100_000), "not valid JSON"),
    "config is no text": (set_file("config.json", b"\xff\xfe\0"), "not valid JSON"),
    "text for a number": (set_config(hidden_size="96"), "hidden_size"),
    "a fraction": (set_config(vocab_size=300.5), "vocab_size"),
    "null": (set_config(num_hidden_layers=None), "num_hidden_layers"),
    "true": (set_config(num_attention_heads=True), "num_attention_heads"),
    "zero": (set_config(intermediate_size=0), "intermediate_size is 0"),
    "no heads": (set_config(num_attention_heads=0), "num_attention_heads is 0"),
    "negative": (set_config(num_key_heads=-1), "num_key_heads is -1"),
    "absurd": (set_config(num_hidden_layers=2**31 - 1), "too few"),
    "beyond absurd": (set_config(num_hidden_layers=2**62), "num_hidden_layers"),
    "absurd vocabulary": (set_config(vocab_size=2**31 - 1), "model.embed_tokens.weight"),
    "absurd length": (set_config(max_position_embeddings=2**62), "max_position_embeddings"),
    "not a number": (set_config(rope_theta=float("nan")), "rope_theta"),
    "heads that do not divide": (set_config(num_query_heads=5), "not a multiple"),
    "widths that do not fit": (set_config(hidden_size=100), "hidden_size"),
    "widths that differ": (set_config(query_dim=16), "query_dim"),
    "another architecture": (set_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "an end token outside": (set_config(eos_token_id=300), "eos_token_id"),
    "missing tensor": (set_tensors(lambda tensors: tensors.pop(NORM)), f"config.json asks for: {NORM}"),
    "surplus tensor": (set_tensors(lambda tensors: tensors.update(extra=tensors[NORM].copy())), "extra"),
    "misshapen tensor": (set_tensors(lambda tensors: tensors.update({NORM: tensors[NORM][:-1].copy()})), "[95]"),
    "transposed tensor": (set_tensors(lambda tensors: tensors.update({UP: tensors[UP].T.copy()})), "[96, 128]"),
    "another type": (set_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.float64)})), "F64"),
    "a layer too few": (set_config(num_hidden_layers=1), "model.layers.1"),
    "a layer too many": (set_config(num_hidden_layers=3), "model.layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint(failing: Callable[..., str], copied_checkpoint: Path, tmp_path: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(copied_checkpoint)
    assert expected in failing("export", copied_checkpoint, tmp_path / "out")
    assert expected in failing("inspect", copied_checkpoint)


def test_weights_that_are_not_finite(
    failing: Callable[..., str], copied_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[NORM][3] = float("nan")

    set_tensors(spoil)(copied_checkpoint)
    said = f"{NORM} holds nan at [3], 1 of 96 values are not finite"
    assert said in failing("export", copied_checkpoint, tmp_path / "out", "--no-verify")
    assert said in failing("verify", tiny_bundle, "--checkpoint", copied_checkpoint)


def test_weights_that_do_not_fit_a_precision(
    failing: Callable[..., str], copied_checkpoint: Path, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][0, 0] = 1e6

    set_tensors(enlarge)(copied_checkpoint)
    assert "65504" in failing("export", copied_checkpoint, tmp_path / "out", "--precision", "fp16")


def test_a_damaged_checkpoint_in_a_process_of_its_own(copied_checkpoint: Path, tmp_path: Path) -> None:
    cut(0.5)(copied_checkpoint)
    before = listing(tmp_path)
    assert "model.safetensors" in run("export", copied_checkpoint, tmp_path / "out").error
    assert listing(tmp_path) == before
