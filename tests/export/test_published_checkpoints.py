"""Checkpoints as other programs write them, from the files to logits in ONNX Runtime, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from gta_edge.export.pipeline import export_model
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported_graphs import TOLERANCE, empty_feeds, exact_logits, run

IDS = np.random.default_rng(0).integers(0, 97, (1, 24))
SMALL = {"vocab_size": 97, "max_position_embeddings": 48}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def exported_logits(checkpoint: Path) -> np.ndarray:
    """Logits [1, T, V] of the checkpoint's fp32 bundle in plain ONNX Runtime: a prompt, and tokens after it."""
    bundle = export_model(checkpoint, checkpoint.with_name("bundle"), precision="fp32", verify=False).bundle
    session = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    feeds = empty_feeds(session, 1, IDS.shape[1])
    bounds = [(0, 16), *((i, i + 1) for i in range(16, IDS.shape[1]))]
    return np.concatenate([run(session, feeds, IDS[:, a:b], np.array([a])) for a, b in bounds], axis=1)


def transformers_logits(checkpoint: Path) -> np.ndarray:
    """What transformers makes of the same files."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert type(model) is LlamaForCausalLM
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


def llama(directory: Path, **changes: Any) -> LlamaForCausalLM:
    entries = reference.llama_entries(**{**SMALL, **changes})
    model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(entries)))).eval()
    weights = {name: torch.from_numpy(values) for name, values in reference.random_weights(entries).items()}
    model.load_state_dict(weights, strict=False)
    directory.mkdir()
    return model


def in_shards(directory: Path) -> None:
    llama(directory, tie_word_embeddings=False, rope_scaling=YARN).save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 2


def without_head(directory: Path) -> None:
    model = llama(directory, rope_theta=500.0)
    model.model.save_pretrained(directory)
    assert "embed_tokens.weight" in load_file(directory / "model.safetensors")


def with_only_the_head(directory: Path) -> None:
    model = llama(directory)
    save_model(model, directory / "model.safetensors")
    model.config.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in weights) != ("model.embed_tokens.weight" in weights)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight", weights.get("lm_head.weight"))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def of_an_old_release(directory: Path) -> None:
    entries = reference.llama_entries(**SMALL)
    for key in ("head_dim", "attention_bias", "mlp_bias", "num_key_value_heads", "rope_theta"):
        entries.pop(key, None)
    entries |= {
        "architectures": ["LLaMAForCausalLM"],
        "hidden_act": "swish",
        "eos_token_id": -1,
        "bos_token_id": -1,
        "pad_token_id": -1,
        "pretraining_tp": 2,
        "rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 24, "finetuned": False},
        "transformers_version": "4.27.0.dev0",
    }
    weights = reference.random_weights({**entries, "num_key_value_heads": 4})
    wrong = np.full(8, 0.5, np.float32)  # no release that ignores them looks at their values
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": wrong for i in range(2)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("write", [in_shards, without_head, with_only_the_head, of_an_old_release])
def test_a_llama_checkpoint_gives_the_logits_that_transformers_gives_it(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    write(checkpoint)
    expected = transformers_logits(checkpoint)
    assert np.abs(exported_logits(checkpoint) - expected).max() < TOLERANCE * expected.std()


def test_a_gta_checkpoint_with_only_the_head(tmp_path: Path) -> None:
    entries = reference.gta_entries(e=2, **SMALL)
    checkpoint = tmp_path / "checkpoint"
    weights = write_checkpoint(checkpoint, entries, reference.random_weights(entries), "bfloat16")
    stored = load_file(checkpoint / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    stored["model.layers.0.self_attn.o_proj.bias"] = np.zeros(entries["hidden_size"], ml_dtypes.bfloat16)
    save_file(stored, checkpoint / "model.safetensors")
    expected = exact_logits(entries, weights, IDS)
    assert np.abs(exported_logits(checkpoint) - expected).max() < TOLERANCE * expected.std()
