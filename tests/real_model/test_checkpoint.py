"""The real model's checkpoint: what it is, and that transformers makes the same of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gta_edge.accuracy.reference import build_decoder, reference_logits
from gta_edge.formats.checkpoint import Checkpoint

pytestmark = pytest.mark.real_model


def test_it_is_what_its_makers_describe(smollm2: Path) -> None:
    checkpoint = Checkpoint.open(smollm2)
    config = checkpoint.config
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.rope_theta) == (49152, 8192, 100000.0)
    assert config.tie_word_embeddings
    assert config.parameters == 134_515_008
    assert {checkpoint.dtype_of(name) for name in checkpoint.names} == {"bfloat16"}
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_the_reference_has_the_logits_of_transformers(smollm2: Path, chat_ids: np.ndarray) -> None:
    checkpoint = Checkpoint.open(smollm2)
    own = reference_logits(
        build_decoder(checkpoint.config, ((n, checkpoint.read(n)) for n in checkpoint.names)), chat_ids
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    assert type(model) is LlamaForCausalLM
    with torch.inference_mode():
        theirs = model(torch.from_numpy(chat_ids)).logits.numpy()
    assert np.abs(own - theirs).max() < 1e-4 * theirs.std()  # 1e-5 here; what is ill-conditioned lies elsewhere
