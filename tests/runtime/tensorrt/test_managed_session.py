"""Sessions of an engine whose cache a policy manages, on the simulation of TensorRT and CUDA, against float64.

What the engine computes is ONNX Runtime's here; all else is as on a GPU: the inputs that a step is given, which rows
move where in the GPU's memory, and that a token is a replay of one graph. On a GPU ``test_session`` runs engines with a
policy too.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gta_edge.errors import CapacityError, EngineError, InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.measured import LayerRows
from gta_edge.runtime.tensorrt.build import buffer_bytes, step_inputs
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.engine_cache import EngineCache
from gta_edge.runtime.tensorrt.session import TensorRTSession
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import MODELS, POSITIONS, bundle_of, open_session, prompt, weights_of
from tests.helpers.tensorrt_simulator import Driver, open_simulated

TOLERANCE = 1e-4
CHUNK, ROWS = 24, 2
SPEC = EngineSpec("tensorrt-rtx", "fp32", "fp32", max_length=POSITIONS, max_batch=ROWS, chunk_size=CHUNK)

POLICIES: dict[str, dict[str, Any]] = {
    "window": {"rows": 20, "sinks": 2},
    "h2o": {"rows": 20},
    "corm": {"window": 8, "rows": 40},
    "zsmerge": {"rows": 20, "residual_rows": 3},
    "layers": {"rows": 20},
}


def make(name: str, **changes: Any) -> Any:
    if name == "layers":
        return LayerRows(rule=make("h2o"), layer_rows=(30, 10))
    return policy(name, **{"interval": 5, **POLICIES[name], **changes})


def spec_for(bundle: Bundle, of: Any) -> EngineSpec:
    sizes = {"chunk_size": CHUNK, "max_length": POSITIONS}
    return replace(SPEC, managed=EngineCache.of(of, bundle.config, "fp32", **sizes))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``engines("gta", "h2o")`` is a bundle with an engine for the policy; made once."""

    @functools.cache
    def built(model: str, name: str | None) -> Bundle:
        directory = tmp_path_factory.mktemp("managed")
        shutil.copytree(bundle_of(model), directory / "bundle", ignore=shutil.ignore_patterns("engines"))
        bundle = Bundle.open(directory / "bundle")
        spec = spec_for(bundle, make(name)) if name else replace(SPEC, max_length=50)
        simulator.build(bundle, spec, directory / "lowered")
        return bundle

    return built


@pytest.fixture
def driver() -> Driver:
    return Driver()


def opened(bundle: Bundle, driver: Driver | None = None, **options: Any) -> TensorRTSession:
    return open_simulated(bundle, SPEC.engine, driver or Driver(), **options)


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"), [("gta", "window"), ("gqa", "h2o"), ("gta", "corm"), ("gqa", "zsmerge"), ("gta", "layers")]
)
def test_logits_are_those_of_the_formula(engines: Any, model: str, name: str) -> None:
    """A prompt in chunks, single tokens, a second prompt, and single tokens again."""
    exact = ManagedModel(MODELS[model], weights_of(model), make(name), CHUNK, observed=16)
    ids, place = prompt(1, 100), 0
    with opened(engines(model, name), cache=make(name)) as session:
        for count in (60, *[1] * 13, 18, 3, *[1] * 6):
            part = ids[:, place : place + count]
            found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
            assert np.abs(found - expected).max() <= TOLERANCE * expected.std(), place
            place += count
            assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]
        assert session.length.tolist() == [100]
        assert (session.rows < 100).all()
        assert session.cuda_graph


def test_each_sequence_evicts_as_if_alone(engines: Any) -> None:
    bundle, ids, lengths = engines("gta", "h2o"), prompt(ROWS, 50), np.array([50, 33])
    with opened(bundle, cache=make("h2o")) as session:
        together = [session.forward(ids, lengths=lengths)]
        together += [session.forward(prompt(ROWS, 1, seed=i)) for i in range(12)]
    for row, length in enumerate(lengths):
        with opened(bundle, cache=make("h2o")) as session:
            alone = [session.forward(ids[row : row + 1, :length])]
            alone += [session.forward(prompt(ROWS, 1, seed=i)[row : row + 1]) for i in range(12)]
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=0, atol=TOLERANCE * a.std())


def test_without_a_policy_an_engine_for_one_keeps_every_token(engines: Any) -> None:
    ids = prompt(1, 40)
    exact = ManagedModel(MODELS["gta"], weights_of("gta"))
    room = min(spec_for(engines("gta", "h2o"), make("h2o")).managed.capacities)
    with opened(engines("gta", "h2o")) as session:
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:40]):
            found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
            assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
        assert session.max_length == room
        with pytest.raises(CapacityError, match=f"room for {room} rows, and without a cache policy every token keeps"):
            session.forward(prompt(1, room))


def test_past_the_last_position_keys_are_rotated(engines: Any) -> None:
    """As on the backend torch, whose rotation is held against the formula."""
    of = policy("window", rows=20, sinks=2, interval=5, rotate=True)
    ids = prompt(1, POSITIONS + 60)
    with (
        opened(engines("gta", "window"), cache=of) as session,
        open_session("torch", "gta", cache=of, chunk_size=CHUNK) as exact,
    ):
        for start, stop in ((0, 150), *((i, i + 1) for i in range(150, POSITIONS + 60))):
            found, expected = session.forward(ids[:, start:stop]), exact.forward(ids[:, start:stop])
            assert np.abs(found - expected).max() <= 1e-3 * expected.std(), start
        assert session.length.tolist() == [POSITIONS + 60]


