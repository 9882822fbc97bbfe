"""What every session does, whatever its backend."""

import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_weights
from gta_edge.model.config import ModelConfig, parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.session import Session
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.checkpoints import write_checkpoint

# --- backends --------------------------------------------------------------------------------------------------------

Factory = Callable[..., Session]
"""Takes a config, a checkpoint's tensors by name, and the options of ``Session`` by keyword."""


def torch_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    model = Decoder(config, biases={name for name in weights if name.endswith(".bias")})
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    return TorchSession(model, **options)


_exports = tempfile.TemporaryDirectory(prefix="gta-edge-sessions-")  # removed when Python ends


@functools.cache
def _exported(entries: str) -> Path:
    """The bundle of one of the models below; exporting takes seconds, so it is done once for all tests."""
    model = next(name for name, known in ENTRIES.items() if parse_config(known).to_dict() == json.loads(entries))
    directory = Path(_exports.name) / model
    write_checkpoint(directory / "checkpoint", ENTRIES[model], reference.random_weights(ENTRIES[model]))
    export_model(directory / "checkpoint", directory / "bundle", precision=INTEGERS.get(model), verify=False)
    return directory / "bundle"


def onnxruntime_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return OnnxRuntimeSession(Bundle.open(_exported(json.dumps(config.to_dict()))), **options)


def onnxruntime_cuda_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    """The session for GPUs with its graph, on the CPU and in float32."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    own = {name: options[name] for name in options if name != "exact"}
    bundle = Bundle.open(_exported(json.dumps(config.to_dict())))
    return OnnxRuntimeCudaSession(bundle, device="cpu", compute="fp32", **own)


ENGINE = EngineSpec("tensorrt-rtx", "fp32", "fp32", max_length=24, max_batch=5, chunk_size=20)


@functools.cache
def _built(directory: Path) -> Bundle:
    bundle = Bundle.open(directory)
    simulator.build(bundle, ENGINE, directory.with_name("prepared"))
    return bundle


def tensorrt_session(config: ModelConfig, weights: dict[str, np.ndarray], **options: Any) -> Session:
    """The session of engines; what stands in for TensorRT and for CUDA's driver computes on ONNX Runtime."""
    own = {name: options[name] for name in options if name == "chunk_size"}
    return simulator.open_simulated(_built(_exported(json.dumps(config.to_dict()))), ENGINE.engine, **own)


SESSIONS: dict[str, Factory] = {
    "torch": torch_session,
    "onnxruntime": onnxruntime_session,
    "onnxruntime-cuda": onnxruntime_cuda_session,
    "tensorrt": tensorrt_session,
}
growing = pytest.mark.parametrize("backend", ["torch", "onnxruntime", "onnxruntime-cuda"], indirect=True)
"""For tests of caches that begin small; an engine's has its capacity from the start."""

TOLERANCE = 1e-4  # of a float32 backend: largest error over the standard deviation of the exact logits

# --- models ----------------------------------------------------------------------------------------------------------

P = 24
VOCAB = 61
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": P, "intermediate_size": 80}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=8, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
}
# The same with weights in integers; of other sizes, one of them no multiple of what the kernel takes at once.
INTEGERS = {"gta in int4": "int4", "gqa in int8": "int8"}
ENTRIES = {
    **MODELS,
    "gta in int4": {**MODELS["gta"], "intermediate_size": 96},
    "gqa in int8": {**MODELS["gqa"], "intermediate_size": 72},
}


@functools.cache
def weights_of(model: str) -> dict[str, np.ndarray]:
    """What the formula is given: the checkpoint's tensors, or the values that the bundle's integers stand for."""
    if model not in INTEGERS:
        return reference.random_weights(ENTRIES[model])
    config = parse_config(ENTRIES[model])
    return dict(read_weights(_exported(json.dumps(config.to_dict())) / "model.onnx", config))


def exact_logits(model: str, ids: Any) -> np.ndarray:
    """Logits [T, V] of one row in float64, from the formula."""
    formula = reference.gta_logits if model.startswith("gta") else reference.llama_logits
    return formula(ENTRIES[model], weights_of(model), ids)


