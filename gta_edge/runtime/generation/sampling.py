"""From logits to one token: greedy, or a draw after temperature, top-k, top-p and min-p.

What each option means, and their order, is that of transformers' logits processors: repetition penalty, temperature,
top_k, top_p, min_p, then a draw from the softmax of what is left. Three of OpenAI's API come before the temperature:
biases are added first, frequency and presence penalties subtracted after the repetition penalty.

It happens on the CPU, whatever computed the logits: copying them there takes less than a kernel of a sampler would.
Exponentials are float32, whose rounding is far below that of any logits, and sums float64; in float64 throughout, a
draw from a large vocabulary would take as long as a good part of a token.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, InputError
from gta_edge.support.text import brief

__all__ = ["LARGEST_SEED", "Guess", "Sampler", "Sampling", "draw", "finite_top"]

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float32]

LARGEST_SEED = 2**63 - 1
_LARGEST_FLOAT = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 is greedy. None is greedy too, unless top_k, top_p or min_p is given: then 1.
        top_k: keep the k largest logits, and those equal to the k-th (arXiv 1805.04833); 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum, at least one (arXiv 1904.09751).
        min_p: keep tokens at least this fraction as probable as the most probable one (arXiv 2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of the tokens seen so far, prompt included
            (arXiv 1909.05858); greedy too.
        presence_penalty: is subtracted from the logit of each token that was generated before, from -2 to 2; greedy
            too.
        frequency_penalty: is subtracted for each time that it was; the same.
        logit_bias: is added to the logits of these tokens, from -100 to 100; the same.
        seed: of the draws; None takes a new one.

    Raises:
        InputError: on construction, naming the first option that is out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        number, whole = (Real, "a number"), (Integral, "a whole number")
        if self.temperature is not None:
            _check("temperature", self.temperature, number, "from 0 up", lambda x: 0 <= x < math.inf)
        if self.top_k is not None:
            _check("top_k", self.top_k, whole, "from 0 up", lambda x: x >= 0)
        if self.top_p is not None:
            _check("top_p", self.top_p, number, "above 0 and at most 1", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, number, "from 0 to 1", lambda x: 0 <= x <= 1)
        _check("repetition_penalty", self.repetition_penalty, number, "above 0", lambda x: 0 < x < math.inf)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), number, "from -2 to 2", lambda x: -2 <= x <= 2)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is {brief(self.logit_bias)}", "expected a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check("a token of logit_bias", token, whole, "from 0 up", lambda x: x >= 0)
            _check(f"logit_bias of token {token}", bias, number, "from -100 to 100", lambda x: -100 <= x <= 100)
        if self.seed is not None:
            _check("seed", self.seed, whole, f"from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED)

    @property
    def effective_temperature(self) -> float:
        """The temperature that is used; 0 for greedy."""
        if self.temperature is not None:
            return float(self.temperature)
        return 0.0 if not self.top_k and self.top_p is None and self.min_p is None else 1.0

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken, without a draw."""
        return self.effective_temperature == 0


