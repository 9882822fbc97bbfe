"""Bundles in int8 and int4: what is stored, in which form, and that the graph computes with exactly that."""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest

from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from tests.helpers import reference
from tests.helpers.bundle_files import manifest_of
from tests.helpers.exported_graphs import TOLERANCE, empty_feeds, exact_logits, run
from tests.helpers.quantized_models import MODELS, POSITIONS, VOCABULARY, checkpoint_of
from tests.helpers.stored_weights import DATA, MODEL, TABLE, Stored

EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")  # not with activations rounded to int8
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
