"""Bundles in int8 and int4: what is stored, in which form, and that the graph computes with exactly that."""

import collections
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import gta_edge
from gta_edge.errors import BundleError, ExportError, InputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from tests.helpers import reference
from tests.helpers.bundle_files import edit_model, forge, manifest_of, refused, relist, write
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.commands import Result
from tests.helpers.exported_graphs import TOLERANCE, empty_feeds, exact_logits, run
from tests.helpers.exports import export_refused

Command = Callable[..., Result]

MODEL, DATA = "model.onnx", "model.onnx.data"
TABLE = "model.embed_tokens.weight"
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")  # not with activations rounded to int8
VOCABULARY, POSITIONS = 97, 24
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "intermediate_size": 256}

MODELS: dict[str, dict[str, Any]] = {
    "tied": reference.gta_entries(heads=4, n_q=2, d_l=64, **SMALL),
    "several heads, untied": reference.gta_entries(
        heads=8, n_q=4, n_k=2, n_c=2, d_l=32, tie_word_embeddings=False, **SMALL
    ),
    "without biases": reference.gta_entries(heads=4, n_q=2, d_l=32, e=2, **{**SMALL, "intermediate_size": 320}),
    "odd widths, untied": reference.gta_entries(
        heads=3, n_q=3, d_l=24, tie_word_embeddings=False, **{**SMALL, "intermediate_size": 180}
    ),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
    "mha, untied": reference.llama_entries(heads=4, n_kv=4, d_h=32, tie_word_embeddings=False, **SMALL),
}
# model, precision, block size asked for, and stored, precision of embedding and head
CASES: list[tuple[str, str, int | None, int | None, str | None]] = [
    ("tied", "int4", None, 32, None),
    ("tied", "int4", 16, 16, "int4"),
    ("tied", "int8", None, None, None),
    ("several heads, untied", "int4", 64, 64, "int4"),
    ("odd widths, untied", "int8", None, None, None),
    ("without biases", "int4", 16, 16, "int8"),
    ("gqa", "int8", 16, 16, None),
    ("mha, untied", "int4", 128, 128, None),
]


def checkpoint_of(name: str, directory: Path) -> dict[str, np.ndarray]:
    weights = reference.random_weights(MODELS[name])
    if name == "without biases":
        weights = {n: w for n, w in weights.items() if not n.endswith(".bias")}
    return write_checkpoint(directory, MODELS[name], weights)


# --- what is stored, read with ONNX and numpy alone ------------------------------------------------------------------

STORED_TYPES = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.INT32: np.dtype("<i4"),
}


