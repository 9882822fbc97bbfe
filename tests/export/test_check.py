"""The check of an export: a right one passes, however ill-conditioned its weights; a planted fault does not."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gta_edge.accuracy.probes import LATE, RANDOM, TEXT, encoder, probes
from gta_edge.accuracy.tolerance import FLOAT32_BOUND, Report
from gta_edge.errors import CheckpointError, ExportError
from gta_edge.evaluate.verify import verify
from gta_edge.export.check import check_export
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from tests.helpers import planted
from tests.helpers.commands import ROOT
from tests.helpers.ill_conditioned import ill_conditioned
from tests.helpers.planted import ChangedCheckpoint

TRAINED = ROOT / "examples" / "tiny-gta"
MODELS = ("random", "trained")
PRECISIONS = ("bf16", "int4")

Pair = tuple[Path, Checkpoint]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """The bundle and the checkpoint of a model, by its name and a precision; not to be changed."""
    made: dict[tuple[str, str], Pair] = {}

    def export(model: str, precision: str) -> Pair:
        if (model, precision) not in made:
            checkpoint = tiny_checkpoint if model == "random" else TRAINED
            directory = tmp_path_factory.mktemp("checked") / "bundle"
            # plainly rounded: what calibration returned, only the export itself can compare to the last bit
            rounding = {"calibrate": "none"} if precision == "int4" else {}
            export_model(checkpoint, directory, precision=precision, verify=False, **rounding)
            made[model, precision] = directory, Checkpoint.open(checkpoint)
        return made[model, precision]

    return export


@pytest.fixture
def copied(exported: Callable[[str, str], Pair], tmp_path: Path) -> Callable[[str, str], Pair]:
    """The same, to do anything to."""

    def copy(model: str, precision: str) -> Pair:
        bundle, checkpoint = exported(model, precision)
        return shutil.copytree(bundle, tmp_path / f"{model}-{precision}"), checkpoint

    return copy


def twice(faults: Iterable[str]) -> list[tuple[str, str, str]]:
    """Each fault in each model and each precision, once: half of all combinations."""
    found = []
    for i, fault in enumerate(faults):
        found += [(model, PRECISIONS[(i + j) % 2], fault) for j, model in enumerate(MODELS)]
    return found


def failure(report: Report) -> str:
    """The first thing that a report says is wrong, in one line."""
    assert not report.passed
    assert "\n" not in report.failures[0]
    return report.failures[0]


# --- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_right_passes(exported: Callable[[str, str], Pair], model: str, precision: str) -> None:
    bundle, checkpoint = exported(model, precision)
    report = check_export(Bundle.open(bundle), checkpoint)
    assert report.passed
    found = report.backends["onnxruntime"]
    assert found.max_rel_error <= FLOAT32_BOUND / 2
    assert found.bound_fraction <= 0.5
    lossless = precision in ("fp32", "bf16")
    assert (report.weights["equal"] == report.weights["compared"]) == lossless
    assert (report.quantisation.mean_kl_divergence == 0) == lossless


def test_what_is_asked_for(exported: Callable[[str, str], Pair]) -> None:
    """Random ids, a text where there is a tokenizer, and the last positions that there are."""
    bundle, checkpoint = exported("trained", "bf16")
    asked = {probe.name: probe for probe in probes(checkpoint.config, encoder(bundle))}
    assert asked.keys() == {RANDOM, TEXT, LATE}
    late = asked[LATE]
    assert late.past + late.ids.shape[1] == checkpoint.config.max_position_embeddings
    assert len(np.unique(asked[TEXT].ids)) > 60
    assert {probe.name for probe in probes(checkpoint.config)} == {RANDOM, LATE}


def test_a_token_whose_residual_is_taken_away(tmp_path: Path) -> None:
    """No arithmetic in float32 is near the truth there, and elsewhere the bound is as sharp as ever."""
    ill_conditioned(tmp_path, leaves=1e-4)
    exported = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp32")
    assert exported.report is not None
    found = exported.report.backends["onnxruntime"]
    assert found.max_rel_error > 2 * FLOAT32_BOUND  # such a position it is
    report = verify(tmp_path / "bundle", tmp_path / "checkpoint")
    assert report.passed
    assert report.backends.keys() >= {"onnxruntime", "torch"}
    # and a fault elsewhere is found all the same
    other = planted.planted(tmp_path / "bundle", planted.multiplied("model.layers.1.mlp.up_proj", 1.001))
    report = check_export(other, Checkpoint.open(tmp_path / "checkpoint"))
    assert "onnxruntime: max_rel_error " in failure(report)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_it_passes_however_it_is_stored(tmp_path: Path, precision: str) -> None:
    ill_conditioned(tmp_path, leaves=1e-4)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision)
    assert verify(tmp_path / "bundle", tmp_path / "checkpoint").passed


# --- a graph that is wrong -------------------------------------------------------------------------------------------

LAYERS = "model.layers."
GRAPHS: dict[str, tuple[planted.GraphChange, str]] = {
    "1% on a matrix": (planted.multiplied(f"{LAYERS}1.mlp.up_proj", 1.01), " at position "),
    "1% on the first layer": (planted.multiplied(f"{LAYERS}0.self_attn.k_proj", 1.01), "layer 0's cache is the first"),
    "2% on values": (planted.multiplied(f"{LAYERS}0.self_attn.o_proj", 1.02), "layer 1's cache is the first"),
    "negated gate": (planted.multiplied(f"{LAYERS}1.self_attn.g_proj", -1.0), " at position "),
    "layers swapped": (
        planted.exchanged(f"{LAYERS}0.self_attn.q_proj", f"{LAYERS}1.self_attn.q_proj"),
        " at position ",
    ),
    "another eps": (planted.attribute("RMSNormalization", "epsilon", 0.1), "epsilon of RMSNormalization"),
    "another scale": (planted.attribute("GroupedLatentAttention", "scale", 1.02), "scale of GroupedLatentAttention"),
}


@pytest.mark.parametrize(("model", "precision", "fault"), twice(GRAPHS))
def test_a_wrong_graph_is_found(copied: Callable[[str, str], Pair], model: str, precision: str, fault: str) -> None:
    bundle, checkpoint = copied(model, precision)
    change, where = GRAPHS[fault]
    assert where in failure(check_export(planted.planted(bundle, change), checkpoint))


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_a_table_that_is_wrong_late(copied: Callable[[str, str], Pair], name: str) -> None:
    bundle, checkpoint = copied("trained", "int4")
    opened = Bundle.open(bundle)
    planted.change_table(opened, name, 280, lambda rows: rows[::-1])
    said = failure(check_export(opened, checkpoint))
    assert f"the table {name} is " in said
    assert "at position 280, pair 0" in said


def test_late_positions_are_run(copied: Callable[[str, str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong at the last positions shows in the logits there, whatever is known of the tables."""
    monkeypatch.setattr("gta_edge.accuracy.expected.constant_problems", lambda *_: [])
    bundle, checkpoint = copied("trained", "bf16")
    opened = Bundle.open(bundle)
    planted.change_table(opened, "sin", 1017, np.negative)
    said = failure(check_export(opened, checkpoint))
    assert " at position " in said
    assert f" of {LATE} " in said


