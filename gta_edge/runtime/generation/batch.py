"""Several texts at once with one session: they join and leave between steps (continuous batching).

Every text has a row of the batch. A step reads a part of one prompt, and gives one token to each text whose prompt has
been read; how long the part is keeps what the others wait for it within bounds. What a text says is what it says alone.

The rows of texts lie together at the start of the batch, since a row without a token costs a step as much as one that
has: where one ends, the last one takes its row, which costs a copy of its cache, less than a step. What ends leaves its
cache to ``KeptCaches``, from where it is copied into the row of a prompt that begins like it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gta_edge.errors import BackendError, CapacityError, GtaEdgeError, InputError
from gta_edge.runtime.generation.answer import FinishReason
from gta_edge.runtime.generation.answers import Alternative
from gta_edge.runtime.generation.batch_guesses import BatchGuesses
from gta_edge.runtime.generation.kept_caches import KeptCaches, longest
from gta_edge.runtime.generation.request import Event
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.generation.text import Text
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session import Claim, Ids, Logits, Session
from gta_edge.support.text import one_line

__all__ = ["Batch", "BatchFigures", "in_a_batch"]

MIN_REUSED_TOKENS = 16
"""A prefix that is shorter is read again: that takes no longer than copying it."""

_FIRST_PART, _MIN_PART = 32, 16
"""Tokens of a prompt that are read beside others before it is known how long that takes; and at least."""

_MAX_ROWS = 8
"""Texts at once, of one call: more take more memory, and on a CPU are hardly faster."""

_LOGIT_BYTES = 2**26  # logits of one call stay below this where all are asked for


@dataclass
class BatchFigures:
    """Counts since a batch began.

    Attributes:
        prompt_tokens: of all prompts that were begun.
        cached_tokens: those of them that were not read, since their cache was there.
        generated_tokens: new ones.
        steps: calls of the model that gave tokens.
        parts: calls of the model that read a part of a prompt.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    parts: int = 0


class _Pace:
    """How many tokens of a prompt are read while others wait, so that they wait for about as long as they may.

    It follows what parts have taken, by a factor of 2 at a time: a machine that does something else for a moment makes
    the parts after it short, and not all that follow.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.tokens = _FIRST_PART

    def note(self, tokens: int, seconds: float) -> None:
        """Heed how long a part took; a short one, such as a prompt's last, tells little."""
        if 2 * tokens >= self.tokens:
            fitting = tokens * self._seconds / max(seconds, 1e-6)
            self.tokens = max(_MIN_PART, int(min(max(fitting, self.tokens / 2), 2 * self.tokens)))


