"""What all of our ops have in common: domain, version, opset, and the sources of their kernels."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DOMAIN", "KERNELS", "OPSET", "VERSION"]

DOMAIN = "gta"
VERSION = 1
OPSET = 24
"""Standard opset of the function body and of every graph that is written."""

KERNELS = Path(__file__).with_name("kernels")
"""Directory of the CUDA sources."""
