"""Requests of several threads on one session."""

import threading
import time

import pytest

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.runtime.torch.session import TorchSession
from gta_edge.serve.scheduler import Event, QueueFullError, RequestOptions, Scheduler
from tests.helpers.batches import new_talker

PATIENCE = 60  # seconds, of a machine that does something else


@pytest.fixture
def session(tmp_path) -> TorchSession:
    return new_talker(tmp_path)


class Gate:
    """Lets a session's steps through one by one, or all."""

    def __init__(self, session, monkeypatch) -> None:
        self.steps, self.open, run = threading.Semaphore(0), threading.Event(), session._run

        def wait(*arguments):
            while not self.open.is_set() and not self.steps.acquire(timeout=0.01):
                pass
            return run(*arguments)

        monkeypatch.setattr(session, "_run", wait)


def test_requests_of_threads_are_each_as_alone(session) -> None:
    asked = [([i, *range(i)], 1 + 3 * i % 17, i) for i in range(1, 13)]
    found = {}

    def ask(scheduler: Scheduler, ids, tokens, seed) -> None:
        time.sleep(seed % 4 / 100)
        options = RequestOptions(Sampling(temperature=1.0, seed=seed), max_new_tokens=tokens)
        request = scheduler.submit(ids, options)
        events = list(request)
        assert request.done.wait(PATIENCE)
        found[seed] = [token for event in events for token in event.ids], "".join(event.text for event in events)
        assert (request.prompt_tokens, request.completion_tokens, request.seed) == (len(ids), tokens, seed)
        assert request.finish_reason == events[-1].finish_reason == "length"

    with Scheduler(session, slots=3, queue=20) as scheduler:
        threads = [threading.Thread(target=ask, args=(scheduler, *each)) for each in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    figures = scheduler.metrics()
    assert figures["generation_tokens_total"] == sum(tokens for _, tokens, _ in asked)
    assert figures["prompt_tokens_total"] == sum(len(ids) for ids, _, _ in asked)
    assert (figures["requests_running"], figures["requests_waiting"], figures["cache_rows_used"]) == (0, 0, 0)
    for ids, tokens, seed in asked:
        generation = generate(session, ids, max_new_tokens=tokens, temperature=1.0, seed=seed)
        text = "".join(generation)
        assert found[seed] == (generation.ids, text)


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(session, monkeypatch) -> None:
    gate = Gate(session, monkeypatch)
    heard: list[Event] = []
    with Scheduler(session, slots=1, queue=1) as scheduler:
        first = scheduler.submit([1, 2], RequestOptions(max_new_tokens=40))
        second = scheduler.submit([3], RequestOptions(max_new_tokens=2), heard.append)
        with pytest.raises(QueueFullError, match="1 requests wait, as many as may; try again later"):
            scheduler.submit([4], RequestOptions())
        gate.steps.release(3)
        first.cancel()
        first.cancel()
        events = list(first)
        assert (events[-1].finish_reason, first.finish_reason) == ("interrupted", "interrupted")
        gate.open.set()
        assert second.done.wait(PATIENCE)
        assert heard[-1].finish_reason == "length"
        assert len(list(scheduler.submit([4], RequestOptions(max_new_tokens=2)))) == 2
        first.cancel()  # of one that has ended: nothing
    assert scheduler.metrics()["generation_tokens_total"] < 40


def test_a_listener_that_fails_cancels_its_request_alone(session, caplog) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("gone")

    with Scheduler(session, slots=2) as scheduler:
        bad = scheduler.submit([1, 2], RequestOptions(max_new_tokens=50), fail)
        good = scheduler.submit([3], RequestOptions(max_new_tokens=5))
        assert sum(len(event.ids) for event in good) == 5
        assert bad.done.wait(PATIENCE)
        assert bad.finish_reason == "interrupted"
    assert caplog.text.count("the listener of a request failed") == 1


@pytest.mark.parametrize("drain", [True, False])
def test_closing_drains_or_cancels(session, monkeypatch, drain) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, slots=2)
    requests = [scheduler.submit([i], RequestOptions(max_new_tokens=6)) for i in range(4)]
    closing = threading.Thread(target=scheduler.close, args=(drain,))
    closing.start()
    while not scheduler._closing:
        time.sleep(0.001)
    with pytest.raises(BackendError, match="the scheduler is closed"):
        scheduler.submit([1], RequestOptions())
    gate.open.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    reasons = {request.finish_reason for request in requests}
    assert reasons == ({"length"} if drain else {"interrupted"})
    scheduler.close()
    assert session.forward([[1]]).shape == (1, 300)  # the session is nobody's again


def test_what_does_not_end_in_time_is_cancelled(session, monkeypatch) -> None:
    gate = Gate(session, monkeypatch)
    scheduler = Scheduler(session, slots=2)
    request = scheduler.submit([1], RequestOptions(max_new_tokens=60))
    threading.Timer(0.2, lambda: gate.steps.release(5)).start()
    scheduler.close(timeout=0.05)
    assert request.finish_reason == "interrupted"


def test_a_failure_of_the_model_ends_requests_with_its_error(session, monkeypatch) -> None:
    with Scheduler(session, slots=2) as scheduler:
        monkeypatch.setattr(session, "_run", lambda *arguments: (_ for _ in ()).throw(BackendError("planted", "mend")))
        requests = [scheduler.submit([i], RequestOptions()) for i in range(3)]
        for request in requests:
            *_, last = request
            assert (last.finish_reason, str(last.error)) == ("error", "planted; mend")
            assert request.error is last.error
        monkeypatch.undo()
        assert len(list(scheduler.submit([1], RequestOptions(max_new_tokens=3)))) == 3


def test_a_scheduler_that_fails_leaves_nobody_waiting(session, monkeypatch, caplog) -> None:
    scheduler = Scheduler(session, slots=2)
    monkeypatch.setattr(scheduler._batch, "step", lambda: 1 / 0)
    *_, last = scheduler.submit([1], RequestOptions())
    assert "the scheduler failed (division by zero)" in str(last.error)
    scheduler._thread.join(PATIENCE)
    with pytest.raises(BackendError, match="the scheduler is closed"):
        scheduler.submit([1], RequestOptions())
    assert "the scheduler failed" in caplog.text


def test_requests_that_make_no_sense_are_refused_at_once(session) -> None:
    with Scheduler(session) as scheduler:
        for ids, error, message in [
            ([], InputError, "no tokens"),
            ([300], InputError, "token id 300; expected 0 to 299"),
            ([1] * 65, CapacityError, "65 tokens and the model 64 positions"),
            ("text", InputError, "expected text, a flat list of token ids"),
        ]:
            with pytest.raises(error, match=message):
                scheduler.submit(ids, RequestOptions())
    with pytest.raises(InputError, match="slots 0 and queue 64; expected at least 1 slot"):
        Scheduler(session, slots=0)
