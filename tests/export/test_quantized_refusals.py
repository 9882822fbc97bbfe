"""Exports in int8 and int4 that are refused: block sizes that do not fit, and weights that no scale reaches."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from gta_edge.errors import ExportError, InputError
from gta_edge.export.pipeline import export_model
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exports import export_refused
from tests.helpers.quantized_models import SMALL, checkpoint_of
from tests.helpers.stored_weights import TABLE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    checkpoint_of("without biases", tmp_path / "checkpoint")  # widths of 128 and 320, and 64 in the value decoder
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", None])
def test_floats_have_no_blocks(checkpoint: Path, precision: str | None) -> None:
    said = export_refused(checkpoint, InputError, precision=precision, block_size=32)
    assert said == f"precision is {precision or 'fp32'}, which has no blocks; a block size goes with int8 or int4"


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("block_size", [-32, 0, 1, 8, 24, 48, 128, 256])
def test_block_sizes_that_are_none(checkpoint: Path, precision: str, block_size: int) -> None:
    said = export_refused(checkpoint, InputError, precision=precision, block_size=block_size)
    assert said.startswith(f"block size is {block_size}; expected one of 16, 32, 64")
    assert "64, 128" not in said  # which does not divide 320
    if block_size == 128:
        assert said.endswith("; model.layers.0.mlp.down_proj.weight has 320 inputs")


def test_widths_that_no_block_divides(tmp_path: Path) -> None:
    checkpoint_of("odd widths, untied", tmp_path / "checkpoint")
    for precision in ("int4", "int8"):
        said = export_refused(tmp_path / "checkpoint", InputError, precision=precision, block_size=16)
        assert said.startswith("block size is 16; expected none fits; use a wider precision; ")
        assert said.endswith(" inputs")


@pytest.mark.parametrize("width", [24, 16])  # hidden 72, which no block divides, and 48, which blocks of 16 do
def test_the_default_block_is_refused_where_it_does_not_fit(width: int, tmp_path: Path) -> None:
    entries = reference.gta_entries(heads=3, n_q=3, d_l=width, **SMALL)
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    said = export_refused(tmp_path / "checkpoint", InputError, precision="int4")
    assert f"has {3 * width} inputs" in said


def test_widths_of_what_is_not_quantised_do_not_matter(tmp_path: Path) -> None:
    entries = reference.gta_entries(heads=3, n_q=3, d_l=16, e=2, **SMALL)  # hidden 96, value decoder 48
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    result = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="int4", block_size=32, verify=False)
    assert result.bundle.block_size == 32


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", TABLE])
def test_weights_that_no_scale_reaches(checkpoint: Path, name: str) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].flat[11] = 1e8
    save_file(weights, checkpoint / "model.safetensors")
    said = export_refused(checkpoint, ExportError, precision="int4", verify=False)
    assert said.startswith(f"{name} cannot be quantised: ")
    assert said.endswith("use fp32 or bf16")


def test_a_value_decoder_beyond_half_precision(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.v_b_proj.weight"
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, name: weights[name] * 1e6}, checkpoint / "model.safetensors")
    said = export_refused(checkpoint, ExportError, precision="int8")
    assert re.match(rf"{re.escape(name)} has values up to .*; use bf16 or fp32", said)
