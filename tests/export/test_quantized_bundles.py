"""Bundles in int8 and int4: what the commands say of them, and that damaged ones are refused or fail their check."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import gta_edge
from gta_edge.errors import BundleError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from tests.helpers.bundle_files import edit_model, forge, manifest_of, refused, relist, write
from tests.helpers.commands import Result
from tests.helpers.exported_graphs import TOLERANCE
from tests.helpers.stored_weights import DATA, MODEL, STORED_TYPES, TABLE, Stored

Command = Callable[..., Result]


# --- the commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    checkpoint: Path
    bundle: Path
    precision: str


@pytest.fixture(scope="module", params=["int4", "int8"])
def tiny(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The bundle of ``tiny_checkpoint`` in blocks of 16; not to be changed."""
    bundle = tmp_path_factory.mktemp("tiny") / "bundle"
    result = export_model(tiny_checkpoint, bundle, precision=request.param, block_size=16)
    assert result.report is not None
    assert result.report.passed
    assert result.report.backends["onnxruntime"].max_rel_error <= TOLERANCE
    return Tiny(tiny_checkpoint, bundle, request.param)


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Tiny:
    directory = shutil.copytree(tiny.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return Tiny(tiny.checkpoint, directory, tiny.precision)


def test_verify_is_exact_and_tells_of_int8_activations(command: Command, tiny: Tiny) -> None:
    report = command("verify", tiny.bundle, "--checkpoint", tiny.checkpoint, "--json").document
    assert report["passed"] is True
    assert report["precision"] == tiny.precision
    assert report["backends"].keys() == {"onnxruntime", "torch"}
    assert all(found["max_rel_error"] <= TOLERANCE for found in report["backends"].values())
    assert report["int8_activations"].keys() == {"onnxruntime"}
    assert TOLERANCE < report["int8_activations"]["onnxruntime"]["max_rel_error"] <= 0.5
    low, high = {"int4": (0.05, 2.0), "int8": (0.001, 0.1)}[tiny.precision]
    assert low < report["quantisation"]["max_rel_error"] < high


def test_floats_have_no_int8_activations(command: Command, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    report = command("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, "--json").document
    assert report["int8_activations"] == {}
    assert manifest_of(tiny_bundle)["block_size"] is None
    assert Bundle.open(tiny_bundle).block_size is None


def test_the_command_takes_block_size_and_text(command: Command, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, text = tmp_path / "bundle", tmp_path / "text"
    text.write_text("What a layer gets is what the quantised layers below it give.\n" * 8)
    options = ["--precision", "int4", "--block-size", 16, "--calibrate", text]
    document = command("export", tiny_checkpoint, bundle, *options, "--json").document
    assert document["precision"] == "int4"
    assert document["verification"]["passed"] is True
    assert document["verification"]["backends"]["onnxruntime"]["max_rel_error"] <= TOLERANCE
    assert Bundle.open(bundle).block_size == 16
    stored = Stored(bundle)
    np.testing.assert_array_equal(stored.table_codes(), stored.arrays[f"{TABLE}.transposed"].T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision int4 --block-size 64", r"block size is 64; expected one of 16.*has 96 inputs"),
        ("--precision int4 --block-size 0", r"block size is 0; expected one of 16"),
        ("--block-size 16", "precision is bf16, which has no blocks"),
        ("--calibrate {text}", "precision is bf16, which is not calibrated; calibrate int8 or int4"),
        ("--precision int8 --calibrate {text}", "{text}: gives 5 tokens .*expected at least 128"),
        ("--precision int4 --calibrate {text}s", "{text}s: cannot be read"),
    ],
)
def test_wrong_options(command: Command, options: str, message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    found = command("export", tiny_checkpoint, tmp_path / "bundle", *options.format(text=text).split()).error
    assert re.search(message.replace("{text}", re.escape(str(text))), found), found
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_block_size_that_is_no_number(command: Command, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = command("export", tiny_checkpoint, tmp_path / "bundle", "--precision", "int4", "--block-size", "small")
    assert "--block-size" in found.usage


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        None,
        "lm_head.weight",
        [3],
        ["lm_head.weight"],  # of a tied model
        ["model.norm.weight"],
        ["model.layers.0.self_attn.v_b_proj.weight"],
        ["../config.json"],
    ],
)
def test_a_manifest_with_other_matrices_in_int8(copied: Tiny, names: Any) -> None:
    forge(copied.bundle, int8=names, precision="int4")
    assert "int8" in refused(copied.bundle)


def test_matrices_in_int8_of_another_precision(copied: Tiny) -> None:
    forge(copied.bundle, int8=[TABLE], precision="fp16", block_size=None)
    assert "expected matrices of config.json in an int4 bundle" in refused(copied.bundle)


@pytest.mark.parametrize("block_size", [0, 8, 17, 48, -16, 256, "32", True, 32.0, [32], {}])
def test_a_manifest_with_another_block_size(copied: Tiny, block_size: Any) -> None:
    forge(copied.bundle, block_size=block_size)
    assert f"block_size is {block_size!r}; expected one of" in refused(copied.bundle)


def test_a_manifest_of_an_earlier_version(copied_bundle: Path) -> None:
    manifest = manifest_of(copied_bundle)
    del manifest["block_size"], manifest["int8"]
    write(copied_bundle, manifest)
    opened = Bundle.open(copied_bundle)
    assert opened.block_size is None
    assert opened.storage.int8 == set()


SCALE = "model.layers.1.mlp.gate_proj.weight.transposed.scale"


def change_stored(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change an external tensor's numbers where they lie."""
    tensors = onnx.load(directory / MODEL, load_external_data=False).graph.initializer
    tensor = next(tensor for tensor in tensors if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    stored = bytearray((directory / DATA).read_bytes())
    numbers = np.frombuffer(bytes(stored[start : start + length]), STORED_TYPES[tensor.data_type])
    changed = change(numbers).astype(numbers.dtype).tobytes()
    assert changed != bytes(stored[start : start + length])
    stored[start : start + length] = changed
    (directory / DATA).write_bytes(stored)


def test_a_changed_scale_is_refused(copied: Tiny, command: Command) -> None:
    change_stored(copied.bundle, SCALE, lambda scales: scales * 8)
    assert "SHA-256 differs" in refused(copied.bundle)
    assert "SHA-256 differs" in command("verify", copied.bundle, "--checkpoint", copied.checkpoint).error


def test_a_changed_scale_that_the_manifest_lists_shows(copied: Tiny, command: Command) -> None:
    change_stored(copied.bundle, SCALE, lambda scales: scales * 30)
    relist(copied.bundle)
    result = command("verify", copied.bundle, "--checkpoint", copied.checkpoint, "--json")
    assert result.status == 1
    assert result.err.startswith(f"error: weights stored in {copied.precision} are not the checkpoint's")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SCALE, lambda scales: np.where(np.arange(scales.size) == 5, np.nan, scales)),
    ],
    ids=["a scale that is no number"],
)
def test_damage_that_the_manifest_lists_fails_verification(
    copied: Tiny, name: str, change: Callable[[np.ndarray], np.ndarray], command: Command
) -> None:
    change_stored(copied.bundle, name, change)
    relist(copied.bundle)
    result = command("verify", copied.bundle, "--checkpoint", copied.checkpoint, "--backend", "onnxruntime", "--json")
    assert result.status == 1
    assert '"passed": false' in result.out
    assert result.err.startswith(f"error: weights stored in {copied.precision} are not the checkpoint's")


def without(name: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
        assert len(kept) == len(model.graph.initializer) - 1
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)

    return edit


def instead(name: str, array: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return edit


HALF = np.float16
MISFITS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "no scales": without(SCALE),
    "scales of another matrix": instead(SCALE, np.ones((6, 96), HALF)),
    "scales the other way": instead(SCALE, np.ones((128, 6), HALF)),
    "more blocks than inputs": instead(SCALE, np.ones((192, 128), HALF)),
    "blocks that divide nothing": instead(SCALE, np.ones((7, 128), HALF)),
    "no blocks": instead(SCALE, np.ones((0, 128), HALF)),
    "one scale": instead(SCALE, np.ones((), HALF)),
    "scales in three dimensions": instead(SCALE, np.ones((1, 6, 128), HALF)),
    "a matrix of another size": instead(SCALE.removesuffix(".scale"), np.ones((96, 64), np.int8)),
    "a matrix in three dimensions": instead(SCALE.removesuffix(".scale"), np.ones((1, 96, 128), np.int8)),
    "a row of numbers": instead(SCALE.removesuffix(".scale"), np.ones(96 * 128, np.int8)),
}


@pytest.mark.parametrize("edit", MISFITS.values(), ids=MISFITS)
def test_codes_and_scales_that_do_not_fit(copied: Tiny, edit: Callable[[onnx.ModelProto], None]) -> None:
    edit_model(copied.bundle, edit)
    bundle = Bundle.open(copied.bundle)
    with pytest.raises(BundleError) as caught:
        list(read_weights(bundle.model_path, bundle.config))
    assert "\n" not in str(caught.value)
    assert str(copied.bundle) in str(caught.value)
    assert "export the bundle again" in str(caught.value)
    with pytest.raises(BundleError):
        gta_edge.load(copied.bundle, "torch")


def test_a_table_that_is_not_the_heads_fails_verification(copied: Tiny, command: Command) -> None:
    name = f"{TABLE}.columns"
    edit_model(copied.bundle, instead(name, Stored(copied.bundle).arrays[name] ^ 0x11))
    result = command("verify", copied.bundle, "--checkpoint", copied.checkpoint, "--backend", "onnxruntime", "--json")
    assert result.status == 1
    assert '"passed": false' in result.out


COLUMNS = [(96, 299), (95, 300), (300, 96), (96,), (96, 300, 1), (0, 300), (96, 0), (), (96, 1, 300)]
WORDS = [(300, 11), (300, 13), (299, 12), (300,), (300, 12, 1), (0, 12), (300, 0), (), (300, 1, 24)]


@pytest.fixture(scope="module")
def packed_table(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose table lies in words; not to be changed."""
    bundle = tmp_path_factory.mktemp("packed") / "bundle"
    options = {"block_size": 16, "embedding_precision": "int4", "verify": False}
    export_model(tiny_checkpoint, bundle, precision="int4", **options)
    return bundle


@pytest.mark.parametrize("shape", COLUMNS, ids=str)
def test_a_table_that_does_not_fit(copied: Tiny, shape: tuple[int, ...]) -> None:
    edit_model(copied.bundle, instead(f"{TABLE}.columns", np.zeros(shape, np.int8)))
    refuses_weights(copied.bundle)


@pytest.mark.parametrize("shape", WORDS, ids=str)
def test_a_table_in_words_that_does_not_fit(packed_table: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    directory = shutil.copytree(packed_table, tmp_path / "bundle")
    edit_model(directory, instead(f"{TABLE}.packed", np.zeros(shape, np.int32)))
    refuses_weights(directory)


def refuses_weights(directory: Path) -> None:
    bundle = Bundle.open(directory)
    with pytest.raises(BundleError):
        list(read_weights(bundle.model_path, bundle.config))
