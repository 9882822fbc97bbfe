"""Budgets for each layer of a managed cache: what cutting a layer costs, and the cheapest way to share rows out.

In a few windows of text, a prompt is evicted in one layer alone, to a few sizes. The cost is the rise of the mean loss
of the tokens that follow. Few windows suffice, since layers differ by far more than rules do. Costs of layers are taken
to add up; between sizes they are taken to run straight over the logarithm of the rows, and to fall ever more slowly
with more of them. Then budgets are cheapest under a total where each row is given to the layer that gains most by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.evaluate.perplexity import negative_log_likelihood
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.tokenizer import NO_TOKENIZER
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import Decision, Rows
from gta_edge.runtime.cache_policies.budgets import LayerBudgets
from gta_edge.runtime.cache_policies.measured import OverRule
from gta_edge.runtime.registry import BACKENDS, check_backend, open_session
from gta_edge.runtime.session import Session
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import printable

__all__ = [
    "SHARES",
    "TOKENS",
    "LayerProbe",
    "calibrate",
    "cheapest",
    "check_options",
    "cut_windows",
    "loss_after",
    "measure_costs",
]

SHARES = (0.04, 0.12, 0.36)
"""Of a prompt's rows, that each layer is cut to."""

_GRID = 256
"""Sizes of a budget between none and all of a prompt's rows."""

TOKENS = 768
"""Of a window."""

_MAX_WINDOWS = 256
"""Windows are one batch."""

_MIN_TOKENS = 96
"""Of a window; the smallest share of its prompt is still a few rows."""

Ids = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LayerProbe(OverRule):
    """A policy that cuts single layers, as it is told between one prompt and the next; all other rows stay.

    Args:
        rule: what decides which rows stay.
        cut: rows by layer, to be changed from outside.
    """

    name: ClassVar[str] = "probe"

    cut: dict[int, int] = field(default_factory=dict)

    def budgets(self, layers: int) -> None:
        return None

    def keep(self, rows: Rows) -> Decision:
        budget = self.cut.get(rows.layer)
        if budget is None:
            return Decision(np.ones(len(rows), np.bool_))
        return self.rule.keep(replace(rows, budget=budget))


def cut_windows(ids: Ids, windows: int, tokens: int) -> Ids:
    """Return windows of a text, int64 [N, tokens], spread over it evenly.

    Raises:
        InputError: the text is shorter than one of them.
    """
    if len(ids) < tokens:
        raise InputError(f"the text has {len(ids)} tokens", f"give one of at least {tokens}")
    starts = np.linspace(0, len(ids) - tokens, windows).astype(np.int64)
    return np.stack([ids[start : start + tokens] for start in starts])


def loss_after(session: Session, windows: Ids, prompt: int) -> float:
    """Return the mean loss, in nats, of what follows a prompt that the session's policy has evicted from.

    Args:
        session: whose chunks are as long as the prompt, so that it evicts once; its cache is emptied.
        windows: int64 [N, T], one row of the batch each.
        prompt: tokens of each that come first. Those behind it are predicted, but for the first of them.

    Raises:
        BackendError: the model gave logits that are NaN.
    """
    claim = session.claim()
    claim.forward(windows[:, :prompt])
    logits = claim.forward(windows[:, prompt:-1], all_logits=True)
    targets = windows[:, prompt + 1 :]
    loss = negative_log_likelihood(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)) / targets.size
    if math.isnan(loss):
        raise BackendError(
            "the model's logits hold NaN", "the weights are damaged: try another backend, or export again"
        )
    return loss


def measure_costs(
    session: Session, probe: LayerProbe, windows: Ids, prompt: int, rows: Sequence[int], *, progress: Progress = silent
) -> Costs:
    """Return by how much cutting each layer alone raises the mean loss, in nats, float64 [L, K].

    Args:
        session: opened with ``probe`` as its policy, and chunks of ``prompt`` tokens.
        probe: what is told which layer to cut.
        windows: int64 [N, T].
        prompt: tokens of each that are evicted from.
        rows: that a layer is cut to, ascending (K).
        progress: told of measurements done.
    """
    layers = session.config.num_hidden_layers
    total = layers * len(rows) + 1
    probe.cut.clear()
    progress("measuring layers", 0, total)
    base = loss_after(session, windows, prompt)
    costs = np.zeros((layers, len(rows)))
    for layer in range(layers):
        for k, count in enumerate(rows):
            progress("measuring layers", 1 + layer * len(rows) + k, total)
            probe.cut.clear()
            probe.cut[layer] = count
            costs[layer, k] = loss_after(session, windows, prompt) - base
    probe.cut.clear()
    progress("measuring layers", total, total)
    return costs


