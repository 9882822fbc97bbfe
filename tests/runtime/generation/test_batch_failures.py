"""What goes wrong with one of several texts, and what does not with the others."""

from typing import Any

import numpy as np
import pytest

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.kept_caches import KeptCaches
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Sampling
from tests.helpers.batches import Heard, run
from tests.helpers.generation import ScriptedSession


class Grammar:
    """A constraint that lets one token through, and may fail."""

    def __init__(self, token: int, length: int, fails: str = "") -> None:
        self.token, self.left, self.fails, self.calls = token, length, fails, []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails and self.calls.count(name) == 2:
            raise RuntimeError("planted")

    def prepare(self) -> None:
        self._called("prepare")

    def apply(self, logits) -> None:
        self._called("apply")
        logits[np.arange(len(logits)) != self.token] = -np.inf

    def accept(self, token: int) -> bool:
        self._called("accept")
        assert token == self.token
        self.left -= 1
        return not self.left


def test_a_constraint_rules_tokens_out_and_ends_its_text_alone(talker) -> None:
    batch, free, grammar = Batch(talker, 3), Heard(talker, [1, 2, 3], max_new_tokens=9), Grammar(65, 4)
    bound = Heard(talker, [1, 2, 3], constraint=grammar, logprobs=0)
    for each in (free, bound):
        batch.add(each.text)
    run(batch)
    assert bound.said == ([65] * 4, "AAAA", "stop")
    assert grammar.calls == ["prepare", "apply", "accept"] * 4
    assert all(event.logprobs[0].logprob > -50 for event in bound.events)  # of the model, not of what is allowed
    generation = generate(talker, [1, 2, 3], max_new_tokens=9)
    list(generation)
    assert free.said[0] == generation.ids


@pytest.mark.parametrize("fails", ["prepare", "apply", "accept"])
def test_one_that_fails_ends_alone(talker, fails) -> None:
    batch = Batch(talker, 3, kept=KeptCaches(10**7))
    good = [Heard(talker, [9, i], max_new_tokens=9) for i in range(2)]
    bad = Heard(talker, [1, 2, 3], constraint=Grammar(65, 9, fails))
    for each in (good[0], bad, good[1]):
        batch.add(each.text)
    run(batch)
    assert bad.said[2] == "error"
    assert "RuntimeError: planted" in str(bad.text.error)
    assert bad.events[-1].error is bad.text.error
    for i, each in enumerate(good):
        generation = generate(talker, [9, i], max_new_tokens=9)
        list(generation)
        assert each.said[0] == generation.ids


def test_a_text_whose_probabilities_are_no_numbers_ends_alone(talker, monkeypatch) -> None:
    """Also where no token is chosen by them."""
    whole = talker._run

    def damaged(ids, *others):
        logits = whole(ids, *others)
        logits[(ids == 77).any(1)] = np.nan
        return logits

    monkeypatch.setattr(talker, "_run", damaged)
    batch, good = Batch(talker, 3), Heard(talker, [1, 2, 3], max_new_tokens=9)
    bad = [Heard(talker, [1, 77, i], max_new_tokens=i, prompt_logprobs=1) for i in range(2)]
    for each in (bad[0], good, bad[1]):
        batch.add(each.text)
    run(batch)
    for each in bad:
        assert each.said[2] == "error"
        assert "the model's logits hold NaN" in str(each.text.error)
    generation = generate(talker, [1, 2, 3], max_new_tokens=9)
    list(generation)
    assert good.said[0] == generation.ids


def test_when_the_cache_is_lost_the_others_go_on(talker, monkeypatch) -> None:
    """A step that fails for good takes one text with it; the others read what they have once more."""
    batch = Batch(talker, 3)
    texts = [Heard(talker, [i] * (i + 2), max_new_tokens=12) for i in range(4)]
    for each in texts:
        batch.add(each.text)
    for _ in range(6):
        batch.step()
    longest = max(texts[:3], key=lambda each: each.text.seen)
    whole = talker._run
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> Any:
            raise BackendError("planted")

        patch.setattr(talker, "_run", fail)
        batch.step()
    assert talker._run == whole
    run(batch)
    assert [each.said[2] for each in texts].count("error") == 1
    assert longest.said[2] == "error"
    for i, each in enumerate(texts):
        generation = generate(talker, [i] * (i + 2), max_new_tokens=12)
        list(generation)
        assert each.said[0] == generation.ids[: len(each.said[0])]
        if each is not longest:
            assert each.said[0] == generation.ids


