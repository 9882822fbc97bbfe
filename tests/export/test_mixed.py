"""Which matrices of an int4 model are stored in int8: estimates beside the formula, chosen within the bytes allowed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import ExportError, InputError
from gta_edge.export.mixed import Group, choose, estimated
from gta_edge.export.pipeline import export_model
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import EMBEDDING, Storage
from gta_edge.graph.weights import read_stored
from gta_edge.numerics.quantization import QuantizedMatrix, quantize
from gta_edge.plan.cost import stored_bytes
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exports import export_refused

INT4 = Storage("int4", 32, frozenset([EMBEDDING]))
SIZES = {"vocab_size": 61, "max_position_embeddings": 24, "num_hidden_layers": 2}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=2, d_l=32, e=1, **SIZES),
    "gqa": reference.llama_entries(**SIZES),
}
IDS = np.random.default_rng(3).integers(0, 61, (16, 24))
LAYER = {
    "gta": [{"q_proj", "k_proj", "v_proj", "g_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "gqa": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
}


def log_probabilities(entries: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    """Of the next token, [B, T, V], by the formula in float64."""
    formula = reference.gta_logits if "num_query_heads" in entries else reference.llama_logits
    logits = np.stack([formula(entries, weights, row) for row in IDS])
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_what_int4_costs_is_near_the_divergence(name: str, tmp_path: Path) -> None:
    entries = MODELS[name]
    large = {key: 2 * value if value.ndim == 2 else value for key, value in reference.random_weights(entries).items()}
    weights = write_checkpoint(tmp_path / "checkpoint", entries, large)  # or rounding would change next to nothing
    source = Checkpoint.open(tmp_path / "checkpoint")
    groups = estimated(source, INT4, IDS)
    assert groups == estimated(source, INT4, IDS)
    found = [{parameter.split(".")[4] for parameter in group.names} for group in groups]
    assert found == LAYER[name] * 2
    assert [{parameter.split(".")[2] for parameter in group.names} for group in groups] == [{"0"}] * 4 + [{"1"}] * 4
    own = log_probabilities(entries, weights)
    for group in groups:
        rounded = {parameter: quantize(weights[parameter], 4, 32).values for parameter in group.names}
        other = log_probabilities(entries, {**weights, **rounded})
        divergence = (np.exp(own) * (own - other)).sum(-1).mean()
        assert divergence > 1e-6
        assert 0.4 < group.divergence / divergence < 2, (group.names, group.divergence, divergence)
        wide = replace(INT4, int8=INT4.int8.union(group.names))
        more = stored_bytes(source.config, wide) - stored_bytes(source.config, INT4)
        assert group.extra_bytes == more > 0


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_model_whose_numbers_overflow_is_refused(name: str, tmp_path: Path) -> None:
    entries = MODELS["gqa"]
    weights = reference.random_weights(entries)
    weights[name] = np.full_like(weights[name], 3e38)
    write_checkpoint(tmp_path / "checkpoint", entries, weights)
    with pytest.raises(ExportError, match=r"cannot be quantised|is not finite") as caught:
        estimated(Checkpoint.open(tmp_path / "checkpoint"), INT4, IDS)
    assert "\n" not in str(caught.value)


groups_of = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=12).map(
    lambda found: [Group((f"model.layers.{i}.mlp.up_proj.weight",), *each) for i, each in enumerate(found)]
)


@settings(deadline=None)
@given(groups_of, st.integers(0, 4000), st.randoms(use_true_random=False))
def test_those_that_gain_most_for_their_bytes_are_chosen(groups: list[Group], most: int, random: Any) -> None:
    found = choose(groups, INT4, most)
    assert sum(group.extra_bytes for group in found.chosen) <= most
    assert found.storage == replace(INT4, int8=INT4.int8.union(*(group.names for group in found.chosen)))
    gains = [group.divergence / group.extra_bytes for group in found.chosen]
    assert gains == sorted(gains, reverse=True)
    left = most - sum(group.extra_bytes for group in found.chosen)
    for group in groups:  # what is left out does not fit beside those that gain more
        if group not in found.chosen and group.divergence > 0:
            better = [g for g in found.chosen if g.divergence / g.extra_bytes >= group.divergence / group.extra_bytes]
            assert group.extra_bytes > left or sum(g.extra_bytes for g in better) + group.extra_bytes > most
    mixed = random.sample(groups, len(groups))
    assert choose(mixed, INT4, most) == found


def test_a_mixed_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(97, 123)) * 300)
    options = {"precision": "int4", "calibrate": text}
    results = [export_model(tiny_checkpoint, tmp_path / f"bundle{i}", mixed=30, **options) for i in range(2)]
    plain = export_model(tiny_checkpoint, tmp_path / "plain", verify=False, **options).bundle
    bundle, report = results[0].bundle, results[0].report
    assert report is not None and report.passed
    assert bundle.storage == results[1].bundle.storage
    chosen = bundle.storage.int8 - plain.storage.int8
    assert chosen and len(chosen) < 8 * bundle.config.num_hidden_layers
    assert bundle.weight_bytes == stored_bytes(bundle.config, bundle.storage)
    assert plain.weight_bytes < bundle.weight_bytes <= 1.3 * plain.weight_bytes
    extra = (bundle.weight_bytes - plain.weight_bytes) / 1e6
    assert f"groups of matrices are in int8, {extra:.1f} MB more" in results[0].notes[-1]
    for name, stored in read_stored(bundle.model_path, bundle.config):
        if isinstance(stored, QuantizedMatrix):
            assert (stored.bits == 8) == (name in bundle.storage.int8)
    none = export_model(tiny_checkpoint, tmp_path / "none", mixed=0, verify=False, **options).bundle
    assert none.storage == plain.storage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "mixed": 10}, "precision is int8; int4 is mixed with int8, and nothing else"),
        (
            {"precision": "int4", "mixed": 10},
            "there is no text to measure on which matrices are worth int8; give --calibrate FILE or",
        ),
        ({"precision": "int4", "mixed": -1, "calibrate": "text"}, "mixed is -1; expected 0 to 100 percent"),
        ({"precision": "int4", "mixed": float("nan"), "calibrate": "text"}, "mixed is nan; expected 0 to 100"),
    ],
)
def test_what_cannot_be_mixed(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    assert export_refused(tiny_checkpoint, InputError, **options).startswith(message)
