"""From a prompt to text, a token at a time, with any session."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gta_edge.errors import CapacityError, InputError
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.runtime.generation.incremental_decoder import IncrementalDecoder
from gta_edge.runtime.generation.sampling import Sampler, Sampling
from gta_edge.runtime.generation.speculating import Speculate, steps_for
from gta_edge.runtime.generation.steps import Steps
from gta_edge.runtime.generation.stopping import StopStrings
from gta_edge.runtime.session import Ids, Session
from gta_edge.support.exclusive import Exclusive
from gta_edge.support.text import brief, one_line

if TYPE_CHECKING:
    from gta_edge.runtime.generation.conversation import Conversation

__all__ = ["FinishReason", "Generation", "Prompt", "check_prompt", "generate"]

Prompt = str | Sequence[int] | Ids | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages of ``role`` and ``content``."""

FinishReason = Literal["stop", "length", "context", "interrupted", "error"]


def generate(
    session: Session,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    chat: bool = False,
    ignore_eos: bool = False,
    speculate: Speculate | None = None,
    draft: Session | None = None,
    conversation: Conversation | None = None,
) -> Generation:
    """Continue a prompt; iterate over the result for the text, piece by piece.

    The session is reset first. Nothing is run before the first piece is asked for.

    With speculation tokens that are likely to come are run together with the one before them, which gives several
    tokens at a time where they do come. Up to rounding of calls of other widths, greedy text stays the same; so does
    drawn text with the same seed, of ``lookup``, and with ``draft`` each token keeps its probability.

    A chat (messages, or ``chat``) also ends at the tokenizer's end token, and takes what it is not told of temperature,
    top_k, top_p, min_p and repetition_penalty from the model's ``generation_config.json``.

    Args:
        session: what runs the model; its ``tokenizer`` and ``end_token_ids`` are used.
        prompt: text, token ids, or chat messages.
        max_new_tokens: at most this many tokens are generated.
        temperature: see ``Sampling``, as for the next four.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        repetition_penalty: see there.
        stop: texts at which generation stops; they are not part of the result. The name of a special or added token is
            met where the token comes.
        seed: of the draws; the same seed on the same backend gives the same text.
        chat: wrap a prompt of text as one message of the user in the model's chat template.
        ignore_eos: treat end tokens as any other.
        speculate: ``lookup`` guesses what followed the last tokens earlier in prompt or answer, ``draft`` asks another
            model, ``off`` guesses nothing. By default ``draft`` where there is one, and else ``off``.
        draft: a smaller model with the same tokenizer, which is reset too.
        conversation: of the session; the cache is not emptied, and what it holds of the prompt is not run again.

    Raises:
        InputError: options or a prompt that make no sense for this model.
        CapacityError: the prompt is longer than the model has positions for.
    """
    ids, is_chat = _encode(session.tokenizer, prompt, chat)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given["repetition_penalty"] = repetition_penalty
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    defaults = _open_options(session.chat_sampling, options) if is_chat else {}
    sampling = Sampling(**defaults, **options, seed=seed)
    limit: Any = max_new_tokens
    if isinstance(limit, bool) or not isinstance(limit, Integral) or int(limit) < 1:
        raise InputError(f"max_new_tokens is {brief(max_new_tokens)}", "expected a whole number from 1 up")
    if not isinstance(stop, Iterable):
        raise InputError(f"stop is {brief(stop)}", "expected a list of texts")
    stop = stop if isinstance(stop, str) else tuple(stop)
    stops = StopStrings(stop, session.tokenizer.whole_tokens if session.tokenizer else None)
    if stop and session.tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this model has none", "leave them out")
    ends: frozenset[int] = frozenset()
    if not ignore_eos:
        ends = session.end_token_ids | session.chat_end_token_ids if is_chat else session.end_token_ids
    checked = check_prompt(session, ids)
    claim = session.claim if conversation is None else conversation.begin
    sampler = Sampler(sampling, len(checked))
    return Generation(
        session,
        checked,
        steps_for(session, speculate, draft, sampler, len(checked), int(limit), claim),
        sampler,
        stops,
        max_new_tokens=int(limit),
        end_token_ids=ends | stops.token_ids,
        defaults=defaults,
    )


