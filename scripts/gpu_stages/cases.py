"""What of GTA-1B the stages run by itself: sizes, types and steps. A new op, or a new kind of one, is a case here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, COMPUTE_TYPES, ROW_CACHE_TYPES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.tiling import BLOCK_TOKENS, Variant
from gta_edge.plugins.matmul import tiling as matmul

__all__ = [
    "ATTENTION",
    "ATTENTION_SIZES",
    "MATMULS",
    "STEPS",
    "AttentionCase",
    "ElementwiseCase",
    "MatMulCase",
    "attention",
    "matmuls",
]

ATTENTION_SIZES = {
    "gta-1b": Sizes(5, 1, 1, 64, 128, 1280),
    "gqa-1b": Sizes(20, 5, 5, 64, 64, 1280, has_gate=False, has_value_decoder=False),
    "6-2-3 heads": Sizes(6, 2, 3, 48, 80, 480),
}
"""The models', and one whose every size is another."""

ATTENTION = Variant(ATTENTION_SIZES["gta-1b"], "bf16", "bf16")
STEPS = ((1, 2048), (1, 32768), (2048, 2048))
"""New tokens and capacity: of a token with a short and a long context, and of a prompt."""


@dataclass(frozen=True)
class AttentionCase:
    """One call of the attention op."""

    group: str
    name: str
    variant: Variant
    past: tuple[int, ...]
    tokens: int
    capacity: int

    def call(self) -> tuple[Any, float]:
        """Return the call, its memory made, and the largest error that it may have."""
        from tests.helpers import block_gpu_calls, gpu_calls

        of = block_gpu_calls.BlockCall if self.variant.in_blocks else gpu_calls.Call
        return of(self.variant, self.past, self.tokens, self.capacity), gpu_calls.TOLERANCE[self.variant.compute]


@dataclass(frozen=True)
class MatMulCase:
    """One call of the matmul op."""

    group: str
    name: str
    variant: matmul.Variant
    rows: int
    in_features: int
    output_sizes: tuple[int, ...]
    bias: bool = False

    def call(self) -> tuple[Any, float]:
        """Return the call, its memory made, and the largest error that it may have."""
        from tests.helpers import gpu_matmul_calls, matmul_cases

        call = gpu_matmul_calls.Call(self.variant, self.rows, self.in_features, self.output_sizes, bias=self.bias)
        return call, matmul_cases.TOLERANCE[self.variant.compute]


@dataclass(frozen=True)
class ElementwiseCase:
    """A residual's addition with its norm, and SiLU(gate) · up, of so many rows."""

    group: str
    name: str
    compute: str
    rows: int
    width: int

    def call(self) -> tuple[Any, float]:
        """Return the calls, their memory made, and the largest error that they may have."""
        from tests.helpers import gpu_elementwise_calls

        call = gpu_elementwise_calls.Call(self.compute, self.rows, self.width)
        return call, gpu_elementwise_calls.TOLERANCE[self.compute]


def attention(
    tokens_of: Mapping[int, tuple[tuple[int, ...], int]], sizes: tuple[str, ...], *, blocks: bool = False
) -> Iterator[AttentionCase]:
    """Yield calls in all types, the most used first.

    Args:
        tokens_of: by new tokens, those in the cache of each row, and the capacity.
        sizes: keys of ``ATTENTION_SIZES``.
        blocks: whether the cache is in blocks, whose number then follows from the capacity.
    """
    types = [
        (compute, cache)
        for compute in reversed(COMPUTE_TYPES)
        for cache in (BLOCK_CACHE_TYPES if blocks else (compute, *ROW_CACHE_TYPES))
    ]
    types.sort(key=lambda each: each != ("bf16", "bf16"))
    for label in sizes:
        for compute, cache in types:
            variant = Variant(ATTENTION_SIZES[label], compute, cache)
            for tokens, (past, least) in tokens_of.items():
                capacity = -(-least // BLOCK_TOKENS) * BLOCK_TOKENS if blocks else least
                name = f"{label} {compute}/{cache}, {tokens} new of {capacity}"
                yield AttentionCase(f"attention {label} {compute}/{cache}", name, variant, past, tokens, capacity)


def matmuls(rows: tuple[int, ...], kinds: tuple[tuple[int, int], ...], shapes: tuple[Any, ...]) -> Iterator[MatMulCase]:
    """Yield calls in bf16 and fp16.

    Args:
        rows: of x.
        kinds: bits of a weight, and weights that share a scale.
        shapes: inputs, outputs, and whether there is a bias.
    """
    for bits, block in kinds:
        for compute in ("bf16", "fp16"):
            for count in rows:
                for inputs, outputs, bias in shapes:
                    if block and inputs % block:
                        continue
                    variant = matmul.Variant(bits, block, compute)
                    name = f"int{bits}/{block} {compute}, {count} x {inputs} x {sum(outputs)}"
                    group = f"matmul int{bits}/{block} {compute}"
                    yield MatMulCase(group, name, variant, count, inputs, outputs, bias)


_INT4 = matmul.Variant(4, 32, "bf16")
MATMULS = tuple(
    MatMulCase("gta-1b", "", _INT4, rows, inputs, outputs)
    for rows, inputs, outputs in (
        (1, 1280, (320, 64, 128, 1280)),
        (1, 1280, (3584, 3584)),
        (1, 3584, (1280,)),
        (1, 1280, (128256,)),
        (512, 1280, (3584, 3584)),
    )
)
"""Of a token and of a prompt."""
