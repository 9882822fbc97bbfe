"""Requests of several threads on one session: a queue before it, and a thread of its own that runs the model."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.runtime.generation.answer import FinishReason
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.kept_caches import KeptCaches
from gta_edge.runtime.generation.loop import check_prompt
from gta_edge.runtime.generation.request import Constraint, Event, RequestOptions, TokenLogprobs
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.generation.text import Text
from gta_edge.runtime.prompt_cache import PromptCacheDirectory
from gta_edge.runtime.session import Session
from gta_edge.support.text import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Constraint", "Event", "QueueFullError", "Request", "RequestOptions", "Scheduler", "TokenLogprobs"]

_log = logging.getLogger(__name__)

KEPT_BYTES = 2**28
"""Memory for caches of texts that have ended."""


class QueueFullError(GtaEdgeError):
    """As many requests wait as may."""


class Request:
    """One text that is generated beside others; iterate over it for its events, or be told of them.

    The last event has a ``finish_reason``. What is here can be read at any time, from any thread.
    """

    def __init__(self, scheduler: Scheduler, text_of: Callable[[Callable[[Event], None]], Text]) -> None:
        self._scheduler = scheduler
        self._on_event: Callable[[Event], None] | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._text = text_of(self._tell)
        self._over = False
        self.done = threading.Event()
        """Set behind the last event."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, as ``Generation`` has it; None while it waits or runs."""
        return self._text.finish_reason

    @property
    def error(self) -> GtaEdgeError | None:
        """What ended it, where the reason is ``error``."""
        return self._text.error

    @property
    def seed(self) -> int:
        """The seed in use, also where the options left it open."""
        return self._text.sampler.seed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._text.answer.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read, since their cache was there."""
        return self._text.cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens that were generated, the end token among them."""
        return self._text.completion_tokens

    @property
    def guessed(self) -> tuple[int, int] | None:
        """Tokens that were guessed, and those of them that came; None without speculation."""
        return (self._text.drafted, self._text.accepted) if self._scheduler.speculates else None

    def cancel(self) -> None:
        """End it; its row is free before the next step. From any thread."""
        self._scheduler._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they come, and wait for them; once, and only without ``on_event``."""
        while not self._over:
            event = self._events.get()
            self._over = event.finish_reason is not None
            yield event

    def _tell(self, event: Event) -> None:
        if self._on_event is None:
            self._events.put(event)
        else:
            try:
                self._on_event(event)
            except Exception:  # whatever the listener raises: it is not the text's fault, and nobody else's affair
                _log.exception("the listener of a request failed; the request is cancelled")
                self._on_event = lambda event: None
                self.cancel()
        if event.finish_reason is not None:
            self.done.set()


class Scheduler:
    """Runs the requests of several threads on one session, several at once; see ``Batch``.

    Args:
        session: runs the model; the scheduler's alone until it is closed, and not closed by it.
        slots: texts at once, at most.
        queue: requests that wait beyond those, at most.
        kept_bytes: memory for caches of texts that have ended, from which prompts that begin like them go on; 0 keeps
            none.
        prompt_cache: a directory for those that this memory has no room for, and for all of them when the scheduler
            is closed; they are found there again by the next one.
        stall_ms: for how long a part of a prompt may keep the others waiting, about.
        speculate: guess tokens of each text by lookup; see ``BatchGuesses``.

    Raises:
        InputError: less than one slot, a prompt cache for a session with a cache policy, or of no bundle, or
            speculation with a cache that cannot take tokens back.
        BackendError: a prompt cache for a backend that exports none.
        OutputError: the directory cannot be made.
    """

    def __init__(
        self,
        session: Session,
        slots: int = 4,
        queue: int = 64,
        *,
        kept_bytes: int = KEPT_BYTES,
        prompt_cache: Path | None = None,
        stall_ms: float = 100.0,
        speculate: bool = False,
    ) -> None:
        if slots < 1 or queue < 0:
            raise InputError(f"slots {slots} and queue {queue}", "expected at least 1 slot, and a queue from 0 up")
        self._session, self._slots, self._queue = session, slots, queue
        if prompt_cache is not None:
            session.require_exports()
        directory = None if prompt_cache is None else PromptCacheDirectory(session, prompt_cache)
        self._kept = KeptCaches(kept_bytes, directory)
        keeps = kept_bytes or directory is not None
        kept = self._kept if keeps else None
        guesses = StepCounts() if speculate else None
        self._batch = Batch(session, slots, stall_seconds=stall_ms / 1e3, kept=kept, guesses=guesses)
        self._changed = threading.Condition()
        self._new: list[Request] = []
        self._cancelled: list[Request] = []
        self._open: set[Request] = set()
        self._closing = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gta-edge-scheduler", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """Texts that may run and wait, all together."""
        return self._slots + self._queue

    @property
    def speculates(self) -> bool:
        """Whether tokens are guessed."""
        return self._batch.guesses is not None

    def submit(
        self, ids: Sequence[int], options: RequestOptions, on_event: Callable[[Event], None] | None = None
    ) -> Request:
        """Queue a text.

        Args:
            ids: the prompt's token ids.
            options: what is asked of it.
            on_event: told of each event in the scheduler's thread, which waits for it; by default the request is
                iterated over.

        Raises:
            QueueFullError: as many requests wait as may.
            InputError: ids outside the vocabulary, none, or options that make no sense for this model.
            CapacityError: the prompt is longer than the model has positions for.
            BackendError: the scheduler is closed.
        """
        prompt = check_prompt(self._session, ids)
        request = Request(self, lambda listener: Text.asked_for(self._session, prompt, options, listener))
        request._on_event = on_event
        with self._changed:
            if self._closing:
                raise BackendError("the scheduler is closed", "make a new one")
            if len(self._open) >= self.room:
                raise QueueFullError(
                    f"{len(self._open) - self._slots} requests wait, as many as may", "try again later"
                )
            self._open.add(request)
            self._new.append(request)
            self._changed.notify()
        return request

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: let those run to their end that there are; otherwise they are cancelled.
            timeout: seconds after which those that still run are cancelled.
        """
        self._end(stopping=not drain)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.stop()
            self._thread.join()

    def stop(self) -> None:
        """Take no more requests and cancel those that there are, without waiting for their end."""
        self._end(stopping=True)

    def _end(self, *, stopping: bool) -> None:
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or stopping
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """Whether it takes no requests any more: it was closed, or failed."""
        return self._closing

    def metrics(self) -> dict[str, float]:
        """Return figures, by name: what runs and waits now, and counts since the scheduler began."""
        figures, running, guesses = self._batch.figures, self._batch.running, self._batch.guesses
        found: dict[str, float] = {
            "requests_running": running,
            "requests_waiting": max(0, len(self._open) - running),
            "slots": self._slots,
            "cache_rows_used": int(self._session.length.sum()),
            "cache_rows": self._slots * self._session.max_length,
            "kept_caches": len(self._kept),
            "kept_cache_bytes": self._kept.nbytes,
            "prompt_tokens_total": figures.prompt_tokens,
            "cached_tokens_total": figures.cached_tokens,
            "generation_tokens_total": figures.generated_tokens,
            "steps_total": figures.steps,
            "prompt_parts_total": figures.parts,
        }
        if guesses is not None:
            found |= {"drafted_tokens_total": guesses.drafted, "accepted_tokens_total": guesses.accepted}
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _cancel(self, request: Request) -> None:
        with self._changed:
            if request in self._open:
                self._cancelled.append(request)
                self._changed.notify()

    def _run(self) -> None:
        busy = False
        try:
            while self._received(busy):
                busy = self._batch.step()
                self._forget_ended()
        except BaseException as error:  # nobody may wait for ever
            _log.exception("the scheduler failed")
            self._fail(BackendError(f"the scheduler failed ({one_line(error)})", "restart the service"))
        finally:
            with self._changed:
                self._closing = True
            self._kept.flush()

    def _received(self, busy: bool) -> bool:
        """Wait for something to do and take what came; return False at the end."""
        with self._changed:
            while not (busy or self._new or self._cancelled or self._closing):
                self._changed.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            stopping, closing = self._stopping, self._closing
        for request in new:
            self._batch.add(request._text)
        for request in cancelled:
            self._batch.remove(request._text)
        if stopping:
            self._batch.close()
        self._forget_ended()
        return bool(self._open) or not closing

    def _forget_ended(self) -> None:
        with self._changed:
            self._open = {request for request in self._open if request.finish_reason is None}

    def _fail(self, error: GtaEdgeError) -> None:
        with self._changed:
            self._closing = True
            left, self._open = list(self._open), set()
        for request in left:
            request._text.end("error", error)
