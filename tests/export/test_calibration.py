"""GPTQ against the elimination it comes from, in float64; and which inputs each matrix is calibrated for."""

import importlib
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gta_edge
from gta_edge.errors import CheckpointError, ExportError, InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.export import gptq
from gta_edge.export.calibration import calibrated, calibration_ids
from gta_edge.export.gptq import Moments, corrected
from gta_edge.export.pipeline import export_model
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import Storage
from gta_edge.numerics.quantization import BLOCK_SIZES, QuantizedMatrix, quantize
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exports import export_refused

EXAMPLES = Path(__file__).parents[2] / "examples"
RANGES = {8: (-127, 127), 4: (-8, 7)}  # of quantised weights
DAMPING = 0.01  # of the mean diagonal, as in the paper


def rounded(
    weight: np.ndarray, inputs: np.ndarray, bits: int, block_size: int | None, sweeps: int | None = None
) -> QuantizedMatrix:
    """What the code under test makes of ``weight`` for ``inputs``, given as numpy arrays."""
    x = torch.from_numpy(inputs.astype(np.float32))
    matrix = torch.from_numpy(np.asarray(weight, np.float32))
    return corrected(matrix, Moments(x.T @ x), bits, block_size, sweeps)


def damped(inputs: np.ndarray) -> np.ndarray:
    moments = inputs.astype(np.float64).T @ inputs.astype(np.float64)
    return moments + DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))


