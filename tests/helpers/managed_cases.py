"""Calls of the attention kernels on a managed cache, and what should come out, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.plugins.attention.definition import Features
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers import attention_cases as cases
from tests.helpers.attention_simulation import check_caches, simulate

Array = np.ndarray
RECEIVED_TOLERANCE = 2e-4
"""Of what a row has received: approximate powers, and scores whose order of summation is not the reference's."""


def make(
    of: Variant, lengths: tuple[int, ...], tokens: int, capacity: int, seed: int = 0, sharpness: float = 1.0
) -> cases.Case:
    """Random inputs, those of the variant's features too; what a row that is not in use has received is NaN."""
    case = cases.make(of, lengths, tokens, capacity, seed, sharpness)
    rng, features, batch = np.random.default_rng(seed + 1000), of.features, case.batch
    arrays, held = case.arrays, cases.held(case)
    if features.has_positions:
        arrays["token_positions"] = rng.integers(0, len(arrays["cos"]), (batch, tokens))
    if features.bias_rows:
        arrays["row_bias"] = np.log(rng.integers(1, 40, (batch, features.bias_rows))).astype(np.float32)
    if features.has_branches:
        arrays["branch_start"] = np.array([rng.integers(0, length + tokens + 1) for length in held], np.int64)
        width = int(rng.integers(1, capacity + 1))
        arrays["branches"] = rng.integers(-(2**63), 2**63, (batch, width), np.int64)
    if features.observe:
        visible = np.stack([cases.visible(case, row).sum(-1) for row in range(batch)])  # [B, T]
        drawn = rng.uniform(0.1, 1, (batch, tokens))
        weight = visible if features.observe == "last" else drawn
        arrays["query_weight"] = np.where(rng.random((batch, tokens)) < 0.3, 0, weight).astype(np.float32)
        arrays["decay"] = rng.uniform(0.5, 1, batch).astype(np.float32)
        past = (
            rng.uniform(0, 3, (batch, capacity))
            if features.observe == "mass"
            else rng.integers(-1, capacity, (batch, capacity))
        )
        arrays["received"] = np.where(np.arange(capacity) < held[:, None], past, np.nan).astype(np.float32)
    return case


def received(case: cases.Case, before: Array, attention: list[Array]) -> tuple[Array, Array]:
    """What rows have received, float64 [B, S], NaN where it is not specified; and where rounding decides, bool."""
    result = np.full((case.batch, case.capacity), np.nan)
    close = np.zeros((case.batch, case.capacity), bool)
    for row, start in enumerate(cases.held(case)):
        end = min(start + case.tokens, case.capacity)
        weight = case.arrays["query_weight"][row].astype(np.float64)
        for s in range(end):
            mine = attention[row][:, :, s] * weight  # [n_q, T]
            if case.variant.features.observe == "mass":
                past = float(before[row, s]) if s < start else 0.0
                result[row, s] = float(case.arrays["decay"][row]) * past + mine.sum()
            else:
                important = cases.positions(case)[row][(mine >= 1).any(0)]
                result[row, s] = max([float(before[row, s]) if s < start else -1.0, *important])
                close[row, s] = (np.abs(mine - 1) < 1e-3).any()
    return result, close


def check(case: cases.Case, builds: Path, **options: Any) -> None:
    """Run a case and compare caches, output and what was received with float64."""
    before = {name: array.copy() for name, array in case.arrays.items()}
    exact = cases.appended(case, {name: cases.stored(case, name) for name in ("key", "latent")})
    simulate(case, builds, **options)
    check_caches(case, before, exact)
    present = {name: cases.stored(case, name) for name in exact}
    attention = cases.weights(case, present)
    error = cases.error(case.arrays["output"], cases.attended(case, present))
    assert error <= cases.TOLERANCE[case.variant.compute], error
    if case.variant.features.observe:
        expected, close = received(case, before["received"], attention)
        check_received(case.arrays["received"], before["received"], expected, close)
    changed = {"output", "received", "key_cache", "latent_cache", "key_scale", "latent_scale"}
    for name in before.keys() - changed:
        assert case.arrays[name].tobytes() == before[name].tobytes(), name


def check_received(found: Array, before: Array, expected: Array, close: Array) -> None:
    """Compare what rows have received; rows that hold no token are as they were."""
    unused = np.isnan(expected)
    assert found[unused].tobytes() == before[unused].tobytes(), "rows that are not in use"
    wanted, got = expected[~unused & ~close], found[~unused & ~close].astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=RECEIVED_TOLERANCE, atol=RECEIVED_TOLERANCE * 0.1)


def managed(
    of: Variant, observe: str | None = None, bias_rows: int = 0, positions: bool = False, branches: bool = False
) -> Variant:
    """A variant with these inputs of a managed cache."""
    return replace(of, features=Features(observe, bias_rows, positions, branches))