def cheapest(costs: Costs, rows: Sequence[int], most: int, total: int) -> tuple[int, ...]:
    """Return the rows of each layer under a total whose costs have the least sum.

    Args:
        costs: of each layer, cut to each of ``rows``, float64 [L, K].
        rows: ascending, at least 1.
        most: rows that cost nothing, above the last of ``rows``.
        total: rows of all layers together, at least ``L * rows[0]``; above ``L * most`` counts as that.
    """
    points = np.array([*rows, most])
    curves = np.concatenate([costs, np.zeros((len(costs), 1))], axis=1)
    curves = np.maximum.accumulate(np.maximum(curves, 0)[:, ::-1], axis=1)[:, ::-1]  # more rows never cost more
    between = np.unique(np.append(np.arange(rows[0], most, max(1, most // _GRID)), points))
    curves = np.stack([np.interp(np.log(between), np.log(points), curve) for curve in curves])
    given = np.full(len(costs), rows[0])
    left = total - int(given.sum())
    steps = [(gain, layer, width) for layer, curve in enumerate(curves) for gain, width in _steps(between, curve)]
    for _, layer, width in sorted(steps, key=lambda step: -step[0]):  # of equal gains the first layer's
        given[layer] += min(width, left)
        left -= min(width, left)
    return tuple(given.tolist())


def _steps(points: npt.NDArray[np.int64], curve: Costs) -> list[tuple[float, int]]:
    """Return the pieces of a curve's lower convex hull: the gain by a row, which falls, and the piece's rows."""
    hull = [0]
    for k in range(1, len(points)):
        while len(hull) > 1 and _gain(points, curve, hull[-2], hull[-1]) <= _gain(points, curve, hull[-1], k):
            hull.pop()
        hull.append(k)
    return [(_gain(points, curve, i, j), int(points[j] - points[i])) for i, j in pairwise(hull)]


def _gain(points: npt.NDArray[np.int64], curve: Costs, i: int, j: int) -> float:
    return float((curve[i] - curve[j]) / (points[j] - points[i]))


def calibrate(
    bundle: Bundle,
    text: str,
    *,
    rule: str = "zsmerge",
    share: float = 0.2,
    windows: int = 4,
    tokens: int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> LayerBudgets:
    """Measure what each layer of a bundle needs, and return the cheapest budgets.

    Args:
        bundle: what is measured.
        text: like what the model will read.
        rule: policy that decides which rows stay.
        share: of a prompt's rows, that stay in the mean over the layers.
        windows: of the text.
        tokens: of each window, the first two thirds of which are evicted from; ``TOKENS`` by default, or as many as the
            model has positions.
        backend: what runs the model.
        threads: for one operator; by default one for each core.
        progress: told of measurements done.

    Raises:
        InputError: an option that makes no sense, a text that is too short, or a bundle without a tokenizer.
        BackendError: the backend does not work here, or runs engines, each of which was built for one policy.
    """
    tokens = check_options(bundle, rule=rule, share=share, windows=windows, tokens=tokens)
    prompt = tokens * 2 // 3
    probe = LayerProbe(rule=policy(rule, rows=prompt))
    rows = [max(round(part * prompt), probe.least_rows) for part in SHARES]
    # no more positions than are read, since memory and attention cost as the capacity
    sizes = {"chunk_size": prompt, "max_length": tokens}
    with _opened(bundle, backend, cache=probe, threads=threads, progress=progress, **sizes) as session:
        if session.tokenizer is None:
            raise InputError(f"{printable(str(bundle.directory))} has no tokenizer", NO_TOKENIZER)
        ids = cut_windows(np.asarray(session.tokenizer.encode(text), np.int64), windows, tokens)
        costs = measure_costs(session, probe, ids, prompt, rows, progress=progress)
        name = session.backend
    total = max(round(share * prompt), rows[0]) * len(costs)
    measured = {
        "rule": rule,
        "share": share,
        "windows": windows,
        "prompt": prompt,
        "tokens": tokens,
        "backend": name,
        "rows": rows,
        "costs": costs.round(6).tolist(),
    }
    return LayerBudgets(cheapest(costs, rows, prompt, total), measured)


def _opened(bundle: Bundle, backend: str, **options: Any) -> Session:
    """Return a session on a backend that evicts as it is told; an engine does as it was built for."""
    check_backend(backend, ("auto",))
    fit = [each for each in BACKENDS.values() if each.manages_cache and not each.builds_engine]
    names = [each.name for each in fit]
    if backend != "auto":
        if backend not in names:
            raise BackendError(f"{backend} evicts as its engine was built for", f"take one of {', '.join(names)}")
        return open_session(bundle, backend, **options)
    refused: GtaEdgeError = BackendError("no backend works here that evicts as it is told", "run `gta-edge doctor`")
    for each in fit:
        if each.is_here(bundle):
            try:
                return open_session(bundle, each.name, **options)
            except GtaEdgeError as error:
                refused = error
    raise refused


def check_options(bundle: Bundle, *, rule: str, share: float, windows: int, tokens: int | None) -> int:
    """Return the tokens of a window, after a look at the options of ``calibrate``.

    Raises:
        InputError: one that makes no sense.
    """
    positions = bundle.config.max_position_embeddings
    tokens = min(TOKENS, positions) if tokens is None else tokens
    if rule == "measured":
        raise InputError("rule is 'measured'", "give the policy that is to decide in the budgets")
    if not SHARES[0] <= share < 1:
        raise InputError(f"share is {share:g}", f"give one from {SHARES[0]:g} to 1, which is all rows")
    if not 1 <= windows <= _MAX_WINDOWS:
        raise InputError(f"windows is {windows}", f"give from 1 to {_MAX_WINDOWS}")
    if not _MIN_TOKENS <= tokens <= positions:
        raise InputError(
            f"a window has {tokens} tokens", f"give from {_MIN_TOKENS} to the model's {positions} positions"
        )
    policy(rule, rows=tokens * 2 // 3)
    return tokens
