"""The one style of pictures: names have their own colours, contexts are labelled as they were asked for."""

import copy
from pathlib import Path
from typing import Any

import pytest

from gta_edge.cli import bench_plot
from gta_edge.cli.choices import BACKEND_NAMES
from gta_edge.cli.plot import colors, context_axis, new_figure
from gta_edge.model.presets import PRESETS


@pytest.mark.parametrize("names", [BACKEND_NAMES, PRESETS], ids=["backends", "presets"])
def test_a_name_has_its_own_colour_in_every_picture(names: tuple[str, ...]) -> None:
    together = colors([*names, "mine", "yours"])
    assert len({together[name] for name in names}) == len(names)
    for name in names:
        assert colors(["mine", name])[name] == together[name]
    assert len(set(colors([*names[:3], "mine", "yours"]).values())) == 5


def test_contexts_are_labelled_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    _, (axis,) = new_figure(1)
    axis.plot([128, 1024, 5000], [1, 2, 3])
    context_axis(axis, [5000, 128, 1024, 128], "ms")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["128", "1,024", "5,000"]
    assert axis.get_ylim()[0] == 0


def report(*, settled: bool) -> dict[str, Any]:
    """A report with what a picture shows of it."""
    row = {
        "bundle": "b", "backend": "onnxruntime", "context": 128, "batch": 1, "agrees": True, "ttft_ms": 9.0,
        "tpot_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0}, "spread": {"tpot": 0.1}, "notes": {},
    }  # fmt: skip
    other = copy.deepcopy(row) | {"context": 1024}
    if not settled:
        other |= {"spread": {"tpot": 0.5}, "notes": {"spread.tpot": "the rounds lie 50% apart"}}
    machine = {"board": None, "cpu": "a CPU", "architecture": "x86_64", "usable_cores": 2}
    return {"results": [row, other], "machine": machine, "date": "2026-01-02T00:00:00"}


@pytest.mark.parametrize("settled", [True, False])
def test_a_footnote_says_that_rounds_did_not_settle(tmp_path: Path, settled: bool) -> None:
    pytest.importorskip("matplotlib")
    bench_plot.draw(tmp_path / "picture.svg", report(settled=settled), force=False)
    text = (tmp_path / "picture.svg").read_text()
    assert ("did not settle" in text) is not settled
    assert ">1,024<" in text
