"""How a checkpoint's matrices are quantised, by ``quantization_config`` of its ``config.json``.

Read are three layouts, as their own tools and transformers write them; what one of them cannot say without other
arithmetic (other widths, floating point codes, rotations, a cache in integers) is refused by name.

- ``gptq``: AutoGPTQ and GPTQModel, 4 and 8 bits.
- ``awq``: AutoAWQ's ``gemm``, 4 bits.
- ``compressed-tensors``: ``pack-quantized``, 4 and 8 bits, and ``int-quantized``, 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gta_edge.errors import ConfigError
from gta_edge.support.text import brief

__all__ = ["AWQ", "COMPRESSED", "GPTQ", "WeightScheme", "weight_scheme"]

GPTQ, AWQ, COMPRESSED = "gptq", "awq", "compressed-tensors"

_ENTRY = "quantization_config"
_OTHER_NAMES = ("quantization", "compression_config")  # MLX's, and compressed-tensors' before 0.6
_ORIGINAL = "give the checkpoint that it was made from"
_READ = f"read are gptq, awq and compressed-tensors with integers: {_ORIGINAL}"
_FORMAT_ENTRIES = ("checkpoint_format", "format")  # of the same, by different releases
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class WeightScheme:
    """What the layout of quantised matrices depends on, beside their shapes.

    Attributes:
        layout: ``GPTQ``, ``AWQ`` or ``COMPRESSED``.
        bits: widths that a matrix may have.
        zero_offset: what has been taken from zero points before they were stored: 1 in GPTQ's first format.
    """

    layout: str
    bits: tuple[int, ...]
    zero_offset: int = 0


def weight_scheme(entries: Mapping[str, Any]) -> WeightScheme | None:
    """Return how the matrices of a checkpoint may be quantised, None where they are not.

    Args:
        entries: of ``config.json``.

    Raises:
        ConfigError: in a way that is not read.
    """
    for name in _OTHER_NAMES:
        if entries.get(name):
            raise ConfigError(f"{name} is {brief(entries[name])}", _READ)
    config = entries.get(_ENTRY)
    if not config:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method == GPTQ:
        return _gptq(config)
    if method == AWQ:
        return _awq(config)
    if method == COMPRESSED:
        return _compressed(config)
    what = f"{_ENTRY} is {brief(config)}" if method is None else f"{_ENTRY}.quant_method is {brief(method)}"
    raise ConfigError(what, _READ)


def _gptq(config: Mapping[str, Any]) -> WeightScheme:
    bits = _bits(config, "bits", (4, 8))
    formats = {_one_of(config, name, (None, "gptq", "gptq_v2")) for name in _FORMAT_ENTRIES} - {None}
    if len(formats) > 1:
        raise ConfigError(f"{_ENTRY} has {' and '.join(_FORMAT_ENTRIES)} that differ", _ORIGINAL)
    _one_of(config, "pack_dtype", (None, "int32"))
    _nothing(config, "is_marlin_format")
    _nothing(config, "dynamic")  # matrices that differ in width or are left out
    return WeightScheme(GPTQ, (bits,), zero_offset=0 if "gptq_v2" in formats else 1)


def _awq(config: Mapping[str, Any]) -> WeightScheme:
    bits = _bits(config, "bits", (4,))
    for name in ("version", *_FORMAT_ENTRIES):
        _one_of(config, name, (None, "gemm", "GEMM"))
    return WeightScheme(AWQ, (bits,))


def _compressed(config: Mapping[str, Any]) -> WeightScheme:
    formats = ("pack-quantized", "int-quantized")
    _one_of(config, "format", (None, "dense", *formats, "mixed-precision"))
    _one_of(config, "quantization_status", (None, "compressed"))
    _nothing(config, "kv_cache_scheme")
    _nothing(config, "transform_config")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise ConfigError(f"{_ENTRY}.sparsity_config is {brief(sparsity)}", f"only dense weights are read: {_ORIGINAL}")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ConfigError(f"{_ENTRY}.config_groups is {brief(groups)}", "expected an object of objects")
    bits = []
    for name, group in groups.items():
        where = f"config_groups.{brief(name)}"
        _one_of(group, "format", (None, *formats), where)
        bits += _weights(group.get("weights"), f"{where}.weights")
        for activations in ("input_activations", "output_activations"):
            _activations(group.get(activations), f"{where}.{activations}")
    return WeightScheme(COMPRESSED, tuple(sorted(set(bits))))


def _weights(weights: object, where: str) -> list[int]:
    """Return the width of a group of matrices, none where they are not quantised."""
    if weights is None:
        return []
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{_ENTRY}.{where} is {brief(weights)}", "expected an object")
    _one_of(weights, "type", (None, "int"), where)
    _one_of(weights, "strategy", (None, *_STRATEGIES), where)
    _one_of(weights, "dynamic", (None, False), where)
    return [_bits(weights, "num_bits", (4, 8), where)]


def _activations(activations: object, where: str) -> None:
    """Refuse activations that are rounded by scales of the checkpoint's own; other rounding is an engine's business."""
    if activations is None or (isinstance(activations, Mapping) and activations.get("dynamic") is True):
        return
    raise ConfigError(f"{_ENTRY}.{where} is {brief(activations)}", f"only weights may have scales: {_ORIGINAL}")


def _bits(config: Mapping[str, Any], name: str, allowed: tuple[int, ...], where: str = "") -> int:
    found = config.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found not in allowed:
        path = ".".join(filter(None, (_ENTRY, where, name)))
        raise ConfigError(
            f"{path} is {brief(found)}", f"weights of {' or '.join(map(str, allowed))} bits are read: {_ORIGINAL}"
        )
    return found


def _one_of(config: Mapping[str, Any], name: str, allowed: tuple[object, ...], where: str = "") -> object:
    found = config.get(name)
    if not (found is None or isinstance(found, (str, bool))) or found not in allowed:
        path = ".".join(filter(None, (_ENTRY, where, name)))
        read = ", ".join(dict.fromkeys(str(each).lower() for each in allowed if each is not None))
        raise ConfigError(f"{path} is {brief(found)}", f"read is {read}: {_ORIGINAL}")
    return found


def _nothing(config: Mapping[str, Any], name: str) -> None:
    if config.get(name):
        raise ConfigError(f"{_ENTRY}.{name} is {brief(config[name])}", f"it is not read: {_ORIGINAL}")
