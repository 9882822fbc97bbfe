"""Ops' plugins in TensorRT's registry: their classes over one TensorRT module, and their creators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, ClassVar

from gta_edge.errors import BackendError
from gta_edge.libraries.tensorrt import TensorRT
from gta_edge.plugins.domain import DOMAIN, VERSION
from gta_edge.plugins.plugin_base import Plugin, reported
from gta_edge.plugins.plugin_call_base import Fields, FieldTypes, ParametersBase, read_fields

__all__ = ["Creator", "OpPlugin", "plugin_class", "register_plugins"]


@dataclass(frozen=True)
class OpPlugin:
    """An op as a plugin.

    Attributes:
        fields: by which its plugins are made and serialised.
        read_parameters: makes its parameters of the values of fields.
        behaviour: what its plugins do.
    """

    fields: FieldTypes
    read_parameters: Callable[[Mapping[str, Any]], ParametersBase[Any]]
    behaviour: type[Plugin[Any, Any, Any]]


class Creator:
    """Makes an op's plugins from a node's attributes, and from what an engine holds of them.

    Args:
        op: whose plugins.
    """

    trt: ClassVar[Any]
    base: ClassVar[Any]

    def __init__(self, op: OpPlugin) -> None:
        self.base.__init__(self)
        self._op = op
        self.name, self.plugin_version, self.plugin_namespace = op.fields.op, str(VERSION), DOMAIN
        # The parser passes on the attributes that are declared here.
        examples = {name: (1,) if kind is tuple else kind(1) for name, kind in op.fields.attributes.items()}
        self._declared = Fields(self.trt, examples)
        self.field_names = self._declared.collection

    @reported
    def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
        """Make a plugin.

        Args:
            name: of the layer.
            field_collection: the node's attributes, in the phase RUNTIME what ``get_fields_to_serialize`` returned.
            phase: BUILD or RUNTIME.

        Raises:
            BackendError: a field is missing, unknown, ill-typed or out of range.
        """
        values = read_fields(self.trt, self._op.fields, field_collection)
        parameters = self._op.read_parameters(values)
        behaviour: Any = self._op.behaviour  # mypy does not take a generic class for hashable
        return plugin_class(self.trt, behaviour)(parameters, parameters.read_built(values))


# --- the classes over one TensorRT module ----------------------------------------------------------------------------


@cache
def plugin_class(trt: Any, behaviour: Any) -> Any:
    """Return a plugin's class, made at the first call: its behaviour, and TensorRT's classes mixed in.

    Args:
        trt: the TensorRT module.
        behaviour: what the plugin does, a subclass of ``Plugin``.
    """
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    # The bindings' classes have a metaclass of their own.
    return type(trt.IPluginV3)(behaviour.__name__, (behaviour, *bases), {"trt": trt, "bases": bases})


def _creator_class(trt: Any) -> Any:
    """Return the creators' class, like ``plugin_class``."""
    base = trt.IPluginCreatorV3One
    return type(base)(Creator.__name__, (Creator, base), {"trt": trt, "base": base})


# --- the registry ----------------------------------------------------------------------------------------------------

_creators: list[Any] = []  # the registry refers to them for as long as the process lives
_registering = Lock()


def register_plugins(trt: TensorRT, ops: Iterable[OpPlugin]) -> None:
    """Register the creators of ops' plugins, except those that are registered.

    Args:
        trt: whose registry.
        ops: whose plugins.

    Raises:
        BackendError: it has no plugins, or refuses one.
    """
    if not trt.plugins:
        raise BackendError(
            f"{trt.flavour} {trt.version_text} takes no plugins",
            "build the form without them: gta-edge build --engine tensorrt-rtx",
        )
    with _registering:
        registry = trt.module.get_plugin_registry()
        for op in ops:
            name = op.fields.op
            if registry.get_creator(name, str(VERSION), DOMAIN) is not None:
                continue
            creator = _creator_class(trt.module)(op)
            if not registry.register_creator(creator, DOMAIN):
                raise BackendError(
                    f"{trt.flavour} {trt.version_text} did not register the plugin {DOMAIN}::{name} version {VERSION}",
                    "start a new process in which nothing else of that name is registered",
                )
            _creators.append(creator)