def eliminated(weight: np.ndarray, inputs: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The codes of GPTQ for given scales, straight from its derivation.

    One input after the other is rounded and leaves the problem, blocks of more energy first, and stronger inputs of a
    block: the best correction of those that are left follows from the inverse of their X^T X, made afresh each time.
    """
    lowest, highest = RANGES[bits]
    size = weight.shape[1] // scales.shape[1]
    moments = damped(inputs)
    energy = np.diag(moments)
    blocks = sorted(range(scales.shape[1]), key=lambda b: -energy[b * size : (b + 1) * size].sum())
    order = [j for b in blocks for j in sorted(range(b * size, (b + 1) * size), key=lambda j: -energy[j])]
    left, codes = weight.astype(np.float64), np.empty(weight.shape, np.int8)
    for done, j in enumerate(order):
        rest = order[done:]
        inverse = np.linalg.inv(moments[np.ix_(rest, rest)])
        scale = scales[:, j // size].astype(np.float64)
        codes[:, j] = np.clip(np.rint(left[:, j] / scale), lowest, highest)
        error = left[:, j] - codes[:, j] * scale
        left[:, rest] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


def correlated(rng: np.random.Generator, rows: int, inputs: int) -> np.ndarray:
    """Inputs that mostly lie in a few directions, as activations do."""
    directions = rng.standard_normal((max(2, inputs // 4), inputs))
    return rng.standard_normal((rows, len(directions))) @ directions + 0.3 * rng.standard_normal((rows, inputs))


def output_error(weight: np.ndarray, quantized: QuantizedMatrix, inputs: np.ndarray) -> float:
    return float(((inputs @ (weight.astype(np.float64) - quantized.values).T) ** 2).sum())


def loss(weight: np.ndarray, quantized: QuantizedMatrix, inputs: np.ndarray) -> np.ndarray:
    """What is made small, of each row: the error of outputs, and the damping's share."""
    error = weight.astype(np.float64) - quantized.values
    return np.einsum("ij,jk,ik->i", error, damped(inputs), error)


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float((found == expected).mean())


# --- the rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "inputs", "block_size"),
    [(4, 64, 16), (4, 160, 32), (4, 192, 64), (4, 256, 128), (8, 64, 32), (8, 72, None), (8, 200, None)],
)
def test_codes_are_those_of_the_derivation(bits: int, inputs: int, block_size: int | None) -> None:
    rng = np.random.default_rng(inputs)
    x, weight = correlated(rng, 2 * inputs, inputs), rng.standard_normal((40, inputs)).astype(np.float32)
    kept = weight.copy()
    found = rounded(weight, x, bits, block_size, sweeps=0)
    np.testing.assert_array_equal(weight, kept)
    assert found.scales.shape == (40, inputs // (block_size or inputs))
    expected = eliminated(weight, x, found.scales, bits)
    assert agreement(found.codes, expected) >= 0.99  # float32 may round a tie the other way
    plain = quantize(weight, bits, block_size)
    assert agreement(found.codes, plain.codes) < 0.95  # which would not do


@pytest.mark.parametrize("block_size", [32, 64])
def test_scales_are_for_what_corrections_made_of_the_block(block_size: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = correlated(rng, 400, 192), rng.standard_normal((30, 192)).astype(np.float32)
    first = 192 - block_size
    x[:, first:] *= 0.1 * rng.uniform(1, 3, block_size)  # the last block in the order of energy too
    found = rounded(weight, x, 4, block_size, sweeps=0)
    # what reaches the last block: the error of all others, corrected for as well as it can be
    moments = damped(x)
    own = moments[first:, first:]
    error = weight[:, :first].astype(np.float64) - found.values[:, :first]
    block = weight[:, first:] + error @ moments[:first, first:] @ np.linalg.inv(own)
    # an error of each input weighs what is left of it when those behind it have made up for it
    order = np.argsort(-np.diag(own), kind="stable")
    importance = np.empty(block_size)
    for done, j in enumerate(order):
        importance[j] = 1 / np.linalg.inv(own[np.ix_(order[done:], order[done:])])[0, 0]

    def errors(scales: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(block / scales), -8, 7)
        return (importance * (block - codes * scales) ** 2).sum(1)

    widest = np.abs(block).max(1, keepdims=True)
    least = np.min([errors(fraction * widest / 7) for fraction in np.linspace(0.5, 1.2, 500)], axis=0)
    plain = errors(quantize(weight[:, first:], 4, block_size).scales.astype(np.float64))
    chosen = errors(found.scales[:, -1:].astype(np.float64))
    assert chosen.sum() <= 1.04 * least.sum() < 1.04 * plain.sum() / 1.2


@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (4, 128), (8, None), (8, 32)])
def test_inputs_that_have_nothing_in_common_leave_plain_rounding(bits: int, block_size: int | None) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((33, 256)).astype(np.float32)
    found = corrected(torch.from_numpy(weight), Moments(torch.eye(256)), bits, block_size, sweeps=0)
    plain = quantize(weight, bits, block_size)
    assert agreement(found.codes, plain.codes) >= 0.999
    np.testing.assert_allclose(found.scales.astype(np.float32), plain.scales.astype(np.float32), rtol=1e-3)
    unequal = Moments(torch.from_numpy(np.diag(rng.uniform(0.1, 10, 256)).astype(np.float32)))
    found = corrected(torch.from_numpy(weight), unequal, bits, block_size)
    scales = np.repeat(found.scales.astype(np.float32), block_size or 256, axis=1)
    nearest = np.clip(np.rint(weight / scales), *RANGES[bits])
    assert agreement(found.codes, nearest) >= 0.999


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([*BLOCK_SIZES, None]), st.integers(1, 3), st.integers(0, 2**32))
def test_outputs_come_closer_than_by_plain_rounding(bits: int, block_size: int | None, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = (block_size or 48) * blocks
    x, weight = correlated(rng, 3 * inputs, inputs), rng.standard_normal((24, inputs)).astype(np.float32)
    found = rounded(weight, x, bits, block_size)
    lowest, highest = RANGES[bits]
    assert lowest <= found.codes.min() <= found.codes.max() <= highest
    assert (found.scales > 0).all()
    plain = quantize(weight, bits, block_size)
    assert output_error(weight, found, x) < 0.9 * output_error(weight, plain, x)
    errors = [loss(weight, rounded(weight, x, bits, block_size, sweeps), x) for sweeps in range(4)]
    for before, after in pairwise([loss(weight, plain, x), *errors]):
        assert (after <= before * (1 + 1e-4)).all()  # of each row


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES), st.integers(0, 2**32))
def test_a_matrix_that_codes_can_say_is_returned(bits: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lowest, highest = RANGES[bits]
    codes = rng.integers(lowest, highest + 1, (12, 2 * size)).astype(np.int8)
    codes[:, ::size] = highest
    exact = QuantizedMatrix(codes, rng.uniform(0.01, 0.2, (12, 2)).astype(np.float16), bits, size)
    found = rounded(exact.values, correlated(rng, 50, 2 * size), bits, size)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, exact.scales)


