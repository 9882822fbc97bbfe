"""What a session of an engine asks of CUDA and TensorRT, on the simulation of both; ``test_session`` has the logits."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import cache_tensors
from gta_edge.runtime.tensorrt.build import LOGIT_POSITIONS, buffer_bytes
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.session import TensorRTSession
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.tensorrt_simulator import Driver, open_simulated

LENGTH, ROWS, CHUNK = 100, 3, 32
SPEC = EngineSpec("tensorrt-rtx", "fp16", "fp16", max_length=LENGTH, max_batch=ROWS, chunk_size=CHUNK)
STEP = ["copy pinned to device"] * 3 + ["run", "copy device to pinned"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:

    directory = tmp_path_factory.mktemp("simulated")
    shutil.copytree(tiny_bundle, directory / "bundle")
    opened = Bundle.open(directory / "bundle")
    simulator.build(opened, SPEC, directory / "prepared")
    return opened


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def session(bundle: Bundle, driver: Driver) -> Iterator[TensorRTSession]:
    with open_simulated(bundle, SPEC.engine, driver) as opened:
        yield opened


def ids(session: TensorRTSession, rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, session.config.vocab_size, (rows, tokens))


def asked(driver: Driver, session: TensorRTSession, given: np.ndarray) -> list[str]:
    before = len(driver.calls)
    session.forward(given)
    return driver.calls[before:]


def test_a_token_is_one_replay_of_a_graph(session: TensorRTSession, driver: Driver) -> None:
    session.forward(ids(session, 2, 7))
    assert asked(driver, session, ids(session, 2, 1)) == [*STEP, "capture", *STEP]  # runs once, then is captured
    for _ in range(5):
        assert asked(driver, session, ids(session, 2, 1)) == ["replay"]
    assert len(driver.graphs) == 1


def test_a_few_tokens_are_replays_of_a_few_graphs(session: TensorRTSession, driver: Driver) -> None:
    """Padded to their widths, with the logits of single tokens; what pads them is not seen later."""
    given = ids(session, 2, 70)
    session.forward(given[:, :20])
    single = {t: session.forward(given[:, t : t + 1]) for t in range(20, 70)}
    assert len(driver.graphs) == 1
    session.truncate(20)
    at = 20
    for count, queued in (
        (2, "capture"),
        (2, "replay"),
        (5, "capture"),
        (6, "replay"),
        (13, "capture"),
        (16, "replay"),
    ):
        before = len(driver.calls)
        found = session.forward(given[:, at : at + count], all_logits=True)
        assert (queued == "replay") == (driver.calls[before:] == ["replay"])
        for t in range(count):
            np.testing.assert_allclose(found[:, t], single[at + t], rtol=0.05, atol=0.05)
        at += count
    assert len(driver.graphs) == 4  # of 1, 2, 6 and 16 tokens
    session.truncate(LENGTH - 60)
    session.forward(given[:, : 60 - 5])
    session.forward(given[:, :5], all_logits=True)  # no room for what would pad them
    assert len(driver.graphs) == 4


def test_each_number_of_rows_has_its_graph_and_keeps_it(session: TensorRTSession, driver: Driver) -> None:
    found = {}
    for seed, rows in enumerate((1, 3, 2, 1, 3, 2)):
        session.reset()
        for i in range(3):
            logits = session.forward(ids(session, rows, 1, seed=i))
        if rows in found:
            np.testing.assert_array_equal(logits, found[rows])
            assert seed > 2
        found[rows] = logits
    assert len(driver.graphs) == 3


def test_nothing_is_allocated_after_the_start(session: TensorRTSession, driver: Driver) -> None:
    before = [call for call in driver.calls if call.startswith("allocate")]
    for rows in (3, 1):
        session.reset()
        session.forward(ids(session, rows, 2 * CHUNK + 3), all_logits=True)
        for _ in range(3):
            session.forward(ids(session, rows, 1))
    assert [call for call in driver.calls if call.startswith("allocate")] == before


def test_past_and_present_are_one_memory_that_no_step_copies(session: TensorRTSession, driver: Driver) -> None:
    session.forward(ids(session, 1, 5))
    session.forward(ids(session, 1, 1))
    prefill, decode = session._engine.alive
    caches = [name for name in decode.addresses if name.startswith("past_") and name != "past_length"]
    assert len(caches) == 2 * session.config.num_hidden_layers
    for name in caches:
        present = name.replace("past_", "present_")
        assert len({context.addresses[each] for context in (decode, prefill) for each in (name, present)}) == 1
    assert {call for call in driver.calls if call.startswith("copy")} == {
        "copy pinned to device",
        "copy device to pinned",
    }
    size = sum(tensor.nbytes(ROWS, LENGTH) for tensor in cache_tensors(session.config, "fp16"))
    assert session.cache_bytes == SPEC.cache_bytes(session.config) == size
    assert driver.used_bytes() >= size


@pytest.mark.parametrize("how", ["capturable", "captures"])
def test_an_engine_that_cannot_be_captured_runs_step_by_step(
    copied_bundle: Path, tmp_path: Path, session: TensorRTSession, how: str
) -> None:
    """TensorRT-RTX says so before, TensorRT only when it is tried."""
    other, driver = Bundle.open(copied_bundle), Driver()
    simulator.build(other, SPEC, tmp_path / "prepared", **{how: False})
    with open_simulated(other, SPEC.engine, driver) as without:
        assert (session.cuda_graph, without.cuda_graph) == (None, None)
        for i in range(4):
            step = ids(session, 2, 1, seed=i)
            np.testing.assert_array_equal(session.forward(step), without.forward(step))
        assert (session.cuda_graph, without.cuda_graph) == (True, False)
    assert "replay" not in driver.calls


def test_only_so_many_contexts_are_kept(
    session: TensorRTSession, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gta_edge.runtime.tensorrt.session._DECODERS_KEPT", 2)
    for i, rows in enumerate((1, 2, 3, 2, 1)):
        session.reset()
        session.forward(ids(session, rows, 1, seed=i))
    assert len(session._engine.alive) == 1 + 2
    assert len(driver.graphs) - len(driver.freed_graphs) == 2


def test_scratch_memory_is_one_for_all(session: TensorRTSession) -> None:
    for rows in (1, 2):
        session.reset()
        session.forward(ids(session, rows, 3))
        session.forward(ids(session, rows, 1))
    contexts = session._engine.alive
    assert len(contexts) == 3
    largest = max(map(session._engine.scratch_bytes, range(2)))
    assert {context.scratch for context in contexts} == {(session._scratch, largest)}


def test_more_logits_than_one_run_gives(session: TensorRTSession, driver: Driver) -> None:
    """A chunk is run in pieces of as many tokens as there is room for logits of, each of them once."""
    given = ids(session, 2, CHUNK)
    assert CHUNK == 2 * LOGIT_POSITIONS
    every = session.forward(given, all_logits=True)
    assert driver.calls.count("replay") == 1  # of the first piece's graph: the second is another like it
    session.reset()
    for stop in (1, LOGIT_POSITIONS, LOGIT_POSITIONS + 1, CHUNK):
        session.reset()
        np.testing.assert_allclose(session.forward(given[:, :stop]), every[:, stop - 1], rtol=0.05, atol=0.05)


def test_everything_is_given_back(bundle: Bundle, driver: Driver) -> None:
    session = open_simulated(bundle, SPEC.engine, driver)
    session.forward(ids(session, 1, 3))
    session.forward(ids(session, 1, 1))
    session.close()
    session.close()
    assert not driver.live
    assert not driver.objects
    assert not driver.current  # as it was before
    assert driver.calls.count("retain") == driver.calls.count("release") == 1


def test_an_error_of_cuda_keeps_nothing(bundle: Bundle, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_simulated(bundle, SPEC.engine, driver)
    failed = (simulator.driver_enums.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
    monkeypatch.setattr(driver, "cuStreamSynchronize", lambda stream: failed)
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        session.forward(ids(session, 1, 3))
    session.close()
    assert not driver.objects


def test_a_gpu_that_is_too_small_is_refused_with_figures(bundle: Bundle) -> None:
    needed = SPEC.cache_bytes(bundle.config)
    driver = Driver(memory_bytes=needed)
    with pytest.raises(CapacityError, match="--max-length or --max-batch") as raised:
        open_simulated(bundle, SPEC.engine, driver)
    assert f"{needed / 1e9:.2f} GB" in str(raised.value)
    assert not driver.live
    driver = Driver(memory_bytes=needed + 2000)  # enough by the estimate, but not in fact
    with pytest.raises(CapacityError, match=r"takes 0\.\d+ GB and the GPU has 0\.\d+ GB free"):
        open_simulated(bundle, SPEC.engine, driver)
    assert not driver.live
    assert driver.calls.count("retain") == driver.calls.count("release") == 1


@pytest.mark.parametrize("integrated", [False, True])
def test_memory_in_pieces_is_said_by_the_largest(bundle: Bundle, integrated: bool) -> None:
    """That so much is free and so little cannot be had makes no sense without."""
    driver = Driver(block_bytes=40_000, integrated=integrated)
    with pytest.raises(CapacityError) as raised:
        open_simulated(bundle, SPEC.engine, driver)
    message = str(raised.value)
    assert re.search(r"takes 0\.000 GB and the largest block that (the GPU|CUDA) gives is 0\.000 GB", message)
    assert ("drop_caches" in message) is integrated
    assert "and the GPU has" not in message
    assert not driver.live
    assert driver.calls.count("retain") == driver.calls.count("release") == 1


def test_pinned_memory_that_runs_out_is_named(bundle: Bundle) -> None:
    buffers = buffer_bytes(bundle.config, SPEC)
    driver = Driver(pinned_bytes=buffers - 1)
    with pytest.raises(
        CapacityError, match=r"a buffer for logits takes 0\.\d+ GB of pinned memory, which CUDA does not"
    ):
        open_simulated(bundle, SPEC.engine, driver)
    assert not driver.live
    assert driver.calls.count("retain") == driver.calls.count("release") == 1
    with open_simulated(bundle, SPEC.engine, Driver(pinned_bytes=buffers)):
        pass


def test_buffers_are_in_the_estimates(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from gta_edge.runtime.tensorrt.build import requirement

    rows, vocab = 200, bundle.config.vocab_size
    many = replace(SPEC, max_batch=rows)
    found = buffer_bytes(bundle.config, many)
    assert found == 8 * rows * (CHUNK + 1 + LOGIT_POSITIONS) + 4 * rows * LOGIT_POSITIONS * vocab
    needed = requirement(bundle, many)
    assert needed.peak >= needed.weights + needed.cache + needed.builder + 2 * found
    assert needed.on_gpu >= needed.cache + found
    # where the memory is the host's, pinned buffers take it too
    cache, plan = SPEC.cache_bytes(bundle.config), 20_000
    memory = cache + plan + int(1.5 * buffer_bytes(bundle.config, SPEC))
    open_simulated(bundle, SPEC.engine, Driver(memory_bytes=memory)).close()
    monkeypatch.setattr("gta_edge.cuda.session.available_bytes", lambda: memory)
    with pytest.raises(CapacityError, match="its buffers"):
        open_simulated(bundle, SPEC.engine, Driver(memory_bytes=memory, integrated=True))


def test_the_first_error_is_the_reason(session: TensorRTSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT says after it only follows; and what it said in a step before has nothing to do with it."""
    session._log.log(1, "something that did not matter")
    context = session._prefill

    def fail(stream: int) -> bool:
        for message in ("the cause", "a consequence", "CUDA error 700 in the last thing that was tried"):
            session._log.log(1, message)
        return False

    monkeypatch.setattr(context, "execute_async_v3", fail)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"could not run the engine \(the cause\)"):
            session.forward(ids(session, 1, 3))