# --- weights that are not the checkpoint's ---------------------------------------------------------------------------


def changes(checkpoint: Checkpoint) -> dict[str, dict[str, planted.Change]]:
    config = checkpoint.config
    q, up = (f"{LAYERS}{{}}.{name}.weight".format for name in ("self_attn.q_proj", "mlp.up_proj"))
    return {
        "1% on a matrix": {up(1): lambda w: w * 1.01},
        "scale off by 2%": {up(0): lambda w: w * 1.02},
        "two heads swapped": {q(0): planted.heads_swapped(config.key_width)},
        "layers swapped": {up(0): lambda _: checkpoint.read(up(1)).astype(np.float32),
                           up(1): lambda _: checkpoint.read(up(0)).astype(np.float32)},
        "negated gate": {f"{LAYERS}1.self_attn.g_proj.weight": np.negative},
        "head": {"model.embed_tokens.weight": lambda w: w * 1.01},
        "a norm": {f"{LAYERS}1.input_layernorm.weight": lambda w: w * 1.01},
        "a bias": {f"{LAYERS}0.self_attn.k_proj.bias": lambda w: w + 0.01},
        "the value decoder": {f"{LAYERS}0.self_attn.v_b_proj.weight": lambda w: w * 1.01},
    }  # fmt: skip


FAULTS = ("1% on a matrix", "scale off by 2%", "two heads swapped", "layers swapped", "negated gate", "head",
          "a norm", "a bias", "the value decoder")  # fmt: skip


@pytest.mark.parametrize(("model", "precision", "fault"), twice(FAULTS))
def test_wrong_weights_are_found(exported: Callable[[str, str], Pair], model: str, precision: str, fault: str) -> None:
    bundle, checkpoint = exported(model, precision)
    planted_ = changes(checkpoint)[fault]
    found = check_export(Bundle.open(bundle), ChangedCheckpoint(checkpoint, planted_))
    assert f"are not the checkpoint's: {next(iter(planted_))} " in failure(found)


