"""The onnxruntime backend: what only it promises; what every session promises is in tests/runtime/sessions."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.errors import BackendError, CapacityError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import cache_bytes, cache_tensors
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession, _move_apart, _move_together
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint

COPIED = "in-place optimization not activated"  # what ONNX Runtime logs when it copies a cache
WARNINGS = 2  # the severity from which on it does
VOCAB = 61


def exported(directory: Path, model: str, precision: str | None = None) -> Path:
    small = {"vocab_size": VOCAB, "max_position_embeddings": 64}
    entries = (
        reference.llama_entries(heads=4, n_kv=2, **small)
        if model == "gqa"
        else reference.gta_entries(heads=4, n_q=4, n_k=1 if model == "gta of one head" else 2, n_c=1, **small)
    )
    write_checkpoint(directory / "checkpoint", entries, reference.random_weights(entries))
    export_model(directory / "checkpoint", directory / "bundle", precision=precision, verify=False)
    return directory / "bundle"


@pytest.fixture(scope="module", params=["gta", "gta of one head", "gqa", "gta in int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _, precision = request.param.partition(" in ")
    return exported(tmp_path_factory.mktemp("onnxruntime"), model, precision or None)


@pytest.fixture
def session(bundle: Path) -> Iterator[OnnxRuntimeSession]:
    with OnnxRuntimeSession(Bundle.open(bundle), exact=True, chunk_size=8, capacity_step=16) as session:
        yield session


def ids(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).integers(0, VOCAB, (batch, tokens))


def test_no_step_copies_the_cache(session: OnnxRuntimeSession, capfd: pytest.CaptureFixture[str]) -> None:
    session._run_options.log_severity_level = WARNINGS
    session.forward(ids(2, 10))
    addresses = {name: cache.ctypes.data for name, cache in session._caches.items()}
    before = {name: cache.copy() for name, cache in session._caches.items()}
    for i in range(4):
        session.forward(ids(2, 1 + i % 2))
    length = int(session.length[0])
    for name, cache in session._caches.items():
        assert cache.ctypes.data == addresses[name]
        # the graph's output is this memory: the rows of the new tokens are there, those before are untouched
        assert (cache[:, :, 10:length] != 0).any(axis=-1).all()
        np.testing.assert_array_equal(cache[:, :, :10], before[name][:, :, :10])
        np.testing.assert_array_equal(cache[:, :, length:], 0)
    assert COPIED not in capfd.readouterr().err


def test_a_copy_would_be_heard_of(session: OnnxRuntimeSession, capfd: pytest.CaptureFixture[str]) -> None:
    """With other memory behind its outputs the same step copies, and says so: the test above can fail."""
    session._run_options.log_severity_level = WARNINGS
    session.forward(ids(1, 1))
    for name in session._caches:
        session._step.binding.bind_output(f"present_{name}", "cpu")
    session.forward(ids(1, 1))
    assert COPIED in capfd.readouterr().err


def test_no_step_copies_the_cache_where_activations_are_rounded(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What sessions do by default; for integers it is another graph than the exact one."""
    with load(bundle, "onnxruntime") as session:
        assert isinstance(session, OnnxRuntimeSession)
        session._run_options.log_severity_level = WARNINGS
        for tokens in (5, 1, 2, 1):
            session.forward(ids(2, tokens))
            assert all((cache[:, :, : session.length[0]] != 0).any(axis=-1).all() for cache in session._caches.values())
    assert COPIED not in capfd.readouterr().err


@pytest.mark.parametrize("exact", [None, False, True])
def test_who_rounds_activations(bundle: Path, exact: bool | None) -> None:
    in_integers = Bundle.open(bundle).precision == "int4"
    options = {} if exact is None else {"exact": exact}
    with load(bundle, "onnxruntime", **options) as session:
        assert session.rounds_activations is (in_integers and not exact)
    with load(bundle, "torch", **options) as session:
        assert session.rounds_activations is False


def test_exact_makes_a_difference_for_integers_alone(bundle: Path) -> None:
    results = []
    for exact in (True, False):
        with load(bundle, "onnxruntime", threads=1, exact=exact) as session:
            results.append(session.forward(ids(2, 9), all_logits=True))
    if Bundle.open(bundle).precision == "int4":
        assert 1e-3 < reference.relative_error(results[1], results[0]) < 0.5
    else:
        np.testing.assert_array_equal(*results)


