"""Backends against PyTorch: each in the arithmetic that it has, held to what PyTorch is off by in the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.accuracy.probes import RANDOM, encoder, probes
from gta_edge.accuracy.tolerance import FLOAT32_BOUND
from gta_edge.errors import BackendError
from gta_edge.evaluate.verify import verify
from gta_edge.export.pipeline import export_model
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.registry import BACKENDS
from tests.helpers.commands import ROOT

TRAINED = ROOT / "examples" / "tiny-gta"


@pytest.fixture(scope="module", params=["random", "trained"])
def int4(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle in int4, and what it was exported from."""
    checkpoint = tiny_checkpoint if request.param == "random" else TRAINED
    directory = tmp_path_factory.mktemp("verified") / "bundle"
    export_model(checkpoint, directory, precision="int4", calibrate="none", verify=False)
    return directory, checkpoint


class Changed:
    """A session that answers something else."""

    def __init__(self, session: Any, change: Callable[[np.ndarray], np.ndarray], max_length: int | None) -> None:
        self._session, self._change, self._max_length = session, change, max_length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @property
    def max_length(self) -> int:
        return self._max_length or self._session.max_length

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def forward(self, ids: np.ndarray, **options: Any) -> Any:
        assert int(self._session.length.max()) + ids.shape[1] <= self.max_length
        return self._change(self._session.forward(ids, **options))


Wrap = Callable[..., None]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Call it with what ONNX Runtime's answers become: its default ones, its exact ones, or both."""
    right = BACKENDS["onnxruntime"].open

    def change(
        how: Callable[[np.ndarray], np.ndarray],
        *,
        exact: tuple[bool, ...] = (True, False),
        max_length: int | None = None,
    ) -> None:
        def opened(*arguments: Any, **options: Any) -> Any:
            session = right(*arguments, **options)
            is_exact = bool(options.get("exact"))
            return Changed(session, how if is_exact in exact else lambda logits: logits, max_length)

        monkeypatch.setattr(BACKENDS["onnxruntime"], "open", opened)

    return change


def test_rounded_activations_are_off_by_what_pytorch_is(int4: tuple[Path, Path]) -> None:
    report = verify(*int4, ["onnxruntime"])
    assert report.passed
    rounded, exact = report.int8_activations["onnxruntime"], report.backends["onnxruntime"]
    assert 0.02 < rounded.max_rel_error < 0.5
    assert 0.1 < rounded.bound_fraction < 0.6  # near what is simulated, which may be off by five times
    assert exact.max_rel_error < FLOAT32_BOUND
    assert exact.bound_fraction < 0.5


@pytest.mark.parametrize("factor", [1.3, 0.7, -1.0, 0.0])
def test_default_answers_that_are_wrong(int4: tuple[Path, Path], changed: Wrap, factor: float) -> None:
    changed(lambda logits: logits * np.float32(factor), exact=(False,))
    report = verify(*int4, ["onnxruntime"])
    assert not report.passed
    (failure,) = report.failures
    assert failure.startswith("onnxruntime with int8 activations: max_rel_error ")
    assert report.backends["onnxruntime"].bound_fraction < 0.5


def test_exact_answers_that_are_slightly_wrong(int4: tuple[Path, Path], changed: Wrap) -> None:
    changed(lambda logits: logits * np.float32(1.0005), exact=(True,))
    (failure,) = verify(*int4, ["onnxruntime"]).failures
    assert failure.startswith("onnxruntime: max_rel_error ")
    assert "positions are off by too much" in failure


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite(int4: tuple[Path, Path], changed: Wrap, value: float) -> None:
    def broken(logits: np.ndarray) -> np.ndarray:
        logits[..., 7] = value
        return logits

    changed(broken)
    failures = verify(*int4, ["onnxruntime"]).failures
    assert len(failures) == 2
    assert all(f"logits at position 0 of {RANDOM} are not finite" in failure for failure in failures)


def test_one_position_that_is_wrong(int4: tuple[Path, Path], changed: Wrap) -> None:
    """A single wrong logit is named by its position."""
    seen = []

    def change(logits: np.ndarray) -> np.ndarray:
        seen.append(logits.shape[1])
        if len(seen) == 3:  # the second single token after the prompt
            logits[0, 0, 5] += 3
        return logits

    changed(change, exact=(True,))
    (failure,) = verify(*int4, ["onnxruntime"]).failures
    config = Checkpoint.open(int4[1]).config
    prefill = probes(config, encoder(int4[0]))[0].prefill
    assert f" at position {prefill + 1} of {RANDOM} is above 0.0001" in failure
    assert "(1 of " in failure


def test_an_engine_for_fewer_tokens_is_asked_for_those(int4: tuple[Path, Path], changed: Wrap) -> None:
    changed(lambda logits: logits, max_length=50)
    assert verify(*int4, ["onnxruntime"]).passed


def test_a_cache_in_blocks_is_off_by_what_pytorch_is(int4: tuple[Path, Path]) -> None:
    """Whose own operations read its cache in the layer-by-layer model as well."""
    report = verify(*int4, ["torch"], cache_dtype="int4v2")
    found = report.backends["torch"]
    assert report.passed
    assert found.max_rel_error > 100 * FLOAT32_BOUND
    assert found.bound_fraction > 0.05  # which is no bound that everything keeps


@pytest.mark.parametrize("int4", ["random"], indirect=True)
def test_a_cache_policy_is_compared_with_pytorchs(int4: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    window, observing = policy("window", rows=20), policy("zsmerge", rows=20)
    found = verify(*int4, ["onnxruntime"], cache=window)
    assert found.passed and found.int8_activations
    found = verify(*int4, ["onnxruntime"], cache=observing)
    assert found.passed and not found.int8_activations  # which may keep other rows
    with pytest.raises(BackendError, match="goes by attention, which onnxruntime in fp32 with a cache of int8 rounds"):
        verify(*int4, ["onnxruntime"], cache=observing, cache_dtype="int8")
    monkeypatch.setattr(OnnxRuntimeSession, "_move", lambda *_: None)
    assert not verify(*int4, ["onnxruntime"], cache=observing).passed
