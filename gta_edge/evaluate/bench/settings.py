"""What a benchmark asks of every backend, and whether there is room for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gta_edge.errors import CapacityError, InputError
from gta_edge.evaluate.bench.targets import Target
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.plan.roofline import LARGEST_BATCH
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_state import CHUNK_SIZE
from gta_edge.runtime.managed_cache import ManagedCache
from gta_edge.runtime.registry import BACKENDS
from gta_edge.support.cores import check_threads
from gta_edge.support.memory import available_bytes
from gta_edge.support.text import brief, printable

__all__ = ["CHECKED_STEPS", "DEFAULT_CONTEXTS", "DEFAULT_NEW_TOKENS", "Needs", "Settings", "check_room", "needs"]

DEFAULT_CONTEXTS = (128, 2048)
DEFAULT_NEW_TOKENS = 32
CHECKED_STEPS = 8
"""Tokens after the prompt whose logits are compared."""

_MAX_ROUNDS = 10**6
_FLOAT, _ID = 4, 8


@dataclass(frozen=True)
class Settings:
    """What is asked of every backend.

    Attributes:
        contexts: tokens of the prompt, and so in the cache when the first token is decoded; ``DEFAULT_CONTEXTS``, as
            far as the model has positions, or the given prompt's length by default.
        new_tokens: steps that are timed after it; fewer where the model's positions end.
        batch: rows at once.
        rounds: repeats; by default at least 3, and up to 15 while they are short or lie far apart.
        threads: for one operator on a CPU; None for the backend's own choice.
        cache_dtype: type of the cache; None for the backend's own choice.
        cache: policy that says which rows of the cache stay, as its ``name`` and options; None for all.
        speculate: whether prompt lookup is timed beside plain decoding.
        answers: so many to each prompt are timed beside it, where there are more than one.
        prompt: ids to begin with, the same in every row; random ones by default.
        compare: whether backends are asked for their answers to compare them.
        warm_up: whether each context is first run once untimed, in full; its first chunks are in any case. The rest of
            a long prompt has little to warm up, and takes long; but then its first timed run also grows the cache.
    """

    contexts: tuple[int, ...] | None = None
    new_tokens: int = DEFAULT_NEW_TOKENS
    batch: int = 1
    rounds: int | None = None
    threads: int | None = None
    cache_dtype: str | None = None
    cache: Mapping[str, Any] | None = None
    speculate: bool = False
    answers: int = 1
    prompt: tuple[int, ...] | None = None
    compare: bool = True
    warm_up: bool = True

    def check(self) -> None:
        """Refuse what makes no sense for any model.

        Raises:
            InputError: a number below 1 or beyond sense, or a prompt that is shorter than a context.
        """
        numbers = ("--batch", self.batch), ("--new-tokens", self.new_tokens), ("--rounds", self.rounds)
        for name, value in (*numbers, ("--n", self.answers)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {brief(value)}", "expected a whole number above 0")
        if self.rounds is not None and self.rounds > _MAX_ROUNDS:
            raise InputError(f"--rounds is {brief(self.rounds)}", f"expected 1 to {_MAX_ROUNDS}")
        if self.answers > LARGEST_BATCH:
            raise InputError(f"--n is {brief(self.answers)}", f"expected 1 to {LARGEST_BATCH}")
        if self.batch > 1 and (self.speculate or self.answers > 1):
            raise InputError(f"--batch is {self.batch}", "--speculate and --n are for a batch of 1")
        if self.answers > 1 and self.cache is not None:
            raise InputError("--n needs a cache that drops no rows", "leave out --n or --cache-policy")
        check_threads(self.threads)
        for context in self.contexts or ():
            if context < 1:
                raise InputError(f"--contexts has {brief(context)}", "expected whole numbers above 0")
            if self.prompt is not None and context > len(self.prompt):
                raise InputError(
                    f"--contexts has {brief(context)} and the prompt has {len(self.prompt)} tokens",
                    "give a longer prompt or a shorter context",
                )
        if self.prompt is not None and not self.prompt:
            raise InputError("the prompt is empty", "give one with a token at least")

    def contexts_for(self, name: str, bundle: Bundle) -> tuple[int, ...]:
        """Return the contexts for a bundle, ascending.

        Raises:
            InputError: one leaves no position for a new token, or the prompt has ids that the model does not know.
        """
        longest = bundle.config.max_position_embeddings - 1
        if self.contexts is not None:
            contexts = self.contexts
        elif self.prompt is not None:
            contexts = (len(self.prompt),)
        else:
            room = max(1, longest + 1 - self.new_tokens)
            contexts = tuple(min(context, room) for context in DEFAULT_CONTEXTS)
        for context in contexts:
            if context > longest:
                raise InputError(
                    f"the context {brief(context)} leaves no room for a new token: {printable(name)} has {longest + 1} "
                    f"positions",
                    f"choose at most {longest}",
                )
        unknown = [i for i in self.prompt or () if not 0 <= i < bundle.config.vocab_size]
        if unknown:
            raise InputError(
                f"token id {brief(unknown[0])} is outside the vocabulary of {printable(name)}: "
                f"0 to {bundle.config.vocab_size - 1}"
            )
        return tuple(sorted(set(contexts)))

    def new_tokens_at(self, context: int, bundle: Bundle) -> int:
        """Return how many steps there is room for."""
        return min(self.new_tokens, bundle.config.max_position_embeddings - context)


@dataclass(frozen=True)
class Needs:
    """What a benchmark takes beside weights, in bytes: what follows from contexts and rows.

    Attributes:
        own: of this process, which makes prompts and compares answers.
        backend: of one backend on a CPU: its cache, its activations, its logits.
        files: on the disk of temporary files.
    """

    own: int
    backend: int
    files: int


def needs(
    bundle: Bundle,
    context: int,
    new_tokens: int,
    batch: int,
    *,
    answers: int,
    cache_dtype: str | None = None,
    cache: Mapping[str, Any] | None = None,
) -> Needs:
    """Return what one context takes, at the least.

    Args:
        bundle: the model.
        context: tokens of the prompt.
        new_tokens: steps after it.
        batch: rows.
        answers: how many backends' logits are held at once to compare them.
        cache_dtype: type of the cache, float32 by default.
        cache: policy that says which rows of it stay, as ``Settings`` has it.
    """
    config = bundle.config
    logits = _FLOAT * batch * config.vocab_size
    checked = logits * (1 + min(CHECKED_STEPS, new_tokens))
    chunk = min(CHUNK_SIZE, context)
    held, rows = cache_bytes(config, cache_dtype or "fp32", context + new_tokens, batch), context
    if cache is not None:
        managed = ManagedCache(config, policy(**cache).for_bundle(bundle), cache_dtype or "fp32")
        capacities = managed.capacities_for(context)
        held, rows = min(held, managed.nbytes(batch, capacities)), min(context, max(capacities))
    per_token = 4 * config.hidden_size + 3 * config.intermediate_size + config.num_attention_heads * rows
    ids = _ID * batch * context
    return Needs(
        own=2 * ids + answers * checked,
        backend=held + _FLOAT * batch * chunk * per_token + 2 * logits + ids,
        files=ids + (checked if answers else 0),
    )


def check_room(
    settings: Settings,
    bundles: Mapping[str, Bundle],
    contexts: Mapping[str, Sequence[int]],
    targets: Sequence[Target],
    *,
    gpu: bool,
) -> int:
    """Refuse what there is no memory for, before any is taken, and return the bytes of temporary files.

    Args:
        settings: rows, steps, and whether answers are compared.
        bundles: the models, by name.
        contexts: of each bundle.
        targets: who is asked; what runs on a GPU has its cache there, which is the backend's own to check.
        gpu: whether this machine has one.

    Raises:
        CapacityError: the memory that is free here is less than a context takes; how much.
    """
    on_cpu = any(BACKENDS[target.backend].runs_on(gpu=gpu) == "cpu" for target in targets)
    free, files = available_bytes(), 0
    for name, bundle in bundles.items():
        context = max(contexts[name])
        new_tokens = settings.new_tokens_at(context, bundle)
        answers = 2 * settings.compare * len(targets)
        kind: dict[str, Any] = {"cache_dtype": settings.cache_dtype, "cache": settings.cache}
        found = needs(bundle, context, new_tokens, settings.batch, answers=answers, **kind)
        files += len(contexts[name]) * found.files
        taken = found.own + (found.backend if on_cpu else 0)
        if free is not None and taken > free:
            raise CapacityError(
                f"--batch {brief(settings.batch)} with a context of {context} takes {_gb(taken)} at the least beside "
                f"the weights of {printable(name)}, and {_gb(free)} are free",
                "give a smaller --batch or --contexts",
            )
    return files


def _gb(size: int) -> str:
    gigabytes = size / 1e9 if size < 1e300 else math.inf
    return f"{gigabytes:.2f} GB" if gigabytes < 1e6 else f"{gigabytes:.1e} GB"