def test_whatever_else_uses_the_session_texts_go_on(talker, monkeypatch) -> None:
    """Between steps, and where a row cannot be moved when another text has ended."""
    batch, moves = Batch(talker, 3), 0
    write = talker._write_row

    def fail_once(*arguments: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == 1:
            raise CapacityError("planted")
        write(*arguments)

    monkeypatch.setattr(talker, "_write_row", fail_once)
    texts = [Heard(talker, [i] * (i + 2), max_new_tokens=5 + 4 * i) for i in range(4)]
    for each in texts:
        batch.add(each.text)
    for i in range(60):
        if i in (2, 9):
            talker.reset()
        if i == 5:
            next(generate(talker, [7, 8]))
        batch.step()
    assert moves > 1
    assert batch.running == batch.waiting == 0
    for i, each in enumerate(texts):
        generation = generate(talker, [i] * (i + 2), max_new_tokens=5 + 4 * i)
        list(generation)
        assert each.said[0] == generation.ids


def test_a_listener_that_uses_the_session_changes_no_text(talker) -> None:
    """Rows that are read after it, in the same step, would be of an empty cache."""
    batch = Batch(talker, 3)
    texts = [Heard(talker, [i] * (i + 2), max_new_tokens=9) for i in range(3)]
    for each in texts:
        batch.add(each.text)
    for _ in range(2):
        batch.step()
    heard = texts[2].text._listener

    def reset_once(event: Any) -> None:
        if not texts[2].events:
            talker.reset()
        heard(event)

    texts[2].text._listener = reset_once
    run(batch)
    for i, each in enumerate(texts):
        generation = generate(talker, [i] * (i + 2), max_new_tokens=9)
        list(generation)
        assert each.said[0] == generation.ids


def test_without_memory_to_copy_a_cache_one_text_ends_and_others_go_on(talker, monkeypatch) -> None:
    batch, read = Batch(talker, 2), talker._read_row
    good, bad = (Heard(talker, [5] * 40, max_new_tokens=9) for _ in range(2))
    batch.add(good.text)
    batch.step()

    def fail_once(*arguments: Any) -> Any:
        monkeypatch.setattr(talker, "_read_row", read)
        raise MemoryError

    monkeypatch.setattr(talker, "_read_row", fail_once)
    batch.add(bad.text)
    run(batch)
    assert (bad.said[2], good.said[2]) == ("error", "length")
    generation = generate(talker, [5] * 40, max_new_tokens=9)
    list(generation)
    assert good.said[0] == generation.ids


@pytest.mark.parametrize("kept", [None, KeptCaches(10**7)])
def test_what_is_removed_frees_its_row_at_once(talker, kept) -> None:
    batch = Batch(talker, 2, kept=kept)
    texts = [Heard(talker, [i] * 20, max_new_tokens=20) for i in range(4)]
    for each in texts:
        batch.add(each.text)
    for _ in range(3):
        batch.step()
    assert (batch.running, batch.waiting) == (2, 2)
    batch.remove(texts[0].text)
    batch.remove(texts[3].text)
    assert (batch.running, batch.waiting) == (1, 1)
    assert texts[0].said[2] == texts[3].said[2] == "interrupted"
    assert talker.length.tolist().count(0) == 1
    run(batch)
    for i in (1, 2):
        generation = generate(talker, [i] * 20, max_new_tokens=20)
        list(generation)
        assert texts[i].said[0] == generation.ids


def test_a_backend_that_exports_no_cache_runs_all_rows(talker, monkeypatch) -> None:
    monkeypatch.setattr(talker, "reads_rows", False)
    monkeypatch.setattr(talker, "_rows_of_step", lambda first, stop, tokens: slice(None))
    batch = Batch(talker, 3, kept=KeptCaches(10**7))
    lengths = [(58, 6), (3, 20), (30, 3), (40, 9), (8, 8)]
    texts = [Heard(talker, [i] * n, max_new_tokens=tokens) for i, (n, tokens) in enumerate(lengths)]
    for each in texts:
        batch.add(each.text)
    run(batch)
    assert batch.figures.cached_tokens == 0
    for i, (n, tokens) in enumerate(lengths):
        generation = generate(talker, [i] * n, max_new_tokens=tokens)
        list(generation)
        assert texts[i].said[0] == generation.ids


def test_options_that_make_no_sense_are_refused() -> None:
    session = ScriptedSession([])
    for options, message in [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; expected a whole number from 0"),
        ({"logprobs": 21}, "logprobs is 21; expected 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"stop": ("x",)}, "stop strings need a tokenizer"),
        ({"sampling": Sampling(logit_bias={300: 1.0})}, "logit_bias has token id 300; expected 0 to 299"),
    ]:
        with pytest.raises(InputError, match=message):
            Heard(session, [1], **options)
    with pytest.raises(InputError, match="a batch of 0 rows"):
        Batch(session, 0)
