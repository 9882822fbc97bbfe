"""Text that a model writes itself: what it is, when an export is calibrated with it, and what it is good for."""

import importlib
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gta_edge
from gta_edge.errors import CapacityError, ExportError, InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.export import calibration_choice, own_text
from gta_edge.export.calibration_choice import Calibration, choose_calibration
from gta_edge.export.pipeline import export_model
from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import read_stored
from gta_edge.model.presets import preset
from gta_edge.numerics.quantization import QuantizedMatrix, quantize
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exports import export_refused

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_GTA = EXAMPLES / "tiny-gta"
CONTEXT = 20
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=2, d_l=32, e=1, vocab_size=40, max_position_embeddings=CONTEXT),
    "gqa": reference.llama_entries(vocab_size=40, max_position_embeddings=CONTEXT),
}


def learned(directory: Path, tokenizer: Path, entries: dict[str, Any] | None = None) -> Path:
    """A checkpoint as one that was trained: with a tokenizer, and not made by ``init``."""
    entries = entries or {**MODELS["gta"], "vocab_size": 300}
    write_checkpoint(directory, entries, reference.random_weights(entries))
    shutil.copy(tokenizer / "tokenizer.json", directory)
    return directory


def stored(bundle: Path) -> dict[str, QuantizedMatrix]:
    opened = Bundle.open(bundle)
    found = read_stored(opened.model_path, opened.config)
    return {name: each for name, each in found if isinstance(each, QuantizedMatrix)}


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_drawn_as_the_model_predicts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "_SEQUENCES", 200)
    entries = MODELS[name]
    sharp = {key: 8 * value if value.ndim == 2 else value for key, value in reference.random_weights(entries).items()}
    weights = write_checkpoint(tmp_path / "checkpoint", entries, sharp)  # or every token would be as likely
    source = Checkpoint.open(tmp_path / "checkpoint")
    ids = own_text.own_text(source)
    assert ids.shape == (200, CONTEXT)
    assert ids.dtype == np.int64
    formula = reference.gta_logits if name == "gta" else reference.llama_logits
    logits = np.stack([formula(entries, weights, row) for row in ids])[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    chances = np.exp(shifted)
    chances /= chances.sum(-1, keepdims=True)
    given = np.take_along_axis(chances, ids[:, 1:, None], -1)
    # a drawn token's probability is in the mean what the distributions say, sum of p^2, and far from one in 40
    expected, spread = (chances**2).sum(-1).mean(), given.std() / np.sqrt(given.size)
    assert abs(given.mean() - expected) < 5 * spread
    assert expected > 3 / 40
    # and so by token
    counts, sums = np.bincount(ids[:, 1:].flat, minlength=40), chances.sum((0, 1))
    assert (np.abs(counts - sums) < 6 * np.sqrt(sums + 1)).all()


def test_it_is_the_same_each_time_and_begins_with_any_token(tmp_path: Path) -> None:
    entries = {**MODELS["gta"], "bos_token_id": 3, "eos_token_id": [5, 7]}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    source = Checkpoint.open(tmp_path / "checkpoint")
    told: list[tuple[str, int, int]] = []
    ids = own_text.own_text(source, lambda *step: told.append(step))
    np.testing.assert_array_equal(own_text.own_text(source), ids)
    assert len(set(ids[:, 0].tolist())) > 15
    assert not {3, 5, 7} & set(ids[:, 0].tolist())
    assert {what for what, _, _ in told} == {"writing a text to calibrate with"}
    assert [done for _, done, _ in told] == list(range(CONTEXT))
    assert told[-1][2] == CONTEXT - 1


def test_a_vocabulary_of_special_tokens_alone(tmp_path: Path) -> None:
    entries = {**MODELS["gqa"], "vocab_size": 2, "bos_token_id": 0, "eos_token_id": 1}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    assert set(own_text.own_text(Checkpoint.open(tmp_path / "checkpoint")).flat) <= {0, 1}


def test_larger_models_write_less() -> None:
    small, large = preset("gta1-160m"), preset("gta-1b")
    sizes = {}
    for config, layers in product((small, large), (4, 24, 200)):
        rows, tokens = own_text.shape_for(config.replace(num_hidden_layers=layers))
        assert tokens == 256
        assert 8 <= rows <= 32
        sizes[config.replace(num_hidden_layers=layers).parameters] = rows
    by_size = [sizes[parameters] for parameters in sorted(sizes)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[0] == 32
    assert by_size[-1] == 8
    assert own_text.shape_for(small.replace(max_position_embeddings=10))[1] == 10


def test_a_model_that_predicts_no_numbers(tmp_path: Path) -> None:
    entries = MODELS["gta"]
    weights = reference.random_weights(entries)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], 3e38)
    write_checkpoint(tmp_path / "checkpoint", entries, weights)
    said = export_refused(tmp_path / "checkpoint", ExportError, precision="int4", calibrate="self", verify=False)
    assert said == "what the model makes of its own text is not finite; check the weights, or export with " + (
        "--calibrate none"
    )


# --- when ------------------------------------------------------------------------------------------------------------