@pytest.mark.parametrize("rows", [200, 5, 1, 0], ids=["many tokens", "few tokens", "one token", "nothing at all"])
def test_inputs_that_are_never_used(rows: int) -> None:
    rng = np.random.default_rng(2)
    x, weight = correlated(rng, rows, 64), rng.standard_normal((20, 64)).astype(np.float32)
    unused = [0, 17, 31, 32, 63]
    x[:, unused] = 0
    found = rounded(weight, x, 4, 32)
    assert np.isfinite(found.values).all()
    # nothing can be made up for by them, and they change nothing
    scales = found.scales[:, np.array(unused) // 32].astype(np.float32)
    np.testing.assert_array_equal(found.codes[:, unused], np.clip(np.rint(weight[:, unused] / scales), -8, 7))
    if rows:
        assert output_error(weight, found, x) < output_error(weight, quantize(weight, 4, 32), x)
    else:
        assert agreement(found.codes, quantize(weight, 4, 32).codes) >= 0.995


def test_rows_are_rounded_each_by_itself() -> None:
    rng = np.random.default_rng(3)
    x = correlated(rng, 40, 16)
    weight = rng.standard_normal((9000, 16)).astype(np.float32)  # more than are rounded at once
    together = rounded(weight, x, 4, 16)
    assert together.codes.shape == weight.shape
    for part in (slice(0, 700), slice(8000, 9000)):
        alone = rounded(weight[part], x, 4, 16)
        assert agreement(together.codes[part], alone.codes) > 0.999
        assert agreement(together.scales[part], alone.scales) > 0.999


# --- which inputs ----------------------------------------------------------------------------------------------------

CONTEXT, TEXT_ROWS = 12, 5
TEXT = "Größen: a layer gets what the quantised ones below it give"[:58]  # 60 bytes
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=2, d_l=32, e=1, vocab_size=300, max_position_embeddings=CONTEXT),
    "untied": reference.gta_entries(
        heads=4, n_q=2, d_l=32, e=1, vocab_size=300, max_position_embeddings=CONTEXT, tie_word_embeddings=False
    ),
    "baseline": reference.llama_entries(vocab_size=300, max_position_embeddings=CONTEXT),
}


def random_checkpoint(directory: Path, entries: dict[str, Any], tokenizer: Path) -> dict[str, np.ndarray]:
    weights = write_checkpoint(directory, entries, reference.random_weights(entries))
    shutil.copy(tokenizer / "tokenizer.json", directory)
    return weights


class Calibrated:
    """A calibrated model; and the inputs of its matrices by the formula, in float64."""

    def __init__(self, name: str, directory: Path, tokenizer: Path, bits: int, block_size: int | None) -> None:
        self.entries, self.bits, self.block_size = MODELS[name], bits, block_size
        self.weights = random_checkpoint(directory / "checkpoint", self.entries, tokenizer)
        (directory / "text").write_text(TEXT, encoding="utf-8")
        source = Checkpoint.open(directory / "checkpoint")
        ids = calibration_ids(source, directory / "text")
        self.found = calibrated(source, ids, Storage(f"int{bits}", block_size))
        encoded = list(TEXT.encode())
        assert len(encoded) == CONTEXT * TEXT_ROWS  # rows then follow each other
        self.ids = np.array(encoded).reshape(TEXT_ROWS, CONTEXT)
        table = quantize(self.weights["model.embed_tokens.weight"], bits, block_size).values
        self.now = {**self.weights, "model.embed_tokens.weight": table}  # what is quantised so far

    def _run(self, layers: int, norm: str, **changes: np.ndarray) -> np.ndarray:
        """The output of ``layers`` layers after a norm, [N, H]: the model's logits with a head that does nothing."""
        formula = reference.gta_logits if "num_query_heads" in self.entries else reference.llama_logits
        nothing = np.eye(self.entries["hidden_size"])
        weights = {**self.now, **changes, "model.norm.weight": self.weights[norm], "lm_head.weight": nothing}
        return np.concatenate(
            [formula({**self.entries, "num_hidden_layers": layers}, weights, row) for row in self.ids]
        )

    def inputs(self, layer: int) -> dict[str, np.ndarray]:
        """What each matrix of a layer multiplies, those below it quantised already."""
        prefix = f"model.layers.{layer}."
        attention = self._run(layer, f"{prefix}input_layernorm.weight")
        silent = {f"{prefix}mlp.down_proj.weight": np.zeros_like(self.weights[f"{prefix}mlp.down_proj.weight"])}
        mlp = self._run(layer + 1, f"{prefix}post_attention_layernorm.weight", **silent)
        inner = {n: self.weights[f"{prefix}mlp.{n}_proj.weight"].astype(np.float64) for n in ("gate", "up")}
        gate, up = mlp @ inner["gate"].T, mlp @ inner["up"].T
        found = dict.fromkeys([f"self_attn.{n}_proj" for n in "qkvg"], attention)
        found |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": gate * reference.sigmoid(gate) * up}
        return found | {"self_attn.o_proj": self._mixed(layer, attention)}

    def _mixed(self, layer: int, attention: np.ndarray) -> np.ndarray:
        """What the attention gives to its output projection."""
        name = f"model.layers.{layer}.self_attn"
        gta = "num_query_heads" in self.entries
        block = reference.gta_attention if gta else reference.llama_attention
        width = self.entries["key_dim" if gta else "head_dim"]
        weights = {n: w.astype(np.float64) for n, w in self.weights.items()}
        weights[f"{name}.o_proj.weight"] = np.eye(self.entries["hidden_size"])
        tables = reference.tables_of(self.entries, width, CONTEXT)
        rows = attention.reshape(TEXT_ROWS, CONTEXT, -1)
        return np.concatenate([np.stack(block(self.entries, weights, name, list(row), tables)) for row in rows])

    def check(self, name: str, inputs: np.ndarray) -> None:
        """A matrix is rounded for these inputs and no others."""
        codes = self.found.pop(name)
        expected = eliminated(self.weights[name], inputs, codes.scales, self.bits)
        assert agreement(codes.codes, expected) >= 0.99, name
        self.now[name] = codes.values