def _open_options(defaults: Mapping[str, float], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's options that a caller left open; greedy leaves none but the penalty."""
    greedy = given.get("temperature") == 0
    return {
        name: value
        for name, value in defaults.items()
        if name not in given and not (greedy and name != "repetition_penalty")
    }


class Generation(Iterator[str]):
    """A text in the making. Iterating gives one piece per token, joined to ``text``; a piece may be empty.

    Without a tokenizer every piece is empty. Made by ``generate``; iterating runs the session, which nothing else may
    use meanwhile. Everything here can be read at any time.

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
        session: Session,
        prompt: Ids,  # [N]
        steps: Steps,
        sampler: Sampler,
        stops: StopStrings,
        *,
        max_new_tokens: int,
        end_token_ids: frozenset[int],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = len(prompt)
        self.seed = sampler.seed
        self.defaults = dict(defaults or {})
        self._steps = steps
        self._calls = Exclusive("the generation", "ask one generation for its pieces from one place")
        self._sampler = sampler
        self._stops = stops
        self._end_token_ids = end_token_ids
        # the prompt that fills all positions still has logits for one token more
        self._most = min(max_new_tokens, session.max_length - len(prompt) + 1)
        self._full: FinishReason = "length" if self._most == max_new_tokens else "context"
        self._all_ids: Ids = np.concatenate([prompt, np.zeros(self._most, np.int64)])
        self._decoder = None if session.tokenizer is None else IncrementalDecoder(session.tokenizer, prompt.tolist())
        self._pieces: list[str] = []
        self._step_seconds: list[float] = []

    @property
    def text(self) -> str | None:
        """All text returned so far, None without a tokenizer; at the end with what was held back for a stop string."""
        return None if self._decoder is None else "".join(self._pieces)

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
            self._finish("interrupted")
            return
        with self._calls.held(wait=True):
            self._finish("interrupted")

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
        if self.finish_reason is not None:
            return None
        started = time.perf_counter()
        try:
            ids = self._all_ids[: self.prompt_tokens + len(self.ids)]
            token = self._sampler.sample(self._steps.after(ids), ids, self._steps.guess)
            piece = None if self.finish_reason else self._take(token)  # a signal handler may have closed it
        except BaseException as error:
            self._finish("interrupted" if isinstance(error, KeyboardInterrupt) else "error")
            raise
        self._step_seconds.append(time.perf_counter() - started)
        return piece

    def _take(self, token: int) -> str | None:
        """Note a new token and return its piece; None for an end token that leaves nothing to say."""
        if token in self._end_token_ids:
            piece = self._stops.feed("", token)  # a stop string may end with it
            self._pieces.append(piece)
            return piece + self._complete("stop") or None
        self._all_ids[self.prompt_tokens + len(self.ids)] = token
        self.ids.append(token)
        piece = self._stops.feed(self._decoder.push(token), token) if self._decoder else ""
        self._pieces.append(piece)
        if self._stops.found is not None:
            return piece + self._complete("stop")
        if len(self.ids) == self._most:
            return piece + self._complete(self._full)
        return piece

    def _complete(self, reason: FinishReason) -> str:
        """Finish where the text ends by itself, with the cache as it is without speculation."""
        self._steps.settle()
        return self._finish(reason)

    def _finish(self, reason: FinishReason) -> str:
        """Set the reason, unless there is one, and return what was held back, which is now part of the text."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = reason
        held = self._stops.flush()
        self._pieces.append(held)
        return held


# --- the prompt ----------------------------------------------------------------------------------------------------


def _encode(tokenizer: Tokenizer | None, prompt: Any, chat: bool) -> tuple[Any, bool]:
    """Return a prompt's ids, those given as ids as they are, and whether it is a chat."""
    is_text = isinstance(prompt, str)
    is_messages = isinstance(prompt, (list, tuple)) and any(isinstance(entry, Mapping) for entry in prompt)
    if not (is_text or is_messages):
        if chat:
            raise InputError(
                "chat needs a prompt of text or messages, and got token ids", "give text, or leave chat out"
            )
        return prompt, False
    if tokenizer is None:
        raise InputError("the prompt is text, and this model has no tokenizer", NO_TOKENIZER)
    if is_text:
        prompt = prompt.removeprefix("\ufeff")  # the byte order mark of a file that a shell or a program read
    if is_text and not chat:
        return tokenizer.encode(prompt), False
    messages = [{"role": "user", "content": prompt}] if is_text else prompt
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False), True


def check_prompt(session: Session, ids: Any) -> Ids:
    """Return ids as int64 [N], checked as ``generate`` promises."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise InputError(
            f"the prompt cannot be read as token ids ({one_line(error)})", "expected a flat list of them"
        ) from error
    if array.ndim == 1 and not array.size:
        raise InputError("the prompt has no tokens", "give text or at least one id, for instance the begin token's")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"the prompt is {array.dtype} of shape {list(array.shape)}",
            "expected text, a flat list of token ids, or chat messages",
        )
    vocabulary = session.config.vocab_size
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise InputError(
            f"the prompt has token id {int(outside[0])}",
            f"expected 0 to {vocabulary - 1}, the model's vocabulary: "
            "check the ids, or that the tokenizer belongs to the model",
        )
    if array.size > session.max_length:
        raise CapacityError(
            f"the prompt has {array.size} tokens and the model {session.max_length} positions", "shorten the prompt"
        )
    return np.array(array, np.int64)