class Batch:
    """The texts that a session works on, which is the batch's alone from the first step on.

    Args:
        session: runs the model.
        rows: texts at once, at most; more wait.
        stall_seconds: for how long a part of a prompt may keep the others waiting, about.
        kept: where caches of texts that have ended go, and come from; None keeps none.
        guesses: told how it goes, where tokens of each text are guessed by lookup and run in the same step; None to
            guess nothing.

    Attributes:
        figures: counts.
        guesses: the same.

    Raises:
        InputError: no rows, or speculation with a cache that cannot take tokens back.
    """

    def __init__(
        self,
        session: Session,
        rows: int,
        *,
        stall_seconds: float = 0.1,
        kept: KeptCaches | None = None,
        guesses: StepCounts | None = None,
    ) -> None:
        if rows < 1:
            raise InputError(f"a batch of {rows} rows was asked for", "expected at least 1")
        self._session, self._pace = session, _Pace(stall_seconds)
        self._kept = kept if session.exports_cache else None
        self._claim: Claim | None = None
        self._rows: list[Text | None] = [None] * rows
        self._reading: Text | None = None  # the one whose prompt is being read
        self._waiting: deque[Text] = deque()
        self.figures = BatchFigures()
        self.guesses = guesses
        self._guesses = None if guesses is None else BatchGuesses(session, guesses)

    @property
    def running(self) -> int:
        """Texts that have a row."""
        return len(self._taken)

    @property
    def _taken(self) -> list[tuple[int, Text]]:
        return [(row, text) for row, text in enumerate(self._rows) if text is not None]

    def _row_of(self, text: Text) -> int | None:
        return next((row for row, each in self._taken if each is text), None)

    @property
    def waiting(self) -> int:
        """Texts that have none yet."""
        return len(self._waiting)

    def add(self, text: Text) -> None:
        """Let a text join as soon as there is a row for it."""
        self._waiting.append(text)

    def remove(self, text: Text, reason: FinishReason = "interrupted") -> None:
        """End a text here; its row is free at once."""
        text.end(reason)
        if text in self._waiting:
            self._waiting.remove(text)
        else:
            self._leave(text)

    def step(self) -> bool:
        """Read a part of a prompt, and give each other text a token; return whether there is more to do."""
        self._recover()
        if self._reading is None:
            self._begin()
        if self._reading is not None:
            self._read(self._reading)
            self._recover()
        self._write()
        return bool(self._waiting or self._taken)

    def close(self, reason: FinishReason = "interrupted") -> None:
        """End all texts."""
        for text in [*self._waiting, *(text for _, text in self._taken)]:
            self.remove(text, reason)

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Give the text that has waited longest a row, and what is known of its prompt."""
        while self._waiting and self._waiting[0].finish_reason is not None:  # it ended when the cache was lost
            self._waiting.popleft()
        if not self._waiting or None not in self._rows:
            return
        row, text = self._rows.index(None), self._waiting.popleft()
        self._rows[row] = self._reading = text
        text.restart()
        try:
            self._own().truncate([0 if each == row else n for each, n in enumerate(self._session.length.tolist())])
            found = self._known(text)
            if found is not None:
                self._own().import_cache(found[0], row, found[1])
                text.seen = found[1]
        except Exception as error:  # of any backend, such as no memory for a copy: it ends this text alone
            self._failed(text, error)
            return
        if not text.completion_tokens:  # and not one that has to be read once more
            self._count_prompt(text)

    def _own(self) -> Claim:
        """Return the claim to the session; a lost one fails what is called on it, until texts are read once more."""
        if self._claim is None:
            self._claim = self._session.claim(len(self._rows))
        return self._claim

    def _known(self, text: Text) -> tuple[SavedCache, int] | None:
        """Return the cache of what a text begins with, of another that runs or has ended, and how many tokens of it."""
        if not self._session.exports_cache or text.reusable < MIN_REUSED_TOKENS:
            return None
        prompt = text.answer.all_ids[: text.reusable]
        others = [(row, each) for row, each in self._taken if each is not text]
        place, length = longest(prompt, [each.answer.all_ids[: each.seen] for _, each in others])
        if length:
            length = self._session.reusable(others[place][1].seen, length)
        kept = None if self._kept is None else self._kept.find(prompt, MIN_REUSED_TOKENS)
        if kept is not None:
            saved, there = kept[0], self._session.reusable(kept[0].length, kept[1])
            if there >= max(length, MIN_REUSED_TOKENS):
                return saved, there
        if length < MIN_REUSED_TOKENS:
            return None
        return self._own().export_cache(others[place][0], length), length

    def _read(self, text: Text) -> None:
        """Read a part of a prompt; with its last one comes the first new token."""
        row, ids = self._rows.index(text), text.answer.all_ids
        part = ids[text.seen : text.seen + self._part_size(row, text)]
        all_logits = text.options.prompt_logprobs is not None and not text.completion_tokens
        given = np.zeros((len(self._rows), len(part)), np.int64)
        given[row] = part
        lengths = np.zeros(len(given), np.int64)
        lengths[row] = len(part)
        last = text.seen + len(part) == len(ids)
        started = time.perf_counter()
        try:
            if last and text.options.constraint is not None:
                text.options.constraint.prepare()
            logits = self._own().forward(given, lengths=lengths, all_logits=all_logits)[row]
        except Exception as error:  # of any backend or constraint: it ends this text, and no other
            self._failed(text, error)
            return
        self._pace.note(len(part), time.perf_counter() - started)
        self.figures.parts += 1
        if all_logits:
            following = ids[text.seen + 1 : text.seen + len(part) + 1]
            try:
                text.note_prompt(logits[: len(following)], following)
            except BackendError as error:  # they are no numbers
                self._failed(text, error)
                return
            logits = logits[-1]
        text.seen += len(part)
        if last:
            self._reading = None
            began = [text, *self._joined(text)]
            for each in began:
                self._advance(each, logits.copy())
            for each in began:
                if each.finish_reason is not None:
                    self._leave(each)

    def _joined(self, text: Text) -> list[Text]:
        """Give texts that wait next with the very prompt that was read a row, with a copy of its cache; return them.

        Those are the answers to one request, for instance: their prompt is read once.
        """
        found: list[Text] = []
        while self._session.copies_rows and self._waiting and None in self._rows:
            if self._waiting[0].finish_reason is None:
                if not self._waiting[0].begins_as(text):
                    break
                found.append(self._waiting[0])
                self._rows[self._rows.index(None)] = found[-1]
            self._waiting.popleft()
        if not found:
            return []
        try:
            self._own().copy_cache(self._rows.index(text), [self._rows.index(each) for each in found])
            for each in found:
                if each.options.constraint is not None:
                    each.options.constraint.prepare()
        except Exception as error:  # of any backend or constraint; those that it did not reach have nothing else, too
            for each in found:
                self._failed(each, error)
            return []
        for each in found:
            each.join(text)
            self._count_prompt(each)
        return found

    def _count_prompt(self, text: Text) -> None:
        text.cached_tokens = text.seen
        self.figures.prompt_tokens += text.answer.prompt_tokens
        self.figures.cached_tokens += text.seen

    def _part_size(self, row: int, text: Text) -> int:
        """Return how many tokens of a prompt to read now."""
        size = self._session.chunk_size
        if len(self._taken) > 1:
            size = min(size, self._pace.tokens)
        if text.options.prompt_logprobs is not None:
            size = min(size, max(1, _LOGIT_BYTES // (4 * self._session.config.vocab_size * len(self._rows))))
        return max(1, min(size, self._own().room(row)))

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Give every text whose prompt has been read its next token."""
        for text in self._writing:
            try:
                if text.options.constraint is not None:
                    text.options.constraint.prepare()
            except Exception as error:  # a caller's constraint may raise anything, and ends its text alone
                self._failed(text, error)
        rows = {row: text for row, text in self._taken if text is not self._reading}
        if not rows:
            return
        nothing = dict.fromkeys(rows, np.zeros(0, np.int64))
        drafts = nothing if self._guesses is None else self._guesses.drafts(rows)
        started = time.perf_counter()
        try:
            try:
                logits = self._run(rows, drafts)
            except CapacityError:  # which what is guessed may be too much for
                if not any(map(len, drafts.values())) or not self._own().holds:
                    raise
                drafts, started = nothing, time.perf_counter()
                logits = self._run(rows, drafts)
        except Exception as error:  # of any backend: the longest text ends, which most likely had no room
            self._failed(max(rows.values(), key=lambda text: text.seen), error)
            return
        self.figures.steps += 1
        if self._guesses is not None:
            self._guesses.note(rows, drafts, time.perf_counter() - started)
        for row, text in rows.items():
            self._say(text, logits[row].reshape(-1, logits.shape[-1]), drafts[row])
        if any(map(len, drafts.values())):
            self._take_back()
        for text in rows.values():
            if text.finish_reason is not None:
                self._leave(text)

    def _run(self, rows: Mapping[int, Text], drafts: Mapping[int, Ids]) -> Logits:
        """Run the last token of texts, by their row, and what is guessed of each; return logits [B, V] or [B, T, V]."""
        ids = np.zeros((len(self._rows), 1 + max(map(len, drafts.values()))), np.int64)
        lengths = np.zeros(len(ids), np.int64)
        for row, text in rows.items():
            new = [text.answer.all_ids[text.seen], *drafts[row]]
            ids[row, : len(new)], lengths[row] = new, len(new)
        return self._own().forward(ids, lengths=lengths, all_logits=ids.shape[1] > 1)

    def _say(self, text: Text, logits: Logits, draft: Ids) -> None:
        """Give a text the next token, and those after it while they are the guessed ones, by logits [1 + K, V]."""
        for i in range(1 + len(draft)):
            text.seen += 1
            self._advance(text, logits[i], ahead=i > 0)
            if text.finish_reason is not None or i == len(draft) or text.answer.ids[-1] != draft[i]:
                return
            if self._guesses is not None:
                self._guesses.accept(text)

    def _take_back(self) -> None:
        """Drop from the cache what was guessed and has not come."""
        held = self._session.length
        wanted = [n if text is None else text.seen for text, n in zip(self._rows, held.tolist(), strict=True)]
        try:
            self._own().truncate(wanted)
        except Exception:  # of any backend, whose cache then holds what nobody can tell: its texts are read again
            self._read_again()

    @property
    def _writing(self) -> list[Text]:
        return [text for _, text in self._taken if text is not self._reading]

    def _advance(self, text: Text, logits: Logits, *, ahead: bool = False) -> None:
        """Give a text its next token by logits [V], which may be there ahead; it keeps its row where it ends."""
        before = text.completion_tokens
        try:
            if ahead and text.options.constraint is not None:
                text.options.constraint.prepare()
            text.advance(logits)
        except Exception as error:  # a caller's listener or constraint may raise anything, and ends its text alone
            text.end("error", _told(error))
        self.figures.generated_tokens += text.completion_tokens - before

    # --- the end ---------------------------------------------------------------------------------------------------

    def _failed(self, text: Text, error: Exception) -> None:
        """End a text that failed."""
        text.end("error", _told(error))
        self._leave(text)
        self._recover()

    def _recover(self) -> None:
        """Let texts be read once more where the cache was lost, to an error or to somebody else."""
        if self._claim is not None and not self._claim.holds:
            self._read_again()

    def _read_again(self) -> None:
        rest = [each for _, each in self._taken]
        self._rows, self._reading, self._claim = [None] * len(self._rows), None, None
        self._waiting.extendleft(reversed(rest))

    def _leave(self, text: Text) -> None:
        """Free a text's row, if it has one: its cache is kept, and the last row moves into its place."""
        row = self._row_of(text)
        if row is None:
            return
        self._rows[row], self._reading = None, None if self._reading is text else self._reading
        if self._claim is None or not self._claim.holds:
            return
        try:
            if self._kept is not None and text.seen >= MIN_REUSED_TOKENS and text.error is None:
                self._kept.put(text.answer.all_ids[: text.seen], self._claim.export_cache(row, text.seen))
            self._close_gap(row)
        except (GtaEdgeError, MemoryError):  # for want of memory: then nothing is kept, and rows stay where they are
            pass
        if self._claim.holds:
            lengths = [0 if self._rows[each] is None else n for each, n in enumerate(self._session.length.tolist())]
            self._claim.truncate(lengths)
        self._recover()

    def _close_gap(self, row: int) -> None:
        """Move the last text into a free row before it."""
        if not self._session.exports_cache or self._claim is None:
            return
        last = max((each for each, _ in self._taken), default=-1)
        if last > row:
            moved = self._rows[last]
            assert moved is not None  # it is taken
            if moved.seen:
                self._claim.import_cache(self._claim.export_cache(last, moved.seen), row)
            self._rows[row], self._rows[last] = moved, None


