"""Types that GPUs compute in and that caches hold."""

from __future__ import annotations

__all__ = ["CACHE_TYPES", "COMPUTE_TYPES"]

COMPUTE_TYPES = ("fp16", "bf16")
CACHE_TYPES = ("fp16", "bf16", "int8", "fp8")
