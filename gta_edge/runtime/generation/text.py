"""One of several texts that are generated at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.runtime.generation.answer import Answer, FinishReason
from gta_edge.runtime.generation.grammar import check_constraint
from gta_edge.runtime.generation.request import Event, RequestOptions, TokenLogprobs, log_probabilities
from gta_edge.runtime.generation.sampling import Sampler, Sampling
from gta_edge.runtime.generation.stopping import StopStrings
from gta_edge.runtime.session import Ids, Logits, Session

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Text", "check_biases"]


class Text:
    """One of the texts of a batch.

    Args:
        answer: that says nothing yet.
        sampler: chooses its tokens.
        listener: told of each event, while a step runs.
        options: what else is asked of it.

    Attributes:
        answer: what it is so far.
        cached_tokens: tokens of the prompt that were not read, since their cache was there.
        completion_tokens: tokens that were generated, the end token among them.
        drafted: tokens that were guessed, and run before they were known.
        accepted: those of them that came.
        finish_reason: None while it runs.
        error: what ended it, where the reason is ``error``.
    """

    def __init__(
        self, answer: Answer, sampler: Sampler, listener: Callable[[Event], None], options: RequestOptions | None = None
    ) -> None:
        self.answer, self.sampler = answer, sampler
        self.options = options or RequestOptions()
        self.cached_tokens = self.completion_tokens = self.drafted = self.accepted = 0
        self.error: GtaEdgeError | None = None
        self.seen = 0  # tokens that its row of the cache holds
        self._listener = listener
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]

    @classmethod
    def asked_for(
        cls, session: Session, prompt: Ids, options: RequestOptions, listener: Callable[[Event], None]
    ) -> Self:
        """Return the text that is asked for.

        Args:
            session: what will run it.
            prompt: int64 [N], checked.
            options: what is asked of it.
            listener: as of the class.

        Raises:
            InputError: options that make no sense for the model.
        """
        names = session.tokenizer.whole_tokens if session.tokenizer else None
        if options.stop and session.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model has none", "leave them out")
        check_biases(session, options.sampling)
        if options.constraint is not None:
            check_constraint(session, options.constraint)
        answer = Answer(
            prompt,
            session.tokenizer,
            StopStrings(options.stop, names),
            end_token_ids=options.end_token_ids,
            max_new_tokens=max(options.max_new_tokens, 1),
            max_length=session.max_length,
        )
        return cls(answer, Sampler(options.sampling, len(prompt)), listener, options)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self.answer.finish_reason

    @property
    def reusable(self) -> int:
        """Tokens of the prompt that need not be read where their cache is there: all but the last, or none."""
        return 0 if self.options.prompt_logprobs is not None else len(self.answer.all_ids) - 1

    def begins_as(self, other: Text) -> bool:
        """Tell whether it says nothing yet, and its prompt is what another has read, of which it wants to know as much.

        Then it can go on from a copy of that one's cache, and by the logits that it goes on by.
        """
        mine, its = self.answer.all_ids, other.answer.all_ids
        same = self.options.prompt_logprobs == other.options.prompt_logprobs
        return same and len(mine) == len(its) and not self.completion_tokens and bool((mine == its).all())

    def join(self, other: Text) -> None:
        """Note that its row holds a copy of what another has read of their prompt, which is all of it."""
        self.seen, self._prompt_logprobs = other.seen, list(other._prompt_logprobs)

    def restart(self) -> None:
        """Note that its row holds nothing of it."""
        self.seen, self._prompt_logprobs = 0, [None]

    def note_prompt(self, logits: Logits, following: Ids) -> None:
        """Note how probable tokens of the prompt were, by the logits [T, V] before each of them [T]."""
        count = self.options.prompt_logprobs
        if count is not None:
            pairs = zip(logits, following.tolist(), strict=True)
            self._prompt_logprobs += [log_probabilities(each, token, count) for each, token in pairs]

    def advance(self, logits: Logits) -> None:
        """Take the next token by its logits [V], and tell of it."""
        prompt: tuple[TokenLogprobs | None, ...] = ()
        if self.options.prompt_logprobs is not None and not self.completion_tokens:
            prompt = tuple(self._prompt_logprobs)
        if not self.options.max_new_tokens:
            self.answer.finish("length")
            self._listener(Event(prompt_logprobs=prompt, finish_reason="length"))
            return
        count, before, constraint = self.options.logprobs, len(self.answer.ids), self.options.constraint
        allowed = logits
        if constraint is not None:
            allowed = logits.copy()
            constraint.apply(allowed)
        token = self.sampler.sample(allowed, self.answer.all_ids)
        probable = () if count is None else (log_probabilities(logits, token, count),)
        complete = constraint is not None and constraint.accept(token)
        self.completion_tokens += 1
        text = self.answer.take(token)
        if complete:
            text += self.answer.finish("stop")
        new = tuple(self.answer.ids[before:])
        self._listener(Event(text, new, probable, prompt, self.finish_reason))

    def end(self, reason: FinishReason, error: GtaEdgeError | None = None) -> None:
        """End it from outside, and tell of that."""
        if self.finish_reason is None:
            self.error = error
            held = self.answer.finish(reason)
            self._listener(Event(held, finish_reason=reason, error=error))


def check_biases(session: Session, sampling: Sampling) -> None:
    """Refuse a bias of a token that the model does not have.

    Raises:
        InputError: there is one.
    """
    size = session.config.vocab_size
    outside = [token for token in sampling.logit_bias if token >= size]
    if outside:
        raise InputError(f"logit_bias has token id {outside[0]}", f"expected 0 to {size - 1}, the model's vocabulary")
