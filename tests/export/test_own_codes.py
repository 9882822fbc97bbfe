"""Checkpoints in integers: a bundle of their own width has their codes as they are, one of another their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gta_edge
from gta_edge.errors import CheckpointError, InputError
from gta_edge.export.own_codes import OwnCodes, storage_of_own
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import read_stored, read_weights
from gta_edge.numerics.quantization import BITS, QuantizedMatrix
from gta_edge.plugins.matmul import torch as matmul
from gta_edge.plugins.matmul.packing import pack
from tests.helpers import architectures, reference
from tests.helpers import quantized_checkpoints as made
from tests.helpers.exports import export_refused

SMALL = {"vocab_size": 61, "max_position_embeddings": 24, "intermediate_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "gta": reference.gta_entries(heads=4, n_q=2, d_l=64, **SMALL),
    "llama": reference.llama_entries(heads=4, n_kv=2, d_h=32, tie_word_embeddings=False, **SMALL),
}
IDS = np.arange(3, 15)[None]


def matrices(model: str, bits: int, group: int) -> dict[str, made.Codes]:
    """Every matrix of the layers, near what the model has; ``group`` 0 is a scale per output."""
    found = {}
    for seed, (name, weight) in enumerate(reference.random_weights(MODELS[model]).items()):
        if ".layers." not in name or weight.ndim != 2:
            continue
        groups = weight.shape[1] // group if group else 1
        codes = made.random_codes(*weight.shape, bits, groups, seed)
        found[name] = made.Codes(
            codes.codes, codes.zeros, (codes.scales * 2.0 ** (4 - bits)).astype(np.float16), bits, codes.order
        )
    return found


def written(directory: Path, model: str, layout: str, own: dict[str, made.Codes], **changes: Any) -> Path:
    weights = {name: w.astype(np.float16) for name, w in reference.random_weights(MODELS[model]).items()}
    made.write(directory, MODELS[model], weights, own, layout, **changes)
    return directory


def exact_logits(model: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    formula = reference.gta_logits if model == "gta" else reference.llama_logits
    return formula(MODELS[model], weights, IDS[0])


@pytest.mark.parametrize(
    ("model", "layout", "bits", "group", "block_size"),
    [
        ("llama", "awq", 4, 64, None),
        ("llama", "gptq", 8, 0, None),
        ("gta", "compressed-tensors", 4, 128, 32),
    ],
)
def test_codes_go_into_a_bundle_as_they_are(
    model: str, layout: str, bits: int, group: int, block_size: int | None, tmp_path: Path
) -> None:
    own = matrices(model, bits, group)
    made_of = export_model(written(tmp_path / "a", model, layout, own), tmp_path / "b", block_size=block_size)
    bundle = made_of.bundle
    assert bundle.precision == f"int{bits}"
    assert bundle.block_size == (block_size or group or None)
    stored = dict(read_stored(bundle.model_path, bundle.config))
    for name, codes in own.items():
        matrix = stored[name]
        if "v_b_proj" in name:  # which is float16 in every bundle of integers
            np.testing.assert_array_equal(matrix, codes.values.astype(np.float16))
            continue
        assert isinstance(matrix, QuantizedMatrix)
        np.testing.assert_array_equal(matrix.codes, codes.codes - 2 ** (bits - 1), err_msg=name)
        np.testing.assert_array_equal(matrix.values, codes.values, err_msg=name)
    values = {name: np.asarray(value, np.float64) for name, value in read_weights(bundle.model_path, bundle.config)}
    with gta_edge.load(bundle.directory, backend="onnxruntime", exact=True) as session:
        found = session.forward(IDS, all_logits=True)[0]
    assert reference.relative_error(found, exact_logits(model, values)) <= 1e-4


def test_a_model_of_another_architecture_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    """With biases, which lie beside the codes, as zeros do where a model has none."""
    model, own = architectures.model_of("Qwen2"), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." not in name or parameter.ndim != 2:
                continue
            groups = parameter.shape[1] // 32
            scales = (parameter.view(len(parameter), groups, 32).abs().amax(-1) / 7).numpy().astype(np.float16)
            spread = np.repeat(scales.astype(np.float32), 32, axis=1)
            codes = np.clip(np.rint(parameter.numpy() / spread) + 8, 0, 15).astype(int)
            order = np.arange(parameter.shape[1]) // 32
            own[name] = made.Codes(codes, np.full(scales.shape, 8), scales, 4, order)
            parameter.copy_(torch.from_numpy(own[name].values))
        logits = model(torch.from_numpy(architectures.IDS)).logits.numpy()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights["model.layers.0.mlp.up_proj.bias"] = np.zeros(96, np.float32)
    made.write(tmp_path / "a", architectures.entries_of("Qwen2"), weights, own, "gptq")
    bundle = export_model(tmp_path / "a", tmp_path / "b", precision="fp32").bundle
    with gta_edge.load(bundle.directory, backend="onnxruntime") as session:
        found = session.forward(architectures.IDS, all_logits=True)
    assert np.abs(found - logits).max() <= 1e-4 * logits.std()


def test_the_lowest_code_of_eight_bits_is_multiplied_as_it_is() -> None:
    """-128, which quantising here never gives and others do."""
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (96, 16)).astype(np.int8)
    codes[:5] = -128
    scales = random.uniform(0.01, 0.02, 16).astype(np.float16)
    packed = pack(codes, scales, 8, 0)
    x = torch.randn(3, 96)
    arguments = (x, torch.from_numpy(packed.weight), torch.from_numpy(packed.scale), None, 8, 0, [16])
    (found,) = torch.ops.gta.blockwise_matmul(*arguments)
    wanted = x.double().numpy() @ (codes.astype(np.float64) * scales.astype(np.float64))
    assert matmul.blockwise_matmul  # what the op is
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [made.asymmetric, made.act_order])
def test_what_no_code_of_ours_says_is_refused_or_dequantised(change: Any, tmp_path: Path) -> None:
    own = {name: change(codes) for name, codes in matrices("llama", 4, 32).items()}
    source = written(tmp_path / "a", "llama", "gptq", own)
    said = export_refused(source, CheckpointError)
    if change is made.asymmetric:
        assert "asymmetric" in said
        assert said.endswith("use --precision int8, which holds it as it is, fp16 or bf16")
    else:
        assert "act-order" in said
        assert "use --precision fp16 or bf16" in said
    bundle = export_model(source, tmp_path / "b", precision="fp32", verify=False).bundle
    values = dict(read_weights(bundle.model_path, bundle.config))
    for name, codes in own.items():
        np.testing.assert_array_equal(values[name], codes.values)


def test_int8_holds_zero_points_of_four_bits(tmp_path: Path) -> None:
    """As AWQ mostly has them: what a code is above or below its zero point is a code of 8 bits."""
    own = {name: made.asymmetric(codes) for name, codes in matrices("llama", 4, 64).items()}
    bundle = export_model(written(tmp_path / "a", "llama", "awq", own), tmp_path / "b", precision="int8").bundle
    assert bundle.block_size == 64
    stored = dict(read_stored(bundle.model_path, bundle.config))
    for name, codes in own.items():
        matrix = stored[name]
        assert isinstance(matrix, QuantizedMatrix)
        np.testing.assert_array_equal(matrix.values, codes.values, err_msg=name)


@pytest.mark.parametrize(
    ("bits", "group", "precision", "asked", "expected"),
    [
        (4, 32, "int4", None, 32),
        (4, 128, "int4", None, 128),
        (4, 0, "int4", None, 128),
        (4, 64, "int4", 16, 16),
        (8, 0, "int8", None, None),
        (8, 64, "int8", None, 64),
        (8, 0, "int8", 32, 32),
        (4, 64, "int8", None, 64),
        (8, 64, "int4", None, 32),
        (4, 64, "fp16", None, None),
    ],
)
def test_block_sizes(
    bits: int, group: int, precision: str, asked: int | None, expected: int | None, tmp_path: Path
) -> None:
    source = Checkpoint.open(written(tmp_path, "llama", "compressed-tensors", matrices("llama", bits, group)))
    storage = storage_of_own(source, precision, asked)
    assert storage.block_size == expected
    codes = OwnCodes(source, storage)
    assert len(codes) == len(list(codes)) == (len(source.quantized) if bits <= BITS.get(precision, 0) else 0)


def test_both_widths_in_one_bundle(tmp_path: Path) -> None:
    """Layers in 4 bits but for one kind of matrix in 8, and a head in 4, which would be int8 otherwise."""
    own = matrices("llama", 4, 64)
    own["lm_head.weight"] = made.random_codes(*reference.shapes(MODELS["llama"])["lm_head.weight"], 4, 1)
    wide = {name: codes for name, codes in matrices("llama", 8, 0).items() if "down_proj" in name}
    source = written(tmp_path / "a", "llama", "compressed-tensors", own | wide)
    config = json.loads((source / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    (source / "config.json").write_text(json.dumps(config))
    bundle = export_model(source, tmp_path / "b").bundle
    assert (bundle.precision, bundle.block_size) == ("int4", 64)
    assert bundle.storage.int8 == {"model.embed_tokens.weight", *wide}
    stored = dict(read_stored(bundle.model_path, bundle.config))
    for name, codes in (own | wide).items():
        matrix = stored[name]
        assert isinstance(matrix, QuantizedMatrix)
        assert matrix.bits == codes.bits
        np.testing.assert_array_equal(matrix.values, codes.values, err_msg=name)


def test_a_block_size_that_would_change_them_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "a", "llama", "awq", matrices("llama", 4, 32))
    said = export_refused(source, InputError, block_size=64)
    assert "is in int4 already, with a scale for every 32 inputs; expected one of 16, 32, or another precision" in said
    assert "calibration" in export_refused(source, InputError, calibrate=__file__)


def test_groups_that_no_block_size_fits(tmp_path: Path) -> None:
    source = written(tmp_path / "a", "llama", "gptq", matrices("llama", 4, 8))
    assert "no block size fits; take another precision" in export_refused(source, InputError)


def test_a_bundle_keeps_its_config_and_opens(tmp_path: Path) -> None:
    source = written(tmp_path / "a", "llama", "gptq_v2", matrices("llama", 4, 32))
    bundle = export_model(source, tmp_path / "b", precision="int8", verify=False).bundle
    assert Bundle.open(tmp_path / "b").precision == bundle.precision == "int8"
    assert (tmp_path / "b" / "config.json").read_bytes() == (source / "config.json").read_bytes()