def content(tensor: onnx.TensorProto) -> np.ndarray:
    """The numbers of an initializer, from its bytes."""
    if tensor.data_type == onnx.TensorProto.INT4:
        pairs = np.frombuffer(tensor.raw_data, np.uint8).astype(np.int64)
        signed = np.stack([pairs % 16, pairs // 16], axis=1).reshape(-1)  # the low half comes first
        return np.where(signed > 7, signed - 16, signed).reshape(tensor.dims)
    return np.frombuffer(tensor.raw_data, STORED_TYPES[tensor.data_type]).reshape(tensor.dims)


def spread(scales: np.ndarray, width: int) -> np.ndarray:
    """A scale for each weight, [in, out] in float64, from one per block or per channel."""
    scales = scales.astype(np.float64)
    return scales.repeat(width // len(scales), axis=0) if scales.ndim == 2 else np.tile(scales, (width, 1))


class Stored:
    """A bundle's initializers."""

    def __init__(self, bundle: Path) -> None:
        self.model = onnx.load(bundle / MODEL)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.arrays = {name: content(tensor) for name, tensor in self.tensors.items()}
        self.matrices = [name for name in self.arrays if name.endswith(".transposed")]

    def codes(self, name: str) -> np.ndarray:
        """[out, in]"""
        return self.arrays[name].T

    def table_codes(self) -> np.ndarray:
        """[V, H], without their offset."""
        if f"{TABLE}.packed" not in self.arrays:  # looked up in the head's matrix
            return self.codes(f"{TABLE}.transposed")
        words = self.arrays[f"{TABLE}.packed"].astype(np.int64) % 2**32
        width = self.scales(TABLE).shape[1]
        count = width // words.shape[1]  # codes in a word, the first in the lowest bits
        radix = 2 ** (32 // count)
        codes = np.empty((words.shape[0], width), np.int64)
        for i in range(count):
            codes[:, i::count] = words // radix**i % radix - radix // 2
        return codes

    def scales(self, parameter: str) -> np.ndarray:
        """One for each weight, [out, in]."""
        # an untied table, which is in bytes alone, is as wide as the model
        inputs = len(self.arrays.get(f"{parameter}.transposed", self.arrays["model.norm.weight"]))
        return spread(self.arrays[f"{parameter}.transposed.scale"], inputs).T

    def weights(self) -> dict[str, np.ndarray]:
        """What the graph computes with, by the checkpoint's names; a tied head too, since it has codes of its own."""
        found = {TABLE: self.table_codes() * self.scales(TABLE)}
        for name, array in self.arrays.items():
            parameter = name.removesuffix(".transposed")
            if parameter != name:
                found["lm_head.weight" if parameter == TABLE else parameter] = array.T * self.scales(parameter)
            elif name.endswith("v_b_proj.weight"):
                heads, latent, width = array.shape
                found[name] = array.astype(np.float64).reshape(width, heads * latent)
            elif array.ndim == 1 and not name.endswith(".scale"):
                found[name] = array.astype(np.float64)
        return found


@dataclass(frozen=True)
class Exported:
    entries: dict[str, Any]
    own: dict[str, np.ndarray]
    bundle: Path
    precision: str
    block: int | None
    tables: tuple[int, int | None]
    stored: Stored

    @property
    def shared(self) -> bool:
        """Whether the table is looked up in the head's matrix."""
        return self.tied and self.tables[0] == 8

    def form(self, parameter: str) -> tuple[int, int | None]:
        """Bits and block size of a quantised matrix; of a tied head those of the table."""
        return self.tables if parameter in (TABLE, "lm_head.weight") else (int(self.precision[3:]), self.block)

    @property
    def tied(self) -> bool:
        return bool(self.entries["tie_word_embeddings"])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(str(each or "default") for each in case))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, precision, asked, block, embedding = request.param
    directory = tmp_path_factory.mktemp("quantized")
    own = checkpoint_of(name, directory / "checkpoint")
    bundle = directory / "bundle"
    options = {"precision": precision, "block_size": asked, "embedding_precision": embedding, "verify": False}
    export_model(directory / "checkpoint", bundle, **options)
    tables = (8, None) if precision == "int4" and embedding != "int4" else (int(precision[3:]), block)
    return Exported(MODELS[name], own, bundle, precision, block, tables, Stored(bundle))


def plain_session(bundle: Path, optimised: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # copying the cache is meant here
    options.add_session_config_entry(*EXACT)
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(bundle / MODEL, options, providers=["CPUExecutionProvider"])


def test_logits_follow_the_formula_with_the_stored_weights(exported: Exported) -> None:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 10))
    exact = exact_logits(exported.entries, exported.stored.weights(), ids)
    session = plain_session(exported.bundle)
    feeds = empty_feeds(session, 2, 12)
    prompt = run(session, feeds, ids[:, :7], np.array([0, 0]))
    rest = [run(session, feeds, ids[:, i : i + 1], np.array([i, i])) for i in range(7, 10)]
    assert reference.relative_error(np.concatenate([prompt, *rest], axis=1), exact) <= TOLERANCE
    own = exact_logits(exported.entries, exported.own, ids)
    assert reference.relative_error(exact, own) > 10 * TOLERANCE  # which storing them did change


def test_rows_of_different_length(exported: Exported) -> None:
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (3, 7))
    session = plain_session(exported.bundle)
    feeds = empty_feeds(session, 3, 12)
    run(session, feeds, ids[:, :5], np.zeros(3, np.int64))
    lengths = np.array([5, 1, 3])  # what was written beyond them is padding
    logits = run(session, feeds, ids[:, 5:], lengths)
    for row, length in enumerate(lengths):
        tokens = np.concatenate([ids[row, :length], ids[row, 5:]])
        exact = exact_logits(exported.entries, exported.stored.weights(), tokens[None])[0, length:]
        assert reference.relative_error(logits[row], exact) <= TOLERANCE


def test_the_stored_weights_are_the_checkpoints(exported: Exported) -> None:
    stored = exported.stored
    weights = stored.weights()
    head = "lm_head.weight"
    own = {**exported.own, head: exported.own.get(head, exported.own[TABLE])}
    assert weights.keys() == own.keys()
    quantised = {name for name, weight in own.items() if weight.ndim == 2 and "v_b_proj" not in name}
    for name in quantised:
        parameter = TABLE if name == head and exported.tied else name
        bits, _ = exported.form(name)
        lowest, highest = (-8, 7) if bits == 4 else (-127, 127)
        codes = stored.table_codes() if name == TABLE else stored.codes(f"{parameter}.transposed")
        assert codes.shape == own[name].shape
        assert lowest <= codes.min() < 0 < codes.max() <= highest
        scales = stored.scales(parameter)
        away = np.abs(weights[name] - own[name])
        cut_off = np.isin(codes, (lowest, highest))
        assert (away <= scales * 0.51)[~cut_off].all(), name
        energy = np.sqrt((away**2).mean()) / own[name].std()
        assert energy <= {4: 0.12, 8: 0.01}[bits], name


def test_what_stays_in_high_precision(exported: Exported) -> None:
    others = {name for name in exported.own if exported.own[name].ndim == 1 or "v_b_proj" in name}
    for name in others:
        tensor, own = exported.stored.tensors[name], exported.own[name]
        if own.ndim == 1:
            assert tensor.data_type == onnx.TensorProto.FLOAT
            np.testing.assert_array_equal(exported.stored.arrays[name], own)
        else:
            assert tensor.data_type == onnx.TensorProto.FLOAT16
            np.testing.assert_array_equal(exported.stored.arrays[name].reshape(own.shape), own.astype(np.float16))
    assert any("layernorm" in name for name in others)
    assert any("v_b_proj" in name for name in others) == ("num_query_heads" in exported.entries)


def test_read_weights_means_the_same(exported: Exported) -> None:
    found = dict(read_weights(exported.bundle / MODEL, Bundle.open(exported.bundle).config))
    assert found.keys() == exported.own.keys()
    for name, expected in exported.stored.weights().items():
        if name in found:  # a tied head is no parameter
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], expected, err_msg=name)  # a code times float16 is exact


