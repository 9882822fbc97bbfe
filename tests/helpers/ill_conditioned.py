"""A model of pocket size at one token of which no arithmetic in float32 is near the truth."""

from pathlib import Path

import numpy as np

from gta_edge.accuracy.probes import probes
from gta_edge.model.config import parse_config
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint


def ill_conditioned(directory: Path, *, leaves: float) -> np.ndarray:
    """Write a checkpoint whose first layer takes the first random token away but for a part; return the token."""
    entries = reference.gta_entries(vocab_size=300, max_position_embeddings=128)
    weights = reference.random_weights(entries)
    token = probes(parse_config(entries))[0].ids[0, :1]
    wide = {name: weight.astype(np.float64) for name, weight in weights.items()}
    eps, layer = entries["rms_norm_eps"], "model.layers.0"
    x = wide["model.embed_tokens.weight"][token[0]]
    normed = reference.rms_norm(x, wide[f"{layer}.input_layernorm.weight"], eps)
    tables = reference.tables_of(entries, entries["key_dim"], 1)
    x = x + reference.gta_attention(entries, wide, f"{layer}.self_attn", [normed], tables)[0]
    normed = reference.rms_norm(x, wide[f"{layer}.post_attention_layernorm.weight"], eps)
    gate, up = (reference.linear(wide, f"{layer}.mlp.{name}", normed) for name in ("gate_proj", "up_proj"))
    inner = gate * reference.sigmoid(gate) * up
    down = f"{layer}.mlp.down_proj.weight"
    change = (leaves - 1) * x - wide[down] @ inner
    weights[down] = (wide[down] + np.outer(change, inner) / (inner @ inner)).astype(np.float32)
    write_checkpoint(directory / "checkpoint", entries, weights)
    return token