def test_steps_that_were_bound_before_are_used_again(session: OnnxRuntimeSession) -> None:
    """Widths that change from call to call, as those of guesses do, give what steps bound anew give, to the bit."""
    rng, bound, results = np.random.default_rng(3), list[object](), list[list[np.ndarray]]()
    calls = [(*rng.integers(1, 5, 2), bool(rng.integers(2))) for _ in range(24)]  # the cache grows among them
    bind, session._bind = session._bind, lambda key, inputs: (bound.append(key), bind(key, inputs))[1]
    for anew in (False, True):
        session.reset()
        results.append([])
        for width, back, all_logits in calls:
            if anew:
                session._unbind()
            results[-1].append(session.forward(ids(2, width), all_logits=all_logits))
            session.truncate(session.length - min(back, int(session.length[0])) // 2)
        if not anew:
            assert len(bound) < len(calls)
            assert len(session._kept_steps) <= 8
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_growth_keeps_what_is_there(session: OnnxRuntimeSession) -> None:
    tokens = ids(2, 40)
    grown = [session.forward(tokens[:, i : i + 5], all_logits=True) for i in range(0, 40, 5)]
    assert session.capacity == 48
    session.reset()
    at_once = session.forward(tokens, all_logits=True)
    np.testing.assert_allclose(np.concatenate(grown, axis=1), at_once, rtol=1e-4, atol=1e-4)


def visible(session: OnnxRuntimeSession) -> int:
    """Return the capacity that steps are given, and so what attention costs."""
    (capacity,) = {cache.shape[2] for cache in session._caches.values()}
    return capacity


@pytest.mark.parametrize("rows", [1, 2])
def test_after_a_long_prompt_a_short_one_costs_as_in_a_new_session(bundle: Path, rows: int) -> None:
    options = {"exact": True, "chunk_size": 8, "capacity_step": 16}
    with (
        OnnxRuntimeSession(Bundle.open(bundle), **options) as used,
        OnnxRuntimeSession(Bundle.open(bundle), **options) as new,
    ):
        used.forward(ids(rows, 60))
        held = used.cache_bytes
        used.reset()
        for tokens in (5, 3, 20, 1, 30):
            found = used.forward(ids(rows, tokens), all_logits=True)
            np.testing.assert_array_equal(found, new.forward(ids(rows, tokens), all_logits=True))
            assert visible(used) == visible(new) == new.capacity
        assert used.cache_bytes == held


def test_within_a_large_cache_rows_of_different_length_grow_as_in_a_new_session(bundle: Path) -> None:
    """Heads of all rows move apart, by one token's values, and so onto themselves and their neighbours, many times."""
    options = {"exact": True, "chunk_size": 8, "capacity_step": 1}
    with (
        OnnxRuntimeSession(Bundle.open(bundle), **options) as used,
        OnnxRuntimeSession(Bundle.open(bundle), **options) as new,
    ):
        used.forward(ids(3, 64))
        held = used.cache_bytes
        used.reset()
        capacities = set()
        for lengths in ([5, 1, 3], [1, 3, 2], *[[1, 1, 1]] * 20, [2, 1, 1], [30, 9, 30]):
            appended = ids(3, max(lengths))
            found = used.forward(appended, lengths=lengths, all_logits=True)
            np.testing.assert_array_equal(found, new.forward(appended, lengths=lengths, all_logits=True))
            assert visible(used) == visible(new)
            capacities.add(visible(used))
        assert len(capacities) >= 15
        assert used.cache_bytes == held


@given(st.data())
def test_parts_are_moved_apart_and_together_in_place(data: st.DataObject) -> None:
    parts, before, more = (data.draw(st.integers(1, 12)) for _ in range(3))
    after, filled = before + more - 1, data.draw(st.integers(0, before))
    values = np.arange(parts * after, dtype=np.float32)
    old = values[: parts * before].reshape(parts, before).copy()
    _move_apart(values, parts, before, after, filled)
    np.testing.assert_array_equal(values.reshape(parts, after)[:, :filled], old[:, :filled])
    assert np.isin(values, np.arange(parts * after)).all()  # nothing that was not there
    _move_together(values, parts, after, before, filled)
    np.testing.assert_array_equal(values[: parts * before].reshape(parts, before)[:, :filled], old[:, :filled])


def test_parts_are_moved_apart_without_memory_for_a_copy() -> None:
    parts, before, after = 3, 100_000, 100_001
    values = np.arange(parts * after, dtype=np.float32)
    tracemalloc.start()
    try:
        _move_apart(values, parts, before, after, before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * before / 10
    np.testing.assert_array_equal(
        values.reshape(parts, after)[:, :before], np.arange(parts * before).reshape(parts, before)
    )


def test_truncated_to_few_tokens_attention_is_cheap_again(bundle: Path) -> None:
    options = {"exact": True, "chunk_size": 8, "capacity_step": 16}
    with (
        OnnxRuntimeSession(Bundle.open(bundle), **options) as used,
        OnnxRuntimeSession(Bundle.open(bundle), **options) as new,
    ):
        used.forward(ids(1, 60))
        used.truncate(4)
        new.forward(ids(1, 60)[:, :4])
        for tokens in (1, 20, 3):
            found = used.forward(ids(1, tokens), all_logits=True)
            np.testing.assert_allclose(found, new.forward(ids(1, tokens), all_logits=True), rtol=1e-4, atol=1e-5)
            assert visible(used) == visible(new)


def test_cache_bytes_are_what_is_held(session: OnnxRuntimeSession) -> None:
    assert session.cache_bytes == 0
    session.forward(ids(3, 17))
    held = {name: (buffer.shape, buffer.nbytes) for name, buffer in session._buffers.items()}
    tensors = cache_tensors(session.config)
    assert held == {tensor.name: (tensor.shape(3, 32), tensor.nbytes(3, 32)) for tensor in tensors}
    assert session.cache_bytes == cache_bytes(session.config, "fp32", 32, batch=3) == sum(n for _, n in held.values())


def test_no_memory_for_the_cache(session: OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.forward(ids(1, 4))
    zeros = np.zeros

    def refuse(shape: object, *rest: object, **options: object) -> np.ndarray:
        if isinstance(shape, tuple) and len(shape) == 4:  # a cache
            raise MemoryError
        return zeros(shape, *rest, **options)

    monkeypatch.setattr(np, "zeros", refuse)
    with pytest.raises(CapacityError, match=r"no memory for a cache of .* MiB"):
        session.forward(ids(1, 30))
    monkeypatch.undo()
    session.reset()
    assert np.isfinite(session.forward(ids(1, 30))).all()


def test_threads_do_not_change_the_result(bundle: Path) -> None:
    with (
        load(bundle, "onnxruntime", threads=1, exact=True) as one,
        load(bundle, "onnxruntime", threads=2, exact=True) as two,
    ):
        np.testing.assert_allclose(one.forward(ids(1, 20)), two.forward(ids(1, 20)), rtol=1e-4, atol=1e-5)


def test_both_backends_agree(bundle: Path) -> None:
    with load(bundle, "onnxruntime", exact=True) as ours, load(bundle, "torch") as exact:
        for tokens, lengths in ((9, [9, 4, 1]), (3, [1, 3, 2]), (1, None)):
            a, b = (s.forward(ids(3, tokens), lengths=lengths, all_logits=True) for s in (ours, exact))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)
            np.testing.assert_array_equal(ours.length, exact.length)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_closed_session_says_so(bundle: Path, backend: str) -> None:
    with load(bundle, backend) as session:
        session.forward(ids(1, 2))
    assert session.cache_bytes == 0
    with pytest.raises(BackendError, match="the session is closed"):
        session.forward(ids(1, 2))


def test_auto_says_what_it_took(bundle: Path) -> None:
    with load(bundle) as session:
        assert session.backend == "onnxruntime"


def test_unknown_backend(bundle: Path) -> None:
    with pytest.raises(
        BackendError,
        match="no backend is called 'cuda'; there are "
        "tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime, torch, auto",
    ):
        load(bundle, "cuda")


def test_an_old_onnxruntime_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(BackendError, match=r"1\.23\.2 is too old .* pip install 'onnxruntime>=1\.25'"):
        load(bundle, "onnxruntime")
