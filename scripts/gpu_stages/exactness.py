"""Stages that compare single calls of the kernels with float64, memory around them included.

    python -m scripts.gpu_stages.exactness decode|prefill|blocks|few|many

A wrong result does not keep the next case from running; an error of CUDA ends the process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from scripts.gpu_stages import cases
from scripts.gpu_stages.figures import REHEARSAL, Verdict, tell

_KINDS = ((4, 32), (8, 0), (4, 128), (8, 64))
_SHAPES = ((1280, (320, 64, 128, 1280), False), (3584, (1280,), True), (384, (48, 37), True))


def cases_of(group: str) -> Iterator[Any]:
    """Yield the calls of a group, what is used most first."""
    if REHEARSAL:
        yield from _small(group)
        return
    others = tuple(name for name in cases.ATTENTION_SIZES if name != "gta-1b")
    if group == "decode":
        short = {1: ((0, 4999, 2500, 17), 5000), 3: ((0, 330, 17, 100), 333), 16: ((0, 1984, 15, 16), 2000)}
        yield from cases.attention(short, ("gta-1b",))
        yield from cases.attention({1: ((32767,), 32768)}, ("gta-1b",))
        yield from cases.attention({tokens: short[tokens] for tokens in (3, 16)}, others)
    elif group == "prefill":
        yield from cases.attention({17: ((0, 23, 5), 40), 300: ((700, 1), 1000)}, ("gta-1b", *others))
        yield from cases.attention({2048: ((0,), 2048)}, ("gta-1b",))
    elif group == "blocks":
        calls = {1: ((0, 4999, 2527, 32), 5000), 16: ((0, 1999, 15, 16), 2032), 300: ((700, 1), 1000)}
        yield from cases.attention(calls, ("gta-1b", "gqa-1b"), blocks=True)
        yield from cases.attention({2048: ((0,), 2048)}, ("gta-1b",), blocks=True)
    elif group == "few":
        yield from cases.matmuls((1, 16), _KINDS, _SHAPES)
        yield from cases.matmuls((2, 8, 9), _KINDS, _SHAPES[:1])
    else:
        yield from cases.matmuls((17, 512), _KINDS, _SHAPES)
        yield from cases.matmuls((64, 128), _KINDS, _SHAPES[:1])


def _small(group: str) -> Iterator[Any]:
    """One call each, for the simulation."""
    if group == "decode":
        yield next(cases.attention({1: ((17, 0), 40)}, ("gta-1b",)))
        yield next(cases.attention({2: ((17, 0), 40)}, ("gqa-1b",)))
    elif group == "prefill":
        yield next(cases.attention({20: ((3,), 40)}, ("gta-1b",)))
    elif group == "blocks":
        yield next(cases.attention({9: ((27,), 64)}, ("gqa-1b",), blocks=True))
    else:
        rows = 3 if group == "few" else 20
        yield next(cases.matmuls((rows,), ((8, 0),), ((136, (16, 21), True),)))


def main(*groups: str) -> int:
    """Run the calls of some groups.

    Returns:
        the status: 0 if every result was right.
    """
    if REHEARSAL:
        from tests.helpers.simulated_gpu import install

        install()
    verdict = Verdict()
    for case in chain.from_iterable(map(cases_of, groups)):
        try:
            call, bound = case.call()
            call.run()
        except Exception as error:  # of CUDA, after which nothing works in this process
            tell("problem", why=f"{case.name}: {type(error).__name__}: {str(error)[:200]}")
            raise
        why = ""
        try:
            call.check()
        except AssertionError as failure:
            why = str(failure).splitlines()[0][:200] if str(failure) else "memory is not what it should be"
        error = max(call.output_errors())
        verdict.tell("exact", not why, group=case.group, case=case.name, error=error, bound=bound, why=why)
    return verdict.end()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
