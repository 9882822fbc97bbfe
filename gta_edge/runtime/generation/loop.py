"""From a prompt to text, a token at a time, with any session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict, overload

import numpy as np

from gta_edge.errors import CapacityError, InputError
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.runtime.generation.answer import Answer, FinishReason
from gta_edge.runtime.generation.answers import Alternative, Answers
from gta_edge.runtime.generation.batch import in_a_batch
from gta_edge.runtime.generation.generation import Generation
from gta_edge.runtime.generation.grammar import check_constraint
from gta_edge.runtime.generation.request import Constraint
from gta_edge.runtime.generation.sampling import Sampler, Sampling
from gta_edge.runtime.generation.several import answers_for, check_answers, guesses_of_several
from gta_edge.runtime.generation.speculating import Speculate, steps_for
from gta_edge.runtime.generation.steps import Turns
from gta_edge.runtime.generation.stopping import StopStrings
from gta_edge.runtime.generation.text import check_biases
from gta_edge.runtime.session import Ids, Session, checked_session
from gta_edge.runtime.session_inputs import are_integers
from gta_edge.support.text import brief, one_line

__all__ = ["FinishReason", "Generation", "Prompt", "check_prompt", "checked_limit", "generate"]

Prompt = str | Sequence[int] | Ids | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages of ``role`` and ``content``."""

Prompts = list[str] | list[list[int]] | list[Ids] | list[list[dict[str, Any]]]
"""Several of one kind."""

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """What ``generate`` takes in any case, for its overloads."""

        max_new_tokens: int
        temperature: float | None
        top_k: int | None
        top_p: float | None
        min_p: float | None
        repetition_penalty: float | None
        presence_penalty: float
        frequency_penalty: float
        logit_bias: Mapping[int, float] | None
        stop: Sequence[str]
        seed: int | None
        chat: bool
        ignore_eos: bool
        speculate: Speculate | None
        draft: Session | None
        conversation: Turns | None
        length_penalty: float
        constraint: Constraint | None


@overload
def generate(
    session: Session, prompt: Prompt, *, n: None = None, beams: None = None, **options: Unpack[_Options]
) -> Generation: ...


@overload
def generate(
    session: Session, prompt: Prompt, *, n: int | None = None, beams: int | None = None, **options: Unpack[_Options]
) -> Answers: ...


@overload
def generate(session: Session, prompt: Prompts, **options: Unpack[_Options]) -> Answers: ...


