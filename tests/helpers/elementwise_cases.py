"""Inputs of the kernels between matmuls, and what they ought to give: in float64, with the roundings on the way."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
STEP = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of a number that is rounded to this type."""
SMALLEST = {"fp16": 2.0**-25, "bf16": 2.0**-134}
"""Largest error of one that is rounded to a subnormal number."""
FLOAT32 = 4e-6
"""Relative error of float32 arithmetic, of the hardware's approximations too."""
EPSILON = 1e-5


def values(*shape: int, compute: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(TYPES[compute])


def added(x: Tensor, addend: Tensor | None) -> Tensor:
    """The residual's new value, as torch adds: exactly what the kernel gives."""
    return x if addend is None else x + addend


def normed(total: Tensor, weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    exact = total.double()
    return exact / (exact.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def silu_multiplied(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU in float64, not rounded, times up."""
    return gate.double() * torch.sigmoid(gate.double()) * up.double()


def assert_near(found: Tensor, exact: Tensor, compute: str, roundings: int = 1, factor: Tensor | None = None) -> None:
    """Compare with float64, value by value.

    Args:
        found: of the type.
        exact: float64.
        compute: the type.
        roundings: to the type, on the way to the result.
        factor: by which a number that was rounded on the way is multiplied.
    """
    assert not found.isnan().any()
    bound = exact.abs() * (roundings * STEP[compute] + FLOAT32) + SMALLEST[compute]
    if factor is not None:
        bound = bound + SMALLEST[compute] * factor.double().abs()
    assert ((found.double() - exact).abs() <= bound).all(), ((found.double() - exact).abs() / bound).max()
