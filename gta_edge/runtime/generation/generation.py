"""A text in the making, a token at a time, with any session."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from gta_edge.runtime.generation.answer import Answer, FinishReason
from gta_edge.runtime.generation.request import Constraint
from gta_edge.runtime.generation.sampling import Sampler
from gta_edge.runtime.generation.steps import Steps
from gta_edge.runtime.session import Ids, Logits
from gta_edge.support.exclusive import Exclusive

__all__ = ["Generation"]


class Generation(Iterator[str]):
    """A text in the making. Iterating gives one piece per token, joined to ``text``; a piece may be empty.

    Without a tokenizer every piece is empty. Made by ``generate``; iterating runs the session, which nothing else may
    use meanwhile. Everything here can be read at any time.

    Args:
        answer: that says nothing yet.
        steps: gives the logits.
        sampler: chooses the tokens.
        defaults: see there.
        constraint: what the text may be.

    Attributes:
        ids: the new tokens, those of a stop string included, an end token not.
        finish_reason: None while running; ``stop`` after an end token or a stop string, ``length`` after
            max_new_tokens, ``context`` when the model has no position left, ``interrupted`` after KeyboardInterrupt
            or ``close``, ``error`` after any other exception.
        prompt_tokens: tokens of the prompt.
        seed: the seed in use, also where none was given.
        defaults: options that were taken from the model's ``generation_config.json``.
    """

    def __init__(
        self,
        answer: Answer,
        steps: Steps,
        sampler: Sampler,
        defaults: Mapping[str, Any] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt_tokens = answer.prompt_tokens
        self.seed = sampler.seed
        self.defaults = dict(defaults or {})
        self._answer = answer
        self._steps = steps
        self._sampler = sampler
        self._constraint = constraint
        self._calls = Exclusive("the generation", "ask one generation for its pieces from one place")
        self._step_seconds: list[float] = []

    @property
    def ids(self) -> list[int]:
        return self._answer.ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._answer.finish_reason

    @property
    def text(self) -> str | None:
        """All text returned so far, None without a tokenizer; at the end with what was held back for a stop string."""
        return self._answer.text

    @property
    def timings(self) -> dict[str, float | None]:
        """Figures of the time spent here, not in the caller between two pieces; None where nothing was measured yet.

        ``ttft_ms`` until the first token, ``tpot_ms`` per token after it (the end token counts), ``total_ms`` of both;
        ``prompt_tokens_per_s`` over the first and ``decode_tokens_per_s`` over the second. With speculation
        ``drafted`` and ``accepted`` tokens, and ``tokens_per_step``, tokens after the first per call of the model.
        """
        first, rest = self._step_seconds[:1], self._step_seconds[1:]
        counts = self._steps.counts
        return {
            "ttft_ms": 1e3 * first[0] if first else None,
            "tpot_ms": 1e3 * sum(rest) / len(rest) if rest else None,
            "prompt_tokens_per_s": self.prompt_tokens / first[0] if first else None,
            "decode_tokens_per_s": len(rest) / sum(rest) if rest else None,
            "total_ms": 1e3 * (sum(first) + sum(rest)),
            "drafted": counts.drafted if counts else None,
            "accepted": counts.accepted if counts else None,
            "tokens_per_step": len(rest) / counts.calls if counts and counts.calls else None,
        }

    def close(self) -> None:
        """Stop here; ``finish_reason`` becomes ``interrupted`` unless there is one. A step that runs is waited for."""
        if self._calls.mine:  # a signal handler in the middle of a step
            self._answer.finish("interrupted")
            return
        with self._calls.held(wait=True):
            self._answer.finish("interrupted")

    def __next__(self) -> str:
        """Generate one token and return the text that is now certain.

        Raises:
            StopIteration: the text is complete.
            InputError: something else used the session meanwhile, or another thread asks for a piece too.
            BackendError: the model failed, the session is closed, or the logits are NaN.
            KeyboardInterrupt: as it came, with ``text`` and ``ids`` up to there.
        """
        with self._calls.held():
            piece = self._step()
        if piece is None:
            raise StopIteration
        return piece

    def _step(self) -> str | None:
        """Generate one token and return its piece; None at the end."""
        answer = self._answer
        if answer.finish_reason is not None:
            return None
        started, before = time.perf_counter(), len(answer.ids)
        try:
            ids = answer.all_ids
            token = self._sampler.sample(self._logits(ids), ids, self._steps.guess)
            piece = self._take(token)
        except BaseException as error:
            answer.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "error")
            raise
        self._step_seconds.append(time.perf_counter() - started)
        # an end token often leaves nothing to say
        return None if not piece and len(answer.ids) == before else piece

    def _logits(self, ids: Ids) -> Logits:
        """Return the logits [V] of the next token, -inf for those that may not come."""
        if self._constraint is None:
            return self._steps.after(ids)
        self._constraint.prepare()
        logits = self._steps.after(ids)
        self._constraint.apply(logits)
        return logits

    def _take(self, token: int) -> str:
        """Note a new token, unless a signal handler has closed this, and return its piece."""
        if self._answer.finish_reason is not None:
            return ""
        complete = self._constraint is not None and self._constraint.accept(token)
        piece = self._answer.take(token)
        if complete:
            piece += self._answer.finish("stop")
        if self.finish_reason is not None:
            self._steps.settle()  # the cache is then as it is without speculation
        return piece
