"""The graph that is made for ONNX Runtime, and what sessions on it compute."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from gta_edge.formats.bundle import WEIGHTS
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.lowered_bundles import EXACT, EXACT_GRAPH, GRAPH, KEPT, PACKED, ROUNDED, assert_right, logits
from tests.helpers.small_models import MODELS, formula_logits, write_bundle, write_bundle_of

CASES = [
    *(("more keys", precision) for precision in ("fp32", "bf16", "int8", "int4")),
    *(("as many", precision) for precision in ("int8 in blocks", "int4")),
    *(("more latents", "int4"), ("one of each", "int8")),
    *(("baseline", precision) for precision in ("int8", "int4")),
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_logits_are_those_of_the_formula(name: str, precision: str, tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "bundle", name, precision)
    wanted = formula_logits(directory)
    exact, default = logits(directory, exact=True), logits(directory)
    assert (directory / KEPT / GRAPH).exists()  # it ran that graph
    assert reference.relative_error(exact, wanted) <= EXACT
    if precision.startswith("int"):
        assert 1e-3 < reference.relative_error(default, wanted) <= ROUNDED
    else:
        np.testing.assert_array_equal(default, exact)


def test_logits_of_fp16(tmp_path: Path) -> None:
    """The value decoder, too, is float16 then, and has to be cast before the tile of the mix is folded into it."""
    directory = write_bundle(tmp_path / "bundle", "as many", "fp16")
    np.testing.assert_array_equal(logits(directory), logits(directory, exact=True))
    assert_right(directory)


# --- the graph -------------------------------------------------------------------------------------------------------


def op_types(directory: Path) -> Counter[str]:
    graph = onnx.load(directory / KEPT / GRAPH, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_what_all_layers_share_is_there_once(tmp_path: Path) -> None:
    """The mask, positions and sizes do not depend on the layer; and each layer costs the same."""
    counts = []
    for layers in (1, 2, 4):
        entries = {**MODELS["as many"], "num_hidden_layers": layers}
        directory = write_bundle_of(tmp_path / f"{layers}", entries, reference.random_weights(entries), "int4")
        load(directory, "onnxruntime").close()
        counts.append(op_types(directory))
    one, two, four = counts
    layer = {kind: two[kind] - one[kind] for kind in two}
    assert {kind: four[kind] - two[kind] for kind in four} == {kind: 2 * number for kind, number in layer.items()}
    for kind in ("LessOrEqual", "Where", "Range", "Tile", "Shape"):
        assert one[kind] > 0
        assert layer[kind] == 0
    assert one["LessOrEqual"] == 1
    assert one["DequantizeLinear"] == one["GroupedLatentAttention"] == 0
    assert sum(layer.values()) - layer["Constant"] <= 40


def test_weights_that_stay_as_they_are_are_not_written_again(kept: Path) -> None:
    """The tables and norms lie in the bundle's own file; only what is in integers gets a layout of its own."""
    graph = onnx.load(kept / KEPT / GRAPH, load_external_data=False).graph
    places: dict[str, set[str]] = {}
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                places.setdefault(entry.value, set()).add(tensor.name)
    assert {f"{KEPT}/{PACKED}"} <= set(places) <= {WEIGHTS, f"{KEPT}/{PACKED}"}
    made = (".codes", ".scales", ".with_tile", ".packed")
    assert "model.embed_tokens.weight.packed" in places[f"{KEPT}/{PACKED}"]
    assert not {name for name in places.get(WEIGHTS, ()) if name.endswith(made)}
    assert not {name for name in places[f"{KEPT}/{PACKED}"] if not name.endswith(made)}


def test_the_same_bundle_gives_the_same_graph(kept: Path, bundle: Path) -> None:
    """To the byte, so two processes that lower at once can use each other's files."""
    load(bundle, "onnxruntime").close()
    for name in (GRAPH, EXACT_GRAPH, PACKED):
        assert (bundle / KEPT / name).read_bytes() == (kept / KEPT / name).read_bytes()