def chosen(checkpoint: Path, precision: str = "int4", asked: str | Path | None = None) -> Calibration:
    return choose_calibration(Checkpoint.open(checkpoint), precision, asked, in_integers=False)


def test_int4_is_calibrated_with_it_unless_there_is_nothing_to_preserve(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    assert chosen(checkpoint) == Calibration("self")
    assert chosen(TINY_GTA) == Calibration("self")
    for precision in ("int8", "fp16", "bf16", "fp32"):
        assert chosen(checkpoint, precision) == Calibration(None)
    for precision in ("int4", "int8", "fp32"):
        assert chosen(checkpoint, precision, "none") == Calibration(None)
    assert chosen(checkpoint, "int8", "self") == Calibration("self")
    assert chosen(checkpoint, "int8", "text") == Calibration(Path("text"))
    assert chosen(tiny_checkpoint) == Calibration(None)  # made by init
    assert chosen(tiny_checkpoint, asked="self") == Calibration("self")
    monkeypatch.setattr(calibration_choice, "_MAX_PARAMETERS", 1000)
    large = chosen(checkpoint)
    assert not large
    assert large.note is not None
    assert "billion parameters takes long" in large.note
    assert chosen(checkpoint, asked="self") == Calibration("self")
    (checkpoint / "tokenizer.json").unlink()
    assert chosen(checkpoint) == Calibration(None)


@pytest.mark.parametrize("record", ["{}", "[]", "no JSON", '{"weights": ["random"]}'])
def test_a_record_that_says_nothing_of_the_weights(record: str, copied_checkpoint: Path) -> None:
    (copied_checkpoint / "gta_edge_checkpoint.json").write_text(record)
    assert chosen(copied_checkpoint) == Calibration("self")


def test_without_memory_for_the_model(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    monkeypatch.setattr("gta_edge.support.memory.reachable_bytes", lambda: 1000)
    default = chosen(checkpoint)
    assert not default
    assert default.note is not None
    assert "no memory for the whole model" in default.note
    with pytest.raises(CapacityError, match=r"^writing a text to calibrate with .*give --calibrate FILE, which takes"):
        chosen(checkpoint, asked="self")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", None])
def test_only_integers_are_calibrated_with_it(precision: str | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    said = export_refused(checkpoint, InputError, precision=precision, calibrate="self")
    assert said == f"precision is {precision or 'fp32'}, which is not calibrated; calibrate int8 or int4"


# --- what it is for --------------------------------------------------------------------------------------------------


def test_an_export_by_default(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    options: dict[str, dict[str, Any]] = {"default": {}, "self": {"calibrate": "self"}, "none": {"calibrate": "none"}}
    found = {}
    for name, chosen_options in options.items():
        result = export_model(checkpoint, tmp_path / name, precision="int4", verify=name == "default", **chosen_options)
        assert result.report is None or result.report.passed
        found[name] = stored(tmp_path / name)
    source = Checkpoint.open(checkpoint)
    moved = 0
    for name, matrix in found["default"].items():
        np.testing.assert_array_equal(matrix.codes, found["self"][name].codes)
        np.testing.assert_array_equal(matrix.scales, found["self"][name].scales)
        plain = quantize(source.read(name), matrix.bits, matrix.block_size or None)
        np.testing.assert_array_equal(found["none"][name].codes, plain.codes)
        moved += int((matrix.codes != plain.codes).sum())
    assert moved > 0


@pytest.mark.parametrize("factor", [1.01, 0.98])
def test_a_matrix_that_is_not_written_as_it_was_calibrated_is_found(
    factor: float, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    right = Quantizer.__call__

    def wrong(self: Quantizer, asked: str) -> QuantizedMatrix:
        found = right(self, asked)
        return replace(found, scales=(found.scales * factor).astype(np.float16)) if asked == name else found

    monkeypatch.setattr(Quantizer, "__call__", wrong)
    with pytest.raises(ExportError, match=rf"\({name} is not stored as it was calibrated"):
        export_model(checkpoint, tmp_path / "bundle", precision="int4")


@pytest.mark.parametrize("step", ["writing a text to calibrate with", "calibrating"])
def test_an_interrupted_export_leaves_nothing(step: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = learned(tmp_path / "checkpoint", tiny_checkpoint)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(what: str, done: int, _: int) -> None:
        if what == step and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint, tmp_path / "bundle", precision="int4", progress=interrupt)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_example_model_predicts_better_than_rounded_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    everything = "\n".join(importlib.import_module("corpus").read(held_out=True))
    step = len(everything) // 20
    held_out = "\n".join(everything[i * step : i * step + 1000] for i in range(20))
    perplexity = {}
    options: dict[str, str]
    for name, options in {"none": {"calibrate": "none"}, "self": {}}.items():
        export_model(TINY_GTA, tmp_path / name, precision="int4", verify=False, **options)
        with gta_edge.load(tmp_path / name, "onnxruntime") as session:
            assert session.tokenizer is not None
            perplexity[name] = evaluate(session, np.array(session.tokenizer.encode(held_out))).perplexity
    assert perplexity["self"] < 0.995 * perplexity["none"], perplexity
