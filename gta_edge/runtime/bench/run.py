"""The benchmark: every backend on every bundle, in turns, each in a process of its own.

For each context, shortest first: every entrant reads the prompt once untimed, which warms it up and gives the logits
that are compared (without ``compare`` and ``warm_up`` it reads only the prompt's beginning); then rounds, in which all
entrants take turns, so that what the machine does meanwhile hits all alike, until the medians have settled or patience
ends. Only one process works at a time. Since contexts grow, the peak of a process's memory after a context is that
context's: nothing before it took more, except loading, which is part of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.bundle import Bundle
from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.progress import Progress, silent
from gta_edge.runtime.bench.agreement import Answers, agreement, choose_reference, is_exact
from gta_edge.runtime.bench.entrant import Entrant
from gta_edge.runtime.bench.figures import settled, summarise
from gta_edge.runtime.bench.limits import check_memory
from gta_edge.runtime.bench.process import Worker, environment_for
from gta_edge.runtime.bench.report import Comparison, describe_machine, report
from gta_edge.runtime.bench.targets import Target
from gta_edge.support.cores import check_threads
from gta_edge.support.memory import available_bytes

__all__ = ["DEFAULT_CONTEXTS", "Settings", "bench"]

Document = dict[str, Any]

DEFAULT_CONTEXTS = (128, 2048)
DEFAULT_NEW_TOKENS = 32
_ROUNDS = 3
_MOST_ROUNDS = 15
_ENOUGH_S = 1.0  # of the slowest entrant at one context; what takes less is repeated
_PATIENCE_S = 60.0  # of all entrants at one context; rounds that have not settled by then are reported as they are
_STEADY_S = 10.0  # after which bandwidth is measured again, to see how steady the machine was
_CHECKED_STEPS = 8
_FIRST_SYNTHETIC_SEED = 0


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
    prompt: tuple[int, ...] | None = None
    compare: bool = True
    warm_up: bool = True

    def check(self) -> None:
        """Refuse what makes no sense for any model.

        Raises:
            InputError: a number below 1, more threads than could be of use, or a prompt that is shorter than a context.
        """
        check_threads(self.threads)
        for name, value in (("--batch", self.batch), ("--new-tokens", self.new_tokens), ("--rounds", self.rounds)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected a whole number above 0")
        for context in self.contexts or ():
            if context < 1:
                raise InputError(f"--contexts has {context}; expected whole numbers above 0")
            if self.prompt is not None and context > len(self.prompt):
                raise InputError(
                    f"--contexts has {context} and the prompt has {len(self.prompt)} tokens; give a longer prompt or a "
                    "shorter context"
                )
        if self.prompt is not None and not self.prompt:
            raise InputError("the prompt is empty; give one with a token at least")

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
                    f"the context {context} leaves no room for a new token: {name} has {longest + 1} positions; "
                    f"choose at most {longest}"
                )
        unknown = [i for i in self.prompt or () if not 0 <= i < bundle.config.vocab_size]
        if unknown:
            raise InputError(
                f"token id {unknown[0]} is outside the vocabulary of {name}: 0 to {bundle.config.vocab_size - 1}"
            )
        return tuple(sorted(set(contexts)))

    def new_tokens_at(self, context: int, bundle: Bundle) -> int:
        """Return how many steps there is room for."""
        return min(self.new_tokens, bundle.config.max_position_embeddings - context)


@dataclass
class _Run:
    """What one benchmark holds while it runs."""

    settings: Settings
    directory: Path
    progress: Progress
    entrants: list[Entrant] = field(default_factory=list)
    references: list[Entrant] = field(default_factory=list)
    absent: list[Document] = field(default_factory=list)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    bandwidth_notes: dict[str, str] = field(default_factory=dict)
    comparisons: dict[tuple[int, int], Comparison] = field(default_factory=dict)
    """By place among the entrants, and context."""

    def new_directory(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.directory))


def bench(
    bundles: Sequence[str | Path], targets: Sequence[Target], settings: Settings, *, progress: Progress = silent
) -> Document:
    """Measure and return the report that ``gta-edge bench --json`` prints.

    Args:
        bundles: directories that ``export`` wrote.
        targets: backends and interpreters.
        settings: contexts, batch, repeats.
        progress: told of each context's turns.

    Raises:
        BundleError: a bundle does not exist or is damaged.
        InputError: settings that make no sense, for one of the models.
        CapacityError: a batch that takes more memory than is available.
    """
    settings.check()
    opened = {str(name): Bundle.open(name) for name in bundles}
    contexts = {name: settings.contexts_for(name, bundle) for name, bundle in opened.items()}
    check_memory(opened, contexts, settings.batch, 1 + _CHECKED_STEPS if settings.compare else 1)
    described = describe_machine()  # now: later the load would be our own
    with tempfile.TemporaryDirectory(prefix="gta-edge-bench-") as name:
        run = _Run(settings, Path(name), progress)
        try:
            _open_all(run, opened, targets)
            begin = time.monotonic()
            _measure_bandwidths(run)
            for context in sorted({context for found in contexts.values() for context in found}):
                _measure_context(run, context, [e for e in run.entrants if context in contexts[e.name]])
            for entrant in run.entrants:
                entrant.put_away()
            if time.monotonic() - begin > _STEADY_S:
                _measure_bandwidths(run)
        finally:
            for entrant in (*run.entrants, *run.references):
                entrant.put_away(patient=False)
    return report(
        entrants=run.entrants,
        contexts=contexts,
        comparisons=run.comparisons,
        absent=run.absent,
        bandwidths=run.bandwidths,
        bandwidth_notes=run.bandwidth_notes,
        batch=settings.batch,
        new_tokens=settings.new_tokens_at,
        described=described,
    )


# --- who is there ----------------------------------------------------------------------------------------------------


def _open_all(run: _Run, bundles: dict[str, Bundle], targets: Sequence[Target]) -> None:
    """Load every bundle on every target; what does not work is listed with its reason."""
    environments: dict[Target, dict[str, str] | str] = {}
    for target in targets:
        try:
            environments[target] = environment_for(target, run.new_directory())
        except GtaEdgeError as error:
            environments[target] = str(error)
    pairs = [(name, target) for name in bundles for target in targets]
    for name, target in pairs:
        environment = environments[target]
        if isinstance(environment, str):
            run.absent.append(_absence(name, target, environment))
        else:
            entrant = Entrant(name, bundles[name], target, environment, run.new_directory(), run.settings.threads)
            run.entrants.append(entrant)
    for done, entrant in enumerate([*run.entrants]):
        run.progress("loading", done, len(pairs))
        try:
            entrant.open()
        except GtaEdgeError as error:
            run.entrants.remove(entrant)
            # the process was told the whole path
            message = str(error).replace(str(entrant.bundle.directory.resolve()), entrant.name)
            run.absent.append(_absence(entrant.name, entrant.target, message))
            continue
        _make_room(run, entrant)
    run.progress("loading", len(pairs), len(pairs))
    if run.settings.compare:
        run.references = [_reference(run, name) for name in bundles if _lacks_exact(run, name)]


def _absence(name: str, target: Target, message: str) -> Document:
    reason, _, remedy = message.partition("; ")
    return {"bundle": name, "backend": target.label, "reason": reason, "remedy": remedy or "run `gta-edge doctor`"}


def _lacks_exact(run: _Run, name: str) -> bool:
    """Tell whether all that is measured of a bundle rounds, and ONNX Runtime could be asked not to."""
    found = [e for e in run.entrants if e.name == name]
    exact = [e for e in found if e.opened and e.opened["compute"] == "fp32" and not e.opened["rounds_activations"]]
    return not exact and any(e.target.backend == "onnxruntime" for e in found)


def _reference(run: _Run, name: str) -> Entrant:
    """Return the bundle on ONNX Runtime in exact arithmetic, which is asked for its answers and not measured."""
    like = next(e for e in run.entrants if e.name == name and e.target.backend == "onnxruntime")
    return Entrant(
        name, like.bundle, like.target, like.environment, run.new_directory(), run.settings.threads, exact=True
    )


# --- turns -----------------------------------------------------------------------------------------------------------


def _measure_context(run: _Run, context: int, entrants: list[Entrant]) -> None:
    prompts = {name: _prompt(run, context, name, entrants) for name in {e.name for e in entrants}}
    if run.settings.compare:
        for name, prompt in prompts.items():
            _compare(run, context, prompt, [e for e in entrants if e.name == name])
    least, most = (run.settings.rounds,) * 2 if run.settings.rounds else (_ROUNDS, _MOST_ROUNDS)
    spent = {id(e): 0.0 for e in entrants}
    for i in range(most):
        able = [e for e in entrants if e.failure is None]
        if i >= least and (not able or _is_enough(able, context, spent)):
            break
        for done, entrant in enumerate(able if i % 2 == 0 else reversed(able)):
            run.progress(f"context {context}", i * len(able) + done, max(least, i + 1) * len(able))
            begin = time.perf_counter()
            with suppress(GtaEdgeError):  # the entrant remembers it, and what was measured before stays
                tokens, warm_up = _new_tokens(run, context, entrant), run.settings.warm_up
                entrant.measure(context, prompts[entrant.name], tokens, warm_up=warm_up)
            spent[id(entrant)] += time.perf_counter() - begin
            _make_room(run, entrant)
    run.progress(f"context {context}", 1, 1)


def _is_enough(entrants: list[Entrant], context: int, spent: dict[int, float]) -> bool:
    """Tell whether more rounds would hardly change the medians, or cost more patience than they are worth."""
    seconds = [spent[id(e)] for e in entrants]
    if sum(seconds) >= _PATIENCE_S:
        return True
    per_round = (summarise(e.rounds[context], context, 1)["per_round"] for e in entrants)
    return max(seconds) >= _ENOUGH_S and all(settled(values) for found in per_round for values in found.values())


def _new_tokens(run: _Run, context: int, entrant: Entrant) -> int:
    """An engine may hold fewer tokens than the model has positions."""
    limit = entrant.opened["max_length"] if entrant.opened else context
    return max(1, min(run.settings.new_tokens_at(context, entrant.bundle), limit - context))


def _prompt(run: _Run, context: int, name: str, entrants: list[Entrant]) -> Path:
    """Write the ids [B, context] of a bundle's prompt to a file and return it."""
    vocab = next(e.bundle.config.vocab_size for e in entrants if e.name == name)
    if run.settings.prompt is not None:
        ids = np.tile(np.asarray(run.settings.prompt[:context], np.int64), (run.settings.batch, 1))
    else:
        ids = np.random.default_rng(_FIRST_SYNTHETIC_SEED).integers(0, vocab, (run.settings.batch, context))
    path = run.new_directory() / "prompt.npy"
    np.save(path, ids.astype(np.int64))
    return path


