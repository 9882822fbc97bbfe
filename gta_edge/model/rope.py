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
from gta_edge.support.text import brief

__all__ = ["ROPE_TYPES", "RopeScaling", "check_table_size", "inverse_frequencies", "rope_tables", "rope_type_of"]

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
# Parameters of types that are not supported: beside another type, one of the two is a mistake.
_UNSUPPORTED_KEYS = {"long_factor", "short_factor", "long_mscale", "short_mscale", "mrope_section"}

_MAX_TABLE_BYTES = 2**30  # of cos and sin together: two million positions of a key width of 128
_BLOCK_VALUES = 2**20  # angles at a time, which are float64


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
                f"rope_type is {brief(self.rope_type)}; supported types are {', '.join(ROPE_TYPES)}",
                "other types change with the length of the prompt or the layer, which one fixed table cannot express",
            )
        known = ROPE_TYPES[self.rope_type]
        for name, value in self.parameters.items():
            if name not in known:
                raise ConfigError(
                    f"rope scaling of type {self.rope_type!r} has the unknown parameter {brief(name)}",
                    f"expected {', '.join(known) or 'none'}",
                )
            _check_parameter(name, value)
        for name, required in known.items():
            if required and name not in self.parameters:
                raise ConfigError(f"rope scaling of type {self.rope_type!r} lacks the parameter {name!r}", "add it")
        if self.rope_type == "llama3" and self.parameters["high_freq_factor"] <= self.parameters["low_freq_factor"]:
            raise ConfigError(
                f"rope scaling has high_freq_factor {brief(self.parameters['high_freq_factor'])} and low_freq_factor "
                f"{brief(self.parameters['low_freq_factor'])}",
                "the first must be the larger one",
            )

    @classmethod
    def from_config(cls, entry: object) -> RopeScaling:
        """Read the value of ``rope_scaling`` or ``rope_parameters`` in a ``config.json``; None means default.

        As in transformers, keys that the type does not use mean nothing; nor does a parameter that is null, but for
        ``truncate``, where it means false.

        Raises:
            ConfigError: it is no object, or describes no scaling that is supported.
        """
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise ConfigError(f"rope scaling is {brief(entry)}", "expected an object with a rope_type")
        rope_type = rope_type_of(entry)
        _check_type_of_parameters(entry)
        if entry.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(
                f"partial_rotary_factor is {brief(entry['partial_rotary_factor'])}",
                "only 1.0 is supported (every key dimension rotates)",
            )
        known = ROPE_TYPES.get(rope_type, {})
        for name, value in entry.items():
            describes_more = name in _UNSUPPORTED_KEYS or isinstance(value, (Mapping, list))
            if describes_more and value and name not in known and name not in _FOREIGN_KEYS:
                raise ConfigError(
                    f"rope scaling of type {brief(rope_type)} has {brief(name)} ({brief(value)}), which no supported "
                    f"type has",
                    f"those are {', '.join(ROPE_TYPES)}: remove it if the model was trained without it",
                )
        parameters = {name: entry[name] for name in known if entry.get(name) is not None}
        if "truncate" in known and "truncate" in entry:
            parameters["truncate"] = False if entry["truncate"] is None else entry["truncate"]
        return cls(rope_type, parameters)

    def to_config(self) -> dict[str, Any] | None:
        """Return the value for ``rope_scaling`` in a ``config.json``."""
        return None if self.rope_type == "default" else {"rope_type": self.rope_type, **self.parameters}


def rope_type_of(entry: Mapping[str, Any]) -> str:
    """Return the type that an object of rope settings names, under its new key or its old one.

    Raises:
        ConfigError: it is no text, or the keys contradict each other, where releases of transformers differ in which
            one counts.
    """
    named = {key: entry[key] for key in ("rope_type", "type") if entry.get(key) is not None}
    for value in named.values():
        if not isinstance(value, str):
            raise ConfigError(f"rope_type is {brief(value)}", f"expected one of {', '.join(ROPE_TYPES)}")
    if len(set(named.values())) > 1:
        raise ConfigError(
            f"rope_type is {brief(named['rope_type'])} and type, its old name, is {brief(named['type'])}",
            "remove the one that is wrong",
        )
    return next(iter(named.values()), "default")


