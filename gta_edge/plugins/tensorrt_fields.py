"""A plugin of TensorRT as its fields: read where one is made, written where one is serialised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.plugins.grouped_latent_attention import OP, Sizes
from gta_edge.plugins.tensorrt_call import DECLARE_ALIAS, QUANTISED_CACHE, Built, Parameters
from gta_edge.plugins.tiling import Variant

__all__ = ["ATTRIBUTES", "IGNORED_ATTRIBUTES", "Fields", "field_values", "read_built", "read_fields", "read_parameters"]

IGNORED_ATTRIBUTES = ("plugin_namespace", "plugin_version")
ATTRIBUTES: Mapping[str, type] = {
    "num_query_heads": int,
    "num_key_heads": int,
    "num_latent_heads": int,
    "scale": float,
    QUANTISED_CACHE: int,
    DECLARE_ALIAS: int,
}
_OPTIONAL = (QUANTISED_CACHE, DECLARE_ALIAS)
_BUILT: Mapping[str, type] = {
    "key_dim": int,
    "latent_dim": int,
    "hidden_size": int,
    "compute": str,
    "cache": str,
    "architecture": str,
    "processors": int,
}
_FIELD_TYPES: Mapping[type, tuple[str, ...]] = {int: ("INT32", "INT64"), float: ("FLOAT32", "FLOAT64"), str: ("CHAR",)}


def read_fields(trt: Any, fields: Any) -> dict[str, Any]:
    """Return the values of plugin fields by name.

    Raises:
        BackendError: a field is not known, not of its type, or not one value.
    """
    known = {**ATTRIBUTES, **_BUILT}
    values: dict[str, Any] = {}
    for field in (fields[place] for place in range(len(fields))):
        name = str(field.name)
        if name in IGNORED_ATTRIBUTES:
            continue
        if name not in known:
            raise BackendError(
                f"{OP} has no attribute {name}; expected {', '.join((*ATTRIBUTES, *IGNORED_ATTRIBUTES))}"
            )
        kind = known[name]
        if field.type not in [getattr(trt.PluginFieldType, each) for each in _FIELD_TYPES[kind]]:
            found = getattr(field.type, "name", field.type)
            raise BackendError(f"{OP} has {name} of type {found}; expected {' or '.join(_FIELD_TYPES[kind])}")
        data = np.asarray(field.data)
        if kind is str:
            values[name] = data.astype(np.uint8).tobytes().rstrip(b"\0").decode("utf-8", "replace")
        elif data.size != 1:
            raise BackendError(f"{OP} has {data.size} values for {name}; expected one")
        else:
            values[name] = kind(data.reshape(-1)[0])
    return values


def read_parameters(values: Mapping[str, Any]) -> Parameters:
    """Return the attributes among the values.

    Raises:
        BackendError: one is missing or makes no sense.
    """
    missing = [name for name in ATTRIBUTES if name not in values and name not in _OPTIONAL]
    if missing:
        raise BackendError(f"{OP} lacks {', '.join(missing)}; export the model again")
    given = {name: values[name] for name in ATTRIBUTES if name in values}
    for name in _OPTIONAL:
        if given.get(name, 0) not in (0, 1):
            raise BackendError(f"{OP} has {name} = {given[name]}; expected 0 or 1")
        given[name] = bool(given.get(name, 0))
    return Parameters(**given)


def read_built(parameters: Parameters, values: Mapping[str, Any]) -> Built | None:
    """Return what a build settled, None where the plugin was serialised before it.

    Raises:
        BackendError: part of it is missing, or there are no such kernels.
    """
    missing = [name for name in _BUILT if name not in values]
    if len(missing) == len(_BUILT):
        return None
    if missing:
        raise BackendError(f"{OP} in this engine lacks {', '.join(missing)}; build the engine again")
    heads = (parameters.num_query_heads, parameters.num_key_heads, parameters.num_latent_heads)
    try:
        sizes = Sizes(*heads, values["key_dim"], values["latent_dim"], values["hidden_size"])
    except ValueError as error:
        raise BackendError(f"{OP} in this engine is damaged ({error}); build the engine again") from error
    return Built(Variant(sizes, values["compute"], values["cache"]), values["architecture"], values["processors"])


def field_values(parameters: Parameters, built: Built | None) -> dict[str, int | float | str]:
    """Return all that a plugin is made of, by the field's name."""
    values: dict[str, int | float | str] = {name: kind(getattr(parameters, name)) for name, kind in ATTRIBUTES.items()}
    if built is not None:
        variant = built.variant
        numbers = (variant.sizes.key_dim, variant.sizes.latent_dim, variant.sizes.hidden_size)
        all_values = (*numbers, variant.compute, variant.cache, built.architecture, built.processors)
        values |= dict(zip(_BUILT, all_values, strict=True))
    return values


class Fields:
    """A ``PluginFieldCollection`` and all that it points to."""

    def __init__(self, trt: Any, values: Mapping[str, int | float | str]) -> None:
        kinds = trt.PluginFieldType
        self._data: list[Any] = []
        self._fields: list[Any] = []
        for name, value in values.items():
            if isinstance(value, str):
                data, kind = np.frombuffer(value.encode(), np.int8), kinds.CHAR
            elif isinstance(value, float):
                data, kind = np.array([value], np.float32), kinds.FLOAT32
            else:
                data, kind = np.array([value], np.int32), kinds.INT32
            self._data.append((name, data))
            self._fields.append(trt.PluginField(name, data, kind))
        self.collection = trt.PluginFieldCollection(self._fields)
