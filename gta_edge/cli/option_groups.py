"""Options that several commands take together, written once as the fields of a dataclass; typer itself has no such."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OptionGroup", "with_option_groups"]


class OptionGroup:
    """A dataclass whose fields are options, in typer's form, or further groups.

    A command that has a parameter of this type takes its options at that place, and gets them as one object.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """Return the options as parameters of a command."""
        hints = get_type_hints(cls, include_extras=True)
        return [made for field in fields(cls) for made in _expanded(_parameter(field.name, hints, field.default))]

    @classmethod
    def collected(cls, given: Mapping[str, Any]) -> Self:
        """Return the group made of what a command was given, by its parameters' names."""
        hints = get_type_hints(cls)
        return cls(**{field.name: _value(hints[field.name], field.name, given) for field in fields(cls)})


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose groups of options stand in its signature one by one."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        _parameter(name, hints, parameter.default) for name, parameter in inspect.signature(command).parameters.items()
    ]
    expanded = [made for parameter in own for made in _expanded(parameter)]

    @wraps(command)
    def run(**given: Any) -> None:
        command(**{parameter.name: _value(parameter.annotation, parameter.name, given) for parameter in own})

    run.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return run


def _parameter(name: str, hints: Mapping[str, Any], default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])


def _expanded(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    kind = parameter.annotation
    return kind.parameters() if _is_group(kind) else [parameter]


def _value(kind: Any, name: str, given: Mapping[str, Any]) -> Any:
    return kind.collected(given) if _is_group(kind) else given[name]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, OptionGroup)
