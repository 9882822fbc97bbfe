"""Sessions with a cache of int8 on ONNX Runtime's CPU kernels."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gta_edge.errors import BackendError, CapacityError
from gta_edge.evaluate.verify import verify
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import bytes_per_token, cache_tensors
from gta_edge.runtime.onnxruntime import int8_cache
from gta_edge.runtime.onnxruntime.int8_cache import MAX_ROWS, require_exact_products, rows_for
from gta_edge.runtime.onnxruntime.passes import int8_attention
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.lowered_bundles import GRAPH, KEPT
from tests.helpers.small_models import MODELS, write_bundle

COPIED = "in-place optimization not activated"  # what ONNX Runtime logs when it copies a cache
WARNINGS = 2  # the severity from which on it does
VOCAB, P = 61, 64
FEW = 4
ROUNDED = 0.1  # bound on what rounding the cache changes, over the standard deviation of the logits
SAME = 2e-3  # where the same values are rounded: a value that lies between two codes may fall on either side


@pytest.fixture(autouse=True, scope="module")
def small_limits() -> Iterator[None]:
    """A few more tokens are many, so that small models take both ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_attention, "MAX_FEW_TOKENS", FEW)
        yield


ENTRIES = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, vocab_size=VOCAB, max_position_embeddings=P),
    "gta of one head": reference.gta_entries(heads=4, n_q=4, n_k=1, n_c=1, vocab_size=VOCAB, max_position_embeddings=P),
    "gqa": reference.llama_entries(heads=4, n_kv=2, vocab_size=VOCAB, max_position_embeddings=P),
}
_exports = tempfile.TemporaryDirectory(prefix="gta-edge-int8-")  # removed when Python ends


@functools.cache
def exported(name: str) -> Path:
    """A directory with a checkpoint and its bundle."""
    directory = Path(_exports.name) / name
    write_checkpoint(directory / "checkpoint", ENTRIES[name], reference.random_weights(ENTRIES[name]))
    export_model(directory / "checkpoint", directory / "bundle", verify=False)
    return directory


