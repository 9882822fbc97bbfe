"""What the ops' ``plugin_call.py`` share: a node's attributes and what a build settles, as TensorRT's fields and back.

Nothing here calls TensorRT but by the module that it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from gta_edge.errors import BackendError

__all__ = [
    "CALLS_CACHED",
    "IGNORED_ATTRIBUTES",
    "Built",
    "Call",
    "FieldTypes",
    "Fields",
    "ParametersBase",
    "Value",
    "read_fields",
]

CALLS_CACHED = 1024
"""Calls of which types, shapes and workspace are checked once."""

IGNORED_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""Attributes by which TensorRT before 10.10 finds a plugin; they say nothing to the plugin itself."""

Value = int | float | str | tuple[int, ...]
Variant = TypeVar("Variant")

_FIELD_TYPES: Mapping[type, tuple[str, ...]] = {
    int: ("INT32", "INT64"),
    float: ("FLOAT32", "FLOAT64"),
    str: ("CHAR",),
    tuple: ("INT32", "INT64"),
}


# --- fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldTypes:
    """The fields of one plugin, by name: ``int``, ``float``, ``str``, or ``tuple`` for several whole numbers.

    Attributes:
        op: what errors call the plugin.
        attributes: of the node.
        variant: what the kernels of a built engine are compiled for, beside the attributes.
        made_by: command that makes such nodes, ``"export"`` or ``"build"``.
        optional: attributes that a node need not have.
    """

    op: str
    attributes: Mapping[str, type]
    variant: Mapping[str, type]
    made_by: str
    optional: Collection[str] = ()

    @property
    def built(self) -> Mapping[str, type]:
        """What a build settles."""
        return {**self.variant, "architecture": str, "processors": int}

    def attributes_among(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the node's attributes among values of fields.

        Raises:
            BackendError: one is missing.
        """
        missing = [name for name in self.attributes if name not in values and name not in self.optional]
        if missing:
            raise BackendError(f"{self.op} lacks {', '.join(missing)}", f"{self.made_by} the model again")
        return {name: values[name] for name in self.attributes if name in values}

    def built_among(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a build settled among values of fields: all of it, or nothing.

        Raises:
            BackendError: part of it is missing.
        """
        found = {name: values[name] for name in self.built if name in values}
        missing = [name for name in self.built if name not in found]
        if found and missing:
            raise BackendError(f"{self.op} in this engine lacks {', '.join(missing)}", "build the engine again")
        return found


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


# --- a node and its calls --------------------------------------------------------------------------------------------


class Call(Protocol):
    """What one call of an op is, beside its addresses."""

    @property
    def variant(self) -> Any:
        """What its kernels are compiled for."""

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What its launches depend on, as the kernels' ``plan`` takes it."""


@dataclass(frozen=True)
class Built(Generic[Variant]):
    """What a build settled: the engine fits this, and its workspace was reserved for it."""

    variant: Variant
    architecture: str
    """Of the GPU that it was built on, ``sm_87``."""
    processors: int
    """Multiprocessors of that GPU."""


class ParametersBase(ABC, Generic[Variant]):
    """A node's attributes, and what TensorRT asks about the node by them; an op's own is a frozen dataclass."""

    @property
    @abstractmethod
    def fields(self) -> FieldTypes:
        """The plugin's fields."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that there may be, in order."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""

    @property
    @abstractmethod
    def typed_like(self) -> tuple[int, ...]:
        """For each output, the place of the input that has its type."""

    @abstractmethod
    def check_number(self, inputs: int) -> None:
        """Raise BackendError where the op has no such number of inputs."""

    @abstractmethod
    def allowed_types(self, place: int, types: Sequence[str], num_inputs: int) -> tuple[str, ...]:
        """Return the types that an input or output may have, given those of all before it; none if there is no such."""

    @abstractmethod
    def variant_values(self, variant: Variant) -> dict[str, Value]:
        """Return the values of ``fields.variant``."""

    @abstractmethod
    def read_variant(self, values: Mapping[str, Any]) -> Variant:
        """Return a variant, given the values of ``fields.variant``.

        Raises:
            BackendError: there are no such kernels.
        """

    @property
    def circumstances(self) -> str:
        """What else the allowed types depend on, as errors say it behind the first input's type."""
        return ""

    def check_types(self, types: Sequence[str]) -> None:
        """Raise BackendError where the inputs' types are not a combination that there are kernels for."""
        self.check_number(len(types))
        op, first = self.fields.op, f"{self.inputs[0]} of {types[0]}{self.circumstances}"
        for place, (name, found) in enumerate(zip(self.inputs, types, strict=False)):
            allowed = self.allowed_types(place, types, len(types))
            if found not in allowed:
                raise BackendError(
                    f"{op} has {name} of type {found} with {first}",
                    f"expected {' or '.join(allowed)}: retype the model, and build a strongly typed network",
                )

    def read_built(self, values: Mapping[str, Any]) -> Built[Variant] | None:
        """Return what a build settled, given the values of a plugin's fields; None if it was serialised before that.

        Raises:
            BackendError: part of it is missing, or there are no such kernels.
        """
        found = self.fields.built_among(values)
        return Built(self.read_variant(found), found["architecture"], found["processors"]) if found else None

    def field_values(self, built: Built[Variant] | None) -> dict[str, Value]:
        """Return all that a plugin is made of, by the field's name."""
        values: dict[str, Value] = {name: kind(getattr(self, name)) for name, kind in self.fields.attributes.items()}
        if built is not None:
            values |= self.variant_values(built.variant)
            values |= {"architecture": built.architecture, "processors": built.processors}
        return values
