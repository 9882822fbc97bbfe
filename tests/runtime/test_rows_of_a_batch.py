"""Rows of a batch that come and go: steps of some rows, rows taken out, put back, moved and emptied."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session import Session
from tests.helpers import reference
from tests.helpers.generation import ScriptedSession
from tests.helpers.managed_sessions import BACKENDS, MODELS, POSITIONS, VOCAB, open_session, prompt, weights_of

TOLERANCE = 1e-4
EXACT = {"onnxruntime": {"exact": True}}
KINDS = [
    *((backend, model) for backend in BACKENDS for model in MODELS),
    *(("onnxruntime-cuda", "gqa"), ("tensorrt", "gta")),
]


def exact_logits(model: str, ids: list[int]) -> np.ndarray:
    """Logits [V] behind one sequence in float64, from the formula."""
    formula = reference.gta_logits if model == "gta" else reference.llama_logits
    return formula(MODELS[model], weights_of(model), ids)[-1]


def rows_computed(session: Session) -> list[tuple[int, int]]:
    """Return a list that the session appends to: first row and number of rows of each of its runs."""
    seen: list[tuple[int, int]] = []
    run: Callable[..., Any] = session._run

    def recorded(input_ids, *others):
        seen.append((session._first_row, len(input_ids)))
        return run(input_ids, *others)

    session._run = recorded
    return seen


@pytest.mark.parametrize(("backend", "model"), KINDS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rows_that_come_go_and_move_are_each_as_alone(backend: str, model: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    with open_session(backend, model, **EXACT.get(backend, {}), chunk_size=7, capacity_step=8) as session:
        claim, texts = session.claim(rows), [[] for _ in range(rows)]
        saved: list[tuple[SavedCache, list[int]]] = []
        computed = rows_computed(session)
        for _ in range(data.draw(st.integers(1, 8))):
            step = data.draw(st.sampled_from(["forward", "forward", "truncate", "export", "import"]))
            row = data.draw(st.integers(0, rows - 1))
            if step == "forward":
                lengths = np.array([data.draw(st.integers(0, 11)) for _ in range(rows)])
                lengths[row] = max(lengths[row], 1)
                ids = random.integers(0, VOCAB, (rows, int(lengths.max())))
                del computed[:]
                logits = claim.forward(ids, lengths=lengths)
                takes = np.flatnonzero(lengths)
                chosen = range(rows)[session._rows_of_step(takes[0], takes[-1] + 1, min(lengths.max(), 7))]
                assert computed[0] == (chosen.start, len(chosen))
                if lengths.max() > 1:  # which no backend has a graph for
                    assert (chosen.start, chosen.stop) == (takes[0], takes[-1] + 1)
                for b in range(rows):
                    texts[b] += ids[b, : lengths[b]].tolist()
                    expected = exact_logits(model, texts[b]) if lengths[b] else np.zeros(VOCAB)
                    assert (
                        reference.relative_error(logits[b], expected) <= TOLERANCE
                        if lengths[b]
                        else not logits[b].any()
                    )
            elif step == "truncate":
                kept = [data.draw(st.integers(0, len(text))) if b == row else len(text) for b, text in enumerate(texts)]
                claim.truncate(kept)
                texts[row] = texts[row][: kept[row]]
            elif step == "export" and texts[row]:
                count = data.draw(st.integers(1, len(texts[row])))
                saved.append((claim.export_cache(row, count), texts[row][:count]))
                assert saved[-1][0].nbytes == cache_bytes(session.config, "fp32", count)
            elif step == "import" and saved:
                cache, text = data.draw(st.sampled_from(saved))
                count = data.draw(st.integers(1, cache.length))
                claim.import_cache(cache, row, count)
                texts[row] = text[:count]
            assert session.length.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("backend", [*BACKENDS, "onnxruntime-cuda"])
def test_where_a_row_ends_is_heeded_anew_in_each_step_of_a_shape(backend: str) -> None:
    ids, lengths = prompt(2, 5), [[5, 3], [1, 1], [2, 1], [1, 1]]
    with open_session(backend, "gqa", **EXACT.get(backend, {})) as session:
        for counts in lengths:
            session.reset()
            logits = session.forward(ids, lengths=counts)
            for row, count in enumerate(counts):
                expected = exact_logits("gqa", ids[row, :count].tolist())
                assert reference.relative_error(logits[row], expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["window", "tova"])
def test_rows_without_tokens_do_not_disturb_a_policy(name: str) -> None:
    """Rows that join later and rest in between are evicted from as if each were alone."""
    options = {"cache": policy(name, rows=24, interval=4), "chunk_size": 16}
    starts, ids = [0, 3, 9], prompt(3, 60)
    with open_session("onnxruntime", "gta", exact=True, **options) as session:
        session.claim(3)
        found: list[list[np.ndarray]] = [[], [], []]
        for i in range(40):
            lengths = np.array([20 if i == start else int(i > start and i % 3 != b) for b, start in enumerate(starts)])
            at = session.length if i else np.zeros(3, int)
            step = np.stack([np.resize(ids[b, at[b] :], 20) for b in range(3)])[:, : lengths.max()]
            logits = session.forward(step, lengths=lengths)
            for b in np.flatnonzero(lengths):
                found[b].append(logits[b])
        ends = session.length
    for b in range(3):
        with open_session("onnxruntime", "gta", exact=True, **options) as alone:
            expected = [alone.forward(ids[b : b + 1, :20])[0]]
            expected += [alone.forward(ids[b : b + 1, t : t + 1])[0] for t in range(20, ends[b])]
        assert reference.relative_error(np.stack(found[b]), np.stack(expected)) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_what_is_put_back_goes_on_bit_for_bit(dtype: str) -> None:
    """In another session, in another row, beside others."""
    ids = prompt(2, 80)
    with (
        open_session("onnxruntime", "gta", cache_dtype=dtype) as first,
        open_session("onnxruntime", "gta", cache_dtype=dtype) as second,
    ):
        first.forward(ids[:1, :50])
        saved = first.export_cache()
        second.claim(3)
        second.forward(prompt(3, 30), lengths=[30, 0, 0])
        second.import_cache(saved, 2)
        again = second.export_cache(2)
        for name, array in saved.tensors.items():
            np.testing.assert_array_equal(again.tensors[name].view(np.uint8), array.view(np.uint8))
        for t in range(50, 60):
            step, beside = ids[:1, t : t + 1], np.array([[0], [0], [ids[0, t]]])
            np.testing.assert_array_equal(first.forward(step)[0], second.forward(beside, lengths=[0, 0, 1])[2])


def test_attention_is_cheap_again_when_a_long_row_has_left() -> None:
    with open_session("onnxruntime", "gta", capacity_step=16) as session:
        claim = session.claim(3)
        claim.forward(prompt(3, 120), lengths=[5, 120, 9])
        shown = [max(cache.shape[2] for cache in session._caches.values())]
        claim.truncate([5, 0, 9])
        claim.forward(prompt(3, 1), lengths=[1, 0, 1])
        shown += [max(cache.shape[2] for cache in session._caches.values())]
        assert shown == [128, 16]


@pytest.mark.parametrize(("backend", "model"), [("torch", "gta"), ("onnxruntime", "gqa"), *KINDS[-2:]])
def test_nothing_stays_of_tokens_whose_logits_were_no_numbers(backend: str, model: str) -> None:
    """What rows without a token hold has no weight, but zero times NaN would be NaN."""
    ids = prompt(2, 6)
    with open_session(backend, model, **EXACT.get(backend, {}), capacity_step=8) as session:
        for ends in (lambda: session.truncate([5, 0]), session.reset):
            session.reset()
            session.forward(ids[:, :4])
            saved = session.export_cache(1)
            nan = {name: np.full_like(array, np.nan) for name, array in saved.tensors.items()}
            session.import_cache(SavedCache(4, saved.dtype, nan), 1)
            found = session.forward(ids[:, 4:5])
            assert np.isfinite(found).all(-1).tolist() == [True, False]
            ends()
            held = session.length.tolist()
            found = session.forward(ids[:, 5:])
            for row, count in enumerate(held):
                expected = exact_logits(model, [*ids[row, :count].tolist(), int(ids[row, 5])])
                assert reference.relative_error(found[row], expected) <= TOLERANCE


def test_what_cannot_be_put_into_a_cache_is_refused_and_changes_nothing() -> None:
    with open_session("torch", "gta") as session, open_session("torch", "gqa") as other:
        session.forward(prompt(2, 6))
        other.forward(prompt(1, 6))
        saved, foreign = session.export_cache(1), other.export_cache()
        cut = SavedCache(6, "fp32", {name: array[..., :-1] for name, array in saved.tensors.items()})
        long = SavedCache(
            POSITIONS + 1,
            "fp32",
            {each.name: np.zeros(each.shape(1, POSITIONS + 1), np.float32) for each in session._cache.tensors},
        )
        retyped, before = SavedCache(6, "int8", saved.tensors), session.export_cache(0)
        for call, error, message in [
            (lambda: session.import_cache(foreign), InputError, "other tensors.*same model"),
            (lambda: session.import_cache(cut), InputError, "key.0 of the saved cache is float32 of shape"),
            (
                lambda: session.import_cache(retyped),
                InputError,
                "int8 and the session's fp32",
            ),
            (lambda: session.import_cache(saved, tokens=7), InputError, "7 tokens.*expected 1 to the 6"),
            (lambda: session.import_cache(saved, tokens=0), InputError, "0 tokens"),
            (lambda: session.import_cache(saved, 2), InputError, "no row 2; expected 0 to 1"),
            (lambda: session.import_cache(long), CapacityError, f"{POSITIONS + 1} tokens, and the session has room"),
            (lambda: session.export_cache(-1), InputError, "no row -1"),
            (lambda: session.export_cache(0, 7), InputError, "7 tokens of row 0.*expected 1 to the 6"),
        ]:
            with pytest.raises(error, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert session.length.tolist() == [6, 6]
        for name, array in session.export_cache(0).tensors.items():
            np.testing.assert_array_equal(array, before.tensors[name])
    with open_session("torch", "gta", cache=policy("window", rows=24)) as managed:
        managed.forward(prompt(1, 6))
        with pytest.raises(InputError, match="a policy manages cannot be exported"):
            managed.export_cache()
        assert not managed.exports_cache
    with pytest.raises(BackendError, match="scripted cannot export its cache"):
        ScriptedSession([1]).export_cache()
    with pytest.raises(BackendError, match="closed"):
        session.export_cache()


def test_a_claim_that_is_stale_takes_and_gives_nothing() -> None:
    with open_session("torch", "gta") as session:
        claim = session.claim()
        claim.forward(prompt(1, 6))
        saved = claim.export_cache()
        session.reset()
        for call in (lambda: claim.export_cache(), lambda: claim.import_cache(saved)):
            with pytest.raises(InputError, match="something else used it"):
                call()
        own = session.claim()
        own.import_cache(saved)
        session.import_cache(saved)
        with pytest.raises(InputError, match=r"import_cache\(\) was called on it"):
            own.forward([[1]])
