"""The real model from checkpoint to answer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gta_edge
from tests.helpers.commands import Result

pytestmark = pytest.mark.real_model

QUESTION = ("--chat", "--prompt", "What is the capital of France?", "--max-new-tokens", 24)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_it_answers(command: Callable[..., Result], precision: str, request: pytest.FixtureRequest) -> None:
    result = command("generate", request.getfixturevalue(f"{precision}_bundle"), *QUESTION, "--json")
    answer = json.loads(result.out)
    assert "Paris" in answer["text"]
    assert answer["finish_reason"] == "stop"  # at the end of its turn, and not of the tokens


def test_a_session_has_the_logits_of_transformers(smollm2: Path, fp32_bundle: Path, chat_ids: np.ndarray) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(chat_ids)).logits.numpy()
    with gta_edge.load(fp32_bundle, "onnxruntime") as session:
        prompt = session.forward(chat_ids[:, :-4], all_logits=True)
        steps = [session.forward(chat_ids[:, i : i + 1]) for i in range(chat_ids.shape[1] - 4, chat_ids.shape[1])]
    own = np.concatenate([prompt, np.stack(steps, axis=1)], axis=1)
    assert np.abs(own - theirs).max() < 1e-4 * theirs.std()