def test_more_rows_than_it_was_built_for(session: TensorRTSession) -> None:
    with pytest.raises(InputError, match=f"built for {ROWS}; .*--max-batch {ROWS + 1} --force"):
        session.forward(ids(session, ROWS + 1, 2))
    assert session.forward(ids(session, ROWS, 2)).shape == (ROWS, session.config.vocab_size)


def test_more_tokens_than_it_was_built_for(session: TensorRTSession) -> None:
    assert session.max_length == LENGTH < session.config.max_position_embeddings
    session.forward(ids(session, 1, LENGTH))
    with pytest.raises(CapacityError, match=f"the engine was built with --max-length {LENGTH}"):
        session.forward(ids(session, 1, 1))


def test_what_tensorrt_refuses_to_run_is_an_error_with_its_words(
    session: TensorRTSession, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session._prefill.scratch = 0, 0
    with pytest.raises(BackendError, match=r"could not run the engine \(there is too little scratch memory\)"):
        session.forward(ids(session, 1, 2))
    monkeypatch.setattr(session._prefill.engine, "names", set())
    with pytest.raises(BackendError, match=r"the engine has no input_ids \(.*; run: gta-edge build"):
        session.forward(ids(session, 1, 1))


def test_kernels_that_were_compiled_at_run_time_are_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # of these kernels alone: the engine's key stays where it is
    monkeypatch.setattr("gta_edge.runtime.tensorrt.runtime_cache.cache_directory", lambda: tmp_path / "cache")

    def opened() -> TensorRTSession:
        return open_simulated(bundle, SPEC.engine, compiles_at_run_time=True)

    first = opened()
    first.forward(ids(first, 1, 1))
    # for a graph kernels are there before it is captured; prompts, of all lengths, do not wait for theirs
    assert first._engine.kinds == ["lazy", "eager"]
    first.close()
    (kept,) = (tmp_path / "cache" / "tensorrt-rtx").iterdir()
    assert kept.read_bytes() == b"kernels 2"
    kept.write_bytes(b"kernels 7")
    opened().close()
    assert kept.read_bytes() == b"kernels 7"  # read, and nothing is new
    for damage in (b"another release's", b"\xff" * 1000):
        kept.write_bytes(damage)
        caplog.clear()
        opened().close()
        assert kept.read_bytes() == b"kernels 2"
        assert [message.split(": ")[1][:11] for message in caplog.messages] == ["is not used"]
    kept.unlink()
    kept.mkdir()  # what nobody can read, not even root
    caplog.clear()
    opened().close()
    (message,) = caplog.messages
    assert "is not used (it is not a regular file); it is made anew" in message
    kept.rmdir()
    kept.write_bytes(b"kernels 2")
    monkeypatch.setattr("gta_edge.runtime.tensorrt.runtime_cache.cache_directory", lambda: kept / "no directory")
    opened().close()  # nowhere to keep them, which stops nobody


def test_a_smaller_engine_is_another_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one engine's kernels are is no business of another's."""
    from gta_edge.runtime.tensorrt.engine import EngineManifest
    from gta_edge.runtime.tensorrt.runtime_cache import RuntimeCache

    monkeypatch.setattr("gta_edge.runtime.tensorrt.runtime_cache.cache_directory", lambda: tmp_path)
    records = [
        EngineManifest(replace(SPEC, max_length=length), {"model.onnx": "0"}, "1.7", ["8.6"]) for length in (10, 20)
    ]
    paths = {RuntimeCache(None, gpu, record)._path for record in records for gpu in ("one", "another")}
    assert len(paths) == 4
