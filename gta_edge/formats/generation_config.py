"""``generation_config.json``: which tokens end a text, and how the makers of a model mean it to be sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gta_edge.errors import BundleError
from gta_edge.formats.tokenizer_files import REMEDY, read_object
from gta_edge.model.config import ModelConfig
from gta_edge.model.config_entries import is_int, names_no_token
from gta_edge.support.text import brief, printable

__all__ = ["GENERATION_CONFIG", "GenerationConfig"]

GENERATION_CONFIG = "generation_config.json"

_TOP_K = 50  # of transformers, where a file asks to sample and leaves it open

_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number from 0 up", lambda x: 0 <= x < math.inf),
    "top_k": ("a whole number from 0 up", lambda x: x >= 0 and x == int(x)),
    "top_p": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number above 0", lambda x: 0 < x < math.inf),
}


@dataclass(frozen=True)
class GenerationConfig:
    """What a model's files say about generating.

    Attributes:
        end_token_ids: what ends a text: of ``generation_config.json``, else of the model's config.
        chat_end_token_ids: what ends an answer: those of both, and the tokenizer's ``eos_token``.
        sampling: options as ``generate`` takes them, those that differ from its own defaults; for chat.
    """

    end_token_ids: frozenset[int]
    chat_end_token_ids: frozenset[int]
    sampling: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, config: ModelConfig, tokenizer_end: int | None) -> GenerationConfig:
        """Read a bundle's or checkpoint's file; where there is none, the model's config speaks alone.

        Args:
            directory: where it lies.
            config: the model's.
            tokenizer_end: the tokenizer's ``eos_token``, if it has one.

        Raises:
            BundleError: the file is damaged, an end token is not in the model's vocabulary, or a value for sampling is
                none.
        """
        path = directory / GENERATION_CONFIG
        content = read_object(path)
        own = frozenset(config.eos_token_ids)
        found = _end_token_ids(path, content.get("eos_token_id"), config.vocab_size)
        more = {tokenizer_end} if tokenizer_end is not None and tokenizer_end < config.vocab_size else set()
        return cls(own if found is None else found, own | (found or set()) | more, _sampling(path, content))


def _end_token_ids(path: Path, value: Any, vocab_size: int) -> frozenset[int] | None:
    """Return the ids of ``eos_token_id``, None where it says nothing; as in the config, -1 or such is no token.

    As in ``config.json``, ids that the model cannot produce are passed over beside one that it can.
    """
    if value is None:
        return None
    ids = [token for token in (value if isinstance(value, list) else [value]) if not names_no_token(token)]
    possible = [token for token in ids if not (is_int(token) and token >= vocab_size)]
    for token in possible or ids:
        if not is_int(token) or token >= vocab_size:
            raise BundleError(
                f"{printable(str(path))}: eos_token_id is {brief(value)}; expected ids from 0 to {vocab_size - 1}",
                f"{REMEDY}",
            )
    return frozenset(possible)


def _sampling(path: Path, content: Mapping[str, Any]) -> dict[str, float]:
    """Return the options that transformers would sample with; without ``do_sample`` it takes the likeliest token."""
    samples = content.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise BundleError(f"{printable(str(path))}: do_sample is {brief(samples)}; expected true or false", REMEDY)
    defaults = {"temperature": 1.0, "top_k": _TOP_K, "repetition_penalty": 1.0} if samples else {}
    names = _ALLOWED if samples else ("repetition_penalty",)
    given = {name: _number(path, name, content[name]) for name in names if content.get(name) is not None}
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    return {name: value for name, value in {**defaults, **given}.items() if neutral.get(name) != value}


def _number(path: Path, name: str, value: Any) -> float:
    wanted, is_allowed = _ALLOWED[name]
    try:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and is_allowed(float(value))
    except (OverflowError, ValueError):  # beyond a float; NaN
        fits = False
    if not fits:
        raise BundleError(f"{printable(str(path))}: {name} is {brief(value)}; expected {wanted}", REMEDY)
    return int(value) if name == "top_k" else float(value)
