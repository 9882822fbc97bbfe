"""Each graph pass: what it changes, that it changes nothing else, and that it says when there was nothing to do."""

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gta_edge.export.graph import _traced, traced
from gta_edge.export.passes.attach_functions import AttachFunctionsPass
from gta_edge.export.passes.fold_weight_views import FoldWeightViewsPass
from gta_edge.export.passes.stamp_layers import RepeatLayersPass
from gta_edge.export.passes.store_weights import StoreWeightsPass
from gta_edge.export.passes.tie_head import TieHeadPass
from gta_edge.export.trace import trace
from gta_edge.formats.weights import TRANSPOSED
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import interface_names
from gta_edge.model.rope import rope_tables
from tests.helpers import reference
from tests.helpers.small_models import write_bundle

EMBEDDING = "model.embed_tokens.weight"
SMALL = {"vocab_size": 61, "max_position_embeddings": 24, "num_hidden_layers": 1}
MODELS = {
    "tied": reference.gta_entries(heads=4, n_q=2, e=2, **SMALL),
    "untied": reference.gta_entries(heads=4, n_q=2, e=2, tie_word_embeddings=False, **SMALL),
    "baseline": reference.llama_entries(**SMALL),
}


@functools.cache
def _traced_model(name: str, layers: int) -> ir.Model:
    """What the tracer gives for a model; not to be changed."""
    entries = {**MODELS[name], "num_hidden_layers": layers}
    biases = [name for name in reference.random_weights(entries) if name.endswith(".bias")]
    return trace(parse_config(entries), biases)


