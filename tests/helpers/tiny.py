"""The smallest model that tests share."""

from gta_edge.model.presets import preset

TINY = preset("gta1-160m").replace(
    num_hidden_layers=2,
    hidden_size=96,
    num_attention_heads=12,
    head_dim=8,
    key_dim=8,
    latent_dim=16,
    intermediate_size=128,
    vocab_size=300,
    max_position_embeddings=128,
)
"""The smallest preset with its head ratios, and all else as small as it gets."""
