"""Engines on a GPU, against the models' arithmetic in float64.

To run on a board with full TensorRT (``make test-jetson``), or with TensorRT-RTX on a GPU that it knows. A board needs
neither torch nor ONNX Runtime for it: ``engine_bundles.py`` says where the models come from.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, FLOAT32_BOUND, difference
from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError, CapacityError, EngineError, InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from gta_edge.libraries.tensorrt import load
from gta_edge.numerics.dtypes import QUANTIZED_CACHE_TYPES
from gta_edge.numerics.quantization import BITS
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.registry import open_session
from gta_edge.runtime.session import Session
from gta_edge.runtime.tensorrt.build import LOGIT_POSITIONS, build
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.engine_cache import EngineCache
from gta_edge.runtime.token_tree import PREFIX
from tests.helpers.engine_bundles import COMPUTE, MODEL, prepared, write
from tests.helpers.managed_model import ManagedModel
from tests.helpers.reference import gta_logits

Logits = Callable[[np.ndarray], np.ndarray]


def missing(engine: str) -> str | None:
    """What is not here of all that an engine takes."""
    try:
        current_gpu()
        return None if load(engine).builds else f"{engine} has no builder"
    except BackendError as error:
        return str(error)


def available(engine: str, **options: str) -> object:
    reason = missing(engine)
    marks = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=reason or "")]
    if engine == "tensorrt":
        marks.append(pytest.mark.tensorrt)
    return pytest.param((engine, options), marks=marks, id="-".join((engine, *options.values())))


ENGINES = [
    available("tensorrt"),
    available("tensorrt", matmul="plugin"),
    available("tensorrt", matmul="native"),
    available("tensorrt", cache_dtype="int8"),
    available("tensorrt", cache_dtype="fp8"),
    available("tensorrt", cache_dtype="int4"),
    available("tensorrt-rtx"),
]
LENGTH, ROWS, CHUNK = 128, 3, 32
CACHE_BOUNDS = {"int8": 0.1, "fp8": 0.5, "int4": 0.8}
"""Of quantised caches, whose rounding is in the logits too: wide, to tell rounding from wrong arithmetic."""


@pytest.fixture(scope="module", params=COMPUTE)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    precision: str = request.param
    directory = tmp_path_factory.mktemp("engines")
    found = prepared(precision, directory) or write(directory, [precision])[precision]
    return Bundle.open(found), COMPUTE[precision]


@pytest.fixture(scope="module", params=ENGINES)
def spec(request: pytest.FixtureRequest, bundle: tuple[Bundle, str]) -> EngineSpec:
    """What the engine that now lies in the bundle was built for."""
    engine, options = request.param
    opened, compute = bundle
    if "int4" in options and opened.precision not in BITS:
        pytest.skip(f"{opened.precision} has no quantised matrices")
    spec = EngineSpec(engine, compute, compute, max_length=LENGTH, max_batch=ROWS, chunk_size=CHUNK)
    spec = replace(spec, **options)
    build(opened, spec, force=True)
    return spec


@pytest.fixture
def session(bundle: tuple[Bundle, str], spec: EngineSpec) -> Iterator[Session]:
    with open_session(bundle[0], spec.engine) as opened:
        yield opened


Near = Callable[[np.ndarray, np.ndarray], bool]


@pytest.fixture
def near(spec: EngineSpec) -> Near:
    def within(found: np.ndarray, expected: np.ndarray) -> bool:
        assert found.shape == expected.shape
        bound = CACHE_BOUNDS.get(spec.cache_dtype, COMPUTE_BOUNDS[spec.compute])
        return difference(found, expected).max_rel_error <= bound

    return within


def formula(bundle: Bundle) -> Logits:
    """The model as a function of whole rows, token ids [B, T] to float64 logits [B, T, V]."""
    config = json.loads((bundle.directory / "config.json").read_text(encoding="utf-8"))
    weights = dict(read_weights(bundle.model_path, bundle.config))
    return lambda rows: np.stack([gta_logits(config, weights, row) for row in rows])


@pytest.fixture(scope="module")
def expected(bundle: tuple[Bundle, str]) -> Logits:
    return formula(bundle[0])


def ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, tokens))


def test_a_prompt_and_tokens_after_it(session: Session, near: Near, expected: Logits) -> None:
    given = ids(2, 90)
    logits = expected(given)
    assert near(session.forward(given[:, :70]), logits[:, 69])
    for i in range(70, 90):  # the first is run and captured, the others are replayed
        assert near(session.forward(given[:, i : i + 1]), logits[:, i])
    assert session.length.tolist() == [90, 90]


def test_a_few_tokens_at_once(session: Session, near: Near, expected: Logits) -> None:
    """Of widths that graphs are made for and of others, behind tokens that were taken back."""
    given, other = ids(2, 90), ids(2, 90, seed=1)
    logits, at = expected(given), 20
    session.forward(given[:, :at])
    for count in (2, 3, 5, 8, 16, 11, 2, 5, 1, 8):  # the first of each shape is run and captured
        session.forward(other[:, :count], all_logits=True)
        session.truncate(at)
        assert near(session.forward(given[:, at : at + count], all_logits=True), logits[:, at : at + count])
        at += count


def test_logits_of_every_position(session: Session, near: Near, expected: Logits) -> None:
    given = ids(1, 2 * CHUNK + LOGIT_POSITIONS + 3)
    assert near(session.forward(given, all_logits=True), expected(given))


def test_however_tokens_come_a_row_is_read_alike(session: Session, spec: EngineSpec) -> None:
    """Of a cache in blocks too: by the block that it is in, not by when that was quantised."""
    given = ids(1, 100)
    at_once = session.forward(given, all_logits=True)
    session.reset()
    parts = np.cumsum([0, 33, *[1] * 4, 30, 33])
    in_parts = [session.forward(given[:, a:b], all_logits=True) for a, b in pairwise(parts)]
    bound = COMPUTE_BOUNDS[spec.compute] * (2 if spec.cache_dtype in QUANTIZED_CACHE_TYPES else 1)
    assert difference(np.concatenate(in_parts, axis=1), at_once).max_rel_error <= bound


def test_rows_of_different_length(session: Session, near: Near, expected: Logits) -> None:
    given, lengths, step = ids(3, 40), np.array([40, 1, 17]), ids(3, 1, seed=1)
    rows = [np.concatenate([row[:n], new]) for row, n, new in zip(given, lengths, step, strict=True)]
    logits = [expected(row[None])[0] for row in rows]
    assert near(session.forward(given, lengths=lengths), np.stack([each[-2] for each in logits]))
    assert near(session.forward(step), np.stack([each[-1] for each in logits]))


def test_tokens_of_changing_numbers_of_rows(session: Session, near: Near, expected: Logits) -> None:
    for rows in (1, 3, 1, 2, 3):
        session.reset()
        given = ids(rows, 5, seed=rows)
        logits = expected(given)
        for i in range(5):
            assert near(session.forward(given[:, i : i + 1]), logits[:, i])


def test_truncate_and_reset(session: Session, near: Near, expected: Logits) -> None:
    given, step, other = ids(1, 60), ids(1, 1, seed=2), ids(2, 9, seed=3)
    session.forward(given)
    session.truncate(21)
    assert near(session.forward(step), expected(np.concatenate([given[:, :21], step], axis=1))[:, -1])
    session.reset()
    assert near(session.forward(other), expected(other)[:, -1])


def test_the_cache_has_its_memory_from_the_start(session: Session, spec: EngineSpec) -> None:
    before = session.cache_bytes
    session.forward(ids(1, LENGTH))
    assert session.cache_bytes == before == spec.cache_bytes(MODEL)
    with pytest.raises(CapacityError):
        session.forward(ids(1, 1))


def test_more_rows_than_it_was_built_for(session: Session) -> None:
    with pytest.raises(InputError, match=f"--max-batch {ROWS + 1}"):
        session.forward(ids(ROWS + 1, 4))


def test_two_sessions_of_one_engine(bundle: tuple[Bundle, str], spec: EngineSpec, session: Session) -> None:
    given = ids(1, 20)
    with open_session(bundle[0], spec.engine) as other:
        for i in range(20):
            assert np.array_equal(session.forward(given[:, i : i + 1]), other.forward(given[:, i : i + 1]))


# --- with a cache policy ----------------------------------------------------------------------------------------------

POLICIES = {
    "window": {"rows": 40, "sinks": 2},
    "window, merged": {"rows": 40, "sinks": 2, "residual_rows": 2},
}
"""Which rows stay follows from their positions alone: rounding decides nothing, so logits can be compared."""


def make(name: str) -> CachePolicy:
    return policy(name.partition(",")[0], interval=8, **POLICIES[name])


@pytest.fixture(scope="module", params=[available("tensorrt"), ENGINES[3], ENGINES[4], available("tensorrt-rtx")])
def managed(
    request: pytest.FixtureRequest, bundle: tuple[Bundle, str], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A bundle of its own, and a function that builds an engine for a policy in it and opens a session."""
    engine, options = request.param
    directory = tmp_path_factory.mktemp("managed") / "bundle"
    opened = Bundle.open(shutil.copytree(bundle[0].directory, directory, ignore=shutil.ignore_patterns("engines")))
    spec = EngineSpec(engine, bundle[1], bundle[1], max_length=256, max_batch=ROWS, chunk_size=CHUNK)
    spec = replace(spec, **options)

    def start(of: CachePolicy) -> Session:
        sizes = {"chunk_size": spec.chunk_size, "max_length": spec.max_length}
        needed = EngineCache.of(of, opened.config, spec.cache_dtype, **sizes)
        build(opened, replace(spec, managed=needed), force=True)
        return open_session(opened, engine, cache=of)

    return opened, spec, start