def _compare(run: _Run, context: int, prompt: Path, entrants: list[Entrant]) -> None:
    """Ask all of a bundle's entrants, and its reference, for their answers to the same prompt, and compare."""
    given: dict[int, Answers] = {}
    for entrant in (*entrants, *(e for e in run.references if entrants and e.name == entrants[0].name)):
        if entrant.failure is not None:
            continue
        steps = min(_CHECKED_STEPS, *(_new_tokens(run, context, e) for e in entrants))
        shape = (1 + steps, run.settings.batch, entrant.bundle.config.vocab_size)
        with suppress(GtaEdgeError):
            given[id(entrant)] = entrant.check(prompt, shape)
        if entrant in run.references:
            entrant.put_away()
        _make_room(run, entrant)
    if not given:
        return
    chosen = choose_reference(given)
    reference = next(e for e in (*run.entrants, *run.references) if id(e) == chosen)
    label = f"{reference.target.label}, exact" if reference.exact else reference.target.label
    for entrant in entrants:
        if id(entrant) in given:
            place = next(i for i, e in enumerate(run.entrants) if e is entrant)
            found = agreement(given[id(entrant)], given[chosen])
            run.comparisons[place, context] = Comparison(
                label, entrant is reference, len(given) > 1, is_exact(given[chosen]), found
            )


