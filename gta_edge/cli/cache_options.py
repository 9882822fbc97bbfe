"""Options that say which rows of a KV cache stay, made of the table of policies; several commands take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gta_edge.cli.choices import checked, completed
from gta_edge.runtime.cache_policies import COMMON, OPTIONS, POLICIES

if TYPE_CHECKING:
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["CacheChoice", "policy_of", "takes_cache_policy"]

CacheChoice = dict[str, Any]
"""A policy as it was asked for: its ``name``, and those of its options that were given. It can be sent as JSON."""

_ARGUMENT = "cache"
_FLAG = "--cache-"


def takes_cache_policy(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of cache policies; it gets a ``CacheChoice`` as its argument ``cache``, or None."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != _ARGUMENT]
    added = [_policy_parameter(), *map(_parameter, _in_order())]

    @wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(f"{_ARGUMENT}_{name}") for name in ("policy", *OPTIONS)}
        command(**arguments, **{_ARGUMENT: _choice(given)})

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


def policy_of(choice: CacheChoice | None) -> CachePolicy | None:
    """Return the policy that was asked for.

    Raises:
        InputError: an option that the policy does not have, or that makes no sense.
    """
    if choice is None:
        return None
    from gta_edge.runtime.cache_policies import policy

    return policy(**choice)


def _choice(given: dict[str, Any]) -> CacheChoice | None:
    name = given.pop("policy")
    options = {option: value for option, value in given.items() if value is not None}
    if name is not None:
        return {"name": name, **options}
    if options:
        raise typer.BadParameter(f"{_flag(next(iter(options)))} is for a cache policy: give --cache-policy too")
    return None


def _in_order() -> list[str]:
    return [*COMMON, *(name for name in OPTIONS if name not in COMMON)]


def _flag(option: str) -> str:
    return _FLAG + option.replace("_", "-")


def _policy_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--cache-policy",
        metavar="NAME",
        help=f"Which rows of the cache stay: {', '.join(POLICIES)}; all by default.",
        parser=checked("no cache policy is called {}; there are {}", lambda: POLICIES),
        autocompletion=completed(lambda: POLICIES),
    )
    return _made("policy", Annotated[str | None, option])


def _parameter(name: str) -> inspect.Parameter:
    kind: Any = OPTIONS[name].kind
    return _made(name, Annotated[kind | None, typer.Option(_flag(name), help=OPTIONS[name].help)])


def _made(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(f"{_ARGUMENT}_{name}", kind, default=None, annotation=annotation)