class Case:
    """A traced model with its weights."""

    def __init__(self, name: str, layers: int = 1) -> None:
        self.entries = {**MODELS[name], "num_hidden_layers": layers}
        self.config = parse_config(self.entries)
        self.weights = reference.random_weights(self.entries)
        cos, sin = rope_tables(16, 10000.0, self.config.rope_scaling, 24)
        self.tables = {"cos": cos, "sin": sin}
        self.model = _traced_model(name, layers).clone()
        for value in self.model.graph.initializers.values():
            value.type = ir.TensorType(value.dtype)  # a copy's is the original's own

    def attach(self) -> None:
        """Attach the weights as they are, by name: what the tracer's graph means."""
        for name, value in self.model.graph.initializers.items():
            value.const_value = ir.tensor({**self.weights, **self.tables}[name].astype(np.float32), name=name)

    def store(self, precision: str = "fp32") -> ir.passes.PassResult:
        return StoreWeightsPass(self.weights.__getitem__, self.tables, precision)(self.model)

    def logits(self, path: Path) -> np.ndarray:
        ir.save(self.model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        feeds = {
            value.name: np.zeros((1, value.shape[1], 8, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_") and value.name != "past_length"
        }
        feeds["input_ids"] = np.array([[3, 1, 4, 1, 5]])
        feeds["past_length"], feeds["logit_positions"] = np.array([0]), np.array([[0, 4]])
        return session.run(["logits"], feeds)[0]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_pass_keeps_the_meaning(case: Case, tmp_path: Path) -> None:
    case.attach()
    assert AttachFunctionsPass()(case.model).modified
    expected = case.logits(tmp_path / "traced.onnx")
    assert expected.std() > 0.1

    tied = case.config.tie_word_embeddings
    assert TieHeadPass(EMBEDDING)(case.model).modified == tied
    np.testing.assert_allclose(case.logits(tmp_path / "tied.onnx"), expected, rtol=1e-4, atol=1e-4)

    assert FoldWeightViewsPass()(case.model).modified
    case.store()
    np.testing.assert_allclose(case.logits(tmp_path / "folded.onnx"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_stamped_layers_are_traced_layers(name: str, tmp_path: Path) -> None:
    case = Case(name, layers=3)
    stamped, case.model = case.model, traced(case.config, [n for n in case.weights if n.endswith(".bias")])
    graphs = []
    for model in (stamped, case.model):
        case.model = model
        case.attach()
        AttachFunctionsPass()(model)
        # sizes that follow from none of its layers are there once in the one, and in each layer in the other
        kinds = [n.op_type for n in model.graph if n.op_type not in ("Constant", "Concat")]
        graphs.append((kinds, [v.name for v in (*model.graph.inputs, *model.graph.outputs)]))
        graphs[-1][0].sort()
        logits = case.logits(tmp_path / f"{len(graphs)}.onnx")
    assert graphs[0] == graphs[1]
    case.model = stamped
    np.testing.assert_array_equal(case.logits(tmp_path / "again.onnx"), logits)


def test_a_single_layer_needs_no_stamp() -> None:
    case = Case("tied")
    assert not RepeatLayersPass(1, interface_names(case.config))(case.model).modified


def test_a_second_run_changes_nothing(case: Case) -> None:
    for run in (TieHeadPass(EMBEDDING), FoldWeightViewsPass(), AttachFunctionsPass()):
        run(case.model)
        assert not run(case.model).modified, type(run).__name__


def test_tied_head_shares_the_table(tmp_path: Path) -> None:
    case = Case("tied")
    TieHeadPass(EMBEDDING)(case.model)
    users = sorted(node.op_type for node, _ in case.model.graph.initializers[EMBEDDING].uses())
    assert users == ["Gather", "Gemm"]
    assert case.model.graph.outputs[0].name == "logits"


def test_folded_weights_are_named_for_their_view(case: Case) -> None:
    TieHeadPass(EMBEDDING)(case.model)
    FoldWeightViewsPass()(case.model)
    initializers = case.model.graph.initializers
    assert not [n for v in initializers.values() for n, _ in v.uses() if n.op_type in ("Transpose", "Reshape")]
    shapes = {name: tuple(value.shape.numpy()) for name, value in initializers.items()}
    for name, weight in case.weights.items():
        if name.endswith("v_b_proj.weight"):
            assert shapes[name] == (2, 32, 64)  # n_q, d_l, e·d_l
        elif weight.ndim == 2 and name != EMBEDDING:
            assert shapes[name + TRANSPOSED] == weight.shape[::-1]
        else:
            assert shapes[name] == weight.shape
    assert len(shapes) == len(case.weights) + 2  # cos and sin


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_stored_types_are_cast_where_they_are_used(case: Case, precision: str) -> None:
    TieHeadPass(EMBEDDING)(case.model)
    FoldWeightViewsPass()(case.model)
    case.store(precision)
    stored = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    for name, value in case.model.graph.initializers.items():
        assert value.dtype == value.const_value.dtype
        if name in case.tables or len(value.shape) == 1:
            assert value.dtype == ir.DataType.FLOAT
            continue
        assert value.dtype == stored
        for node, _ in value.uses():
            if node.op_type == "Gather":  # the rows that are looked up, not the table
                ((node, _),) = node.outputs[0].uses()
            assert node.op_type == "Cast"
            assert node.attributes["to"].value == ir.DataType.FLOAT


def test_nothing_is_read_before_it_is_written(case: Case) -> None:
    FoldWeightViewsPass()(case.model)

    def read(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    StoreWeightsPass(read, case.tables, "bf16")(case.model)
    with pytest.raises(AssertionError, match="was read"):
        next(v for n, v in case.model.graph.initializers.items() if n not in case.tables).const_value.numpy()


def test_what_was_traced_for_an_earlier_export_is_as_traced(tmp_path: Path) -> None:
    """A model is traced once for all its exports, and what passes did to the graph of one is not in the next."""
    bundles = {}
    for i, precision in enumerate(["fp32", "int4", "fp16", "fp32"]):
        bundles[i] = write_bundle(tmp_path / str(i), "more keys", precision)
    graphs = [(bundles[i] / "model.onnx").read_bytes() for i in bundles]
    assert graphs[0] == graphs[3]
    _traced.cache_clear()
    again = write_bundle(tmp_path / "again", "more keys", "fp16")
    assert (again / "model.onnx").read_bytes() == graphs[2]