@pytest.mark.parametrize("name", POLICIES)
def test_rows_are_evicted_and_merged(managed: Any, name: str) -> None:
    opened, spec, start = managed
    config = json.loads((opened.directory / "config.json").read_text(encoding="utf-8"))
    weights = dict(read_weights(opened.model_path, opened.config))
    exact = ManagedModel(config, weights, make(name), CHUNK, observed=16)
    given, place = ids(1, 130), 0
    bound = CACHE_BOUNDS.get(spec.cache_dtype, COMPUTE_BOUNDS[spec.compute])
    with start(make(name)) as session:
        for tokens in (90, *[1] * 20, 20):
            part = given[:, place : place + tokens]
            found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
            assert difference(found, expected).max_rel_error <= bound
            place += tokens
            assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]
        assert session.cuda_graph


def test_what_rows_receive_adds_up(managed: Any) -> None:
    """Every head of every query that observes shares out 1; of a prompt's chunk those are the last 16."""
    opened, _, start = managed
    with start(policy("h2o", rows=100, interval=100)) as session:
        session.forward(ids(2, CHUNK))
        for i in range(4):
            session.forward(ids(2, 1, seed=i))
        for received in session._received():
            held = received[:, : CHUNK + 4]
            heads = opened.config.attention.num_query_heads
            np.testing.assert_allclose(held.sum(1), heads * (16 + 4), rtol=1e-2)
            assert (held >= 0).all()


