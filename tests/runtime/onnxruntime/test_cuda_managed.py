"""The onnxruntime-cuda backend with a cache policy: its graph and session on the CPU provider, against float64.

Which operators it takes, and that all have kernels on a GPU, ``test_cuda_session`` checks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from gta_edge.errors import BackendError, BundleError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.builder import Nodes
from gta_edge.graph.io import run_passes
from gta_edge.libraries import onnxruntime as ort
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.cache_policies.measured import LayerRows
from gta_edge.runtime.onnxruntime import cuda_session as backend
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.onnxruntime.cuda_steps import NO_GRAPH
from gta_edge.runtime.onnxruntime.passes.spell_for_cuda import SpellForCudaPass
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import MODELS, POSITIONS, bundle_of, open_session, prompt, weights_of

CHUNK = 24
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}

POLICIES: dict[str, dict[str, Any]] = {
    "window": {"rows": 20, "sinks": 2, "residual_rows": 2},
    "h2o": {"rows": 20},
    "corm": {"window": 8, "rows": 40},
    "zsmerge": {"rows": 20, "residual_rows": 3},
}


def make(name: str, **changes: Any) -> CachePolicy:
    if name == "layers":
        return LayerRows(rule=make("h2o"), layer_rows=(30, 10))
    return policy(name, **{"interval": 5, **POLICIES[name], **changes})


def opened(bundle: Path, **options: Any) -> OnnxRuntimeCudaSession:
    options = {"compute": "fp32", "chunk_size": CHUNK} | options
    return OnnxRuntimeCudaSession(Bundle.open(bundle), device="cpu", **options)


def check(session: OnnxRuntimeCudaSession, exact: ManagedModel, bound: float) -> None:
    """A prompt in chunks, single tokens, a second prompt, and single tokens again."""
    ids, place = prompt(1, 100), 0
    for count in (60, *[1] * 13, 18, 3, *[1] * 6):
        part = ids[:, place : place + count]
        found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
        assert np.abs(found - expected).max() <= bound * expected.std()
        place += count
        assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]


@pytest.mark.parametrize(
    ("model", "name", "compute"),
    [
        ("gta", "window", "fp32"),
        ("gqa", "h2o", "fp32"),
        ("gta", "corm", "fp32"),
        ("gqa", "corm", "fp16"),
        ("gta", "zsmerge", "fp16"),
        ("gqa", "zsmerge", "fp32"),
        ("gta", "layers", "fp32"),
    ],
)
def test_logits_are_those_of_the_formula(model: str, name: str, compute: str) -> None:
    exact = ManagedModel(MODELS[model], weights_of(model), make(name), CHUNK, observed=16)
    with opened(bundle_of(model), compute=compute, cache=make(name)) as session:
        check(session, exact, TOLERANCE[compute])


def test_each_sequence_evicts_as_if_alone() -> None:
    ids, lengths = prompt(2, 50), np.array([50, 33])
    with opened(bundle_of("gta"), cache=make("h2o")) as session:
        together = [session.forward(ids, lengths=lengths)]
        together += [session.forward(prompt(2, 1, seed=i)) for i in range(8)]
    for row, length in enumerate(lengths):
        with opened(bundle_of("gta"), cache=make("h2o")) as session:
            alone = [session.forward(ids[row : row + 1, :length])]
            alone += [session.forward(prompt(2, 1, seed=i)[row : row + 1]) for i in range(8)]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=0, atol=1e-4 * a.std())


def test_a_step_that_is_run_again_counts_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CUDA graph fails after its kernels have run, rows have received what they would have without it."""
    launch, ids = OnnxRuntimeCudaSession._launch, prompt(1, 41)

    def fail(session: OnnxRuntimeCudaSession, step: Any) -> None:
        launch(session, step)
        if step.graph_id != NO_GRAPH:
            raise RuntimeError("no graph")

    with opened(bundle_of("gta"), cache=make("h2o")) as session, opened(bundle_of("gta"), cache=make("h2o")) as plain:
        for each in (session, plain):
            each.forward(ids[:, :40])
        monkeypatch.setattr(OnnxRuntimeCudaSession, "_launch", fail)
        session.graph_refused = None
        np.testing.assert_array_equal(session.forward(ids[:, 40:]), plain.forward(ids[:, 40:]))
        assert session.graph_refused == "no graph"
        for found, expected in zip(session._received(), plain._received(), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert max(received.max() for received in session._received()) > 0


def test_past_the_last_position_keys_are_rotated() -> None:
    """As on the backend torch, whose rotation is held against the formula."""
    of = policy("window", rows=20, sinks=2, interval=5, rotate=True)
    ids = prompt(1, POSITIONS + 60)
    with (
        opened(bundle_of("gta"), cache=of) as session,
        open_session("torch", "gta", cache=of, chunk_size=CHUNK) as exact,
    ):
        for start, stop in ((0, 150), *((i, i + 1) for i in range(150, POSITIONS + 60))):
            found, expected = session.forward(ids[:, start:stop]), exact.forward(ids[:, start:stop])
            assert np.abs(found - expected).max() <= 1e-3 * expected.std(), start
        assert session.length.tolist() == [POSITIONS + 60]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that no session has seen."""
    return shutil.copytree(bundle_of("gta"), tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))


def test_its_graph_is_kept_beside_the_other_and_reads_its_weights(bundle: Path) -> None:
    opened(bundle, compute="fp16", cache=make("h2o")).close()
    kept = bundle / "engines" / "onnxruntime-cuda"
    assert sorted(each.name for each in kept.iterdir()) == ["fp16", "fp16-mass-0"]
    assert not (kept / "fp16-mass-0" / "weights.data").exists()
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    opened(bundle, compute="fp16", cache=make("h2o", rows=30)).close()  # other rows, the same graph
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    opened(bundle, compute="fp16", cache=make("zsmerge")).close()
    assert (kept / "fp16-mass-3").is_dir()


def test_a_bundle_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cached_graph", lambda *_, **__: None)
    exact = ManagedModel(MODELS["gta"], weights_of("gta"), make("h2o"), CHUNK, observed=16)
    with opened(bundle_of("gta"), cache=make("h2o")) as session:
        check(session, exact, TOLERANCE["fp32"])


# --- on a GPU --------------------------------------------------------------------------------------------------------


def why_not() -> str:
    try:
        ort.load_onnxruntime_cuda()
    except BackendError as error:
        return str(error)
    return ""


NO_GPU = why_not()


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")
@pytest.mark.parametrize(
    ("model", "name", "compute"),
    [
        ("gta", "window", "fp32"),
        ("gta", "window", "bf16"),
        ("gqa", "h2o", "fp32"),
        ("gta", "corm", "fp32"),
        ("gta", "zsmerge", "fp32"),
    ],
)
def test_on_a_gpu_logits_are_those_of_the_formula(model: str, name: str, compute: str) -> None:
    """In float32, where rounding decides nothing; of a window it does so in no type."""
    exact = ManagedModel(MODELS[model], weights_of(model), make(name), CHUNK, observed=16)
    bundle = Bundle.open(bundle_of(model))
    with OnnxRuntimeCudaSession(bundle, compute=compute, cache=make(name), chunk_size=CHUNK) as session:
        check(session, exact, 0.3 if compute == "bf16" else 1e-3)
        assert session.cuda_graph is True, session.graph_refused


# --- the pass --------------------------------------------------------------------------------------------------------


def graph_of(build: Callable[[Nodes, ir.Value], ir.Value]) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["b", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = Nodes()
    y = build(nodes, x)
    y.name, y.type = "y", x.type
    graph = ir.Graph([x], [y], nodes=nodes.made, opset_imports={"": 24}, name="graph")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "build",
    [
        lambda nodes, x: nodes("Pad", x, nodes.constant(0, 1, 0, 1)),
        lambda nodes, x: nodes("ReduceMax", x, nodes.constant(1)),
        lambda nodes, x: nodes("Mul", nodes("ReduceMax", x, nodes.constant(1)), x),
    ],
)
def test_what_stands_elsewhere_is_refused(build: Callable[[Nodes, ir.Value], ir.Value]) -> None:
    with pytest.raises(BundleError, match=r"a (Pad|ReduceMax) is not where export writes one; export the bundle again"):
        run_passes(graph_of(build), "model.onnx", SpellForCudaPass())
