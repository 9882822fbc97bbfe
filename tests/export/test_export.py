"""From a checkpoint to a bundle: the written graph against the formula in float64, in plain ONNX Runtime."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest

import gta_edge
from gta_edge.errors import CheckpointError, ConfigError, ExportError, InputError, OutputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import input_shapes, interface_names
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.function import function
from gta_edge.plugins.domain import DOMAIN
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported_graphs import TOLERANCE, empty_feeds, exact_logits, run

SMALL = {"vocab_size": 97, "max_position_embeddings": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# The presets' proportions (heads, n_q / n_k / n_c, d_l = 2·d_k, tied or not), and what they leave out.
GTA: dict[str, dict[str, Any]] = {
    "gta1-160m": {"heads": 12, "n_q": 3, "e": 2},
    "gta2-160m": {"heads": 12, "n_q": 6, "e": 1},
    "gta3-500m": {"heads": 20, "n_q": 5, "e": 2, "tie_word_embeddings": False},
    "gta4-500m": {"heads": 20, "n_q": 10, "n_c": 2, "tie_word_embeddings": False},
    "gta-1b": {"heads": 20, "n_q": 5, "e": 2},
    "several key heads, yarn": {"heads": 12, "n_q": 6, "n_k": 3, "n_c": 2, "rope_scaling": YARN},
    "wide keys, llama3": {"heads": 3, "n_q": 3, "n_k": 1, "n_c": 3, "d_k": 48, "d_l": 48, "rope_scaling": LLAMA3},
}
BASELINES: dict[str, dict[str, Any]] = {
    "gqa": {"heads": 4, "n_kv": 2, "d_h": 16},
    "mha, untied": {"heads": 4, "n_kv": 4, "d_h": 16, "tie_word_embeddings": False},
}


def model_entries(name: str) -> dict[str, Any]:
    make = reference.gta_entries if name in GTA else reference.llama_entries
    return make(**{**(GTA.get(name) or BASELINES[name]), **SMALL})


def plain_session(bundle: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # copying the cache is meant here
    return onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=[*GTA, *BASELINES])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    """A model's config entries, its weights, and its bundle in fp32."""
    entries = model_entries(request.param)
    directory = tmp_path_factory.mktemp("export")
    weights = write_checkpoint(directory / "checkpoint", entries, reference.random_weights(entries))
    result = export_model(directory / "checkpoint", directory / "bundle", precision="fp32")
    assert result.report is not None
    assert result.report.passed
    return entries, weights, directory / "bundle"


def test_logits_follow_the_formula(exported: tuple[dict, dict, Path]) -> None:
    entries, weights, bundle = exported
    ids = np.random.default_rng(1).integers(0, entries["vocab_size"], (1, 11))
    exact = exact_logits(entries, weights, ids)
    session = plain_session(bundle)
    feeds = empty_feeds(session, 1, 16)
    prompt = run(session, feeds, ids[:, :8], np.array([0]))
    rest = [run(session, feeds, ids[:, i : i + 1], np.array([i])) for i in range(8, 11)]
    logits = np.concatenate([prompt, *rest], axis=1)
    assert np.abs(logits - exact).max() <= TOLERANCE * exact.std()


def test_rows_of_different_length(exported: tuple[dict, dict, Path]) -> None:
    entries, weights, bundle = exported
    ids = np.random.default_rng(2).integers(0, entries["vocab_size"], (3, 9))
    session = plain_session(bundle)
    feeds = empty_feeds(session, 3, 12)
    run(session, feeds, ids[:, :5], np.zeros(3, np.int64))
    lengths = np.array([5, 2, 4])  # what was written beyond them is padding
    logits = run(session, feeds, ids[:, 5:], lengths)
    for row, length in enumerate(lengths):
        tokens = np.concatenate([ids[row, :length], ids[row, 5:]])
        exact = exact_logits(entries, weights, tokens[None])[0, length:]
        assert np.abs(logits[row] - exact).max() <= TOLERANCE * exact.std()


def test_graph_is_as_promised(exported: tuple[dict, dict, Path]) -> None:
    entries, _, bundle = exported
    onnx.checker.check_model(bundle / "model.onnx", full_check=True)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    layers, is_gta = entries["num_hidden_layers"], "num_query_heads" in entries
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in ours] == [op.OP] * layers
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 24), ("gta", 1)}
    for node in ours:
        given = {name for name, value in zip(op.MODEL_INPUTS, node.input, strict=False) if value}
        assert {*op.MODEL_INPUTS} - given == (set() if is_gta else {"gate", "value_decoder"})
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values["plugin_namespace"] == b"gta"
        assert values["plugin_version"] == b"1"
        assert values["num_query_heads"] == entries["num_query_heads" if is_gta else "num_attention_heads"]

    def shape(value: Any) -> list[Any]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {value.name: shape(value) for value in model.graph.input}
    outputs = {value.name: shape(value) for value in model.graph.output}
    second = "latent" if is_gta else "value"
    names = [f"{kind}.{i}" for i in range(layers) for kind in ("key", second)]
    assert list(inputs) == ["input_ids", "past_length", "logit_positions", *(f"past_{name}" for name in names)]
    assert list(outputs) == ["logits", *(f"present_{name}" for name in names)]
    assert inputs["input_ids"] == ["batch", "tokens"]
    assert inputs["logit_positions"] == ["batch", "positions"]
    assert outputs["logits"] == ["batch", "positions", entries["vocab_size"]]
    sizes = {"batch": "batch", "tokens": "tokens", "positions": "positions", "capacity": "capacity"}
    config = parse_config(entries)
    assert inputs == {name: list(shape) for name, shape in input_shapes(config, **sizes).items()}
    assert (list(inputs), list(outputs)) == interface_names(config)
    for name in names:
        assert inputs[f"past_{name}"] == outputs[f"present_{name}"]
        assert inputs[f"past_{name}"][0::2] == ["batch", "capacity"]
    assert not any("/" in prop.value for node in model.graph.node for prop in node.metadata_props), "paths leaked"