# --- with trees of tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [available("tensorrt"), ENGINES[3]], indirect=True)
def test_each_node_of_a_tree_is_its_path_alone(
    bundle: tuple[Bundle, str], spec: EngineSpec, near: Near, expected: Logits
) -> None:
    build(bundle[0], replace(spec, tree_rows=64), force=True)
    text = ids(1, CHUNK + 7)
    with open_session(bundle[0], spec.engine, trees=True) as session:
        session.forward(text)
        tree = session.tree()
        nodes = tree.grow([PREFIX, PREFIX, 0, 2, 1, *[3] * 20])
        new = ids(1, len(nodes), seed=4)
        found = session.forward(new, tree=tree, all_logits=True)[0]
        for node in (1, 4, 15, 24):
            whole = np.concatenate([text[0], tree.ids(node)])
            assert near(found[node], expected(whole[None])[0, -1])
        tree.accept(15)
        whole = np.concatenate([text[0], new[0, [0, 2, 3, 15]], [3]])
        assert near(session.forward([[3]])[0], expected(whole[None])[0, -1])
        assert session.cuda_graph


# --- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_without_an_engine(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(EngineError, match=f"there is no engine; run: gta-edge build .* --engine {name}$"):
        open_session(Bundle.open(tiny_bundle), name)


def test_the_command_for_an_engine_that_is_not_there_has_what_was_asked_for(tiny_bundle: Path) -> None:
    asked = {"compute": "fp16", "cache_dtype": "fp16", "cache": policy("window", rows=64, sinks=2)}
    with pytest.raises(EngineError) as raised:
        open_session(Bundle.open(tiny_bundle), "tensorrt", **asked)
    assert str(raised.value).endswith(
        f"run: gta-edge build {tiny_bundle} --engine tensorrt --compute fp16 --cache-dtype fp16 --cache-policy window "
        "--cache-rows 64 --cache-sinks 2"
    )


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_where_something_is_missing(copied_bundle: Path, name: str) -> None:
    reason = missing(name)
    if reason is None:
        pytest.skip("nothing is missing here")
    (copied_bundle / "engines" / name).mkdir(parents=True)
    with pytest.raises(BackendError) as raised:
        open_session(Bundle.open(copied_bundle), name)
    assert str(raised.value) == reason


def test_auto_goes_on_where_there_is_no_engine(tiny_bundle: Path) -> None:
    with open_session(Bundle.open(tiny_bundle)) as session:
        assert session.backend == "onnxruntime"


def test_what_engines_are_compared_with(bundle: tuple[Bundle, str]) -> None:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime, to compare the reference with", minversion="1.25")
    given = ids(2, 12)
    with open_session(bundle[0], "onnxruntime", exact=True) as session:
        found = session.forward(given, all_logits=True)
    assert difference(found, formula(bundle[0])(given)).max_rel_error <= FLOAT32_BOUND


def test_bundles_made_elsewhere(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared("bf16", tmp_path) is None
    (tmp_path / "made").mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "made" / "bf16")
    monkeypatch.setenv("GTA_EDGE_TEST_BUNDLES", str(tmp_path / "made"))
    found = prepared("bf16", tmp_path)
    assert found is not None
    assert found.parent == tmp_path  # a copy: an engine is built into it
    assert Bundle.open(found).config == Bundle.open(tiny_bundle).config
