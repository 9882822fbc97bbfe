"""One session, several users: each gets its own text, or an error that says what the other did."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.session import Session
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.generation import CONFIG, EOS, ScriptedSession

ONE, OTHER = [1, 2, 3], [4, 5, 6]  # of the same length
USED = "something else used it"


@pytest.fixture
def session() -> Session:
    torch.manual_seed(0)
    session = TorchSession(Decoder(CONFIG.replace(tie_word_embeddings=False)).eval())
    session.end_token_ids = frozenset()
    return session


INTERVENTIONS: dict[str, tuple[Callable[[Session], Any], str]] = {
    "a generation": (lambda s: next(generate(s, OTHER)), "another generation or evaluation began"),
    "a generation to its end": (lambda s: list(generate(s, OTHER, max_new_tokens=2)), "another generation"),
    "an abandoned generation": (lambda s: next(iter(generate(s, OTHER))), "another generation"),
    "an evaluation": (lambda s: evaluate(s, np.arange(9)), "another generation or evaluation began"),
    "a claim": (lambda s: s.claim(), "another generation"),
    "reset": (lambda s: s.reset(), r"reset\(\) was called"),
    "reset and as many tokens": (lambda s: (s.reset(), s.forward([OTHER])), r"forward\(\) was called"),
    "forward": (lambda s: s.forward([[7]]), r"forward\(\) was called"),
    "forward and back": (lambda s: (s.forward([[7]]), s.truncate(3)), r"truncate\(\) was called"),
    "truncate": (lambda s: s.truncate(1), r"truncate\(\) was called"),
    "truncate to where it is": (lambda s: s.truncate(s.length), r"truncate\(\) was called"),
}


@pytest.mark.parametrize(("intervene", "reason"), INTERVENTIONS.values(), ids=INTERVENTIONS)
def test_whatever_comes_between_two_tokens_is_an_error(session, intervene, reason):
    generation = generate(session, ONE, max_new_tokens=5)
    next(generation)
    ids = list(generation.ids)
    intervene(session)
    with pytest.raises(InputError, match=f"{USED}.*{reason}.*; finish one") as caught:
        next(generation)
    assert "\n" not in str(caught.value)
    assert (generation.ids, generation.finish_reason) == (ids, "error")
    assert list(generation) == []


def test_two_generations_in_turns_are_each_alone_or_an_error(session):
    alone = {}
    for prompt in (ONE, OTHER):
        alone[tuple(prompt)] = generation = generate(session, prompt, max_new_tokens=4)
        list(generation)
    first, second = (generate(session, prompt, max_new_tokens=4) for prompt in (ONE, OTHER))
    next(first)
    next(second)
    with pytest.raises(InputError, match=USED):
        next(first)
    list(second)
    assert second.ids == alone[tuple(OTHER)].ids
    assert first.ids == alone[tuple(ONE)].ids[:1]


def refused(call, argument):
    with pytest.raises((InputError, CapacityError)):
        call(argument)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda s: s.length,
        lambda s: generate(s, OTHER),  # not begun
        lambda s: generate(s, OTHER).close(),
        lambda s: refused(s.forward, [[-1]]),
        lambda s: refused(s.forward, [[1], [2]]),
        lambda s: refused(s.truncate, 99),
        lambda s: refused(s.forward, [[1] * 99]),
    ],
)
def test_what_leaves_the_cache_alone_does_not_end_a_generation(session, harmless):
    expected = generate(session, ONE, max_new_tokens=4)
    list(expected)
    generation = generate(session, ONE, max_new_tokens=4)
    next(generation)
    harmless(session)
    list(generation)
    assert generation.ids == expected.ids


def test_an_evaluation_between_whose_steps_something_else_runs(session):
    def intervene(what, done, total):
        session.forward([[1]])

    with pytest.raises(InputError, match=USED):
        evaluate(session, np.arange(40), window=8, progress=intervene)


def test_a_session_that_is_closed_takes_no_memory_for_a_claim(session):
    session.close()
    with pytest.raises(BackendError, match="the session is closed"):
        session.claim(3)
    assert session.cache_bytes == 0


def test_a_batch_is_owned_as_a_single_row_is(session):
    claim = session.claim()
    claim.forward([ONE, OTHER])
    expected = claim.forward([[7], [8]])
    claim.truncate([3, 3])
    assert np.allclose(claim.forward([[7], [8]]), expected, atol=1e-5)
    session.reset()
    session.forward([ONE, ONE])
    for call in (lambda: claim.forward([[7], [8]]), lambda: claim.truncate(1), claim.reset):
        with pytest.raises(InputError, match=USED):
            call()
    assert session.length.tolist() == [3, 3]


def test_after_a_step_that_failed_the_cache_is_nobodys():
    session = ScriptedSession([7, BackendError("broken"), 8])
    claim = session.claim()
    claim.forward([ONE])
    with pytest.raises(BackendError):
        claim.forward([[7]])
    with pytest.raises(InputError, match="a forward\\(\\) that failed"):
        claim.forward([[7]])


@pytest.mark.parametrize("begun", [True, False])
def test_a_generation_of_a_session_that_was_closed(session, begun):
    generation = generate(session, ONE)
    if begun:
        next(generation)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="the session is closed; load the bundle again"):
        next(generation)
    assert generation.finish_reason == "error"
    session.truncate(0)  # harmless, as before


# --- threads ---------------------------------------------------------------------------------------------------------


class SlowSession(ScriptedSession):
    """Waits in the middle of a run until it is told to go on."""

    def __init__(self, script, config=CONFIG):
        super().__init__(script, config=config)
        self.running, self.go_on, self.released = threading.Event(), threading.Event(), False

    def _run(self, *arguments):
        self.running.set()
        assert self.go_on.wait(30)
        assert not self.released
        return super()._run(*arguments)

    def _release(self):
        self.released = True


def in_thread(call):
    """Start a call in a thread; the result's function waits for it and returns what it gave or raised."""
    result = []

    def run():
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(30)
        assert not thread.is_alive()
        return result[0]

    return join


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.forward([OTHER]),
        lambda s: s.truncate(0),
        lambda s: s.reset(),
        lambda s: s.claim(),
        lambda s: next(generate(s, OTHER)),
        lambda s: evaluate(s, np.arange(9)),
    ],
)
def test_a_call_while_another_thread_is_in_one_is_refused(call):
    session = SlowSession([7, 8, EOS])
    generation = generate(session, ONE)
    ended = in_thread(lambda: list(generation))
    assert session.running.wait(30)
    with pytest.raises(InputError, match="the session is in use by another thread; load the bundle once for each"):
        call(session)
    session.go_on.set()
    ended()
    assert (generation.ids, generation.finish_reason) == ([7, 8], "stop")  # as if nothing had been
    assert [tokens for _, tokens in session.steps] == [ONE, [7], [8]]


