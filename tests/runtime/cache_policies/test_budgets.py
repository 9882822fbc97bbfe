"""Rows shared out among layers, and the budgets that lie in a bundle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.errors import InputError, OutputError
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.budgets import (
    FILE,
    PLACE,
    LayerBudgets,
    budgets_output,
    has_budgets,
    read_budgets,
    shared_out,
    write_budgets,
)
from gta_edge.runtime.cache_policies.measured import LayerRows, Measured
from tests.helpers.tiny import TINY


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of two layers, as far as budgets ask for one."""
    directory = tmp_path / "bundle"
    directory.mkdir()
    files = {name: {"sha256": 64 * digit} for name, digit in (("model.onnx", "a"), ("model.onnx.data", "b"))}
    return Bundle(directory, TINY, "fp32", {"files": files})


def keep_budgets(bundle: Bundle, budgets: LayerBudgets, *, force: bool = False) -> Path:
    """Write a bundle's budgets as the command does, and return the file."""
    with budgets_output(bundle, force=force) as directory:
        write_budgets(directory, bundle, budgets)
    return bundle.directory / PLACE / FILE


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_rows_are_shared_out_whole(shares: list[float], least: int, more: int) -> None:
    total = least * len(shares) + more
    rows = shared_out(total, shares, least)
    assert rows.dtype == np.int64 and rows.sum() == total and rows.min() >= least
    for i, j in zip(range(len(shares)), range(1, len(shares)), strict=False):
        if shares[i] > shares[j]:
            assert rows[i] >= rows[j]


@pytest.mark.parametrize(
    ("total", "shares", "least", "rows"),
    [
        (10, [1, 1], 1, [5, 5]),
        (10, [3, 1], 1, [8, 2]),  # 7.5 and 2.5: the first has the one left over
        (10, [1, 0], 2, [8, 2]),
        (10, [0, 0], 1, [5, 5]),
        (20, [100, 1, 1, 1], 3, [11, 3, 3, 3]),
        (512, [0.42, 0.04, 0.04, 0.04, 0.46], 2, [215, 21, 20, 20, 236]),
    ],
)
def test_rows_are_shared_out_in_proportion(total: int, shares: list[float], least: int, rows: list[int]) -> None:
    assert shared_out(total, shares, least).tolist() == rows


# --- policies over budgets -------------------------------------------------------------------------------------------


def test_a_measured_policy_is_its_rule_but_for_the_budgets(bundle: Bundle) -> None:
    layers = bundle.config.num_hidden_layers
    shares = tuple(range(1, layers + 1))
    keep_budgets(bundle, LayerBudgets(shares))
    chosen = policy("measured", rows=40, interval=7, decay=0.9)
    rule = policy("zsmerge", rows=40, interval=7, decay=0.9)
    assert chosen == Measured(rule=rule)
    fitted = chosen.for_bundle(bundle)
    for each in (chosen, fitted):
        assert (each.rows, each.interval, each.bias_rows, each.observe) == (40, 7, 1, "mass")
        positions = np.arange(6)[None]
        for got, wanted in zip(each.weights(positions, positions), rule.weights(positions, positions), strict=True):
            np.testing.assert_array_equal(got, wanted)
    budgets = fitted.budgets(layers)
    assert budgets is not None
    assert budgets.tolist() == shared_out(40 * layers, shares, 2).tolist()
    assert fitted.for_bundle(bundle) is fitted and rule.for_bundle(bundle) is rule


def test_any_policy_takes_budgets(bundle: Bundle, tmp_path: Path) -> None:
    layers = bundle.config.num_hidden_layers
    copied = tmp_path / "copied.json"
    copied.write_bytes(keep_budgets(bundle, LayerBudgets((3,) + (1,) * (layers - 1))).read_bytes())
    fitted = policy("window", rows=10, sinks=0, budgets=str(copied)).for_bundle(bundle)
    budgets = fitted.budgets(layers)
    assert budgets is not None and budgets[0] > budgets[1] and budgets.sum() == 10 * layers


