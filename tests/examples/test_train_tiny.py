"""The training script: its fused attention is the op's, and its text is split cleanly."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gta_edge.model.decoder import Decoder, empty_cache

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("train_tiny")
    for name in ("train_tiny", "corpus"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["gta", "gqa"])
def test_attention_for_training_is_the_op(examples: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    config = examples.make_config(kind).replace(num_hidden_layers=2, vocab_size=50)
    trained, exact = Decoder(config, attention=examples.attention), Decoder(config)
    for name, parameter in trained.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        exact.get_parameter(name).data.copy_(parameter)
    ids = torch.randint(50, (2, 40))
    nothing, positions = torch.zeros(2, dtype=torch.int64), torch.arange(40).expand(2, -1)
    with torch.no_grad():
        found, _ = trained(ids, nothing, positions, [(torch.empty(0), torch.empty(0))] * 2)
        expected, _ = exact(ids, nothing, positions, empty_cache(config, 2, 40))
    # queries, keys and latents are rounded to bfloat16, which keeps 8 bits
    assert (found - expected).abs().max() <= 0.05 * expected.std()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_a_draft_learns_what_the_shipped_model_expects(examples: ModuleType) -> None:
    torch.manual_seed(0)
    teacher = examples.load(EXAMPLES / "tiny-gta")
    config = examples.make_config("draft")
    assert config.weight_bytes + (EXAMPLES / "tiny-gta" / "tokenizer.json").stat().st_size < 2_000_000
    model = Decoder(config, attention=examples.attention)
    examples.initialise(model)
    examples.take_embedding(model, teacher)
    windows = torch.randint(config.vocab_size, (1, 9))
    with torch.no_grad():
        p, q = (examples.all_logits(each, windows[:, :-1]).double() for each in (teacher, model))
        divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        loss = examples.distillation(teacher)(model, windows)
        torch.testing.assert_close(loss.double(), divergence, rtol=1e-4, atol=0)
        assert examples.distillation(teacher)(teacher, windows).abs().max() < 1e-4
        rejected = [
            1 - sum(min(float(a), float(b)) for a, b in zip(row, other, strict=True))
            for row, other in zip((p / 0.8).softmax(-1), (q / 0.8).softmax(-1), strict=True)
        ]
        found = examples.disagreement(teacher, 0.8)(model, windows)
        torch.testing.assert_close(found.double(), torch.tensor(rejected, dtype=torch.float64), rtol=1e-4, atol=0)
        assert set(examples.disagreement(teacher, 0.0)(teacher, windows).tolist()) == {0.0}
    examples.distillation(teacher)(model, windows).mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_both_models_have_one_size(examples: ModuleType) -> None:
    gta, gqa = examples.make_config("gta"), examples.make_config("gqa")
    assert abs(gta.parameters - gqa.parameters) < 0.02 * gqa.parameters
    assert gta.cache_values_per_token_per_layer < 0.4 * gqa.cache_values_per_token_per_layer


def test_held_out_modules_are_held_out(examples: ModuleType) -> None:
    corpus = importlib.import_module("corpus")
    training, held_out = corpus.read(held_out=False), corpus.read(held_out=True)
    assert len(held_out) > 20
    assert not set(training) & set(held_out)
    assert sum(map(len, training)) > 10 * sum(map(len, held_out))


def test_tokenizer_holds_any_text(examples: ModuleType) -> None:
    tokenizer = examples.train_tokenizer(["def f(x):\n    return x\n"] * 10)
    for text in ("x = 1\n\n\tpass", "naïve 数 🙂", "\x00\x7f", "a" * 100):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