def _make_room(run: _Run, entrant: Entrant) -> None:
    """End an entrant's process if there may be no room for the next one that has none, on the host or the GPU."""
    waiting = [e.needed_bytes for e in run.entrants if not e.running and e.failure is None]
    if not waiting or not entrant.running:
        return
    host, gpu = max(n for n, _ in waiting), max(n for _, n in waiting)
    free, gpu_free = available_bytes(), entrant.gpu_free_bytes
    if (free is not None and free < host) or (gpu_free is not None and gpu_free < gpu):
        entrant.put_away()


# --- bandwidth -------------------------------------------------------------------------------------------------------


def _measure_bandwidths(run: _Run) -> None:
    """Measure the memory of each kind of device that is used, once more."""
    for device in ("cpu", "gpu"):
        user = next((e for e in run.entrants if e.opened and e.opened["device"] == device), None)
        if user is None:
            continue
        run.progress("bandwidth", 0, 1)
        try:
            with Worker(user.target.python, user.environment, user.directory) as worker:
                rate = worker.ask(do="bandwidth", device=device)["bytes_per_s"]
            run.bandwidths.setdefault(device, []).append(rate)
        except GtaEdgeError as error:
            run.bandwidth_notes[device] = f"the bandwidth was not measured ({error})"
        run.progress("bandwidth", 1, 1)
