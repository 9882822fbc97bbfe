"""Options that several commands take together: where they stand, what a command gets, what it overrides."""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from gta_edge.cli.option_groups import OptionGroup, with_option_groups


@dataclass(frozen=True)
class Inner(OptionGroup):
    size: Annotated[int, typer.Option(help="Inner.")] = 3


@dataclass(frozen=True, kw_only=True)
class Outer(OptionGroup):
    first: Annotated[str, typer.Option(help="First.")] = "a"
    inner: Inner


@dataclass(frozen=True, kw_only=True)
class Other(Outer):
    first: Annotated[str, typer.Option(help="Other.")] = "b"


def help_of(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation.__metadata__[0].help)


def test_a_group_stands_in_its_place_and_comes_as_one_object() -> None:
    got: list[Any] = []

    def verb(path: str, *, before: int = 1, outer: Outer, after: bool = False) -> None:
        got.append((path, before, outer, after))

    run = with_option_groups(verb)
    signature = inspect.signature(run)
    assert list(signature.parameters) == ["path", "before", "first", "size", "after"]
    assert [each.default for each in signature.parameters.values()][1:] == [1, "a", 3, False]
    run(path="p", before=2, first="x", size=5, after=True)
    assert got == [("p", 2, Outer(first="x", inner=Inner(5)), True)]


def test_a_command_overrides_an_option_where_it_stands() -> None:
    first, size = Other.parameters()
    assert (first.default, help_of(first), help_of(size)) == ("b", "Other.", "Inner.")
