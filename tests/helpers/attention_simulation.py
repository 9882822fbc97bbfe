"""The attention's kernels in the simulation: what is compiled for a variant, and a call of them on a case's arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.plugins.attention import launches as plan
from gta_edge.plugins.attention.tiling import Program, Variant
from gta_edge.plugins.domain import KERNELS
from tests.helpers import attention_cases as cases
from tests.helpers.kernel_simulator import LaunchSpec, Simulator

ARCHITECTURE = "sm_87"


def programs_of(variant: Variant, min_tokens: int | None = 64) -> plan.Programs:
    """What is compiled for a variant, its splits shorter than is good for a GPU, so that small caches have several."""
    programs = plan.programs_for(variant, ARCHITECTURE)
    if min_tokens is None:
        return programs
    decodes = [
        replace(each, tiles=tuple((dict(each.tiles) | {"GTA_DECODE_MIN_TOKENS": min_tokens}).items()))
        for each in programs.decodes
    ]
    return replace(programs, decode=decodes[0], wide_decode=decodes[1] if len(decodes) > 1 else None)


def simulator(program: Program, sources: Path = KERNELS) -> Simulator:
    return Simulator(sources / program.source, program.kernels, program.defines(), [sources])


def simulate(
    case: cases.Case,
    builds: Path,
    *,
    seed: int = 0,
    processors: int = 4,
    sources: Path = KERNELS,
    prefill: int | None = None,
    min_tokens: int | None = 64,
) -> int:
    """Run the op's launches on the case's arrays; ``prefill`` takes that program whatever the number of tokens.

    Returns:
        Bytes of caches that were read (of a prompt, of the value decoder too).
    """
    programs = programs_of(case.variant, min_tokens)
    sizes = {"batch": case.batch, "tokens": case.tokens}
    if prefill is None:
        plans = plan.plan_attention(programs, processors, capacity=case.capacity, **sizes)
        launches, numbers = plans.launches, plans.numbers
    else:
        launches = plan.prefill_launches(programs.prefill[prefill], **sizes)
        numbers = {"tokens": case.tokens, "capacity": case.capacity}
    rows, splits = case.batch * case.tokens * case.variant.sizes.num_query_heads, numbers.get("splits", 1)
    workspace = {
        "mixes": np.full((rows, splits, case.variant.sizes.latent_dim), np.nan, np.float32),
        "sums": np.full((rows, splits, 2), np.nan, np.float32),
        "scores": np.full((rows, -(-case.capacity // 16) * 16), np.nan, np.float32),
    }
    values: dict[str, Any] = case.arrays | workspace | numbers
    values |= {"positions": len(case.arrays["cos"]), "scale": float(case.scale)}
    values["branch_rows"] = case.arrays["branches"].shape[1] if "branches" in case.arrays else 0
    specs = []
    for launch in launches:
        arguments = [values.get(name) for name in (*launch.signature.addresses, *launch.signature.numbers)]
        grid = launch.launch
        specs.append(LaunchSpec(launch.kernel, grid.grid, grid.threads, grid.shared_bytes, arguments))
    programme = simulator(launches[0].program, sources)
    programme.compile(builds)
    return programme.run(specs, seed)


def check(case: cases.Case, builds: Path, **options: Any) -> None:
    """Run a case and compare the caches and the output with float64."""
    before = {name: array.copy() for name, array in case.arrays.items()}
    exact = cases.appended(case, {name: cases.stored(case, name) for name in ("key", "latent")})
    simulate(case, builds, **options)
    check_caches(case, before, exact)
    # of 8 bits: what was written is right to within a code, and the output is of what was written
    present = {name: cases.stored(case, name) for name in exact} if case.variant.quantised else exact
    error = cases.error(case.arrays["output"], cases.attended(case, present))
    assert error <= cases.TOLERANCE[case.variant.compute], error
    for name in {"query", "key", "latent", "gate", "past_length", "cos", "sin", "value_decoder"} & set(before):
        assert case.arrays[name].tobytes() == before[name].tobytes(), name


def check_caches(case: cases.Case, before: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> None:
    """New rows are what they should be, rounded; all others are, bit for bit, what they were."""
    fresh = np.zeros((case.batch, case.capacity), bool)
    for row, start in enumerate(cases.held(case)):
        fresh[row, start : start + case.tokens] = True
    for name in ("key", "latent"):
        for part in (f"{name}_cache", f"{name}_scale") if case.variant.quantised else (f"{name}_cache",):
            old, new = (np.moveaxis(arrays[part], 1, 2)[~fresh] for arrays in (before, case.arrays))
            assert old.tobytes() == new.tobytes(), f"{part}: rows of earlier tokens, or of none"
        found, wanted = (np.moveaxis(values, 1, 2)[fresh] for values in (cases.stored(case, name), exact[name]))
        assert (np.abs(found - wanted) <= cases.rounding(case.variant, wanted)).all(), name