def test_chosen_positions(exported: tuple[dict, dict, Path]) -> None:
    entries, _, bundle = exported
    ids = np.random.default_rng(3).integers(0, entries["vocab_size"], (2, 6))
    session = plain_session(bundle)
    everything = run(session, empty_feeds(session, 2, 6), ids, np.zeros(2, np.int64))
    feeds = {**empty_feeds(session, 2, 6), "input_ids": ids, "past_length": np.zeros(2, np.int64)}
    chosen = np.array([[5, 0], [2, 2]])
    (some,) = session.run(["logits"], {**feeds, "logit_positions": chosen})
    np.testing.assert_allclose(some, everything[np.arange(2)[:, None], chosen], rtol=1e-4, atol=1e-5)
    (none,) = session.run(["logits"], {**feeds, "logit_positions": np.zeros((2, 0), np.int64)})
    assert none.shape == (2, 0, entries["vocab_size"])


@pytest.mark.parametrize("name", ["gta4-500m", "gqa"])
def test_the_onnx_reference_agrees(name: str, tmp_path: Path) -> None:
    entries = {**model_entries(name), "num_hidden_layers": 1}
    weights = write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp32", verify=False)
    model = onnx.load(tmp_path / "bundle" / "model.onnx")
    for initializer in model.graph.initializer:  # the evaluator wants the data at hand
        assert initializer.data_location != onnx.TensorProto.EXTERNAL
    evaluator = onnx.reference.ReferenceEvaluator(model)
    session = plain_session(tmp_path / "bundle")
    ids = np.random.default_rng(4).integers(0, entries["vocab_size"], (2, 4))
    feeds = empty_feeds(session, 2, 6)
    logits = run(evaluator, feeds, ids, np.zeros(2, np.int64))
    exact = exact_logits(entries, weights, ids)
    assert np.abs(logits - exact).max() <= TOLERANCE * exact.std()


# --- precision -----------------------------------------------------------------------------------------------------

