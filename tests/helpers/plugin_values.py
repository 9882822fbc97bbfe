"""Arguments of TensorRT plugins, as TensorRT gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_lean_bindings", reason="needs tensorrt-lean-cu13-bindings and -libs")
KINDS = trt.PluginFieldType


class Fields:
    """A collection of fields and what it points to, as a parser makes it; TensorRT's own holds addresses only."""

    def __init__(self, **values: Any) -> None:
        self.kept = []
        for name, value in values.items():
            if isinstance(value, tuple):
                data, kind = value
            elif isinstance(value, str):
                data, kind = np.frombuffer(value.encode(), np.int8), KINDS.CHAR
            elif isinstance(value, float):
                data, kind = np.array([value], np.float32), KINDS.FLOAT32
            else:
                data, kind = np.array([value], np.int32), KINDS.INT32
            self.kept.append((name, data, trt.PluginField(name, data, kind)))
        self.collection = trt.PluginFieldCollection([field for *_, field in self.kept])


def numbers(kind: Any, dtype: Any, *values: float) -> tuple[Any, Any]:
    return np.array(values, dtype), kind


def descs(types: list[Any], of: list[tuple[int, ...]]) -> list[Any]:
    made = []
    for each, shape in zip(types, of, strict=True):
        desc = trt.PluginTensorDesc()
        desc.type, desc.dims = each, trt.Dims(shape)
        made.append(desc)
    return made


def bounds(types: list[Any], least: list[tuple[int, ...]], most: list[tuple[int, ...]]) -> list[Any]:
    """A profile, as the builder describes it: -1 where sizes differ."""
    dynamic = [tuple(x if x == y else -1 for x, y in zip(a, b, strict=True)) for a, b in zip(least, most, strict=True)]
    made = []
    for desc, low, high in zip(descs(types, dynamic), least, most, strict=True):
        bound = trt.DynamicPluginTensorDesc()
        bound.desc, bound.min, bound.opt, bound.max = desc, trt.Dims(low), trt.Dims(high), trt.Dims(high)
        made.append(bound)
    return made
