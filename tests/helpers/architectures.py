"""A small checkpoint of every architecture, as transformers writes it, with random weights that all matter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": True}),
    "Llama 3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 32}),
    "Llama, biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "Mistral": ("Mistral", {"sliding_window": None, "head_dim": 32, "num_key_value_heads": 1}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 16, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "Qwen3, biased": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "SmolLM3, biased": ("SmolLM3", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
}
"""By name: transformers' name, and entries of its config."""

IDS = np.random.default_rng(7).integers(0, SIZES["vocab_size"], (2, 12))


def model_of(name: str) -> transformers.PreTrainedModel:
    """Transformers' model, whose every tensor matters for the logits."""
    family, changes = CASES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter += 1
    return model


def entries_of(name: str, **changes: Any) -> dict[str, Any]:
    """The content of its config.json; ``...`` for entries to leave out."""
    model = model_of(name)
    entries = {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
    return {key: value for key, value in (entries | changes).items() if value is not ...}


def write(directory: Path, name: str) -> np.ndarray:
    """Write the checkpoint, and return transformers' logits [2, 12, V] of ``IDS``."""
    model = model_of(name)
    model.save_pretrained(directory)
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(IDS)).logits.numpy()
    return logits
