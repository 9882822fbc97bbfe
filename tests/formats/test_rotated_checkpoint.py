"""Checkpoints that are read with their values rotated: the same model, and an export that is checked as any other."""

import json
from pathlib import Path

import numpy as np
import pytest

from gta_edge.errors import InputError
from gta_edge.evaluate.verify import verify
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle, _digest
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.rotated_checkpoint import RotatedCheckpoint, rotation
from tests.helpers import quantized_checkpoints, reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.int8_reference import Cache
from tests.helpers.small_models import IDS, MODELS, WEIGHTS

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", MODELS[name], WEIGHTS[name])
    return tmp_path / "checkpoint"


def formula(name: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    logits = reference.gta_logits if "num_query_heads" in MODELS[name] else reference.llama_logits
    return logits(MODELS[name], weights, IDS[0])


@pytest.mark.parametrize("width", [8, 16, 24, 40, 48, 64, 80, 96, 128, 256])
def test_a_rotation_is_orthogonal_and_mixes_each_block_evenly(width: int) -> None:
    found = rotation(width)
    np.testing.assert_allclose(found @ found.T, np.eye(width), atol=1e-14)
    block = width & -width
    assert {round(abs(float(value)), 12) for value in found.flat} <= {0.0, round(block**-0.5, 12)}
    assert (np.count_nonzero(found, axis=1) == block).all()


@pytest.mark.parametrize("width", [1, 3, 4, 12, 20, 63])
def test_a_width_that_cannot_be_rotated(width: int) -> None:
    with pytest.raises(InputError, match=f"values of {width} channels cannot be rotated; expected a multiple of 8"):
        rotation(width)


@every_model
def test_logits_do_not_change(name: str, checkpoint: Path) -> None:
    """In float64 not at all; rounded to float32, by that rounding. And the weights do: all that read or make values."""
    source, rotated = Checkpoint.open(checkpoint), RotatedCheckpoint.of(Checkpoint.open(checkpoint))
    before = formula(name, {key: source.read(key).astype(np.float64) for key in source.names})
    exact = formula(name, {key: rotated.exact(key) for key in rotated.names})
    assert reference.relative_error(exact, before) < 1e-12
    rounded = formula(name, {key: rotated.read(key).astype(np.float64) for key in rotated.names})
    assert 0 < reference.relative_error(rounded, before) < 1e-5
    turned = {key for key in rotated.names if not np.array_equal(rotated.read(key), source.read(key))}
    other = "o_proj" if name == "baseline" else "v_b_proj"
    assert turned == {key for key in source.names if ".v_proj." in key or f".{other}." in key}
    assert turned == {key for key in source.names if rotated.rotates(key)}


@every_model
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_an_export_is_checked_against_the_rotated_weights(
    name: str, precision: str, checkpoint: Path, tmp_path: Path
) -> None:
    exported = export_model(checkpoint, tmp_path / "bundle", precision=precision, rotate_values=True)
    assert exported.bundle.rotated_values
    assert exported.report is not None
    assert exported.report.passed
    assert exported.report.weights["compared"] == len(Checkpoint.open(checkpoint).names)


@pytest.mark.parametrize("name", ["as many", "baseline"])
def test_verify_knows_a_rotated_bundle(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """And finds one that says that it is not."""
    bundle = tmp_path / "bundle"
    export_model(checkpoint, bundle, precision="bf16", rotate_values=True, verify=False)
    assert verify(bundle, checkpoint, ["onnxruntime"]).passed
    manifest = json.loads((bundle / "gta_edge.json").read_text())
    del manifest["rotated_values"], manifest["sha256"]
    (bundle / "gta_edge.json").write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
    assert not Bundle.open(bundle).rotated_values
    report = verify(bundle, checkpoint, ["onnxruntime"])
    assert any("are not the checkpoint's" in failure for failure in report.failures)


def test_matrices_in_integers_are_not_rotated(tmp_path: Path) -> None:
    entries = reference.llama_entries(heads=4, n_kv=2, d_h=16, hidden_size=64)
    name = "model.layers.0.self_attn.v_proj.weight"
    codes = quantized_checkpoints.random_codes(32, 64, 4, 2)
    weights = reference.random_weights(entries)
    quantized_checkpoints.write(tmp_path / "checkpoint", entries, weights, {name: codes}, "gptq")
    with pytest.raises(InputError, match=r"v_proj\.weight is in integers already.*leave the rotation out"):
        export_model(tmp_path / "checkpoint", tmp_path / "bundle", rotate_values=True)


def test_outliers_cost_less() -> None:
    """A channel that is far larger than the others decides the scale of a row, and rounds them away."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 2, 50, 64))
    values[..., 7] *= 30

    def lost(rows: np.ndarray) -> float:
        return float(np.sqrt(np.mean((Cache.of(rows).values - rows) ** 2)))

    assert lost(values @ rotation(64).T) < lost(values) / 3