def _told(error: Exception) -> GtaEdgeError:
    """Return an error as it is told of."""
    if isinstance(error, GtaEdgeError):
        return error
    problem = BackendError(
        f"a step failed ({type(error).__name__}: {one_line(error)})", "try again, or with another backend"
    )
    problem.__cause__ = error
    return problem


def in_a_batch(
    session: Session, prompts: Ids, answers: Sequence[Alternative], guesses: StepCounts | None = None
) -> Iterator[tuple[int, str] | None]:
    """Generate the answers to several prompts, or several to one, at once; see ``Answers``.

    Args:
        session: runs the model.
        prompts: all of them, one behind the other.
        answers: each with its own.
        guesses: as of ``Batch``.
    """
    rows = min(len(answers), _MAX_ROWS, session.max_batch or _MAX_ROWS)
    batch, told = Batch(session, rows, guesses=guesses), deque[tuple[int, Event]]()
    for i, each in enumerate(answers):
        assert each.sampler is not None  # it is no search
        batch.add(Text(each.answer, each.sampler, partial(_tell, told, i)))
    more, calls = True, 0  # of the model, all that led to a first token as one
    while more:
        more = batch.step()
        if batch.figures.generated_tokens:
            yield from [None] * (1 + batch.figures.steps - calls)
            calls = 1 + batch.figures.steps
        while told:
            i, event = told.popleft()
            if event.error is not None:
                raise event.error
            yield i, event.text


def _tell(told: deque[tuple[int, Event]], i: int, event: Event) -> None:
    told.append((i, event))
