"""The model: config, rotary embedding, presets, and the decoder in PyTorch."""
