"""Rotary position embedding: which frequencies, and the cos and sin tables by position.

The tables are what the op takes, so scaling types exist here and nowhere else. Formulas follow transformers'
``modeling_rope_utils``: ``linear`` (positions divided by a factor), ``llama3`` (frequencies divided by wavelength,
arXiv 2407.21783) and ``yarn`` (arXiv 2309.00071). They are evaluated in float64 and rounded once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import ConfigError

__all__ = ["ROPE_TYPES", "RopeScaling", "inverse_frequencies", "rope_tables"]

# The parameters of each type: True where it must be given.
ROPE_TYPES: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": False,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}
# Keys that transformers writes into the same dict and that are read elsewhere.
_FOREIGN_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class RopeScaling:
    """A rope type and its parameters, both as transformers names them.

    Raises:
        ConfigError: unknown type, or a parameter that is missing, unknown, no number or out of range.
    """

    rope_type: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type is {self.rope_type!r}; supported types are {', '.join(ROPE_TYPES)}; "
                "other types change with the length of the prompt, which one fixed table cannot express"
            )
        known = ROPE_TYPES[self.rope_type]
        for name, value in self.parameters.items():
            if name not in known:
                raise ConfigError(
                    f"rope scaling of type {self.rope_type!r} has the unknown parameter {name!r}; "
                    f"expected {', '.join(known) or 'none'}"
                )
            if isinstance(value, bool) != (name == "truncate") or not isinstance(value, (int, float)):
                raise ConfigError(f"rope scaling parameter {name} is {value!r}; expected a number")
            may_be_zero = name in ("truncate", "mscale", "mscale_all_dim")
            if not 0 <= value <= sys.float_info.max or (value == 0 and not may_be_zero):
                raise ConfigError(f"rope scaling parameter {name} is out of range; expected a finite number above 0")
        for name, required in known.items():
            if required and name not in self.parameters:
                raise ConfigError(f"rope scaling of type {self.rope_type!r} lacks the parameter {name!r}")
        if self.rope_type == "llama3" and self.parameters["high_freq_factor"] <= self.parameters["low_freq_factor"]:
            raise ConfigError(
                f"rope scaling has high_freq_factor {self.parameters['high_freq_factor']} and low_freq_factor "
                f"{self.parameters['low_freq_factor']}; the first must be the larger one"
            )

    @classmethod
    def from_config(cls, entry: object) -> RopeScaling:
        """Read the value of ``rope_scaling`` or ``rope_parameters`` in a ``config.json``; None means default."""
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise ConfigError(f"rope scaling is {entry!r}; expected an object with a rope_type")
        rope_type = entry.get("rope_type", entry.get("type", "default"))
        if not isinstance(rope_type, str):
            raise ConfigError(f"rope_type is {rope_type!r}; expected one of {', '.join(ROPE_TYPES)}")
        if entry.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"partial_rotary_factor is {entry['partial_rotary_factor']!r}; only 1.0 is supported "
                "(every key dimension rotates)"
            )
        parameters = {k: v for k, v in entry.items() if k not in _FOREIGN_KEYS and v is not None}
        return cls(rope_type, parameters)

    def to_config(self) -> dict[str, Any] | None:
        """Return the value for ``rope_scaling`` in a ``config.json``."""
        return None if self.rope_type == "default" else {"rope_type": self.rope_type, **self.parameters}


def inverse_frequencies(
    dim: int, theta: float, scaling: RopeScaling, max_position_embeddings: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Return the rotation per position of each pair of dimensions, and the factor on cos and sin.

    Args:
        dim: width of a key, even.
        theta: base of the geometric series of wavelengths.
        scaling: type and parameters.
        max_position_embeddings: stands in for an ``original_max_position_embeddings`` that is not given.

    Returns:
        float64 [dim/2] in radians per position, and a plain factor (1 but for yarn).
    """
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    frequencies = theta**-exponents
    p = scaling.parameters
    original = float(p.get("original_max_position_embeddings", max_position_embeddings))
    if scaling.rope_type == "linear":
        return frequencies / p["factor"], 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, p, original), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, theta, p, original)
    return frequencies, 1.0


def _llama3(frequencies: npt.NDArray[np.float64], p: Mapping[str, float], original: float) -> npt.NDArray[np.float64]:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    kept = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / p["factor"]


def _yarn(
    frequencies: npt.NDArray[np.float64], theta: float, p: Mapping[str, float], original: float
) -> tuple[npt.NDArray[np.float64], float]:
    """Pairs that turn often within the original length are kept, those that turn rarely are stretched."""
    dim = 2 * len(frequencies)

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(p.get("beta_fast") or 32.0)
    high = pair_that_turns(p.get("beta_slow") or 1.0)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, as the reference has it
    stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    factor = p["factor"]
    attention_factor = p.get("attention_factor")
    if attention_factor is None:
        attention_factor = magnitude(factor)
        if p.get("mscale") and p.get("mscale_all_dim"):
            attention_factor = magnitude(factor, p["mscale"]) / magnitude(factor, p["mscale_all_dim"])
    return stretched * frequencies / factor + (1 - stretched) * frequencies, attention_factor


def rope_tables(
    dim: int, theta: float, scaling: RopeScaling, positions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cos and sin, float32 [positions, dim/2], scaling applied."""
    frequencies, factor = inverse_frequencies(dim, theta, scaling, positions)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)
