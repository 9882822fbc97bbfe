"""The comparison with llama.cpp: the file that it gets, what is refused, what the tables say. Nothing is compiled."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from gta_edge.errors import BackendError, CheckpointError, InputError
from gta_edge.formats.checkpoint import Checkpoint
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.gguf_files import llama_cpp_order, tensor_name

Script = Callable[[str], ModuleType]


def llama(directory: Path, **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a checkpoint in bf16; return its directory and weights."""
    entries = reference.llama_entries(heads=4, n_kv=2, d_h=16, rope_theta=100000.0, **{"vocab_size": 97, **changes})
    weights = reference.random_weights(entries)
    return directory, write_checkpoint(directory, entries, weights, "bfloat16")


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_the_same_weights(script: Script, tied: bool, tmp_path: Path) -> None:
    directory, weights = llama(tmp_path / "checkpoint", tie_word_embeddings=tied)
    script("gguf_file").write_gguf(Checkpoint.open(directory), tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert set(found) == {tensor_name(name) for name in weights}
    for name, values in weights.items():
        tensor = found[tensor_name(name)]
        expected = llama_cpp_order(name, values, heads=4, kv_heads=2)
        if values.ndim == 1:
            assert np.array_equal(tensor.data, expected)
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
            assert np.array_equal(tensor.data.view(ml_dtypes.bfloat16).astype(np.float32), expected), name


def test_the_file_describes_the_model(script: Script, tmp_path: Path) -> None:
    directory, _ = llama(tmp_path / "checkpoint")
    config = Checkpoint.open(directory).config
    script("gguf_file").write_gguf(Checkpoint.open(directory), tmp_path / "model.gguf")
    facts = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert facts["general.architecture"] == "llama"
    expected = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "rope.freq_base": 100000.0,
        "vocab_size": 97,
    }
    assert {name: facts[f"llama.{name}"] for name in expected} == expected
    assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_a_model_that_the_file_cannot_describe_is_refused(script: Script, tmp_path: Path) -> None:
    gta = reference.gta_entries()
    write_checkpoint(tmp_path / "gta", gta, reference.random_weights(gta))
    scaled, _ = llama(tmp_path / "scaled", rope_scaling={"rope_type": "linear", "factor": 2.0})
    biased = tmp_path / "biased"
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": np.ones(64, np.float32) for i in range(2)}
    entries = reference.llama_entries(attention_bias=True)
    write_checkpoint(biased, entries, reference.random_weights(entries) | bias)
    other, _ = llama(
        tmp_path / "other", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None
    )
    for directory in (tmp_path / "gta", scaled, biased, other):
        with pytest.raises(CheckpointError, match="expected LlamaForCausalLM without biases and RoPE scaling"):
            script("gguf_file").write_gguf(Checkpoint.open(directory), tmp_path / "model.gguf")


# --- the engine ------------------------------------------------------------------------------------------------------


def test_an_environment_that_cannot_be_built_gives_the_reason(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BackendError, match=r"No matching distribution found for llama-cpp-python.*environment\.log"):
        script("llama_cpp_engine").LlamaCpp.prepare(tmp_path / "environment")


def test_a_context_beyond_the_model_is_refused_before_anything_is_made(script: Script, tmp_path: Path) -> None:
    directory, _ = llama(tmp_path / "checkpoint")  # 64 positions
    main = script("llama_cpp")
    arguments = main.parse([str(directory), "--contexts", "16,60", "--work", str(tmp_path / "work")])
    with pytest.raises(InputError, match="93 positions and the model has 64"):
        main.run(arguments)
    assert not (tmp_path / "work").exists()


# --- the tables ------------------------------------------------------------------------------------------------------


def test_the_commands_in_the_tables_have_no_paths(script: Script) -> None:
    main = script("llama_cpp")
    arguments = main.parse(["--work", "/somewhere", "--environment", "/else", "--contexts", "8,4", "--threads", "1"])
    assert main._command(arguments) == (
        "python benchmarks/llama_cpp.py --contexts 4,8 --new-tokens 32 --rounds 5 --threads 1"
    )
    quality = script("llama_cpp_quality")
    arguments = quality.parse(["/some/model", "--exact", "--json", "/else/where"])
    assert quality._command(arguments) == (
        "python benchmarks/llama_cpp_quality.py model --tokens 8192 --window 512 --exact"
    )


def test_perplexity_rises_from_the_engines_own_base(script: Script) -> None:
    quality = script("llama_cpp_quality")
    rows = [
        quality._row(label, size, {"prose": np.log(perplexity)})
        for label, size, perplexity in [
            ("llama.cpp BF16", 2000, 10.0),
            ("llama.cpp Q4_0", 500, 12.0),
            ("gta-edge fp32", 2000, 20.0),
            ("gta-edge int4", 500, 21.0),
        ]
    ]
    document = {
        "rows": rows,
        "parameters": 1000,
        "model": "smollm2",
        "tokens": 64,
        "window": 8,
        "command": "python benchmarks/llama_cpp_quality.py",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": quality.machine(),
        "versions": {"onnxruntime": "1.2"},
        "peer_versions": {"llama-cpp-python": "0.3"},
    }
    text = quality.markdown(document)
    assert "| llama.cpp Q4_0 | 500 | 4.00 | 12.000 | +20.00% |" in text
    assert "| gta-edge int4 | 500 | 4.00 | 21.000 | +5.00% |" in text
    assert "| gta-edge fp32 | 2,000 | 16.00 | 20.000 |  |" in text
    for fact in ("python benchmarks/llama_cpp_quality.py", "2026-01-02", "llama-cpp-python 0.3", "64 tokens"):
        assert fact in text


def test_texts_for_calibration_are_not_those_that_are_predicted(script: Script) -> None:
    texts = script("texts")
    predicted, rest = texts.code(), texts.code(held_out=False)
    assert min(map(len, (texts.prose(), predicted, rest))) > 100_000
    start = predicted[:2000]
    assert "class" in predicted
    assert start not in rest
    assert start not in texts.prose()