def test_a_tied_head_has_the_tables_codes(exported: Exported) -> None:
    arrays = exported.stored.arrays
    assert (f"{TABLE}.transposed" in arrays) == exported.tied
    assert ("lm_head.weight.transposed" in arrays) == (not exported.tied)
    assert (f"{TABLE}.packed" in arrays) == (not exported.shared)
    if exported.tied:
        np.testing.assert_array_equal(exported.stored.table_codes(), arrays[f"{TABLE}.transposed"].T)
    assert [name for name in arrays if name.startswith(TABLE) and name.endswith(".scale")] == [
        f"{TABLE}.transposed.scale"
    ]


# --- the form it is stored in ----------------------------------------------------------------------------------------


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_matrices_are_in_the_standards_own_form(exported: Exported) -> None:
    onnx.checker.check_model(exported.bundle / MODEL, full_check=True)
    stored, nodes = exported.stored, exported.stored.model.graph.node
    makers = {output: node for node in nodes for output in node.output}
    users = collections.defaultdict(list)
    for node in nodes:
        for index, name in enumerate(node.input):
            users[name].append((node, index))
    outputs = {value.name for value in stored.model.graph.output}

    kinds = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
    expected = {name: kinds[exported.form(name.removesuffix(".transposed"))[0]] for name in stored.matrices}
    found = {name: tensor.data_type for name, tensor in stored.tensors.items()}
    found.pop(f"{TABLE}.columns", None)
    assert {name: kind for name, kind in found.items() if kind in kinds.values()} == expected
    dequantised = [node for node in nodes if node.op_type == "DequantizeLinear"]
    assert sorted(node.input[0] for node in dequantised) == sorted(stored.matrices)
    for node in dequantised:
        assert len(node.input) == 2  # no zero point: codes are symmetric
        _, block = exported.form(node.input[0].removesuffix(".transposed"))
        assert attributes(node) == ({"axis": 0, "block_size": block} if block else {"axis": 1})
        cast = makers[node.input[1]]
        assert cast.op_type == "Cast"
        assert attributes(cast) == {"to": onnx.TensorProto.FLOAT}
        assert cast.input[0] == f"{node.input[0]}.scale"
        assert stored.tensors[cast.input[0]].data_type == onnx.TensorProto.FLOAT16
        assert [user.op_type for user, _ in users[cast.output[0]]] == ["DequantizeLinear"]
        assert node.output[0] not in outputs
        assert [(user.op_type, index) for user, index in users[node.output[0]]] == [("MatMul", 1)]
    for name in stored.matrices:
        assert [(user.op_type, index) for user, index in users[name]] == [("DequantizeLinear", 0)]
    looked_up = f"{TABLE}.{'columns' if exported.shared else 'packed'}"
    assert [user.op_type for user, _ in users[looked_up]] == ["Gather"]

    domains = {node.domain for node in nodes} | {o.domain for o in stored.model.opset_import}
    domains |= {node.domain for function in stored.model.functions for node in function.node}
    assert domains <= {"", "gta"}


