"""The benchmark: every backend on every bundle, in turns, each in a process of its own.

For each context, shortest first: every case reads the prompt once untimed, which warms it up and gives the logits
that are compared (without ``compare`` and ``warm_up`` it reads only the prompt's beginning); then rounds, in which all
cases take turns, so that what the machine does meanwhile hits all alike, until the medians have settled or patience
ends. Only one process works at a time. Since contexts grow, the peak of a process's memory after a context is that
context's: nothing before it took more, except loading, which is part of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import GtaEdgeError, OutputError
from gta_edge.evaluate.bench.agreement import Answers, agreement, choose_reference, is_exact
from gta_edge.evaluate.bench.case import Case
from gta_edge.evaluate.bench.judge import judged
from gta_edge.evaluate.bench.process import Worker, environment_for, temporary_files
from gta_edge.evaluate.bench.report import Comparison, describe_machine, report
from gta_edge.evaluate.bench.settings import CHECKED_STEPS, DEFAULT_CONTEXTS, DEFAULT_NEW_TOKENS, Settings, check_room
from gta_edge.evaluate.bench.statistics import settled, summarise
from gta_edge.evaluate.bench.targets import Target
from gta_edge.formats.bundle import Bundle
from gta_edge.support.files import scratch_directory
from gta_edge.support.memory import available_bytes
from gta_edge.support.progress import Progress, silent

__all__ = ["DEFAULT_CONTEXTS", "DEFAULT_NEW_TOKENS", "Settings", "bench"]

Document = dict[str, Any]

_ROUNDS = 3
_MAX_ROUNDS = 15
_ENOUGH_S = 1.0  # of the slowest case at one context; what takes less is repeated
_PATIENCE_S = 60.0  # of all cases at one context; rounds that have not settled by then are reported as they are
_STEADY_S = 10.0  # after which bandwidth is measured again, to see how steady the machine was
_FIRST_SYNTHETIC_SEED = 0


@dataclass
class _Run:
    """What one benchmark holds while it runs."""

    settings: Settings
    directory: Path
    progress: Progress
    cases: list[Case] = field(default_factory=list)
    twins: dict[int, Case] = field(default_factory=dict)
    """By the identity of each case that rounds activations: the same in exact arithmetic, asked and not measured."""
    exact: dict[int, Document | str] = field(default_factory=dict)
    """By the same: how its twin compared with the reference, or why it was not compared."""
    checked: set[str] = field(default_factory=set)
    """Bundles whose twins were asked."""
    absent: list[Document] = field(default_factory=list)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    bandwidth_notes: dict[str, str] = field(default_factory=dict)
    comparisons: dict[tuple[int, int], Comparison] = field(default_factory=dict)
    """By place among the cases, and context."""

    def new_directory(self) -> Path:
        with temporary_files(self.directory):
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
        CapacityError: rows and contexts that there is no memory for.
        OutputError: temporary files cannot be written.
    """
    settings.check()
    opened = {str(name): Bundle.open(name) for name in bundles}
    contexts = {name: settings.contexts_for(name, bundle) for name, bundle in opened.items()}
    described = describe_machine()  # now: later the load would be our own
    file_bytes = check_room(settings, opened, contexts, targets, gpu=bool(described["gpus"]))
    with scratch_directory(needed_bytes=file_bytes) as directory:
        run = _Run(settings, directory, progress)
        try:
            _open_all(run, opened, targets)
            begin = time.monotonic()
            _measure_bandwidths(run)
            for context in sorted({context for found in contexts.values() for context in found}):
                _measure_context(run, context, [e for e in run.cases if context in contexts[e.name]])
            for case in run.cases:
                case.release()
            if time.monotonic() - begin > _STEADY_S:
                _measure_bandwidths(run)
        finally:
            for case in (*run.cases, *run.twins.values()):
                case.release(patient=False)
    return report(
        cases=run.cases,
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
    environments: dict[Target, dict[str, str] | GtaEdgeError] = {}
    for target in targets:
        try:
            environments[target] = environment_for(target, run.new_directory())
        except GtaEdgeError as error:
            environments[target] = error
    pairs = [(name, target) for name in bundles for target in targets]
    for name, target in pairs:
        environment = environments[target]
        if isinstance(environment, GtaEdgeError):
            run.absent.append(_absence(name, target, environment, bundles[name]))
        else:
            of = run.settings
            asked = of.threads, of.cache_dtype, of.cache, of.speculate, of.answers
            case = Case(name, bundles[name], target, environment, run.new_directory(), *asked)
            run.cases.append(case)
    for done, case in enumerate([*run.cases]):
        run.progress("loading", done, len(pairs))
        try:
            case.open()
        except GtaEdgeError as error:
            run.cases.remove(case)
            run.absent.append(_absence(case.name, case.target, error, case.bundle))
            continue
        _make_room(run, case)
    run.progress("loading", len(pairs), len(pairs))
    if run.settings.compare:
        run.twins = {id(e): _twin(run, e) for e in run.cases if e.opened and e.opened["rounds_activations"]}


def _absence(name: str, target: Target, error: GtaEdgeError, bundle: Bundle) -> Document:
    told = str(bundle.directory.resolve())  # a process is told the whole path, a person gave this name
    reason, remedy = (text.replace(told, name) for text in (error.problem, error.remedy or "run `gta-edge doctor`"))
    return {"bundle": name, "backend": target.label, "reason": reason, "remedy": remedy}


def _twin(run: _Run, of: Case) -> Case:
    """Return an case in exact arithmetic: where rounding hides what is wrong, it shows there."""
    directory = run.new_directory()
    asked = of.threads, of.cache_dtype, of.cache
    return Case(of.name, of.bundle, of.target, of.environment, directory, *asked, exact=True)


# --- turns -----------------------------------------------------------------------------------------------------------


def _measure_context(run: _Run, context: int, cases: list[Case]) -> None:
    prompts = {name: _prompt(run, context, name, cases) for name in {e.name for e in cases}}
    if run.settings.compare:
        for name, prompt in prompts.items():
            _compare(run, context, prompt, [e for e in cases if e.name == name])
    least, most = (run.settings.rounds,) * 2 if run.settings.rounds else (_ROUNDS, _MAX_ROUNDS)
    spent = {id(e): 0.0 for e in cases}
    for i in range(most):
        able = [e for e in cases if e.failure is None]
        if i >= least and (not able or _is_enough(able, context, spent)):
            break
        for done, case in enumerate(able if i % 2 == 0 else reversed(able)):
            run.progress(f"context {context}", i * len(able) + done, max(least, i + 1) * len(able))
            begin = time.perf_counter()
            with _going_on():  # the case remembers it, and what was measured before stays
                tokens, warm_up = _new_tokens(run, context, case), run.settings.warm_up
                case.measure(context, prompts[case.name], tokens, warm_up=warm_up)
            spent[id(case)] += time.perf_counter() - begin
            _make_room(run, case)
    run.progress(f"context {context}", 1, 1)


def _is_enough(cases: list[Case], context: int, spent: dict[int, float]) -> bool:
    """Tell whether more rounds would hardly change the medians, or cost more patience than they are worth."""
    seconds = [spent[id(e)] for e in cases]
    if sum(seconds) >= _PATIENCE_S:
        return True
    per_round = (summarise(e.rounds[context], context, 1)["per_round"] for e in cases)
    return max(seconds) >= _ENOUGH_S and all(settled(values) for found in per_round for values in found.values())


def _new_tokens(run: _Run, context: int, case: Case) -> int:
    """An engine may hold fewer tokens than the model has positions."""
    limit = case.opened["max_length"] if case.opened else context
    return max(1, min(run.settings.new_tokens_at(context, case.bundle), limit - context))


def _prompt(run: _Run, context: int, name: str, cases: list[Case]) -> Path:
    """Write the ids [B, context] of a bundle's prompt to a file and return it."""
    vocab = next(e.bundle.config.vocab_size for e in cases if e.name == name)
    if run.settings.prompt is not None:
        ids = np.tile(np.asarray(run.settings.prompt[:context], np.int64), (run.settings.batch, 1))
    else:
        ids = np.random.default_rng(_FIRST_SYNTHETIC_SEED).integers(0, vocab, (run.settings.batch, context))
    path = run.new_directory() / "prompt.npy"
    with temporary_files(path.parent):
        np.save(path, ids.astype(np.int64))
    return path


@contextmanager
def _going_on() -> Iterator[None]:
    """Go on after what stops one backend, and not after what stops them all."""
    try:
        yield
    except OutputError:
        raise
    except GtaEdgeError:
        pass


def _compare(run: _Run, context: int, prompt: Path, cases: list[Case]) -> None:
    """Ask all of a bundle's cases, and twins as needed, for their answers to the same prompt, and compare."""
    if not cases:
        return
    given: dict[int, Answers] = {}
    twins = _twins_to_ask(run, cases)
    for case in (*cases, *twins):
        if case.failure is not None:
            continue
        steps = min(CHECKED_STEPS, *(_new_tokens(run, context, e) for e in cases))
        shape = (1 + steps, run.settings.batch, case.bundle.config.vocab_size)
        with _going_on():
            given[id(case)] = case.check(prompt, shape)
        if case.exact:
            case.release()
        _make_room(run, case)
    if not given:
        return
    chosen = choose_reference(given)
    reference = next(e for e in (*cases, *twins) if id(e) == chosen)
    ids = np.load(prompt)
    label = f"{reference.target.label}, exact" if reference.exact else reference.target.label
    for case in cases:
        _note_exact(run, case, given, chosen, ids)
        if id(case) in given:
            place = next(i for i, e in enumerate(run.cases) if e is case)
            found = agreement(given[id(case)], given[chosen])
            found = judged(case.bundle, ids, given[id(case)], given[chosen], found)
            run.comparisons[place, context] = Comparison(
                label,
                case is reference,
                len(given) > 1,
                is_exact(given[chosen]),
                found,
                run.exact.get(id(case)),
            )


def _twins_to_ask(run: _Run, cases: list[Case]) -> list[Case]:
    """Return the twins that are asked now: all of them once, then one as the reference if nobody else is exact."""
    twins = [run.twins[id(e)] for e in cases if id(e) in run.twins]
    if cases[0].name not in run.checked:
        run.checked.add(cases[0].name)
        return twins
    able = [e for e in cases if e.failure is None]
    exact = [e for e in able if e.opened and e.opened["compute"] == "fp32" and id(e) not in run.twins]
    return [] if exact else [e for e in twins if e.failure is None][:1]


def _note_exact(run: _Run, case: Case, given: dict[int, Answers], chosen: int, prompt: npt.NDArray[np.int64]) -> None:
    """Keep how an case's twin compares with the reference: within float32's bound, whatever rounding hides."""
    twin = run.twins.get(id(case))
    if twin is None or id(twin) == chosen:
        return
    if id(twin) in given:
        found = agreement(given[id(twin)], given[chosen])
        run.exact[id(case)] = judged(case.bundle, prompt, given[id(twin)], given[chosen], found)
    elif twin.failure is not None:
        run.exact.setdefault(id(case), twin.failure)


def _make_room(run: _Run, case: Case) -> None:
    """End an case's process if there may be no room for the next one that has none, on the host or the GPU."""
    waiting = [e.needed_bytes for e in run.cases if not e.running and e.failure is None]
    if not waiting or not case.running:
        return
    host, gpu = max(n for n, _ in waiting), max(n for _, n in waiting)
    free, gpu_free = available_bytes(), case.gpu_free_bytes
    if (free is not None and free < host) or (gpu_free is not None and gpu_free < gpu):
        case.release()


# --- bandwidth -------------------------------------------------------------------------------------------------------


def _measure_bandwidths(run: _Run) -> None:
    """Measure the memory of each kind of device that is used, once more."""
    for device in ("cpu", "gpu"):
        user = next((e for e in run.cases if e.opened and e.opened["device"] == device), None)
        if user is None:
            continue
        run.progress("bandwidth", 0, 1)
        try:
            with Worker(user.target.python, user.environment, user.directory, user.target.arguments) as worker:
                rate = worker.ask(do="bandwidth", device=device)["bytes_per_s"]
            run.bandwidths.setdefault(device, []).append(rate)
        except GtaEdgeError as error:
            run.bandwidth_notes[device] = f"the bandwidth was not measured ({error})"
        run.progress("bandwidth", 1, 1)