def open_session(backend: str, model: str, *, exact: bool = True, **options: Any) -> Session:
    if model in INTEGERS:
        options["exact"] = exact
    return SESSIONS[backend](parse_config(ENTRIES[model]), weights_of(model), **options)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SESSIONS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


# For tests of what the arithmetic could break: those of input and errors do not need it.
in_integers_too = pytest.mark.parametrize(
    ("backend", "model"),
    [
        *((backend, model) for backend in SESSIONS for model in MODELS),
        *((backend, model) for backend in ("onnxruntime", "onnxruntime-cuda", "tensorrt") for model in INTEGERS),
    ],
    indirect=True,
)


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Callable[..., Session]]:
    """Start a session of the backend and model at hand; options as ``Session`` takes them."""
    started: list[Session] = []

    def begin(**options: Any) -> Session:
        session = open_session(backend, model, **options)
        started.append(session)
        return session

    yield begin
    for session in started:
        session.close()


@pytest.fixture
def session(start: Callable[..., Session]) -> Session:
    return start()


def prompt(rows: int, tokens: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert reference.relative_error(found, expected) <= TOLERANCE


@pytest.fixture(autouse=True)
def warn_each_time() -> Iterator[None]:
    """Without this, torch gives most warnings once in a process, and only the first test would fail on one."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


# --- logits ----------------------------------------------------------------------------------------------------------


@in_integers_too
def test_logits_are_those_of_the_formula(session, model):
    ids = prompt(2, 9)
    found = session.forward(ids, all_logits=True)
    assert found.shape == (2, 9, VOCAB)
    assert_same(found, np.stack([exact_logits(model, row) for row in ids]))


def test_logits_of_the_last_position_or_of_all(start):
    ids = prompt(2, 9)
    last, every = start().forward(ids), start().forward(ids, all_logits=True)
    assert last.shape == (2, VOCAB)
    assert_same(last, every[:, -1])


@in_integers_too
def test_token_by_token(session, model):
    ids = prompt(2, 12)
    found = [session.forward(ids[:, t : t + 1]) for t in range(12)]
    assert_same(np.stack(found, axis=1), np.stack([exact_logits(model, row) for row in ids]))


@in_integers_too
@pytest.mark.parametrize("cut", range(1, 9))
def test_a_prompt_may_be_cut_anywhere(session, model, cut):
    ids = prompt(2, 9)
    found = np.concatenate(
        [session.forward(ids[:, :cut], all_logits=True), session.forward(ids[:, cut:], all_logits=True)], axis=1
    )
    assert_same(found, np.stack([exact_logits(model, row) for row in ids]))


@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8, 9, 10, 100])
def test_the_size_of_a_chunk_does_not_matter(start, chunk_size, all_logits):
    ids, lengths = prompt(3, 9), [9, 4, 1]
    chunked, whole = start(chunk_size=chunk_size), start()
    expected = whole.forward(ids, lengths=lengths, all_logits=all_logits)
    assert_same(chunked.forward(ids, lengths=lengths, all_logits=all_logits), expected)
    np.testing.assert_array_equal(chunked.length, lengths)
    following = prompt(3, 2, seed=8)
    assert_same(chunked.forward(following), whole.forward(following))


@pytest.mark.parametrize("value", [0, -1])
def test_a_chunk_below_one_is_refused_by_name(start, value):
    with pytest.raises(InputError, match="chunk_size"):
        start(chunk_size=value)


@growing
@pytest.mark.parametrize("value", [0, -1])
def test_steps_below_one_are_refused_by_name(start, value):
    with pytest.raises(InputError, match="capacity_step"):
        start(capacity_step=value)


# --- rows of different length ----------------------------------------------------------------------------------------


@in_integers_too
@pytest.mark.parametrize("chunk_size", [3, 512])
def test_rows_of_different_length_are_as_each_alone(start, model, chunk_size):
    session = start(chunk_size=chunk_size)
    ids, lengths = prompt(4, 9), np.array([9, 1, 5, 3])
    last = session.forward(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_same(last[row], exact_logits(model, ids[row, :length])[-1])
    np.testing.assert_array_equal(session.length, lengths)
    # and on, every row from where it ended
    more, new = prompt(4, 4, seed=4), np.array([2, 4, 1, 3])
    every = session.forward(more, lengths=new, all_logits=True)
    for row in range(4):
        tokens = np.concatenate([ids[row, : lengths[row]], more[row, : new[row]]])
        assert_same(every[row, : new[row]], exact_logits(model, tokens)[lengths[row] :])
    np.testing.assert_array_equal(session.length, lengths + new)


@in_integers_too
def test_padded_positions_are_zero(session):
    found = session.forward(prompt(2, 6), lengths=[6, 2], all_logits=True)
    assert found.shape == (2, 6, VOCAB)
    assert not found[1, 2:].any()
    assert found[0].any(axis=1).all()
    assert found[1, :2].any(axis=1).all()


@pytest.mark.parametrize("chunk_size", [3, 512])
def test_what_the_padding_is_does_not_matter(start, chunk_size):
    one = prompt(2, 8)
    other = one.copy()
    other[1, 2:] = (other[1, 2:] + 7) % VOCAB
    first, second = start(chunk_size=chunk_size), start(chunk_size=chunk_size)
    np.testing.assert_array_equal(first.forward(one, lengths=[8, 2]), second.forward(other, lengths=[8, 2]))
    following = prompt(2, 3, seed=4)
    np.testing.assert_array_equal(first.forward(following, all_logits=True), second.forward(following, all_logits=True))


def test_lengths_of_full_width_are_no_lengths(start):
    ids = prompt(2, 5)
    np.testing.assert_array_equal(start().forward(ids, lengths=[5, 5]), start().forward(ids))


# --- length, truncate, reset -----------------------------------------------------------------------------------------


def test_length_counts_what_was_appended(session):
    np.testing.assert_array_equal(session.length, [0])
    session.forward(prompt(3, 5))
    np.testing.assert_array_equal(session.length, [5, 5, 5])
    session.forward(prompt(3, 4), lengths=[1, 4, 2])
    np.testing.assert_array_equal(session.length, [6, 9, 7])
    assert session.length.dtype == np.int64
    session.truncate([2, 9, 0])
    np.testing.assert_array_equal(session.length, [2, 9, 0])
    session.reset()
    np.testing.assert_array_equal(session.length, [0, 0, 0])


def test_length_is_a_copy(session, model):
    ids = prompt(1, 6)
    session.forward(ids[:, :3])
    session.length[:] = 0
    np.testing.assert_array_equal(session.length, [3])
    assert_same(session.forward(ids[:, 3:])[0], exact_logits(model, ids[0])[-1])


def test_a_length_that_was_taken_does_not_change_later(session):
    session.forward(prompt(1, 3))
    before = session.length
    session.forward(prompt(1, 3))
    session.truncate(1)
    session.reset()
    np.testing.assert_array_equal(before, [3])


@in_integers_too
@pytest.mark.parametrize("keep", [0, 1, 4, 7])
def test_truncated_tokens_were_never_there(session, model, keep):
    ids, others = prompt(2, 7), prompt(2, 5, seed=9)
    session.forward(ids)
    session.truncate(keep)
    found = session.forward(others, all_logits=True)
    for row in range(2):
        tokens = np.concatenate([ids[row, :keep], others[row]])
        assert_same(found[row], exact_logits(model, tokens)[keep:])


@in_integers_too
def test_each_row_is_truncated_to_its_own_length(session, model):
    ids, others = prompt(3, 7), prompt(3, 2, seed=9)
    session.forward(ids)
    keep = np.array([6, 0, 3], np.int32)
    session.truncate(keep)
    keep[:] = 1  # the session's own lengths are not this array
    np.testing.assert_array_equal(session.length, [6, 0, 3])
    found = session.forward(others)
    for row, kept in enumerate([6, 0, 3]):
        assert_same(found[row], exact_logits(model, np.concatenate([ids[row, :kept], others[row]]))[-1])


def test_truncate_takes_lists_and_numpy_numbers(session):
    session.forward(prompt(2, 7))
    for given_length, expected in ((6, [6, 6]), (np.int64(5), [5, 5]), ([4, 3], [4, 3]), ((4, 3), [4, 3])):
        session.truncate(given_length)
        np.testing.assert_array_equal(session.length, expected)


@pytest.mark.parametrize(
    "length",
    [6, [5, 6], -1, [5, -1], 2.0, [2.0, 2.0], True, "2", None, [2], [1, 2, 3], [[1, 2]], [[1], [1, 2]], 10**30],
    ids=repr,
)
def test_a_length_that_makes_no_sense_is_refused_and_changes_nothing(session, model, length):
    ids = prompt(2, 8)
    session.forward(ids[:, :5])
    with pytest.raises(InputError):
        session.truncate(length)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(ids[:, 5:])[1], exact_logits(model, ids[1])[-1])


@in_integers_too
def test_after_a_reset_all_is_as_new(session, model):
    first, second = prompt(2, 12), prompt(2, 5, seed=9)
    session.forward(first)
    session.reset()
    found = session.forward(second, all_logits=True)
    assert_same(found, np.stack([exact_logits(model, row) for row in second]))
    np.testing.assert_array_equal(session.length, [5, 5])


@pytest.mark.parametrize("empty", ["reset", "truncate"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_empty_session_takes_another_number_of_rows(session, model, rows, empty):
    session.forward(prompt(3, 12))
    if empty == "reset":
        session.reset()
    else:
        session.truncate(0)
    ids = prompt(rows, 6, seed=9)
    found = session.forward(ids, lengths=[6, 3, 1, 2, 4][:rows])
    for row, length in enumerate([6, 3, 1, 2, 4][:rows]):
        assert_same(found[row], exact_logits(model, ids[row, :length])[-1])
    np.testing.assert_array_equal(session.length, [6, 3, 1, 2, 4][:rows])


# --- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "model"),
    [
        *((backend, model) for backend in ("torch", "onnxruntime", "onnxruntime-cuda") for model in MODELS),
        *((backend, model) for backend in ("onnxruntime", "onnxruntime-cuda") for model in INTEGERS),
    ],
    indirect=True,
)
@pytest.mark.parametrize("step", [1, 4, 5, 100])
def test_the_cache_grows_in_steps_and_keeps_its_content(start, model, step):
    session = start(capacity_step=step)
    ids = prompt(2, P)
    exact = np.stack([exact_logits(model, row) for row in ids])
    before = 0
    for t in range(P):
        assert_same(session.forward(ids[:, t : t + 1]), exact[:, t])
        assert max(before, t + 1) <= session.capacity <= P
        assert session.capacity % step == 0 or session.capacity == P
        assert session.capacity < t + 1 + step
        assert session.cache_bytes == cache_bytes(session.config, "fp32", session.capacity, batch=2)
        before = session.capacity


@growing
def test_memory_is_kept_for_the_next_prompt(start):
    session = start(capacity_step=4)
    session.forward(prompt(1, 10))
    grown = session.cache_bytes
    session.reset()
    session.forward(prompt(1, 2))
    assert session.cache_bytes == grown


@in_integers_too
@pytest.mark.parametrize("chunk_size", [5, 512])
def test_every_position_can_be_used(start, model, chunk_size):
    session = start(chunk_size=chunk_size)
    ids = prompt(2, P)
    assert session.max_length == P
    assert_same(session.forward(ids), np.stack([exact_logits(model, row)[-1] for row in ids]))
    assert session.capacity == P
    with pytest.raises(CapacityError):
        session.forward(ids[:, :1])
    session.truncate(P - 1)
    assert_same(session.forward(ids[:, -1:]), np.stack([exact_logits(model, row)[-1] for row in ids]))


@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("chunk_size", [2, 512])
def test_too_many_tokens_are_refused_before_any_is_appended(start, model, chunk_size, all_logits):
    session = start(chunk_size=chunk_size, capacity_step=4)
    ids = prompt(2, P + 1)
    session.forward(ids[:, : P - 3])
    capacity = session.capacity
    with pytest.raises(CapacityError, match=str(P)):
        session.forward(ids[:, P - 3 :], all_logits=all_logits)
    np.testing.assert_array_equal(session.length, [P - 3, P - 3])
    assert session.capacity == capacity
    assert_same(session.forward(ids[:, P - 3 : P])[0], exact_logits(model, ids[0, :P])[-1])


def test_padding_counts_towards_the_positions(session, model):
    ids = prompt(2, P)
    session.forward(ids[:, : P - 3], lengths=[P - 3, 2])
    with pytest.raises(CapacityError, match="padding"):
        session.forward(ids[:, :4], lengths=[1, 4])  # one real token of row 0 would fit, its padding would not
    np.testing.assert_array_equal(session.length, [P - 3, 2])
    found = session.forward(ids[:, P - 3 :], lengths=[1, 3])  # here it just does
    assert_same(found[0], exact_logits(model, ids[0, : P - 2])[-1])
    assert_same(found[1], exact_logits(model, np.concatenate([ids[1, :2], ids[1, P - 3 :]]))[-1])


def test_the_row_that_is_too_long_is_named(session):
    session.forward(prompt(3, P), lengths=[2, P, 5])
    with pytest.raises(CapacityError, match=f"row 1 holds {P} tokens"):
        session.forward(prompt(3, 1))


def test_a_prompt_longer_than_all_positions_is_refused_on_a_new_session(session, model):
    with pytest.raises(CapacityError):
        session.forward(prompt(1, P + 1))
    np.testing.assert_array_equal(session.length, [0])
    ids = prompt(1, P)
    assert_same(session.forward(ids)[0], exact_logits(model, ids[0])[-1])


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.astype(np.int32),
        lambda ids: ids.astype(np.uint8),
        lambda ids: ids.tolist(),
        lambda ids: tuple(map(tuple, ids.tolist())),
        lambda ids: np.asfortranarray(ids),
        lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
        lambda ids: np.frombuffer(ids.astype(np.int64).tobytes(), np.int64).reshape(ids.shape),  # read-only
        torch.from_numpy,
    ],
    ids=["int32", "uint8", "lists", "tuples", "by columns", "strided", "read-only", "torch"],
)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("all_logits", [True, False])
def test_integers_of_any_kind_are_taken(start, convert, rows, all_logits):
    ids = prompt(rows, 5)
    expected = start().forward(ids, all_logits=all_logits)
    np.testing.assert_array_equal(start().forward(convert(ids), all_logits=all_logits), expected)


@pytest.mark.parametrize(
    "lengths", [np.array([5, 2], np.int32), np.array([5, 2], np.uint8), (5, 2), torch.tensor([5, 2])]
)
def test_lengths_of_any_kind_are_taken(start, lengths):
    ids = prompt(2, 5)
    session = start()
    np.testing.assert_array_equal(session.forward(ids, lengths=lengths), start().forward(ids, lengths=[5, 2]))
    np.testing.assert_array_equal(session.length, [5, 2])


def test_the_callers_arrays_are_left_alone(session):
    ids, lengths = prompt(2, 5), np.array([5, 2])
    kept = ids.copy()
    session.forward(ids, lengths=lengths)
    session.forward(ids[:, :1])
    np.testing.assert_array_equal(ids, kept)
    np.testing.assert_array_equal(lengths, [5, 2])


def test_logits_that_were_returned_do_not_change_later(session):
    first = session.forward(prompt(2, 5), all_logits=True)
    kept = first.copy()
    session.forward(prompt(2, 5, seed=4), all_logits=True)
    np.testing.assert_array_equal(first, kept)


BAD_IDS = {
    "one row without its batch": [1, 2, 3],
    "one number": 5,
    "three dimensions": [[[1]]],
    "floats": [[1.0, 2.0]] * 2,
    "truth values": [[True, False]] * 2,
    "text": [["a", "b"]] * 2,
    "none": None,
    "rows of different length": [[1, 2], [3]],
    "no tokens": np.zeros((2, 0), np.int64),
    "no rows": np.zeros((0, 2), np.int64),
    "negative": [[1, -1]] * 2,
    "the size of the vocabulary": [[1, 2], [3, VOCAB]],
    "far outside": [[2**62, 1]] * 2,
    "wider than 64 bits": [[10**30, 1]] * 2,
    "as large as unsigned goes": np.full((2, 1), 2**64 - 1, np.uint64),
    "another number of rows": [[1], [2], [3]],
    "a single row": [[1]],
}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_make_no_sense_are_refused_and_change_nothing(session, model, ids):
    before = prompt(2, 8)
    session.forward(before[:, :5])
    with pytest.raises(InputError):
        session.forward(ids)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(before[:, 5:])[1], exact_logits(model, before[1])[-1])


@pytest.mark.parametrize("token", [-1, VOCAB, 2**62])
def test_an_id_outside_the_vocabulary_is_named(session, token):
    with pytest.raises(InputError, match=rf"{token}\b.*{VOCAB - 1}"):
        session.forward([[1, token]])


@pytest.mark.parametrize(
    "lengths",
    [
        *([0, 0], [3, 4], [3, -1], [3, 10**30]),
        *([3.0, 3.0], [True, True], ["3", "3"]),
        *(3, [3], [3, 3, 3], [[3, 3]], [[3], [3, 3]]),
    ],
    ids=repr,
)
def test_lengths_that_make_no_sense_are_refused_and_change_nothing(session, model, lengths):
    ids = prompt(2, 8)
    session.forward(ids[:, :5])
    with pytest.raises(InputError):
        session.forward(ids[:, 5:], lengths=lengths)
    np.testing.assert_array_equal(session.length, [5, 5])
    assert_same(session.forward(ids[:, 5:])[1], exact_logits(model, ids[1])[-1])


def test_another_number_of_rows_needs_a_reset(session):
    session.forward(prompt(2, 3))
    with pytest.raises(InputError, match=r"3 rows.*holds 2.*reset"):
        session.forward(prompt(3, 1))
    session.truncate([0, 1])  # still one token there
    with pytest.raises(InputError, match="reset"):
        session.forward(prompt(3, 1))
    session.reset()
    assert session.forward(prompt(3, 1)).shape == (3, VOCAB)


def test_whether_tokens_are_replays_of_a_cuda_graph(session, backend):
    """A CPU has no such graphs; what stands in for an engine's driver captures."""
    assert session.cuda_graph is None
    for tokens in (3, 1, 1):
        session.forward(prompt(2, tokens))
    assert session.cuda_graph is (True if backend == "tensorrt" else None)


@pytest.mark.parametrize("by", ["close", "with"])
def test_a_closed_session_runs_no_more(session, by):
    if by == "with":
        with session as entered:
            assert entered is session
            session.forward(prompt(1, 3))
    else:
        session.forward(prompt(1, 3))
        session.close()
        session.close()  # once more does no harm
    with pytest.raises(BackendError, match="closed"):
        session.forward(prompt(1, 1))


# --- activations rounded to int8 -------------------------------------------------------------------------------------

ROUNDED = 0.5  # the same tolerance where matmuls with integers round activations


@pytest.mark.parametrize(("backend", "model"), [("onnxruntime", model) for model in INTEGERS], indirect=True)
def test_rounded_activations_are_near(start, model):
    ids = prompt(3, 9)
    exact = np.stack([exact_logits(model, row) for row in ids])
    session = start(exact=False)
    at_once = session.forward(ids, all_logits=True)
    assert TOLERANCE < reference.relative_error(at_once, exact) <= ROUNDED
    session.reset()
    by_token = np.stack([session.forward(ids[:, t : t + 1]) for t in range(9)], axis=1)
    assert reference.relative_error(by_token, exact) <= ROUNDED


@pytest.mark.parametrize(("backend", "model"), [("onnxruntime", model) for model in INTEGERS], indirect=True)
def test_rounding_does_not_depend_on_the_other_tokens(start, model):
    """A token's activations are rounded by themselves: not with those of other rows, or of padding."""
    ids, lengths = prompt(3, 9), [9, 1, 5]
    together = start(exact=False).forward(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = start(exact=False, chunk_size=4).forward(ids[row : row + 1, :length])
        assert reference.relative_error(alone[0], together[row]) <= 0.02
    changed = np.where(np.arange(9) < np.array(lengths)[:, None], ids, (ids + 7) % VOCAB)
    np.testing.assert_array_equal(start(exact=False).forward(changed, lengths=lengths), together)


# --- everything together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "models"),
    [*((name, [*MODELS]) for name in SESSIONS), ("onnxruntime", [*INTEGERS]), ("tensorrt", [*INTEGERS])],
    ids=[*SESSIONS, "onnxruntime in integers", "tensorrt in integers"],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_calls_gives_what_the_tokens_in_the_cache_give(name, models, data):
    model = data.draw(st.sampled_from(models))
    rows = data.draw(st.integers(1, 3))
    session = open_session(
        name,
        model,
        chunk_size=data.draw(st.integers(1, 6)),
        capacity_step=data.draw(st.integers(1, 6)),
    )
    held: list[list[int]] = [[] for _ in range(rows)]
    with session:
        for step in range(data.draw(st.integers(1, 6))):
            # an empty cache learns the number of its rows from the first call
            action = data.draw(st.sampled_from(["forward", "forward", "truncate", "reset"])) if step else "forward"
            if action == "reset":
                session.reset()
                held = [[] for _ in range(rows)]
            elif action == "truncate":
                keep = [data.draw(st.integers(0, len(row))) for row in held]
                session.truncate(keep)
                held = [row[:length] for row, length in zip(held, keep, strict=True)]
            else:
                width = data.draw(st.integers(1, 9))
                lengths = [data.draw(st.integers(1, width)) for _ in range(rows)]
                ids = prompt(rows, width, seed=data.draw(st.integers(0, 99)))
                longer = [row + ids[i, : lengths[i]].tolist() for i, row in enumerate(held)]
                try:
                    found = session.forward(ids, lengths=lengths)
                except CapacityError:
                    assert max(len(row) for row in held) + width > P
                else:
                    held = longer
                    for i, row in enumerate(held):
                        assert_same(found[i], exact_logits(model, row)[-1])
            np.testing.assert_array_equal(session.length, [len(row) for row in held])
            assert max(len(row) for row in held) <= session.capacity <= P


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted(call: Callable[[], Any], line: int) -> bool:
    """Let Ctrl-C come before the given line that runs in a session's own modules; tell whether there were so many."""
    left = line

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if "/gta_edge/runtime/" not in frame.f_code.co_filename:
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(("backend", "model"), [(backend, "gta") for backend in SESSIONS], indirect=True)
def test_ctrl_c_at_any_line_leaves_what_was_appended(start, model):
    """In the middle of a prompt's chunks, of growth, of a step: the length is of what is there, and it goes on."""
    ids = prompt(2, 14)
    exact = np.stack([exact_logits(model, row)[-1] for row in ids])
    lengths = set()
    for line in itertools.count(1, 23):
        session = start(chunk_size=4, capacity_step=5)
        stopped = interrupted(lambda session=session: session.forward(ids), line)
        there = set(session.length.tolist())
        assert len(there) == 1
        (length,) = there
        lengths.add(length)
        if length == 14:
            session.truncate(13)
            length = 13
        assert_same(session.forward(ids[:, length:]), exact)
        session.close()
        if not stopped:
            break
    assert lengths >= {0, 14}
    assert len(lengths) > 2
