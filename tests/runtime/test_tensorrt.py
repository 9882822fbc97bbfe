"""Engines on a GPU, against ONNX Runtime on the CPU.

To run on a board with full TensorRT (``make test-jetson``), or with TensorRT-RTX on a GPU that it knows.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gta_edge.bundle import Bundle
from gta_edge.errors import BackendError, CapacityError, EngineError, InputError
from gta_edge.export.initialise import initialise
from gta_edge.export.pipeline import export
from gta_edge.fidelity import COMPUTE_BOUNDS, difference
from gta_edge.plugins.launch import current_gpu
from gta_edge.presets import preset
from gta_edge.runtime.backends import open_session
from gta_edge.runtime.build import LOGIT_POSITIONS, build
from gta_edge.runtime.engine import Purpose
from gta_edge.runtime.session import Session
from gta_edge.trt import load


def missing(engine: str) -> str | None:
    """What is not here of all that an engine takes."""
    try:
        current_gpu()
        return None if load(engine).builds else f"{engine} has no builder"
    except BackendError as error:
        return str(error)


def available(engine: str, *marks: pytest.MarkDecorator) -> object:
    reason = missing(engine)
    return pytest.param(engine, marks=[*marks, pytest.mark.skipif(reason is not None, reason=reason or "")])


ENGINES = [available("tensorrt", pytest.mark.tensorrt, pytest.mark.gpu), available("tensorrt-rtx", pytest.mark.gpu)]
MODEL = preset("gta1-160m").replace(num_hidden_layers=2, vocab_size=500, max_position_embeddings=256)
LENGTH, ROWS, CHUNK = 128, 3, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "checkpoint"
    initialise(MODEL, directory)
    return directory


@pytest.fixture(scope="module", params=[("bf16", "bf16"), ("int4", "fp16"), ("int8", "fp16")], ids=lambda p: p[0])
def bundle(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[Bundle, str]:
    precision, compute = request.param
    exported = export(checkpoint, checkpoint.with_name(precision), precision=precision, verify=False)
    return exported.bundle, compute


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, bundle: tuple[Bundle, str]) -> str:
    name: str = request.param
    purpose = Purpose(name, bundle[1], bundle[1], max_length=LENGTH, max_batch=ROWS, chunk_size=CHUNK)
    build(bundle[0], purpose, force=True)
    return name


@pytest.fixture
def session(bundle: tuple[Bundle, str], engine: str) -> Iterator[Session]:
    with open_session(bundle[0], engine) as opened:
        yield opened


@pytest.fixture
def expected(bundle: tuple[Bundle, str]) -> Iterator[Session]:
    with open_session(bundle[0], "onnxruntime", exact=True) as opened:
        yield opened


def ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, tokens))


def near(session: Session, found: np.ndarray, expected: np.ndarray) -> bool:
    return difference(found, expected).max_rel_error <= COMPUTE_BOUNDS[session.compute]


def test_a_prompt_and_tokens_after_it(session: Session, expected: Session) -> None:
    given = ids(2, 90)
    assert near(session, session.forward(given[:, :70]), expected.forward(given[:, :70]))
    for i in range(70, 90):  # the first is run and captured, the others are replayed
        assert near(session, session.forward(given[:, i : i + 1]), expected.forward(given[:, i : i + 1]))
    assert session.length.tolist() == [90, 90]


def test_logits_of_every_position(session: Session, expected: Session) -> None:
    given = ids(1, 2 * CHUNK + LOGIT_POSITIONS + 3)
    found = session.forward(given, all_logits=True)
    assert near(session, found, expected.forward(given, all_logits=True))


def test_rows_of_different_length(session: Session, expected: Session) -> None:
    given, lengths = ids(3, 40), np.array([40, 1, 17])
    assert near(session, session.forward(given, lengths=lengths), expected.forward(given, lengths=lengths))
    step = ids(3, 1, seed=1)
    assert near(session, session.forward(step), expected.forward(step))


def test_truncate_and_reset(session: Session, expected: Session) -> None:
    for each in (session, expected):
        each.forward(ids(1, 60))
        each.truncate(21)
    step = ids(1, 1, seed=2)
    assert near(session, session.forward(step), expected.forward(step))
    session.reset()
    expected.reset()
    assert near(session, session.forward(ids(2, 9, seed=3)), expected.forward(ids(2, 9, seed=3)))


def test_the_cache_has_its_memory_from_the_start(session: Session) -> None:
    before = session.cache_bytes
    session.forward(ids(1, LENGTH))
    value_bytes = 2
    assert session.cache_bytes == before == ROWS * LENGTH * MODEL.cache_bytes_per_token(value_bytes)
    with pytest.raises(CapacityError):
        session.forward(ids(1, 1))


def test_more_rows_than_it_was_built_for(session: Session) -> None:
    with pytest.raises(InputError, match=f"--max-batch {ROWS + 1}"):
        session.forward(ids(ROWS + 1, 4))


def test_two_sessions_of_one_engine(bundle: tuple[Bundle, str], engine: str, session: Session) -> None:
    given = ids(1, 20)
    with open_session(bundle[0], engine) as other:
        for i in range(20):
            assert np.array_equal(session.forward(given[:, i : i + 1]), other.forward(given[:, i : i + 1]))


# --- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_without_an_engine(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(EngineError, match=f"there is no engine; run: gta-edge build .* --engine {name}$"):
        open_session(Bundle.open(tiny_bundle), name)


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