def _check_type_of_parameters(entry: Mapping[str, Any]) -> None:
    """Raise ConfigError where the type is null and something is said of it: what that means, nothing says."""
    named = [key for key in ("rope_type", "type") if key in entry]
    parameters = [name for name, value in entry.items() if value is not None and name not in _FOREIGN_KEYS]
    if named and parameters and all(entry[key] is None for key in named):
        raise ConfigError(
            f"{named[0]} is null, with {brief(parameters[0])} beside it ({brief(entry[parameters[0]])})",
            f"expected one of {', '.join(ROPE_TYPES)}: restore the type that the model was trained with",
        )


def _check_parameter(name: str, value: object) -> None:
    if isinstance(value, bool) != (name == "truncate") or not isinstance(value, (int, float)):
        expected = "true or false" if name == "truncate" else "a number"
        raise ConfigError(f"rope scaling parameter {name} is {brief(value)}", f"expected {expected}")
    may_be_zero = name in ("truncate", "mscale", "mscale_all_dim")
    if not 0 <= value <= sys.float_info.max or (value == 0 and not may_be_zero):
        raise ConfigError(f"rope scaling parameter {name} is {brief(value)}", "expected a finite number above 0")


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
        float64 [dim/2] in radians per position, and a plain factor (1 but for yarn); both finite in float32 too.

    Raises:
        ConfigError: the parameters are so large or small that they are not.
    """
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = _scaled(dim, float(theta), scaling, max_position_embeddings)
            rounded = np.append(frequencies, factor).astype(np.float32)
    except (ArithmeticError, ValueError):
        rounded = None
    if rounded is None or not np.isfinite(rounded).all():
        raise ConfigError(
            f"rope_theta {brief(theta)} with rope scaling {brief(scaling.to_config())} gives rotations that are not "
            "finite",
            "expected parameters of usual size: restore those that the model was trained with",
        )
    return frequencies, factor


def _scaled(
    dim: int, theta: float, scaling: RopeScaling, max_position_embeddings: int
) -> tuple[npt.NDArray[np.float64], float]:
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    p = {name: float(value) for name, value in scaling.parameters.items()}
    original = p.get("original_max_position_embeddings", float(max_position_embeddings))
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

    low = pair_that_turns(p.get("beta_fast", 32.0))
    high = pair_that_turns(p.get("beta_slow", 1.0))
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


def check_table_size(dim: int, positions: int) -> None:
    """Raise ConfigError where the tables of ``positions`` keys of width ``dim`` are too large to be made."""
    size = positions * dim * np.dtype(np.float32).itemsize
    if size > _MAX_TABLE_BYTES:
        raise ConfigError(
            f"max_position_embeddings is {positions} and a key is {dim} wide, so the cos and sin tables of RoPE take "
            f"{size / 1e9:.1f} GB",
            f"expected at most {_MAX_TABLE_BYTES / 1e9:.1f} GB: lower max_position_embeddings in "
            f"config.json to the longest context that is needed, at most {_MAX_TABLE_BYTES // (4 * dim)}",
        )


def rope_tables(
    dim: int, theta: float, scaling: RopeScaling, max_position_embeddings: int, positions: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cos and sin, float32 [positions, dim/2], scaling applied.

    Args:
        dim: width of a key, even.
        theta: base of the geometric series of wavelengths.
        scaling: type and parameters.
        max_position_embeddings: positions of the model, on which the scaling may depend.
        positions: how many of them to make tables for; all by default.

    Raises:
        ConfigError: they would be too large, or not finite.
    """
    positions = max_position_embeddings if positions is None else positions
    check_table_size(dim, positions)
    frequencies, factor = inverse_frequencies(dim, theta, scaling, max_position_embeddings)
    cos, sin = (np.empty((positions, dim // 2), np.float32) for _ in range(2))
    step = max(1, _BLOCK_VALUES // dim)
    for start in range(0, positions, step):
        rows = slice(start, min(start + step, positions))
        angles = np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] * frequencies
        np.multiply(np.cos(angles), factor, out=cos[rows], casting="same_kind")
        np.multiply(np.sin(angles), factor, out=sin[rows], casting="same_kind")
    return cos, sin
