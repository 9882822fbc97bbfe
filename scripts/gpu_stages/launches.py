"""A few launches of every kernel, for tools that watch them.

    python -m scripts.gpu_stages.launches small|large

``small`` ones are for compute-sanitizer, which takes many times as long; ``large`` ones, once each, for Nsight Compute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from scripts.gpu_stages import cases
from scripts.gpu_stages.figures import REHEARSAL, tell


def _small() -> Iterator[Any]:
    calls = {1: ((0, 299, 64), 300), 5: ((285, 17), 300), 40: ((3, 90), 140)}
    if REHEARSAL:
        yield next(cases.attention({1: ((0, 29, 30), 30)}, ("gta-1b",)))
        return
    types = (("bf16", "bf16"), ("fp16", "int8"), ("bf16", "fp8"), ("bf16", "int4"), ("fp16", "int4v2"))
    in_blocks = cases.attention(calls, ("gta-1b", "gqa-1b"), blocks=True)
    for case in (*cases.attention(calls, tuple(cases.ATTENTION_SIZES)), *in_blocks):
        if (case.variant.compute, case.variant.cache) in types:
            yield case
    shapes = ((1280, (320, 64, 128, 1280), True), (136, (16, 21), True))
    yield from cases.matmuls((1, 9, 40, 130), ((4, 32), (8, 0)), shapes)
    for compute in ("bf16", "fp16"):
        yield from (cases.ElementwiseCase("elementwise", compute, compute, 3, width) for width in (264, 1280))


def _large() -> Iterator[Any]:
    if REHEARSAL:
        yield next(cases.matmuls((1,), ((8, 0),), ((136, (16, 21), False),)))
        return
    for tokens, capacity in cases.STEPS:
        past = (capacity - tokens,)
        yield cases.AttentionCase("large", "", cases.ATTENTION, past, tokens, capacity)
    yield from cases.MATMULS
    yield cases.ElementwiseCase("large", "elementwise", "bf16", 1, 1280)


def main(*sizes: str) -> None:
    """Run the calls; whether they are right is for other stages to say."""
    if REHEARSAL:
        from tests.helpers.simulated_gpu import install

        install()
    count = 0
    for case in chain.from_iterable({"small": _small, "large": _large}[size]() for size in sizes):
        call, _ = case.call()
        call.run()
        count += 1
        print(f"ran {case.group} {case.name}", flush=True)
    tell("ran", calls=count)


if __name__ == "__main__":
    main(*sys.argv[1:])