@pytest.fixture(params=ENTRIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


Start = Callable[..., OnnxRuntimeSession]


@pytest.fixture
def start(name: str) -> Iterator[Start]:
    started: list[OnnxRuntimeSession] = []

    def begin(**options: Any) -> OnnxRuntimeSession:
        options = {"cache_dtype": "int8", "threads": 1} | options
        started.append(OnnxRuntimeSession(Bundle.open(exported(name) / "bundle"), **options))
        return started[-1]

    yield begin
    for session in started:
        session.close()


def ids(rows: int, tokens: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


def in_steps(session: OnnxRuntimeSession, tokens: np.ndarray, *cuts: int) -> np.ndarray:
    parts = np.split(tokens, cuts, axis=1)
    return np.concatenate([session.forward(part, all_logits=True) for part in parts], axis=1)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert reference.relative_error(found, expected) <= SAME


# --- logits ----------------------------------------------------------------------------------------------------------


def test_logits_are_near_those_of_float32(start: Start) -> None:
    tokens = ids(2, 40)
    exact = start(cache_dtype="fp32").forward(tokens, all_logits=True)
    for cuts in ((), (30, *range(31, 40)), range(1, 40), (3, 12, 14, 37)):
        assert 1e-4 < reference.relative_error(in_steps(start(), tokens, *cuts), exact) < ROUNDED


def test_the_size_of_a_chunk_does_not_matter(start: Start) -> None:
    """In chunks that are all dequantised, or all read as they are, a prompt gives what it gives at once."""
    tokens, lengths = ids(3, 30), [30, 12, 1]
    whole = start(chunk_size=30).forward(tokens, lengths=lengths, all_logits=True)
    for size in (6, 10, 15):
        assert_same(start(chunk_size=size).forward(tokens, lengths=lengths, all_logits=True), whole)
    single = start(chunk_size=1).forward(tokens, lengths=lengths, all_logits=True)
    for size in (2, 3):
        assert_same(start(chunk_size=size).forward(tokens, lengths=lengths, all_logits=True), single)


def test_rows_of_different_length_are_as_each_alone(start: Start) -> None:
    tokens, lengths = ids(4, 9), np.array([9, 1, 5, 7])
    more = ids(4, 3, seed=8)
    session = start()
    prompts = session.forward(tokens, lengths=lengths, all_logits=True)
    single = [session.forward(more[:, i : i + 1]) for i in range(3)]
    for row, length in enumerate(lengths):
        alone = start()
        # one token would be read as it is, with its query rounded, and the chunk of all rows was not
        own = np.concatenate([tokens[row : row + 1, :length], np.zeros((1, 9 - length), np.int64)], axis=1)
        assert_same(prompts[row, :length], alone.forward(own, lengths=[length], all_logits=True)[0, :length])
        for i in range(3):
            assert_same(single[i][row], alone.forward(more[row : row + 1, i : i + 1])[0])


@pytest.mark.parametrize("keep", [0, 1, 7, 16])
def test_truncated_tokens_were_never_there(start: Start, keep: int) -> None:
    tokens, others = ids(2, 16), ids(2, 9, seed=9)
    used, new = start(), start()
    in_steps(used, tokens, 7, 8)
    used.truncate(keep)
    for part in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):  # as the other was given them
        done = int(new.length[0])
        if done < keep:
            new.forward(part[:, : keep - done])
    for part in (others[:, :1], others[:, 1:7], others[:, 7:]):
        assert_same(used.forward(part, all_logits=True), new.forward(part, all_logits=True))


def test_after_a_reset_all_is_as_new(start: Start) -> None:
    used, new = start(capacity_step=16), start(capacity_step=16)
    used.forward(ids(2, 60))
    held = used.cache_bytes
    used.reset()
    for tokens in (5, 3, 20, 1, 30):
        given = ids(2, tokens)
        assert_same(used.forward(given, all_logits=True), new.forward(given, all_logits=True))
        shapes = [{key: cache.shape for key, cache in each._caches.items()} for each in (used, new)]
        assert shapes[0] == shapes[1]  # so it costs what it costs in a new session
    assert used.cache_bytes == held


def test_growth_keeps_what_is_there(start: Start) -> None:
    tokens = ids(2, 60)
    cuts = range(6, 60, 6)
    grown = in_steps(start(capacity_step=4), tokens, *cuts)
    assert_same(grown, in_steps(start(capacity_step=64), tokens, *cuts))


def test_threads_do_not_change_the_result(start: Start) -> None:
    tokens = ids(2, 20)
    assert_same(in_steps(start(threads=2), tokens, 16, 17), in_steps(start(), tokens, 16, 17))


@pytest.mark.parametrize("precision", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_with_weights_in_other_types(model: str, precision: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", model, precision)
    tokens, found = ids(2, 12), []
    for cache_dtype in ("fp32", "int8"):
        with load(bundle, "onnxruntime", threads=1, exact=True, cache_dtype=cache_dtype) as session:
            found.append(in_steps(session, tokens, 9, 10, 11))
    assert 1e-4 < reference.relative_error(found[1], found[0]) < ROUNDED


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_step_copies_the_cache(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    session = start()
    session._run_options.log_severity_level = WARNINGS
    session.forward(ids(2, 10))
    addresses = {key: cache.ctypes.data for key, cache in session._caches.items()}
    for tokens in (1, 2, 7, 1):
        session.forward(ids(2, tokens))
    assert {key: cache.ctypes.data for key, cache in session._caches.items()} == addresses
    assert COPIED not in capfd.readouterr().err


def test_what_is_held(start: Start) -> None:
    session = start(capacity_step=16)
    session.forward(ids(3, 17))
    assert session.cache_dtype == "int8"
    tensors = cache_tensors(session.config, "int8", transposed=True)
    assert {key: buffer.shape for key, buffer in session._buffers.items()} == {
        tensor.name: tensor.shape(3, 32) for tensor in tensors
    }
    assert session.cache_bytes == 3 * 32 * bytes_per_token(session.config, "int8")
    assert {str(cache.dtype) for cache in session._caches.values()} == {"int8", "float32"}
    assert 3 * session.cache_bytes < 3 * 32 * bytes_per_token(session.config, "fp32")


def test_channels_of_a_key_lie_unevenly_apart(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they would lie at a multiple of 512 bytes, there are rows that nothing is written to."""
    monkeypatch.setattr(int8_cache, "_ALIASED_BYTES", 16)
    session = start(capacity_step=16)
    tokens = ids(2, 30)
    found = in_steps(session, tokens, 10, 11, 20)
    assert session.capacity == 32
    assert {cache.shape[-1] for key, cache in session._caches.items() if key.startswith("key")} == {rows_for(32)}
    monkeypatch.undo()
    assert_same(found, in_steps(start(capacity_step=16), tokens, 10, 11, 20))


def test_a_bundle_that_cannot_be_written_to(name: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = in_steps(start(), ids(2, 12), 9, 10)
    monkeypatch.setattr("gta_edge.runtime.onnxruntime.lowered.cached_graph", lambda *_: None)
    assert_same(in_steps(start(), ids(2, 12), 9, 10), wanted)


def test_what_all_layers_share_is_there_once(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", "as many", "int4")
    load(bundle, "onnxruntime", cache_dtype="int8").close()
    graph = onnx.load(bundle / f"{KEPT}-int8" / GRAPH, load_external_data=False).graph
    counts = [node.op_type for node in graph.node]
    assert counts.count("If") == 2  # layers
    for shared, most in {"LessOrEqual": 2, "Range": 2, "Tile": 1, "Where": 2}.items():
        assert 0 < counts.count(shared) <= most


# --- what is refused -------------------------------------------------------------------------------------------------


class Saturating:
    """ONNX Runtime on a processor that sums two products in 16 bits."""

    SessionOptions = staticmethod(lambda: type("Options", (), {})())

    @staticmethod
    def InferenceSession(*_: Any, **__: Any) -> Any:
        return type("Session", (), {"run": lambda *_: [np.full((1, 16), 32 * 32767, np.int32)]})()


def test_a_processor_whose_products_saturate() -> None:
    with pytest.raises(BackendError, match=r"products of 8-bit integers saturate.*; take a cache of fp32"):
        require_exact_products(Saturating)


def test_longer_contexts_than_32_bits_allow(tmp_path: Path) -> None:
    entries = {**ENTRIES["gta"], "max_position_embeddings": MAX_ROWS + 10}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", verify=False)
    with load(tmp_path / "bundle", "onnxruntime", cache_dtype="int8") as session:
        assert session.max_length == MAX_ROWS
        with pytest.raises(CapacityError, match=f"a cache of int8 holds at most {MAX_ROWS} tokens"):
            session.forward(ids(1, MAX_ROWS + 1))


@pytest.mark.parametrize(
    ("backend", "cache_dtype", "allowed"),
    [
        ("onnxruntime", "fp16", "fp32 or int8"),
        ("torch", "fp16", "fp32 or int8 or fp8 or int4 or int4v2"),
        ("onnxruntime", "int3", "fp32 or int8"),
    ],
)
def test_a_type_that_the_backend_has_not(backend: str, cache_dtype: str, allowed: str) -> None:
    with pytest.raises(BackendError, match=f"{backend} has no cache of {cache_dtype} .* expected {allowed}, or"):
        load(exported("gta") / "bundle", backend, cache_dtype=cache_dtype)


def test_auto_takes_a_backend_that_has_it() -> None:
    with load(exported("gta") / "bundle", cache_dtype="int8") as session:
        assert (session.backend, session.cache_dtype) == ("onnxruntime", "int8")
    with load(exported("gta") / "bundle") as session:
        assert session.cache_dtype == "fp32"


def test_verified_within_the_bound_for_8_bits(name: str) -> None:
    bundle, checkpoint = exported(name) / "bundle", exported(name) / "checkpoint"
    report = verify(bundle, checkpoint, ["onnxruntime"], cache_dtype="int8")
    assert report.passed, report.failures
    assert report.backends["onnxruntime"].max_rel_error > 1e-3


def test_where_the_ways_of_reading_meet(tmp_path: Path) -> None:
    """A text that grows in steps of few and of many tokens."""
    write_checkpoint(tmp_path / "checkpoint", ENTRIES["gqa"], reference.random_weights(ENTRIES["gqa"]))
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", verify=False)
    tokens, found = ids(2, 60), []
    for cache_dtype in ("fp32", "int8"):
        options: dict[str, Any] = {"cache_dtype": cache_dtype, "capacity_step": 8, "threads": 1}
        with OnnxRuntimeSession(Bundle.open(tmp_path / "bundle"), **options) as session:
            found.append(in_steps(session, tokens, 1, 4, 20, 21, 22, 26, *range(27, 36), 41, 50, 51))
    assert 1e-4 < reference.relative_error(found[1], found[0]) < ROUNDED