def test_scales_are_one_per_block_or_channel(exported: Exported) -> None:
    parameters = [name.removesuffix(".transposed") for name in exported.stored.matrices]
    for parameter in {*parameters, TABLE}:
        outputs, inputs = exported.own[parameter].shape
        scales = exported.stored.arrays[f"{parameter}.transposed.scale"]
        _, block = exported.form(parameter)
        assert scales.shape == ((inputs // block, outputs) if block else (outputs,))
        assert np.isfinite(scales).all()
        assert (scales > 0).all()
    manifest = manifest_of(exported.bundle)
    assert (manifest["precision"], manifest["block_size"]) == (exported.precision, exported.block)
    opened = Bundle.open(exported.bundle)
    assert (opened.precision, opened.block_size) == (exported.precision, exported.block)
    for parameter in {*parameters, TABLE}:
        bits, block = exported.form(parameter)
        assert opened.storage.of(parameter) == (f"int{bits}", block)


def test_nothing_is_stored_twice_or_wide(exported: Exported) -> None:
    expected = 2 * 4 * POSITIONS * exported.entries.get("key_dim", exported.entries["head_dim"]) // 2  # cos and sin
    for name, weight in exported.own.items():
        if weight.ndim == 1:
            expected += 4 * weight.size
        elif "v_b_proj" in name:
            expected += 2 * weight.size
        else:
            outputs, inputs = weight.shape
            # looked up in words, multiplied by as a matrix
            twice = 2 if name == TABLE and exported.tied and not exported.shared else 1
            bits, block = exported.form(name)
            expected += twice * weight.size * bits // 8
            expected += 2 * outputs * (inputs // block if block else 1)
    tensors = exported.stored.tensors.items()
    initializers = {name: len(tensor.raw_data) for name, tensor in tensors if not name.endswith(".columns")}
    assert sum(initializers.values()) == expected
    in_graph = sum(len(a.t.raw_data) for n in exported.stored.model.graph.node for a in n.attribute if a.HasField("t"))
    assert in_graph < 1024  # constants of the arithmetic alone
    sizes = [(exported.bundle / name).stat().st_size for name in (MODEL, DATA)]
    assert sizes[1] <= expected + 64 * 1024  # the gaps between them
    assert sum(sizes) <= expected + 128 * 1024


def test_onnx_runtime_multiplies_by_the_codes(exported: Exported, tmp_path: Path) -> None:
    plain_session(exported.bundle, tmp_path / "optimised.onnx")
    model = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    fused = [attributes(node) for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
    expected = [exported.stored.arrays[name].shape for name in exported.stored.matrices]
    assert sorted((a["K"], a["N"]) for a in fused) == sorted(expected)
    for entry in fused:
        found = [n for n in exported.stored.matrices if exported.stored.arrays[n].shape == (entry["K"], entry["N"])]
        forms = {exported.form(name.removesuffix(".transposed")) for name in found}
        assert (entry["bits"], entry["block_size"]) in forms or (entry["bits"], None) in forms


def test_the_onnx_reference_agrees(exported: Exported) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(exported.stored.model)
    ids = np.random.default_rng(4).integers(0, VOCABULARY, (2, 3))
    logits = run(evaluator, empty_feeds(plain_session(exported.bundle), 2, 4), ids, np.zeros(2, np.int64))
    exact = exact_logits(exported.entries, exported.stored.weights(), ids)
    assert reference.relative_error(logits, exact) <= TOLERANCE


# --- refused ---------------------------------------------------------------------------------------------------------


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