@pytest.mark.parametrize(
    ("name", "bits", "block_size"), [("gta", 4, 16), ("gta", 8, None), ("untied", 4, 32), ("baseline", 4, 32)]
)
def test_every_matrix_is_calibrated_for_its_own_inputs(
    name: str,
    bits: int,
    block_size: int | None,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptq, "_SWEEPS", {4: 0, 8: 0})  # the derivation ends before them
    model = Calibrated(name, tmp_path, tiny_checkpoint, bits, block_size)
    quantised = set(model.found)
    layers = range(model.entries["num_hidden_layers"])
    for layer in layers:
        inputs = model.inputs(layer)
        for matrix, x in inputs.items():
            if (full := f"model.layers.{layer}.{matrix}.weight") in model.weights:
                model.check(full, x)
    head = "model.embed_tokens.weight" if model.entries["tie_word_embeddings"] else "lm_head.weight"
    model.check(head, model._run(len(layers), "model.norm.weight"))
    assert model.found == {}, "more was quantised"
    matrices = {n for n, w in model.weights.items() if w.ndim == 2 and "v_b_proj" not in n}
    assert quantised == matrices - ({"model.embed_tokens.weight"} if head == "lm_head.weight" else set())


def test_tokens_are_taken_from_all_of_the_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint)
    text = tmp_path / "text"
    length = source.config.max_position_embeddings
    text.write_bytes(bytes(range(97, 123)) * 300)
    ids = calibration_ids(source, text)
    assert ids.dtype == np.int64
    assert ids.shape == (32, length)
    content = list(text.read_bytes())
    starts = [next(i for i in range(26) if content[i : i + length] == row) for row in ids.tolist()]
    assert starts[0] == 0
    assert content[-length:] == ids[-1].tolist()
    assert len(set(starts)) > 1
    text.write_bytes(bytes(range(97, 123)) * 300 + b"Z" * 5000)
    assert 0.2 < np.mean(calibration_ids(source, text) == ord("Z")) < 0.6
    text.write_text("a" * (3 * length + 5))
    assert calibration_ids(source, text).shape == (3, length)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    entries = {**MODELS["gta"], "num_hidden_layers": 1}
    random_checkpoint(tmp_path / "checkpoint", entries, tiny_checkpoint)
    return tmp_path / "checkpoint"


TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"cannot be read \(No such file.*give another calibration text"),
    "in another encoding": (
        "Größe ".encode("latin-1") * 99,
        r"is not UTF-8 text \(byte 2\).*give another calibration text",
    ),
    "empty": (b"", f"gives 0 tokens .*expected at least {CONTEXT}, .*give a longer text"),
    "too short": (b"a" * (CONTEXT - 1), f"gives {CONTEXT - 1} tokens .*expected at least {CONTEXT}"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_text_that_cannot_be_used(checkpoint: Path, precision: str, content: bytes | None, message: str) -> None:
    text = checkpoint.parent / "text"
    if content is not None:
        text.write_bytes(content)
    said = export_refused(checkpoint, InputError, precision=precision, calibrate=text)
    assert str(text) in said
    assert re.search(message, said), said


def test_a_text_that_is_a_directory(checkpoint: Path) -> None:
    assert "cannot be read" in export_refused(checkpoint, InputError, precision="int4", calibrate=checkpoint)


def test_a_text_just_long_enough(checkpoint: Path) -> None:
    text = checkpoint.parent / "text"
    text.write_text("a" * CONTEXT)
    np.testing.assert_array_equal(calibration_ids(Checkpoint.open(checkpoint), text), [[ord("a")] * CONTEXT])


def test_tokens_outside_the_vocabulary(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    entries = {**MODELS["gta"], "num_hidden_layers": 1, "vocab_size": 100}
    random_checkpoint(tmp_path / "other" / "checkpoint", entries, tiny_checkpoint)
    text = tmp_path / "other" / "text"
    text.write_text("wxyz" * 40)  # 119 to 122
    said = export_refused(tmp_path / "other" / "checkpoint", InputError, precision="int4", calibrate=text)
    assert "a vocabulary of 100" in said


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    text = checkpoint.parent / "text"
    text.write_text(TEXT, encoding="utf-8")
    assert "has no tokenizer.json" in export_refused(checkpoint, InputError, precision="int4", calibrate=text)


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": 1}')
    text = checkpoint.parent / "text"
    text.write_text(TEXT, encoding="utf-8")
    said = export_refused(checkpoint, CheckpointError, precision="int4", calibrate=text)
    assert f"{checkpoint / 'tokenizer.json'}: is not a tokenizer" in said


def test_a_byte_order_mark_is_no_part_of_the_text(checkpoint: Path) -> None:
    text, marked = checkpoint.parent / "text", checkpoint.parent / "marked"
    text.write_text(TEXT, encoding="utf-8")
    marked.write_text(TEXT, encoding="utf-8-sig")
    source = Checkpoint.open(checkpoint)
    assert calibration_ids(source, marked).tolist() == calibration_ids(source, text).tolist()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", None])
def test_only_integers_are_calibrated(checkpoint: Path, precision: str | None) -> None:
    text = checkpoint.parent / "text"
    text.write_text(TEXT, encoding="utf-8")
    said = export_refused(checkpoint, InputError, precision=precision, calibrate=text)
    assert f"precision is {precision or 'fp32'}, which is not calibrated; calibrate int8 or int4" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", np.nan),
        ("model.embed_tokens.weight", 1e9),
        ("model.layers.0.self_attn.k_proj.weight", np.inf),
        ("model.layers.0.self_attn.v_proj.weight", 1e9),
        ("model.layers.0.mlp.down_proj.weight", np.nan),
        ("model.layers.0.input_layernorm.weight", np.inf),
        ("model.norm.weight", np.nan),
        ("lm_head.weight", np.nan),
    ],
)
def test_weights_that_cannot_be_calibrated(name: str, value: float, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    random_checkpoint(checkpoint, {**MODELS["untied"], "num_hidden_layers": 1}, tiny_checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].flat[7] = value
    save_file(weights, checkpoint / "model.safetensors")
    text = tmp_path / "text"
    text.write_text(TEXT, encoding="utf-8")
    error = ExportError if np.isfinite(value) else CheckpointError
    said = export_refused(checkpoint, error, precision="int4", block_size=16, calibrate=text, verify=False)
    assert np.isfinite(value) or f"{name} holds {value} at [" in said


# --- what it is for --------------------------------------------------------------------------------------------------


def excerpts(texts: list[str], parts: int, characters: int) -> str:
    """Stretches from all of the texts."""
    everything = "\n".join(texts)
    step = len(everything) // parts
    return "\n".join(everything[i * step : i * step + characters] for i in range(parts))


def test_the_example_model_in_integers_predicts_about_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    corpus = importlib.import_module("corpus")
    (tmp_path / "text").write_text(excerpts(corpus.read(held_out=False), 12, 2400), encoding="utf-8")
    held_out = excerpts(corpus.read(held_out=True), 20, 1000)
    perplexity = {}
    options: dict[str, dict[str, Any]] = {
        "own": {},
        "int8": {"precision": "int8"},
        "int4": {"precision": "int4", "calibrate": "none"},
        "calibrated": {"precision": "int4", "calibrate": tmp_path / "text"},
    }
    for name, chosen in options.items():
        export_model(EXAMPLES / "tiny-gta", tmp_path / name, verify=False, **chosen)
        with gta_edge.load(tmp_path / name, "onnxruntime") as session:
            assert session.tokenizer is not None
            ids = np.array(session.tokenizer.encode(held_out))
            assert len(ids) > 3000
            perplexity[name] = evaluate(session, ids).perplexity
    change = {name: value / perplexity["own"] - 1 for name, value in perplexity.items()}
    assert abs(change["int8"]) <= 0.005, change
    assert 0.005 < change["calibrated"] <= 0.035, change
    assert change["calibrated"] <= change["int4"] - 0.003 <= 0.1, change