# --- what is asked of the GPU ----------------------------------------------------------------------------------------


def test_a_token_is_one_replay_and_nothing_is_allocated(engines: Any, driver: Driver) -> None:
    with opened(engines("gta", "h2o"), driver, cache=make("h2o")) as session:
        session.forward(prompt(1, 60))
        before = [call for call in driver.calls if call.startswith("allocate")]
        inputs = len(step_inputs(session.config, session._spec))
        assert inputs == 3 + 1 + 2  # positions; query_weight and decay
        step = ["copy pinned to device"] * inputs + ["run", "copy device to device", "copy device to pinned"]
        start = len(driver.calls)
        session.forward(prompt(1, 1))
        assert driver.calls[start:][-2 * len(step) - 1 :] == [*step, "capture", *step]
        evictions = 0
        for i in range(12):
            start = len(driver.calls)
            session.forward(prompt(1, 1, seed=i))
            calls = driver.calls[start:]
            assert calls[-1] == "replay"
            evictions += len(calls) > 1
            assert set(calls) <= {"replay", "copy device to pinned", "copy device to device"}
        assert evictions == 12 // 5
        assert len(driver.graphs) == 1
        assert [call for call in driver.calls if call.startswith("allocate")] == before


def test_memory_is_that_of_the_rows(engines: Any, driver: Driver) -> None:
    bundle = engines("gta", "layers")
    spec = spec_for(bundle, make("layers"))
    first, last = spec.managed.capacities
    assert first > last
    with opened(bundle, driver, cache=make("layers")) as session:
        size = 4 * ROWS * (first + last) * (2 * 16 + 8 + 1)  # keys, latents, received
        assert spec.cache_bytes(bundle.config) == size
        padded = session.cache_bytes - size  # what rows received begins at multiples of 256 bytes, and is there twice
        assert 0 <= padded - 4 * ROWS * (first + last) <= 2 * 2 * 256
        assert driver.used_bytes() >= session.cache_bytes
    assert not driver.live


def test_buffers_of_a_managed_step_are_in_the_estimate(engines: Any) -> None:
    bundle = engines("gqa", "zsmerge")
    spec, layers, vocab = spec_for(bundle, make("zsmerge")), 2, bundle.config.vocab_size
    integers = ROWS * (CHUNK + layers + 16 + CHUNK)  # ids, lengths by layer, logit positions, positions
    floats = ROWS * (layers * 3 + CHUNK + 1)  # biases, weights of queries, decay
    assert buffer_bytes(bundle.config, spec) == 8 * integers + 4 * floats + 4 * ROWS * 16 * vocab


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "asked", "problem", "options"),
    [
        ("window", ("h2o", {}), "observes nothing and not mass", "--cache-policy h2o --cache-rows 20"),
        ("corm", ("h2o", {}), "observes last and not mass", "--cache-policy h2o --cache-rows 20"),
        (
            "h2o",
            ("zsmerge", {"rows": 10}),
            "has biases for 0 rows and not for 3",
            "--cache-policy zsmerge --cache-rows 10",
        ),
        (
            "h2o",
            ("h2o", {"rows": 40}),
            r"has room for 64 rows in layer 0 and not for 80",
            "--cache-policy h2o --cache-rows 40",
        ),
        (
            "layers",
            ("h2o", {"rows": 20}),
            r"has room for \d+ rows in layer 1 and not for 64",
            "--cache-policy h2o --cache-rows 20",
        ),
    ],
)
def test_an_engine_for_another_policy(
    engines: Any, built: str, asked: tuple[str, dict[str, Any]], problem: str, options: str
) -> None:
    bundle = engines("gta", built)
    name, changes = asked
    with pytest.raises(EngineError, match=rf"engines/tensorrt-rtx: the engine {problem}; ") as raised:
        opened(bundle, cache=make(name, **changes))
    text = str(raised.value)
    assert "\n" not in text
    assert options in text and "--cache-interval 5" in text
    assert text.endswith("--force")


def test_an_engine_without_a_policy(engines: Any) -> None:
    bundle = engines("gta", None)
    with pytest.raises(EngineError) as raised:
        opened(bundle, cache=make("window"))
    assert str(raised.value) == (
        f"{bundle.directory}/engines/tensorrt-rtx: the engine was built without a cache policy; run: gta-edge build "
        f"{bundle.directory} --engine tensorrt-rtx --compute fp32 --cache-dtype fp32 --max-length 50 --max-batch 2 "
        "--cache-policy window --cache-rows 20 --cache-interval 5 --cache-sinks 2 --force"
    )
    with pytest.raises(
        InputError, match="keeps 60 rows, and the engine was built with --max-length 50; give at most 50"
    ):
        opened(bundle, cache=make("h2o", rows=60))


def test_an_engine_serves_policies_that_need_less(engines: Any) -> None:
    bundle = engines("gqa", "zsmerge")
    for of in (make("window"), make("h2o", rows=12), make("window", residual_rows=2)):
        exact = ManagedModel(MODELS["gqa"], weights_of("gqa"), of, CHUNK, observed=16)
        with opened(bundle, cache=of) as session:
            for part in (prompt(1, 60), prompt(1, 1), prompt(1, 7)):
                found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
                assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