def test_closing_waits_for_the_step_of_another_thread():
    # whichever thread is faster, the generation does not end by itself
    session = SlowSession([7] * 100_000, CONFIG.replace(max_position_embeddings=100_000))
    generation = generate(session, ONE, max_new_tokens=90_000)
    ended = in_thread(lambda: list(generation))
    assert session.running.wait(30)
    closed = in_thread(session.close)
    assert not session.released
    session.go_on.set()
    closed()
    assert session.released
    assert isinstance(ended(), BackendError | InputError)
    assert set(generation.ids) == {7}  # as many as came before the close


def test_one_generation_asked_by_two_threads():
    session = SlowSession([7, 8, EOS])
    generation = generate(session, ONE)
    ended = in_thread(lambda: list(generation))
    assert session.running.wait(30)
    with pytest.raises(InputError, match="the generation is in use by another thread"):
        next(generation)
    session.go_on.set()
    ended()
    assert (generation.ids, generation.finish_reason) == ([7, 8], "stop")


def test_closing_a_generation_waits_for_the_step_of_another_thread():
    session = SlowSession([7, 8, EOS])
    generation = generate(session, ONE)
    ended = in_thread(lambda: next(generation))
    assert session.running.wait(30)
    closed = in_thread(generation.close)
    session.go_on.set()
    closed()
    ended()
    assert (generation.ids, generation.finish_reason) == ([7], "interrupted")


def test_many_threads_get_their_own_text_or_an_error(session):
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    expected = []
    for prompt in prompts:
        generation = generate(session, prompt, max_new_tokens=6)
        list(generation)
        expected.append(generation.ids)

    def run(i):
        generation = generate(session, prompts[i], max_new_tokens=6)
        try:
            list(generation)
        except InputError:
            assert generation.finish_reason == "error"
        return generation

    for _ in range(5):
        for i, ended in enumerate([in_thread(lambda i=i: run(i)) for i in range(6)]):
            generation = ended()
            assert generation.ids == expected[i][: len(generation.ids)]
            assert len(generation.ids) == 6 or generation.finish_reason == "error"


def test_a_signal_handler_in_the_middle_of_a_step():
    session = ScriptedSession([7, 8, 9])
    generation = generate(session, ONE)
    inner = ScriptedSession._run

    def run(*arguments):
        if len(session.steps) == 1:
            generation.close()
            with pytest.raises(InputError, match="called from within one of its own calls"):
                session.close()
        return inner(session, *arguments)

    session._run = run
    assert next(generation) == ""
    assert list(generation) == []
    assert (generation.ids, generation.finish_reason) == ([7], "interrupted")