def _check(name: str, value: Any, kind: tuple[type, str], allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    fits = isinstance(value, kind[0]) and not isinstance(value, bool)
    try:
        # float() refuses whole numbers that are beyond a float
        fits = fits and is_allowed(value if kind[0] is Integral else float(value))
    except OverflowError:
        fits = False
    if not fits:
        raise InputError(f"{name} is {brief(value)}", f"expected {kind[1]} {allowed}")


@dataclass(frozen=True)
class Guess:
    """What a draft model expects the next token to be.

    Attributes:
        tokens: drawn from ``probabilities``, one after the other without replacement.
        probabilities: the draft model's distribution, float64 [V].
    """

    tokens: Sequence[int]
    probabilities: Floats


class Sampler:
    """Chooses tokens as ``sampling`` says, with a random generator (PCG64) of its own.

    Args:
        sampling: the options.
        prompt_tokens: how many of the ids are the prompt, which presence and frequency penalties pass over.

    Attributes:
        sampling: the options.
        seed: the seed in use, also where the options left it open: the same seed and logits give the same tokens.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int = 0) -> None:
        self.sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._biased = np.array(list(sampling.logit_bias), np.int64)  # [K]
        self._biases = np.array(list(sampling.logit_bias.values()), np.float64)
        self.seed: int = secrets.randbits(63) if sampling.seed is None else int(sampling.seed)
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: Logits, ids: Ids, guess: Guess | None = None) -> int:
        """Choose the next token.

        A guess g that was drawn from q is taken with probability min(1, p(g) / q(g)), where p is what is drawn from
        without one; otherwise the draw is from max(0, p - q), scaled to 1. So each token has probability p
        (arXiv 2211.17192, theorem 1), and where q is close to p the guess is mostly taken. Where there are several,
        that draw is made by the next one in the same way, with a q without those before it, scaled to 1: each token
        still has probability p (arXiv 2402.12374, section 3.2).

        Args:
            logits: float32 [V] of the last position; -inf rules a token out.
            ids: int64 [N], every token so far, prompt included.
            guess: of a draft model, drawn at random.

        Raises:
            BackendError: the logits hold NaN or +inf, or -inf only.
        """
        if guess is not None:
            return self._sample_by(guess, self.probabilities(logits, ids))
        scores, top = self._scores(logits, ids)
        if self.sampling.greedy:
            return top if scores is logits else int(scores.argmax())
        tokens, weights = self._candidates(scores)
        return int(tokens[draw(weights, self._random.random())])

    def draw_from(self, probabilities: Floats) -> int:
        """Draw from a distribution, float64 [V]."""
        return draw(probabilities, self._random.random())

    def draw_several(self, probabilities: Floats, count: int) -> list[int]:
        """Draw from a distribution, float64 [V], without replacement; fewer where fewer tokens have a probability."""
        rest, found = probabilities, list[int]()
        while len(found) < count and rest.any():
            found.append(self.draw_from(rest))
            if len(found) < count:
                rest = _without(rest, found[-1])
        return found

    def best(self, logits: Logits, ids: Ids, count: int) -> list[int]:
        """Return the ``count`` tokens that come first by the logits, the one that ``sample`` takes greedily at first.

        Arguments and errors as of ``sample``.
        """
        scores, _ = self._scores(logits, ids)
        first = int(scores.argmax())  # of equal ones the first, as there
        if count == 1:
            return [first]
        top = np.argpartition(scores, -count)[-count:] if count < len(scores) else np.arange(len(scores))
        others = sorted((token for token in top.tolist() if token != first), key=lambda token: -scores[token])
        return [first, *(token for token in others if scores[token] > -np.inf)][:count]

    def _sample_by(self, guess: Guess, wanted: Floats) -> int:
        """Choose from a distribution [V], one of the guess where that keeps it."""
        drafted = guess.probabilities
        for i, token in enumerate(guess.tokens):
            if i:
                drafted = _without(drafted, guess.tokens[i - 1])
                drafted = drafted / drafted.sum()
            if self._random.random() * drafted[token] < wanted[token]:
                return token
            rest = np.maximum(wanted - drafted, 0)
            if not rest.any():  # where both are equal but for rounding
                break
            wanted = rest / rest.sum()
        return self.draw_from(wanted)

    def probabilities(self, logits: Logits, ids: Ids) -> Floats:
        """Return the distribution that ``sample`` draws from, float64 [V]; arguments and errors as there."""
        scores, _ = self._scores(logits, ids)
        result = np.zeros(scores.shape, np.float64)
        if self.sampling.greedy:
            result[scores.argmax()] = 1
        else:
            tokens, weights = self._candidates(scores)
            result[tokens] = weights / weights.sum(dtype=np.float64)
        return result

    def log_probabilities(self, logits: Logits, ids: Ids) -> Floats:
        """Return what beam search adds up, float64 [V]: the log softmax of the logits, biased and penalised after it.

        So does transformers; arguments and errors as of ``sample``.
        """
        scores: Floats = logits.astype(np.float64)
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            scores -= scores.max()
            scores -= np.log(np.exp(scores).sum())
        return self._scores(scores, ids)[0]

    def _scores(self, logits: Logits | Floats, ids: Ids) -> tuple[npt.NDArray[Any], int]:
        """Check the logits, apply biases and penalties: [V], a new array where anything changes; and their top."""
        top = finite_top(logits)
        penalty, options = float(self.sampling.repetition_penalty), self.sampling
        if penalty == 1 and not (options.presence_penalty or options.frequency_penalty or options.logit_bias):
            return logits, top
        scores = logits.astype(np.float64)
        scores[self._biased] += self._biases
        if penalty != 1:
            seen = scores[ids]
            with np.errstate(over="ignore"):
                seen = np.where(seen < 0, seen * penalty, seen / penalty)
            scores[ids] = np.clip(seen, -_LARGEST_FLOAT, _LARGEST_FLOAT)
        if options.presence_penalty or options.frequency_penalty:
            new, counts = np.unique(ids[self._prompt_tokens :], return_counts=True)
            scores[new] -= options.presence_penalty + options.frequency_penalty * counts
        return scores, top

    def _candidates(self, scores: npt.NDArray[Any]) -> tuple[Ids, Weights]:
        """Return the tokens that may be drawn, ascending, and their probabilities over that of the most probable."""
        options, tokens, kept = self.sampling, None, scores
        if options.top_k and options.top_k < len(scores):
            tokens = _top_k(scores, options.top_k)
            kept = scores[tokens]
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of everything but the largest
            exponents = (kept.astype(np.float64) - float(kept.max())) / options.effective_temperature
            weights = np.exp(exponents.astype(np.float32))
        keep = None
        if options.top_p is not None and options.top_p < 1:
            keep = _top_p(kept, weights, float(options.top_p))
        if options.min_p is not None:
            probable = weights >= float(options.min_p)
            keep = probable if keep is None else keep & probable
        if keep is not None:
            chosen = np.flatnonzero(keep)
            tokens, weights = chosen if tokens is None else tokens[chosen], weights[chosen]
        return np.arange(len(scores)) if tokens is None else tokens, weights


def draw(weights: Weights | Floats, uniform: float) -> int:
    """Return which of ``weights`` [K], not all 0, a number in [0, 1) falls to, by their running sums.

    Sums of blocks come first, so that running sums are needed of the blocks and of one block only.
    """
    block = 1 + math.isqrt(len(weights))
    sums = np.add.reduceat(weights, range(0, len(weights), block), dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    # rounding could lead past the last token that has a probability at all
    first = min(sums.searchsorted(target, side="right"), sums.searchsorted(sums[-1], side="left"))
    start = int(first) * block
    within = weights[start : start + block].cumsum(dtype=np.float64)
    rest = target - (sums[first - 1] if first else 0.0)
    drawn = min(within.searchsorted(rest, side="right"), within.searchsorted(within[-1], side="left"))
    return start + int(drawn)


def _without(probabilities: Floats, token: int) -> Floats:
    """Return weights [V] with one token's 0."""
    rest = probabilities.copy()
    rest[token] = 0
    return rest


def _top_k(scores: npt.NDArray[Any], top_k: int) -> Ids:
    """Return the positions of the k largest of [V], ascending, with all that equal the k-th."""
    size = len(scores)
    kth = np.partition(scores, size - top_k)[size - top_k]
    return np.flatnonzero(scores >= kth)


def _top_p(scores: npt.NDArray[Any], weights: Weights, top_p: float) -> npt.NDArray[np.bool_]:
    """Return which of [K] to keep: all but the least probable ones whose sum stays within ``1 - top_p``.

    Of equal ones the first goes first, since they are taken in stable ascending order; the last one always stays.
    """
    budget = (1.0 - top_p) * float(weights.sum(dtype=np.float64))
    # those below an even share of the budget fit into it together, so that only the others need sorting
    large = np.flatnonzero(weights >= min(budget / len(weights), 1.0))
    order = large[np.argsort(scores[large], kind="stable")]
    rest = np.ones(len(weights), np.bool_)
    rest[large] = False
    within = float(weights[rest].sum(dtype=np.float64)) + weights[order].cumsum(dtype=np.float64) <= budget
    within[-1] = False
    keep = np.zeros(len(weights), np.bool_)
    keep[order[~within]] = True
    return keep


def finite_top(logits: Logits | Floats) -> int:
    """Return the token with the largest of some logits [V].

    Raises:
        BackendError: it is no finite number.
    """
    top = int(logits.argmax())  # NaN counts as the largest
    if not math.isfinite(logits[top]):
        found = "NaN" if math.isnan(logits[top]) else str(float(logits[top]))
        raise BackendError(
            f"the model's logits hold {found} at token id {top}; expected finite numbers: "
            "the weights are damaged, or too large for the type they are computed in",
            "try another backend",
        )
    return top
