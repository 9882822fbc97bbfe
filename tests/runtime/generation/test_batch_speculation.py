"""Guesses in a batch, of another number for each text: each is what it is without, and the cache with it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.errors import CapacityError, InputError
from gta_edge.runtime.generation import batch_guesses
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.batch_guesses import width_that_pays
from gta_edge.runtime.generation.guesses import Candidate
from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.session import Session
from gta_edge.runtime.step_costs import WIDTHS, StepCosts
from tests.helpers.batches import Cheap, Heard, run
from tests.helpers.managed_sessions import VOCAB, make, open_session

CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "onnxruntime": ("onnxruntime", {"exact": True}),
    "torch": ("torch", {"capacity_step": 16}),
    "torch, int4": ("torch", {"cache_dtype": "int4"}),
    "torch, window": ("torch", {"cache": "window"}),
}


def opened(kind: str) -> Session:
    backend, options = CACHES[kind]
    return open_session(backend, "gta", **options | ({"cache": make(options["cache"])} if "cache" in options else {}))


def heard(session: Session, guesses: StepCounts | None, seed: int) -> list[Heard]:
    """Texts that begin with something that repeats, in a batch; some are greedy, some drawn, one nearly fills it."""
    random, batch, texts = np.random.default_rng(seed), Batch(session, 3, guesses=guesses), []
    for i in range(6):
        ids = (random.integers(0, VOCAB, random.integers(2, 9)).tolist() * 15)[: int(random.integers(5, 60))]
        sampling = Sampling(temperature=[0.0, 12.0, 6.0][i % 3], repetition_penalty=[1.0, 1.2][i % 2], seed=i)
        length = 160 if i == 2 else int(random.integers(1, 60))
        options = {"max_new_tokens": length, "logprobs": 1, "end_token_ids": frozenset({3} if i == 4 else ())}
        texts.append(Heard(session, ids, sampling=sampling, **options))
        batch.add(texts[-1].text)
        batch.step()
    run(batch)
    assert session.length.tolist() == [0] * 3
    return texts


@pytest.mark.parametrize("kind", CACHES)
def test_each_text_is_what_it_is_without_guesses(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(batch_guesses, "StepCosts", Cheap)
    with opened(kind) as session:
        expected = [text.said for text in heard(session, None, 5)]
        counts = StepCounts()
        texts = heard(session, counts, 5)
        assert [text.said for text in texts] == expected
        assert "context" in {reason for _, _, reason in expected}
        assert 0 < counts.accepted < counts.drafted
        assert counts.drafted == sum(text.text.drafted for text in texts)
        assert counts.accepted == sum(text.text.accepted for text in texts)
        assert counts.calls < sum(len(ids) for ids, _, _ in expected) / 3
        for text in texts:
            told = [each.token for event in text.events for each in event.logprobs]
            assert told[: len(text.said[0])] == text.said[0]


@pytest.mark.parametrize("trees", [False, True])
def test_where_there_is_no_room_for_guesses_texts_go_on_without(trees: bool, monkeypatch) -> None:
    monkeypatch.setattr(batch_guesses, "StepCosts", Cheap)
    with open_session("torch", "gta", trees=trees) as session:
        session.step_costs = Cheap()
        expected = [text.said for text in heard(session, None, 5)]
        alone = generate(session, [5, 6, 7] * 9, max_new_tokens=30)
        list(alone)
        check, refused = session._cache.check_memory, []

        def full(batch, tokens, width, logits_bytes, together=None):
            if logits_bytes > 4 * VOCAB * batch:
                refused.append(width)
                raise CapacityError("full", "close other programs")
            check(batch, tokens, width, logits_bytes, together)

        monkeypatch.setattr(session._cache, "check_memory", full)
        assert [text.said for text in heard(session, StepCounts(), 5)] == expected
        assert refused
        refused.clear()
        guessed = generate(session, [5, 6, 7] * 9, max_new_tokens=30, speculate="lookup")
        list(guessed)
        assert guessed.ids == alone.ids
        assert refused
        assert guessed.timings["drafted"] == 0


def test_several_answers_are_guessed_too(monkeypatch) -> None:
    monkeypatch.setattr(batch_guesses, "StepCosts", Cheap)
    options: Any = {"max_new_tokens": 30, "temperature": 0.4, "seed": 2}
    with opened("torch") as session:
        for asked in ({"prompt": [5, 6, 7] * 9, "n": 3}, {"prompt": [[5, 6, 7] * 9, [8, 9] * 20]}):
            plain = generate(session, **asked, **options)
            list(plain)
            guessed = generate(session, **asked, speculate="lookup", **options)
            list(guessed)
            assert [each.ids for each in guessed.answers] == [each.ids for each in plain.answers]
            assert 0 < guessed.timings["accepted"] <= guessed.timings["drafted"]
            assert plain.timings["drafted"] is None
            assert guessed.timings["tokens_per_step"] > plain.timings["tokens_per_step"]


def test_a_cache_that_cannot_take_tokens_back_is_refused() -> None:
    with (
        open_session("torch", "gta", cache=make("h2o")) as session,
        pytest.raises(InputError, match="observes attention"),
    ):
        Batch(session, 2, guesses=StepCounts())


def test_where_taking_back_fails_the_texts_are_read_once_more(monkeypatch) -> None:
    monkeypatch.setattr(batch_guesses, "StepCosts", Cheap)
    with opened("torch") as session:
        expected = [text.said for text in heard(session, None, 5)]
        truncate, failures = session._cache.truncate, iter([RuntimeError("planted")] * 2)

        def fail_twice(length, given, memory=None):
            if (length != 0).any() and (error := next(failures, None)):
                raise error
            truncate(length, given, memory)

        monkeypatch.setattr(session._cache, "truncate", fail_twice)
        assert [text.said for text in heard(session, StepCounts(), 5)] == expected
        assert next(failures, None) is None


def test_a_text_that_does_not_repeat_is_looked_at_rarely_and_again_when_it_does(monkeypatch) -> None:
    looks, offer = [], PromptLookup.offer
    monkeypatch.setattr(PromptLookup, "offer", lambda *given, **rest: looks.append(1) or offer(*given, **rest))
    guesser, random = batch_guesses._Guesser(), np.random.default_rng(0)
    ids = random.permutation(1000).tolist()
    for length in range(20, 400):
        assert not guesser.offer(np.array(ids[:length]), 15)
    assert len(looks) < 100
    text, found = [*ids[:400], *ids[:100]], 0
    for length in range(402, 500):
        if offered := guesser.offer(np.array(text[:length]), 15):
            draft = guesser.draft(len(offered)).tolist()
            assert draft[: 500 - length] == text[length : length + len(draft)]
            found += 1
    assert found > 60


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=15), min_size=1, max_size=4),
    st.lists(st.floats(0.0, 2.0), min_size=8, max_size=8),
)
def test_the_width_is_the_one_for_which_a_token_costs_least(chances, increments) -> None:
    costs = StepCosts()
    for width, seconds in zip(WIDTHS, np.cumsum([1.0, *increments[1:]]).tolist(), strict=True):
        for _ in range(2):
            costs.add(width, seconds)
    offered = [[Candidate(i - 1, 0, float(p)) for i, p in enumerate(np.cumprod(guess))] for guess in chances]

    def per_second(width: int) -> float:
        return (len(offered) + sum(p.likelihood for guess in offered for p in guess[: width - 1])) / costs.seconds(
            width
        )

    found = width_that_pays(costs, offered)
    possible = [width for width in WIDTHS if width <= 1 + max(map(len, offered))]
    best = max(per_second(width) for width in possible)
    assert found in possible
    assert per_second(found) >= best / 1.02
    assert found == 1 or per_second(found) > per_second(1)
    assert width_that_pays(StepCosts(), offered) == 1
