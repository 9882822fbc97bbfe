"""Text that follows a grammar: a JSON schema, a regular expression or a context-free grammar, by llguidance.

That library says which tokens may come next. What is here: its tokenizer made of ours, which no file has to be read
for, errors in our terms, and the mask computed in a thread of its own while the model computes its logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, InputError
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.libraries.optional import optional
from gta_edge.runtime.session import Logits, Session
from gta_edge.support.choices import unknown
from gta_edge.support.text import brief, one_line

__all__ = ["KINDS", "Grammar", "GrammarConstraint", "check_constraint"]

KINDS = ("json_schema", "regex", "grammar")
"""What a grammar can be given as: a JSON schema, a regular expression, or Lark's notation, GBNF too."""

_EXTRA = "grammar"
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: else a model might add white space without end."""
_NOTHING_FOLLOWS = "NoExtensionBias"  # llguidance's word for a mask without a token
_WORD = 32  # bits of a word of a mask
_THREADS = 2


class Grammar:
    """A grammar, compiled for the tokenizer of one session; ``constraint`` gives what holds one text to it.

    Args:
        session: whose tokens it is for.
        kind: one of ``KINDS``.
        text: of the grammar; a JSON schema may be an object, too.

    Raises:
        InputError: it cannot be read, or nothing meets it; the model has no tokenizer or no end token.
        BackendError: llguidance is not installed.
    """

    def __init__(self, session: Session, kind: str, text: str | Mapping[str, Any]) -> None:
        if kind not in KINDS:
            raise InputError(*unknown("kind is {}; expected one of {}", kind, KINDS))
        self._library = optional("llguidance", _EXTRA)
        self._vocab_size = session.config.vocab_size
        self._ends = session.end_token_ids | session.chat_end_token_ids
        self._tokenizer, self._of = _tokenizer_of(session, self._ends), session.tokenizer
        self._grammar = self._read(kind, text)
        if problem := self._library.LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise _refused(kind, problem)
        if not self.constraint().can_begin():
            raise _refused(kind, "nothing meets it")

    def _read(self, kind: str, text: str | Mapping[str, Any]) -> str:
        matcher = self._library.LLMatcher
        try:
            if kind == "json_schema":
                content = json.loads(text) if isinstance(text, str) else dict(text)
                if not isinstance(content, (dict, bool)):
                    raise ValueError("a schema is an object")
                found = matcher.grammar_from_json_schema(json.dumps(content), defaults=dict(_ONE_LINE))
            elif kind == "regex":
                found = matcher.grammar_from_regex(text)
            else:
                found = self._library.grammar_from("grammar", text)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused(kind, one_line(error)) from error
        return str(found)

    def constraint(self) -> GrammarConstraint:
        """Return what holds one text to the grammar."""
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return GrammarConstraint(matcher, self._vocab_size, self._ends, self._of)


def _refused(kind: str, reason: str) -> InputError:
    what = {"json_schema": "the JSON schema", "regex": "the regular expression"}.get(kind, "the grammar")
    return InputError(f"{what} cannot be used ({one_line(reason, 300)})", "correct it")


class GrammarConstraint:
    """Holds one text to a grammar; a ``Constraint``.

    Args:
        matcher: llguidance's, of this text.
        vocab_size: width of the logits.
        ends: end tokens.
        tokenizer: whose ids it knows.

    Attributes:
        used: whether the text has begun.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: frozenset[int], tokenizer: Tokenizer | None = None) -> None:
        self._matcher, self._vocab_size, self._tokenizer = matcher, vocab_size, tokenizer
        self._mask: npt.NDArray[np.uint8] = np.zeros(4 * -(-vocab_size // _WORD), np.uint8)
        self._pending: Future[None] | None = None
        self._ends = ends
        self.used = False

    def fits(self, session: Session) -> bool:
        """Tell whether ids of a session mean what they mean to the grammar."""
        its, own = session.tokenizer, self._tokenizer
        same = its is own or (its is not None and own is not None and its.has_ids_of(own))
        return same and session.config.vocab_size == self._vocab_size

    def can_begin(self) -> bool:
        """Tell whether any token may come first; to be asked before the first token."""
        self._matcher.compute_bitmask()
        return _NOTHING_FOLLOWS not in self._matcher.get_error()

    def prepare(self) -> None:
        """Begin to compute the mask of the next token, unless that was begun for a step that failed since."""
        if self._pending is None:
            self._pending = _threads().submit(self._compute)

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def apply(self, logits: Logits) -> None:
        """Set the logits [V] of what may not come next to -inf, in place.

        Raises:
            InputError: the grammar became too complex, or nothing may come next.
        """
        self.prepare()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        pending.result()
        self._check()
        allowed = np.unpackbits(self._mask, bitorder="little")[: len(logits)].astype(np.bool_)
        if not allowed.any():
            raise _nothing_follows()
        logits[~allowed] = -np.inf

    def accept(self, token: int) -> bool:
        """Note the token that was chosen; return whether nothing but the end may follow.

        Raises:
            InputError: the grammar became too complex.
        """
        self.used = True
        if token in self._ends:
            return True
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        said = self._matcher.get_error().partition("<state>")[0]  # behind it is what is of use to its developers
        if _NOTHING_FOLLOWS in said:
            raise _nothing_follows()
        raise InputError(f"the grammar failed ({one_line(said, 300)})", "simplify it")


def check_constraint(session: Session, constraint: Any) -> None:
    """Refuse what can hold no text of a session.

    Raises:
        InputError: it is no constraint, one that another text has used, which would go on from there, or one that was
            made for another model's tokens.
    """
    if not all(hasattr(constraint, name) for name in ("prepare", "apply", "accept")):
        raise InputError(f"constraint is {brief(constraint)}", "expected what a Grammar's constraint() returns")
    if not isinstance(constraint, GrammarConstraint):
        return
    if constraint.used:
        raise InputError("the constraint was used for another text", "make one for each: the grammar's constraint()")
    if not constraint.fits(session):
        raise InputError(
            "the grammar was compiled for another tokenizer than the session's", "make a Grammar of this session"
        )


def _nothing_follows() -> InputError:
    return InputError("no token can follow in this grammar", "correct it")


class _Wrapped:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self._tokenizer = tokenizer
        names = tokenizer.whole_tokens
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token in names if tokenizer.is_silent(token) and token < vocab_size]
        self.eos_token_id, self.bos_token_id, self.unk_token_id = end, None, None

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the ids of a text."""
        given = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(given, add_special_tokens=False)


def _tokenizer_of(session: Session, ends: frozenset[int]) -> Any:
    """Return llguidance's tokenizer of a session, which is made once; it takes a moment for a large vocabulary."""
    if session.tokenizer is None:
        raise InputError("a grammar needs a tokenizer, and this model has none", NO_TOKENIZER)
    if not ends:
        raise InputError("a grammar needs an end token, and this model has none", "name one in generation_config.json")
    return _made(session.tokenizer, session.config.vocab_size, tuple(sorted(ends)))


@lru_cache(4)
def _made(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Any:
    library = optional("llguidance", _EXTRA)
    wrapper = library.TokenizerWrapper(_Wrapped(tokenizer, vocab_size, ends[0]))
    try:
        return library.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(ends))
    except (ValueError, TypeError) as error:
        raise BackendError(
            f"llguidance cannot use the tokenizer ({one_line(error)})", "leave the grammar out"
        ) from error


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "gta-edge-grammar")
