"""Tables of rotary embeddings by the formula."""

import numpy as np
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def scaled_tables(entries: dict, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables for a scaled rotation from transformers' frequencies."""
    config = LlamaConfig(
        hidden_size=2 * entries["key_dim"],
        num_attention_heads=2,
        max_position_embeddings=entries["max_position_embeddings"],
        rope_theta=entries["rope_theta"],
        rope_scaling=dict(entries["rope_scaling"]),
    )
    rotary = LlamaRotaryEmbedding(config)
    angles = np.arange(length)[:, None] * rotary.inv_freq.double().numpy()
    return np.cos(angles) * rotary.attention_scaling, np.sin(angles) * rotary.attention_scaling
