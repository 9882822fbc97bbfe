"""The shipped model: small, real, and it has learned something."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest

import gta_edge
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.export.pipeline import export_model
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.model.config import GTAConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny-gta"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "bundle"
    result = export_model(TINY, directory)
    assert result.report is not None
    assert result.report.passed
    assert result.report.quantisation.max_abs_error == 0  # bf16 in, bf16 stored
    return directory


def test_it_is_what_is_promised() -> None:
    checkpoint = Checkpoint.open(TINY)
    config = checkpoint.config
    assert isinstance(config, GTAConfig)
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    assert {checkpoint.dtype_of(name) for name in checkpoint.names} == {"bfloat16"}
    assert config.num_attention_heads // config.num_query_heads >= 4
    assert (config.num_key_heads, config.num_latent_heads) == (1, 1)
    assert config.max_position_embeddings >= 1024
    assert "tokenizer.json" in {path.name for path in checkpoint.companions}


def test_it_predicts_python_it_has_not_seen(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    text = "\n".join(importlib.import_module("corpus").read(held_out=True))
    with gta_edge.load(bundle, "onnxruntime") as session:
        assert session.tokenizer is not None
        ids = np.array(session.tokenizer.encode(text[:60_000]))
        result = evaluate(session, ids)
    # a bigram model with the same tokens has a perplexity of 76 on the whole of this text
    assert result.perplexity < 25


PROMPTS = (
    "class Queue:",
    "class Error(Exception):",
    "def __init__(self, ",
    "def read(path):",
    "def _parse(value):",
    "if __name__ == '__main__':",
)


def test_completions_look_like_python(bundle: Path) -> None:
    """Each prompt is no Python by itself; most become some with what the model adds, but for the cut-off end."""
    valid = []
    with gta_edge.load(bundle, "onnxruntime") as session:
        for prompt in PROMPTS:
            with pytest.raises(SyntaxError):
                ast.parse(prompt)
            text = prompt + "".join(gta_edge.generate(session, prompt, max_new_tokens=80))
            lines = text.splitlines()
            valid.append(any(_statements("\n".join(lines[:stop])) >= 2 for stop in range(1, len(lines) + 1)))
    assert sum(valid) >= 4, valid


def _statements(source: str) -> int:
    try:
        return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))
    except SyntaxError:
        return 0


def test_a_long_text_ends_at_the_context(bundle: Path) -> None:
    with gta_edge.load(bundle, "onnxruntime") as session:
        generation = gta_edge.generate(session, "x = 1\n" * 200, max_new_tokens=2000, ignore_eos=True)
        text = "".join(generation)
        assert generation.finish_reason == "context"
        assert generation.prompt_tokens + len(generation.ids) == session.max_length + 1
        assert text == generation.text
