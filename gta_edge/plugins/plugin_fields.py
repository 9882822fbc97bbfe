"""A plugin of TensorRT as its fields: read where one is made, written where one is serialised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gta_edge.errors import BackendError

__all__ = ["IGNORED_ATTRIBUTES", "FieldTypes", "Fields", "Value", "read_fields"]

IGNORED_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""Attributes by which TensorRT before 10.10 finds a plugin; they say nothing to the plugin itself."""

Value = int | float | str | tuple[int, ...]

_FIELD_TYPES: Mapping[type, tuple[str, ...]] = {
    int: ("INT32", "INT64"),
    float: ("FLOAT32", "FLOAT64"),
    str: ("CHAR",),
    tuple: ("INT32", "INT64"),
}


@dataclass(frozen=True)
class FieldTypes:
    """The fields of one plugin, by name: ``int``, ``float``, ``str``, or ``tuple`` for several whole numbers.

    Attributes:
        op: what errors call the plugin.
        attributes: of the node.
        built: what a build settled.
    """

    op: str
    attributes: Mapping[str, type]
    built: Mapping[str, type]

    def built_among(self, values: Mapping[str, Any]) -> bool:
        """Tell whether values of fields hold what a build settled: all of it, or nothing.

        Raises:
            BackendError: part of it is missing.
        """
        missing = [name for name in self.built if name not in values]
        if missing and len(missing) < len(self.built):
            raise BackendError(f"{self.op} in this engine lacks {', '.join(missing)}", "build the engine again")
        return not missing


def read_fields(trt: Any, types: FieldTypes, fields: Any) -> dict[str, Any]:
    """Return the values of plugin fields by name.

    Raises:
        BackendError: a field is not known, not of its type, or not one value where one is expected.
    """
    op, known = types.op, {**types.attributes, **types.built}
    values: dict[str, Any] = {}
    for field in (fields[place] for place in range(len(fields))):
        name = str(field.name)
        if name in IGNORED_ATTRIBUTES:
            continue
        if name not in known:
            expected = ", ".join((*types.attributes, *IGNORED_ATTRIBUTES))
            raise BackendError(f"{op} has no attribute {name}", f"expected {expected}")
        kind = known[name]
        if field.type not in [getattr(trt.PluginFieldType, each) for each in _FIELD_TYPES[kind]]:
            found = getattr(field.type, "name", field.type)
            raise BackendError(f"{op} has {name} of type {found}", f"expected {' or '.join(_FIELD_TYPES[kind])}")
        data = np.asarray(field.data)
        if kind is str:
            values[name] = data.astype(np.uint8).tobytes().rstrip(b"\0").decode("utf-8", "replace")
        elif kind is tuple:
            values[name] = tuple(int(each) for each in data.reshape(-1))
        elif data.size != 1:
            raise BackendError(f"{op} has {data.size} values for {name}", "expected one")
        else:
            values[name] = kind(data.reshape(-1)[0])
    return values


class Fields:
    """A ``PluginFieldCollection`` and all that it points to."""

    def __init__(self, trt: Any, values: Mapping[str, Value]) -> None:
        kinds = trt.PluginFieldType
        self._data: list[Any] = []
        self._fields: list[Any] = []
        for name, value in values.items():
            if isinstance(value, str):
                data, kind = np.frombuffer(value.encode(), np.int8), kinds.CHAR
            elif isinstance(value, float):
                data, kind = np.array([value], np.float32), kinds.FLOAT32
            else:
                data, kind = np.atleast_1d(np.array(value, np.int32)), kinds.INT32
            self._data.append((name, data))
            self._fields.append(trt.PluginField(name, data, kind))
        self.collection = trt.PluginFieldCollection(self._fields)