def generate(
    session: Session,
    prompt: Prompt | Prompts,
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    chat: bool = False,
    ignore_eos: bool = False,
    speculate: Speculate | None = None,
    draft: Session | None = None,
    conversation: Turns | None = None,
    n: int | None = None,
    beams: int | None = None,
    length_penalty: float = 1.0,
    constraint: Constraint | None = None,
) -> Generation | Answers:
    """Continue a prompt; iterate over the result for the text, piece by piece.

    The session is reset first. Nothing is run before the first piece is asked for.

    With speculation tokens that are likely to come are run together with the one before them, which gives several
    tokens at a time where they do come. Up to rounding of calls of other widths, greedy text stays the same; so does
    drawn text with the same seed, of ``lookup``, and with ``draft`` each token keeps its probability.

    A chat (messages, or ``chat``) also ends at the tokenizer's end token, and takes what it is not told of temperature,
    top_k, top_p, min_p and repetition_penalty from the model's ``generation_config.json``.

    Args:
        session: what runs the model; its ``tokenizer`` and ``end_token_ids`` are used.
        prompt: text, token ids, or chat messages; or a list of such prompts, which are continued at once (``Answers``,
            one for each): what each is given is what it is given alone.
        max_new_tokens: at most this many tokens are generated.
        temperature: see ``Sampling``, as for the next seven.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        repetition_penalty: see there.
        presence_penalty: see there.
        frequency_penalty: see there.
        logit_bias: see there.
        stop: texts at which generation stops; they are not part of the result. The name of a special or added token is
            met where the token comes.
        seed: of the draws; the same seed on the same backend gives the same text.
        chat: wrap a prompt of text as one message of the user in the model's chat template.
        ignore_eos: treat end tokens as any other.
        speculate: ``lookup`` guesses what followed the last tokens earlier in prompt or answer, ``draft`` asks another
            model, ``off`` guesses nothing. By default ``draft`` where there is one, and else ``off``. In a session
            loaded with ``trees=True`` several tokens may be guessed for the same place. Several texts, or answers that
            are no branches of a tree, take ``lookup`` only.
        draft: a smaller model with the same tokenizer, which is reset too.
        conversation: a ``Conversation`` of the session: the cache is not emptied, and what it holds of the prompt not
            run again.
        n: give so many answers, as ``Answers``: number i is what the seed plus i gives alone. The prompt is read and
            held once in a session loaded with ``trees=True``; any other reads it once, and has a copy of its cache for
            each of up to 8 answers at a time. Only where it runs no batches do they come one after another.
        beams: give the most probable answers, ``n`` or one, as ``Answers``: those that a search finds which follows so
            many at once. The session has to be loaded with ``trees=True``.
        length_penalty: of that search: the sum of an answer's log probabilities is divided by the number of its tokens
            to this power, so that above 0 it favours long answers (as ``num_beams`` in transformers).
        constraint: what the text may be, such as a ``Grammar``'s; of one answer.

    Raises:
        InputError: options or a prompt that make no sense for this model.
        CapacityError: the prompt is longer than the model has positions for.
    """
    checked_session(session, "the session")
    several = _are_several(prompt)
    prompts: Any = prompt if several else [prompt]
    encoded = [_encode(session.tokenizer, each, chat) for each in prompts]
    is_chat = encoded[0][1]
    if any(each[1] != is_chat for each in encoded):
        raise InputError("some of the prompts are chats and some are not", "give them in calls of their own")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given["repetition_penalty"] = repetition_penalty
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    defaults = _open_options(session.chat_sampling, options) if is_chat else {}
    options |= {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
    sampling = Sampling(**defaults, **options, logit_bias={} if logit_bias is None else logit_bias, seed=seed)
    check_biases(session, sampling)
    limit = checked_limit(max_new_tokens)
    if not isinstance(stop, Iterable):
        raise InputError(f"stop is {brief(stop)}", "expected a list of texts")
    stop = stop if isinstance(stop, str) else tuple(stop)
    if stop and session.tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this model has none", "leave them out")
    ends: frozenset[int] = frozenset()
    if not ignore_eos:
        ends = session.end_token_ids | session.chat_end_token_ids if is_chat else session.end_token_ids

    if conversation is not None and not hasattr(conversation, "begin"):
        raise InputError(f"conversation is {brief(conversation)}", "expected a Conversation of the session")
    if conversation is not None and conversation.session is not session:
        raise InputError("the conversation is of another session", "give the session that it was made with")
    names = [f"prompt[{i}]" for i in range(len(encoded))] if several else ["the prompt"]
    checked = [check_prompt(session, ids, name) for (ids, _), name in zip(encoded, names, strict=True)]

    def new_answer(ids: Ids) -> Answer:
        stops = StopStrings(stop, session.tokenizer.whole_tokens if session.tokenizer else None)
        lengths = {"max_new_tokens": limit, "max_length": session.max_length}
        return Answer(ids, session.tokenizer, stops, end_token_ids=ends, **lengths)

    check_answers(n, beams, length_penalty, sampling, has_stop_strings=bool(stop))
    if constraint is not None:
        check_constraint(session, constraint)
    if n is None and beams is None and not several:
        sampler = Sampler(sampling, len(checked[0]))
        claim = session.claim if conversation is None else conversation.begin
        steps = steps_for(session, speculate, draft, sampler, len(checked[0]), limit, claim)
        return Generation(new_answer(checked[0]), steps, sampler, defaults, constraint)
    if constraint is not None:
        raise InputError("a constraint is for one answer, and several were asked for", "leave one of both out")
    if conversation is not None:
        raise InputError("a conversation goes on with one answer, and several were asked for", "leave one of both out")
    guesses = guesses_of_several(speculate, draft)
    if several:
        if n is not None or beams is not None:
            raise InputError("several answers were asked for, and to several prompts", "give one prompt, or no n")
        each = [Alternative(new_answer(ids), Sampler(sampling, len(ids))) for ids in checked]
        return Answers(session, np.concatenate(checked), each, partial(in_a_batch, guesses=guesses), defaults, guesses)
    return answers_for(
        session,
        checked[0],
        lambda: new_answer(checked[0]),
        sampling,
        n=n,
        beams=beams,
        length_penalty=length_penalty,
        defaults=defaults,
        guesses=guesses,
    )


def checked_limit(max_new_tokens: Any) -> int:
    """Return how many tokens are generated at most.

    Raises:
        InputError: no whole number, or one below 1.
    """
    limit = max_new_tokens
    if isinstance(limit, bool) or not isinstance(limit, Integral) or int(limit) < 1:
        raise InputError(f"max_new_tokens is {brief(limit)}", "expected a whole number from 1 up")
    return int(limit)


def _open_options(defaults: Mapping[str, float], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's options that a caller left open; greedy leaves none but the penalty."""
    greedy = given.get("temperature") == 0
    return {
        name: value
        for name, value in defaults.items()
        if name not in given and not (greedy and name != "repetition_penalty")
    }


# --- the prompt ----------------------------------------------------------------------------------------------------


def _are_several(prompt: Any) -> bool:
    """Tell whether this is a list of prompts, and not one: of texts, of lists of ids, or of lists of messages."""
    kinds = (str, list, tuple, np.ndarray)
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(each, kinds) for each in prompt)


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


def check_prompt(session: Session, ids: Any, name: str = "the prompt") -> Ids:
    """Return ids as int64 [N], checked as ``generate`` promises; ``name`` is what an error calls them."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise InputError(
            f"{name} cannot be read as token ids ({one_line(error)})", "expected a flat list of them"
        ) from error
    if array.ndim == 1 and not array.size:
        raise InputError(f"{name} has no tokens", "give text or at least one id, for instance the begin token's")
    if array.ndim != 1 or not are_integers(array):
        raise InputError(
            f"{name} is {array.dtype} of shape {list(array.shape)}",
            "expected text, a flat list of token ids, or chat messages",
        )
    vocabulary = session.config.vocab_size
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise InputError(
            f"{name} has token id {brief(int(outside[0]))}",
            f"expected 0 to {vocabulary - 1}, the model's vocabulary: "
            "check the ids, or that the tokenizer belongs to the model",
        )
    if array.size > session.max_length:
        raise CapacityError(
            f"{name} has {array.size} tokens and the model {session.max_length} positions", "shorten the prompt"
        )
    return np.array(array, np.int64)
