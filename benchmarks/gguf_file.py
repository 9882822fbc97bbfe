"""A Llama checkpoint as the GGUF file that llama.cpp reads: the same weights in bf16, the norms in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt

from gta_edge.errors import CheckpointError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.model.architectures import LLAMA
from gta_edge.model.config import GQAConfig

__all__ = ["write_gguf"]


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; without a tokenizer, since everything here is given as ids.

    Raises:
        CheckpointError: it is no plain Llama model.
    """
    config = checkpoint.config
    plain = config.architecture == LLAMA.name and not checkpoint.biases and config.rope_scaling.rope_type == "default"
    if not isinstance(config, GQAConfig) or not plain:
        raise CheckpointError(
            f"{checkpoint.directory} is {config.architecture}",
            f"expected {LLAMA.name} without biases and RoPE scaling",
        )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in checkpoint.names:
        _add(writer, names.get_name(name, try_suffixes=(".weight",)), _ordered(name, checkpoint.read(name), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ordered(name: str, values: npt.NDArray[Any], config: GQAConfig) -> npt.NDArray[Any]:
    """Return a parameter as llama.cpp wants its rows."""
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f".{projection}." in name:
            return _interleaved(values, heads)
    return values


def _add(writer: gguf.GGUFWriter, name: str, values: npt.NDArray[Any]) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
        return
    raw = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).view(np.uint8)
    writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _interleaved(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Put the dimensions of a head that RoPE turns together, i and i + d/2, side by side."""
    width = len(weight) // heads
    order = np.arange(width).reshape(2, width // 2).T.ravel()  # 0, d/2, 1, d/2 + 1, …
    return weight.reshape(heads, width, -1)[:, order].reshape(weight.shape)