def test_budgets_are_known_with_the_bundle_alone(bundle: Bundle) -> None:
    with pytest.raises(
        InputError, match="budgets of cache policy measured are a bundle's; give a bundle that was calibrated"
    ):
        policy("measured", rows=10).budgets(2)


def test_rows_of_layers_have_to_be_enough_and_as_many_as_layers() -> None:
    with pytest.raises(InputError, match="cache policy window: a layer has 4 rows; give each at least 5"):
        LayerRows(rule=policy("window", rows=10), layer_rows=(10, 4))
    with pytest.raises(InputError, match="there are rows for 2 layers, and the model has 3; give the budgets of this"):
        LayerRows(rule=policy("window", rows=10), layer_rows=(10, 5)).budgets(3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_budgets_come_back_as_they_were_written(bundle: Bundle) -> None:
    layers = bundle.config.num_hidden_layers
    assert not has_budgets(bundle)
    written = LayerBudgets(tuple(range(5, 5 + layers)), {"rule": "zsmerge", "tokens": 512})
    path = keep_budgets(bundle, written)
    assert has_budgets(bundle) and read_budgets(bundle) == read_budgets(bundle, path) == written
    with pytest.raises(OutputError):
        keep_budgets(bundle, written)
    newer = LayerBudgets((9,) * layers)
    keep_budgets(bundle, newer, force=True)
    assert read_budgets(bundle) == newer


def test_a_bundle_without_budgets_says_how_to_get_them(bundle: Bundle) -> None:
    with pytest.raises(
        InputError, match=r"there are no budgets; run: gta-edge calibrate-cache .* --text FILE$"
    ) as error:
        policy("measured", rows=10).for_bundle(bundle)
    assert "\n" not in str(error.value)


def test_budgets_that_were_changed_are_not_used(bundle: Bundle) -> None:
    path = keep_budgets(bundle, LayerBudgets((5,) * bundle.config.num_hidden_layers))
    path.write_text(path.read_text().replace("5", "6"))
    with pytest.raises(InputError, match=r"the budgets are not used .*; run: gta-edge calibrate-cache"):
        read_budgets(bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"made_from": {"model.onnx": "0" * 64}}, "the budgets are of another model than"),
        ({"made_from": None}, "the budgets are of another model than"),
        ({"format": "gta-edge-bundle"}, "holds no budgets of a cache"),
        ({"format_version": 2}, "format_version is 2; expected 1"),
        ({"budgets": [3]}, r"budgets is \[3\]; expected a list of 2 numbers"),
        ({"budgets": "33"}, "budgets is '33'; expected a list of 2 numbers"),
        ({"budgets": [3, 0]}, r"budgets is \[3, 0\]; expected whole numbers of at least 1"),
        ({"budgets": [3, 2.5]}, "expected whole numbers of at least 1"),
        ({"budgets": [3, True]}, "expected whole numbers of at least 1"),
        ({"budgets": [3, 10**30]}, "expected whole numbers of at least 1"),
        (None, "holds no budgets of a cache"),
    ],
)
def test_a_file_of_other_budgets_is_refused_in_one_line(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    document = json.loads(keep_budgets(bundle, LayerBudgets((3, 4))).read_text())
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(["a list"] if change is None else document | change))
    with pytest.raises(InputError, match=said) as error:
        policy("h2o", rows=10, budgets=path).for_bundle(bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 5000])
def test_a_file_that_is_no_json_is_refused_in_one_line(bundle: Bundle, tmp_path: Path, text: str) -> None:
    path = tmp_path / "budgets.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"is not valid JSON .*; give a file that calibrate-cache wrote"):
        policy("h2o", rows=10, budgets=path).for_bundle(bundle)
    with pytest.raises(InputError, match="cannot be read"):
        policy("h2o", rows=10, budgets=tmp_path / "none.json").for_bundle(bundle)


def test_budgets_of_another_model_of_the_same_size_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = keep_budgets(bundle, LayerBudgets((3, 4)))
    files = {name: entry | {"sha256": "0" * 64} for name, entry in bundle.manifest["files"].items()}
    other = Bundle(tmp_path, TINY, "fp32", {"files": files})
    with pytest.raises(InputError, match="the budgets are of another model than"):
        read_budgets(other, path)
