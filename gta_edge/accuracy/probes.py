"""The tokens that a check asks for: at random, of a text, and far behind a cache that is full already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import bytes_per_token

__all__ = ["LATE", "RANDOM", "TEXT", "Probe", "encoder", "probes", "random_cache"]

RANDOM, TEXT, LATE = "random ids", "a text", "late positions"

_PREFILL_TOKENS, _TEXT_TOKENS, _LATE_TOKENS = 256, 128, 8
_DECODE_TOKENS = 16
_CACHE_BYTES = 2**26  # of the cache that a late probe is given, over all layers

_SAMPLE = """\
The lighthouse keeper wrote down every ship that passed: its name, the hour, and which way the wind was blowing. \
In 1874 there were 312 of them; "more than last year", he noted, "but fewer with sails."

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

1. Wash 250 g of rice. 2. Bring 0.5 l of water to the boil. 3. Wait.
Une heure plus tard, la mer était calme. Was bleibt, ist das Licht. 日本語も少し。
Question: If a train leaves at 9:40 and needs 85 minutes, when does it arrive? Answer: at 11:05, unless it is late.
"""


@dataclass(frozen=True, eq=False)
class Probe:
    """Tokens whose logits are compared.

    Attributes:
        name: for messages.
        ids: int64 [1, N].
        prefill: how many of them are given at once; the rest follow one by one.
        past: tokens before them, which ``random_cache`` stands for.
    """

    name: str
    ids: npt.NDArray[np.int64]
    prefill: int
    past: int = 0

    @property
    def bounds(self) -> list[int]:
        """Where the steps begin and end: ``[0, prefill, prefill + 1, …, N]``."""
        return [0, *range(self.prefill, self.ids.shape[1] + 1)]


def probes(config: ModelConfig, encode: Callable[[str], Sequence[int]] | None = None) -> list[Probe]:
    """Return what a model is asked for: each probe begins with an empty cache, but for one at the last positions.

    Args:
        config: the model's sizes.
        encode: of the model's tokenizer; without one no text is asked for.
    """
    rng = np.random.default_rng(0)
    limit = config.max_position_embeddings
    tokens = min(limit, _PREFILL_TOKENS + _DECODE_TOKENS)
    found = [_probe(RANDOM, rng.integers(0, config.vocab_size, tokens))]
    text = np.asarray([] if encode is None else _encoded(encode, config), np.int64)
    if text.size:
        found.append(_probe(TEXT, text[: min(limit, _TEXT_TOKENS)]))
    reachable = min(limit, _CACHE_BYTES // bytes_per_token(config))
    if reachable - _LATE_TOKENS >= tokens:
        late = rng.integers(0, config.vocab_size, _LATE_TOKENS).astype(np.int64)
        found.append(Probe(LATE, late[None], _LATE_TOKENS // 2, reachable - _LATE_TOKENS))
    return found


def random_cache(config: ModelConfig, layer: int, tokens: int) -> list[npt.NDArray[np.float32]]:
    """Return what stands for a layer's cache of so many tokens, ``[1, n, tokens, d]`` each, the same at every call."""
    rng = np.random.default_rng([1, layer])
    shapes = [(1, cache.heads, tokens, cache.width) for cache in config.caches]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _encoded(encode: Callable[[str], Sequence[int]], config: ModelConfig) -> list[int]:
    try:
        return [id_ for id_ in encode(_SAMPLE) if id_ < config.vocab_size]
    except InputError:  # a tokenizer that has no tokens for it
        return []


def _probe(name: str, ids: npt.NDArray[Any]) -> Probe:
    count = len(ids)
    return Probe(name, ids.astype(np.int64)[None], count - min(_DECODE_TOKENS, count // 4))


def encoder(directory: Path) -> Callable[[str], Sequence[int]] | None:
    """Return what makes ids of a text for the model of a bundle or checkpoint, None where it has no tokenizer.

    Raises:
        BundleError: its tokenizer is damaged.
    """
    tokenizer = Tokenizer.load(directory)
    return None if tokenizer is None else tokenizer.encode