KINDS = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", ["gta1-160m", "gta4-500m"])
@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_stored_in_the_precision(name: str, precision: str, dtype: str, tmp_path: Path) -> None:
    entries = model_entries(name)
    own = write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries), dtype)
    result = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision)
    assert result.report is not None
    assert result.report.passed
    if dtype == "bfloat16" and precision != "fp16":
        assert result.report.quantisation.max_abs_error == 0  # kept without loss

    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    matrices = {
        i.name: i.data_type for i in model.graph.initializer if len(i.dims) > 1 and i.name not in ("cos", "sin")
    }
    vectors = [i for i in model.graph.initializer if len(i.dims) == 1 and "proj" in i.name]
    assert set(matrices.values()) == {KINDS[precision]}
    assert {i.data_type for i in vectors} <= {onnx.TensorProto.FLOAT}

    stored = dict(read_weights(tmp_path / "bundle" / "model.onnx", result.bundle.config))
    assert stored.keys() == own.keys()
    spacing = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}[precision]
    for key, weight in stored.items():
        assert weight.shape == own[key].shape
        np.testing.assert_allclose(weight, own[key], rtol=spacing, atol=2.0**-25)

    # the graph computes in float32 with the weights as they are stored
    ids = np.random.default_rng(5).integers(0, entries["vocab_size"], (1, 7))
    exact = exact_logits(entries, stored, ids)
    session = plain_session(tmp_path / "bundle")
    logits = run(session, empty_feeds(session, 1, 8), ids, np.array([0]))
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() <= TOLERANCE * exact.std()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_default_precision_is_the_checkpoints_own(dtype: str, expected: str, tmp_path: Path) -> None:
    entries = {**model_entries("gta1-160m"), "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries), dtype)
    result = export_model(tmp_path / "checkpoint", tmp_path / "bundle", verify=False)
    assert result.bundle.precision == expected
    assert result.report is None


@pytest.mark.parametrize(
    "missing",
    [r"q_proj.bias", r"\.bias", r"layers.1.self_attn.g_proj.bias"],
    ids=["of one projection", "of all", "in one layer"],
)
def test_absent_biases(missing: str, tmp_path: Path) -> None:
    entries = model_entries("gta1-160m")
    everything = reference.random_weights(entries)
    weights = {name: weight for name, weight in everything.items() if not re.search(missing, name)}
    assert len(weights) < len(everything)
    write_checkpoint(tmp_path / "checkpoint", entries, weights)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle")
    ids = np.random.default_rng(6).integers(0, entries["vocab_size"], (1, 7))
    exact = exact_logits(entries, weights, ids)
    session = plain_session(tmp_path / "bundle")
    logits = run(session, empty_feeds(session, 1, 8), ids, np.array([0]))
    assert np.abs(logits - exact).max() <= TOLERANCE * exact.std()


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    entries = {**model_entries("gta1-160m"), "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    return tmp_path / "checkpoint"


def damage(checkpoint: Path, name: str, change: Any) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights[name] = change(weights[name].copy())
    save_file(weights, checkpoint / "model.safetensors")


# The last row of the table, which no check draws, and vectors, which are stored in the graph's own file.
@pytest.mark.parametrize(
    ("precision", "name", "value"),
    [
        ("fp32", "model.embed_tokens.weight", np.nan),
        ("bf16", "model.norm.weight", np.nan),
        ("int4", "model.layers.0.self_attn.g_proj.bias", -np.inf),
    ],
)
def test_one_weight_that_is_not_finite_fails_any_export(
    checkpoint: Path, precision: str, name: str, value: float
) -> None:
    def poison(weight: np.ndarray) -> np.ndarray:
        weight.flat[-1] = value
        return weight

    damage(checkpoint, name, poison)
    block = {"block_size": 16} if precision == "int4" else {}
    with pytest.raises(CheckpointError) as caught:
        export_model(checkpoint, checkpoint.parent / "bundle", precision=precision, verify=False, **block)
    said = rf"{re.escape(name)} holds {value} at \[.*\], 1 of \d+ values are not finite; "
    assert re.search(said, str(caught.value))
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint"]


def test_weights_beyond_bfloat16_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def enlarge(weight: np.ndarray) -> np.ndarray:
        weight.flat[3] = np.finfo(np.float32).max
        return weight

    damage(checkpoint, "model.layers.0.self_attn.k_proj.weight", enlarge)
    with pytest.raises(ExportError, match=r"k_proj.weight has values up to 3.403e\+38, beyond bfloat16; use fp32"):
        export_model(checkpoint, tmp_path / "bundle", precision="bf16", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_tables_that_are_too_large_are_refused_at_once(checkpoint: Path, tmp_path: Path) -> None:
    entries = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**entries, "max_position_embeddings": 2**31 - 1}))
    with pytest.raises(ConfigError, match=r"max_position_embeddings is 2147483647 .* lower max_position_embeddings"):
        export_model(checkpoint, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_weights_beyond_half_precision_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    damage(checkpoint, "model.layers.0.self_attn.v_b_proj.weight", lambda weight: weight * 1e6)
    with pytest.raises(ExportError, match=r"v_b_proj.weight has values up to .*; use bf16 or fp32"):
        export_model(checkpoint, tmp_path / "bundle", precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_wrong_graph_fails_the_check(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = function().replace("open_gate = Sigmoid (gate)", "open_gate = Identity (gate)")
    assert wrong != function()
    monkeypatch.setattr("gta_edge.graph.io.function", lambda *form: wrong)
    with pytest.raises(ExportError, match="max_rel_error"):
        export_model(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_wrongly_stored_weight_fails_the_check(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gta_edge.export.passes import store_weights

    kept = store_weights.to_stored

    def scaled(array: np.ndarray, name: str, shape: Any, dtype: Any) -> np.ndarray:
        return kept(array * (2 if "o_proj" in name else 1), name, shape, dtype)

    monkeypatch.setattr(store_weights, "to_stored", scaled)
    with pytest.raises(ExportError, match=r"weights stored in fp32 are not the checkpoint.s: .*o_proj\.weight"):
        export_model(checkpoint, tmp_path / "bundle")


def test_unknown_precision(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision is 'fp8'; expected one of fp32, fp16, bf16"):
        export_model(checkpoint, tmp_path / "bundle", precision="fp8")


def test_output_is_not_its_own_input(checkpoint: Path) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    with pytest.raises(OutputError, match="is the input"):
        export_model(checkpoint, checkpoint, force=True)
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_the_public_function(checkpoint: Path, tmp_path: Path) -> None:
    result = gta_edge.export_model(checkpoint, tmp_path / "bundle", verify=False)
    assert isinstance(result.bundle, Bundle)
    manifest = json.loads((tmp_path / "bundle" / "gta_edge.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["cache"][0] == {"name": "key", "heads": 1, "width": 16, "dtype": "float32"}
    assert (tmp_path / "bundle" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_progress_reaches_its_end(checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(what: str, done: int, total: int) -> None:
        assert seen.get(what, (0, 0))[0] <= done <= total
        seen[what] = (done, total)

    export_model(checkpoint, tmp_path / "bundle", progress=progress)
    assert {"tracing the model", "writing weights", "checking against PyTorch"} <= seen.keys()
    assert all(done == total for done, total in seen.values())
