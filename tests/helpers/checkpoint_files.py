"""Small checkpoints on disk, whole or to be damaged."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gta_edge.errors import CheckpointError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.model.config import GQAConfig, GTAConfig

GTA = GTAConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=4,
    num_query_heads=2,
    num_key_heads=1,
    key_dim=4,
    num_latent_heads=1,
    latent_dim=4,
)
TIED = GTA.replace(tie_word_embeddings=True)
SMALLEST = GQAConfig(
    vocab_size=2,
    hidden_size=2,
    intermediate_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def random_tensors(config, dtype=ml_dtypes.bfloat16):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in config.parameter_shapes().items()}


def write_single(directory, config=GTA, tensors=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(random_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def write_shards(directory, config=GTA, shards=3):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = random_tensors(config)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: value for name, value in tensors.items() if weight_map[name] == shard}, directory / shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def read_index(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def split_header(path):
    """Return the header of a safetensors file, parsed, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def refused(directory, pattern):
    """Expect one line that says what is wrong."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        Checkpoint.open(directory)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    return str(caught.value)


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
