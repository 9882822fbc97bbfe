"""The check of an export of the real model: it passes, ill-conditioned as it is, and planted faults are found."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.accuracy.expected import Reference
from gta_edge.accuracy.probes import LATE, RANDOM, TEXT, encoder, probes
from gta_edge.accuracy.storage import WeightComparison
from gta_edge.accuracy.tolerance import FLOAT32_BOUND
from gta_edge.export.check import check_export
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import StoredWeights
from tests.helpers import planted
from tests.helpers.planted import ChangedCheckpoint

pytestmark = pytest.mark.real_model

LAYER = "model.layers.12."
QUERY, GATE, UP, DOWN = (
    f"{LAYER}{name}.weight" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def source(smollm2: Path) -> Checkpoint:
    return Checkpoint.open(smollm2)


def test_what_it_is_asked_for(smollm2: Path, source: Checkpoint) -> None:
    asked = {probe.name: probe for probe in probes(source.config, encoder(smollm2))}
    assert asked.keys() == {RANDOM, TEXT, LATE}
    assert asked[LATE].past > 1000
    assert asked[TEXT].ids.shape == (1, 128)


def test_it_passes_without_loss(source: Checkpoint, fp32_bundle: Path) -> None:
    report = check_export(Bundle.open(fp32_bundle), source)
    assert report.passed
    found = report.backends["onnxruntime"]
    assert found.max_rel_error > FLOAT32_BOUND  # at the position that is ill-conditioned
    assert found.bound_fraction < 0.5
    assert report.weights["equal"] == report.weights["compared"] == len(source.names)


def test_a_wrong_graph_is_found(
    source: Checkpoint, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is right passes, in int4."""
    compute, computed = Reference.compute, []

    def once(*arguments: Any) -> Reference:
        """Of the weights, which are those of both bundles; in float64 it takes most of the check's time."""
        if not computed:
            computed.append(compute(*arguments))
        return computed[0]

    monkeypatch.setattr(Reference, "compute", once)
    bundle = shutil.copytree(int4_bundle, tmp_path / "bundle")
    report = check_export(Bundle.open(bundle), source)
    assert report.passed
    assert report.backends["onnxruntime"].bound_fraction < 0.5
    report = check_export(planted.planted(bundle, planted.multiplied(UP, 1.01)), source)
    (failure,) = report.failures
    assert failure.startswith("onnxruntime: max_rel_error ")
    assert "layer 13's cache is the first that differs" in failure
    assert report.backends["onnxruntime"].bound_fraction > 5


FAULTS: dict[str, tuple[str, planted.Change]] = {
    "1% on a matrix": (UP, lambda w: w * np.float32(1.01)),
    "scale off by 2%": (DOWN, lambda w: w * np.float32(1.02)),
    "two heads swapped": (QUERY, planted.heads_swapped(64)),
    "negated gate": (GATE, np.negative),
    "inputs shifted": (UP, lambda w: np.roll(w, 1, axis=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_wrong_weights_are_found(
    source: Checkpoint, precision: str, fault: str, request: pytest.FixtureRequest
) -> None:
    opened = Bundle.open(request.getfixturevalue(f"{precision}_bundle"))
    stored = StoredWeights(opened.model_path, opened.config)
    name, change = FAULTS[fault]
    right, wrong = source, ChangedCheckpoint(source, {name: change})
    for checkpoint, problems in ((right, 0), (wrong, 1)):
        found = WeightComparison(stored, checkpoint)  # it reads as one
        found.read(name)
        assert len(found.problems) == problems
    assert name in found.problems[0]


def test_another_layer_s_weights_are_found(source: Checkpoint, int4_bundle: Path) -> None:
    opened = Bundle.open(int4_bundle)
    other = ChangedCheckpoint(source, {UP: lambda _: source.read(UP.replace(".12.", ".13."))})
    found = WeightComparison(StoredWeights(opened.model_path, opened.config), other)  # likewise
    found.read(UP)
    assert "of its norm in output" in found.problems[0]