def test_one_bit_of_a_lossless_store(exported: Callable[[str, str], Pair]) -> None:
    def flipped(weight: np.ndarray) -> np.ndarray:
        bits = weight.astype("bfloat16").copy()
        bits.reshape(-1).view(np.uint16)[77] ^= 1
        return bits.astype(np.float32)

    bundle, checkpoint = exported("trained", "bf16")
    other = ChangedCheckpoint(checkpoint, {f"{LAYERS}2.mlp.down_proj.weight": flipped})
    said = failure(check_export(Bundle.open(bundle), other))
    assert said.startswith(f"weights stored in bf16 are not the checkpoint's: {LAYERS}2.mlp.down_proj.weight is ")
    assert "at [0, 77]" in said
    assert "(1 of " in said


def test_a_narrower_type_than_the_bundle_s(exported: Callable[[str, str], Pair]) -> None:
    bundle, checkpoint = exported("random", "bf16")
    opened = replace(Bundle.open(bundle), precision="fp32")
    said = failure(check_export(opened, checkpoint))
    assert "model.embed_tokens.weight is stored in bf16, and the bundle is in fp32" in said


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and exports write a table that is wrong."""
    from gta_edge.export import pipeline

    right = pipeline.model_tables

    def tables(config: Any) -> dict[str, np.ndarray]:
        return {name: -table if name == "sin" else table for name, table in right(config).items()}

    return lambda: monkeypatch.setattr(pipeline, "model_tables", tables)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_fails_is_kept_under_another_name(
    tiny_checkpoint: Path, tmp_path: Path, wrong: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    with monkeypatch.context():
        wrong()
        for _ in range(2):  # the second replaces what the first has kept
            with pytest.raises(ExportError) as caught:
                export_model(tiny_checkpoint, bundle)
            said = str(caught.value)
            assert said.startswith(f"{bundle}: the export is not the model of {tiny_checkpoint} (the table sin is ")
            assert "at position 1, pair 0" in said
            assert said.endswith("please report this line; what was written is kept as bundle.failed-check")
            assert "\n" not in said
            assert names(tmp_path) == ["bundle.failed-check"]
        assert Bundle.open(tmp_path / "bundle.failed-check", verify_hashes=True).precision == "bf16"
    monkeypatch.undo()
    exported = export_model(tiny_checkpoint, bundle)
    assert names(tmp_path) == ["bundle"]
    assert any("removed bundle.failed-check" in note for note in exported.notes)


@pytest.mark.parametrize("what", ["a file", "a directory of somebody's", "a bundle with more in it"])
def test_what_lies_there_is_left_alone(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, wrong: Callable[[], None], what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = tmp_path / "bundle.failed-check"
    if what == "a file":
        there.write_text("mine")
    elif what == "a bundle with more in it":
        shutil.copytree(tiny_bundle, there)
        (there / "notes.txt").write_text("mine")
    else:
        there.mkdir()
        (there / "notes.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with monkeypatch.context():
        wrong()
        with pytest.raises(ExportError, match=r"what was written is not kept \(.*bundle\.failed-check"):
            export_model(tiny_checkpoint, tmp_path / "bundle")
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert export_model(tiny_checkpoint, tmp_path / "bundle").notes == ()
    assert there.read_text() == "mine" if what == "a file" else (there / "notes.txt").read_text() == "mine"


def test_a_bundle_that_is_there_stays_when_its_successor_fails(
    tiny_checkpoint: Path, copied_bundle: Path, wrong: Callable[[], None]
) -> None:
    wrong()
    with pytest.raises(ExportError):
        export_model(tiny_checkpoint, copied_bundle, force=True)
    assert names(copied_bundle.parent) == ["bundle", "bundle.failed-check"]
    assert Bundle.open(copied_bundle, verify_hashes=True).verified


# --- another config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rope_theta", 500000.0),
        ("rms_norm_eps", 1e-6),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("max_position_embeddings", 256),
        ("num_hidden_layers", 1),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(
    tiny_bundle: Path, copied_checkpoint: Path, entry: str, value: Any
) -> None:
    config = copied_checkpoint / "config.json"
    entries = json.loads(config.read_text())
    assert entries[entry] != value
    config.write_text(json.dumps({**entries, entry: value}))
    if entry == "num_hidden_layers":
        drop_layer(copied_checkpoint, 1)
    with pytest.raises(CheckpointError, match=f"is another model .*{entry} is .* in the checkpoint"):
        verify(tiny_bundle, copied_checkpoint, ["onnxruntime"])


def drop_layer(checkpoint: Path, layer: int) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if f".{layer}." not in n}, checkpoint / "model.safetensors")


def test_what_no_logit_depends_on_may_differ(tiny_bundle: Path, copied_checkpoint: Path) -> None:
    config = copied_checkpoint / "config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({**entries, "eos_token_id": 3, "torch_dtype": "float32"}))
    assert verify(tiny_bundle, copied_checkpoint, ["onnxruntime"]).passed
