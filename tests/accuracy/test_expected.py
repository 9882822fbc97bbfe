"""What PyTorch answers in float64, layer by layer, against the formula; and how far narrower arithmetic is off."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")

from gta_edge.accuracy.expected import Reference, arithmetic_of, distances
from gta_edge.accuracy.layerwise import Arithmetic
from gta_edge.accuracy.probes import Probe, probes
from gta_edge.errors import BundleError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.small_models import IDS, MODELS, WEIGHTS, formula_logits, write_bundle

PROBES = [Probe(f"row {i}", row[None], len(row) - 2) for i, row in enumerate(IDS)]


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("expected") / "checkpoint"
    write_checkpoint(directory, MODELS[name], WEIGHTS[name])
    return Checkpoint.open(directory)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_it_is_the_formula_in_float64(name: str, checkpoint: Checkpoint, precision: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", name, precision)
    found = Reference.compute(Bundle.open(bundle), checkpoint, PROBES)
    wanted = formula_logits(bundle)
    for each, row in zip(found.expected, wanted, strict=True):
        np.testing.assert_allclose(each.logits, row, rtol=0, atol=3e-7 * row.std())  # rounded once to float32
        assert each.spread == pytest.approx(row.std(), rel=1e-6)
        assert (each.distance < 1e-4).all()
        assert (each.distance > 0).any()
        assert [cache.shape for cache in each.caches[0]] == [
            (1, cache.heads, IDS.shape[1], cache.width) for cache in checkpoint.config.caches
        ]
    own = formula_logits(write_bundle(tmp_path / "own", name, "fp32"))[-1]
    largest = np.abs(found.expected[-1].logits - own).max()
    assert found.quantisation.max_abs_error == pytest.approx(largest, rel=1e-3, abs=1e-5)
    assert found.problems == ()
    if precision == "fp32":
        assert found.weights.counts == {"compared": len(WEIGHTS[name]), "equal": len(WEIGHTS[name])}


def test_narrower_arithmetic_is_further_off(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "bundle", name, "fp32"))
    expected = Reference.compute(bundle, checkpoint, PROBES).expected
    typical = {
        what: float(np.median(np.concatenate(distances(bundle, expected, arithmetic))))
        for what, arithmetic in {
            "fp32": Arithmetic(),
            "fp16": Arithmetic("fp16"),
            "bf16": Arithmetic("bf16"),
            "int8 cache": Arithmetic("fp16", cache="int8"),
            "fp8 cache": Arithmetic("fp16", cache="fp8"),
        }.items()
    }
    assert typical["fp32"] == pytest.approx(float(np.median([e.distance for e in expected])), rel=0.5)
    assert 1e3 * typical["fp32"] < typical["fp16"] < typical["bf16"] / 4
    assert typical["fp16"] < typical["int8 cache"] < typical["fp8 cache"] < 0.5


def test_activations_are_rounded_where_weights_are(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """By a part in 250 of a block's largest, and by nothing where nothing is quantised."""
    exact = Bundle.open(write_bundle(tmp_path / "exact", name, "fp32"))
    assert arithmetic_of(exact, "fp32", rounds=True) == Arithmetic()
    bundle = Bundle.open(write_bundle(tmp_path / "bundle", name, "int8 in blocks"))
    arithmetic = arithmetic_of(bundle, "fp32", rounds=True)
    sizes = dict(arithmetic.activation_blocks)
    assert set(sizes.values()) == {16}
    assert "model.layers.1.mlp.down_proj.weight" in sizes
    assert not any("norm" in parameter or "v_b_proj" in parameter for parameter in sizes)
    expected = Reference.compute(bundle, checkpoint, PROBES).expected
    assert 1e-3 < float(np.median(np.concatenate(distances(bundle, expected, arithmetic)))) < 0.1


def test_a_weight_that_is_missing(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """Of a bundle of fewer layers than its config has."""
    bundle = write_bundle(tmp_path / "bundle", name, "fp32")
    opened = Bundle.open(bundle)
    deeper = opened.config.replace(num_hidden_layers=3)
    object.__setattr__(opened, "config", deeper)
    with pytest.raises(BundleError):
        Reference.compute(opened, checkpoint, probes(deeper))
