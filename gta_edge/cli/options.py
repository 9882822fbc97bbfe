"""Arguments and options that several commands take, with their help: each is written here once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import BACKEND_NAMES, Backend, CacheDtype, backend_list, completed_list, value_of
from gta_edge.cli.option_groups import OptionGroup
from gta_edge.errors import InputError
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.runtime.session import Session
    from gta_edge.support.progress import Progress

__all__ = [
    "BackendOption",
    "Batch",
    "BundleArgument",
    "CacheDtypeOption",
    "ReplacePicture",
    "SamplingOptions",
    "SessionOptions",
    "Threads",
    "VerifyHashes",
    "backends_option",
    "checked_options",
    "whole_numbers",
]

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")]
BackendOption = Annotated[Backend, typer.Option(help="auto: the fastest that works.")]
CacheDtypeOption = Annotated[CacheDtype | None, typer.Option(help="Type of the cache; the backend's own by default.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; one per core by default.")]
VerifyHashes = Annotated[bool, typer.Option("--verify-hashes", help="Hash the weights first.")]
Batch = Annotated[int, typer.Option(help="Sequences at once.")]
ReplacePicture = Annotated[bool, typer.Option("--force", help="Replace a picture that is there.")]


def backends_option(metavar: str, explained: str) -> Any:
    """Return the option of several backends with commas between; what it parses to is empty for all of them."""
    return typer.Option(
        metavar=metavar,
        help=f"Of {', '.join(BACKEND_NAMES)}; {explained}",
        parser=backend_list,
        autocompletion=completed_list(BACKEND_NAMES),
    )


def whole_numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Return what an option lists, with commas between.

    Raises:
        InputError: something else is in the list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"{option} is {brief(text)}", f"expected whole numbers with commas between, such as {example}"
        ) from error


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``generate`` as they are, by its names.

    Raises:
        InputError: one is out of range.
    """
    from gta_edge.runtime.generation.loop import checked_limit
    from gta_edge.runtime.generation.sampling import Sampling

    checked_limit(options.get("max_new_tokens", 1))
    Sampling(**{name: value for name, value in options.items() if name != "max_new_tokens"})
    return dict(options)


@dataclass(frozen=True, kw_only=True)
class SessionOptions(OptionGroup):
    """What opens a bundle for running it."""

    backend: BackendOption = Backend.AUTO
    cache_dtype: CacheDtypeOption = None
    threads: Threads = None
    verify_hashes: VerifyHashes = False
    cache: CacheOptions

    def load(self, bundle: Path, *, progress: Progress, trees: bool = False) -> Session:
        """Return a session of a bundle; what it raises is ``gta_edge.load``'s."""
        from gta_edge.runtime.registry import load

        return load(
            bundle,
            self.backend.value,
            threads=self.threads,
            cache_dtype=value_of(self.cache_dtype),
            cache=self.cache.policy(),
            trees=trees,
            verify_hashes=self.verify_hashes,
            progress=progress,
        )


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """How a next token is drawn; a command may say more of an option by overriding its field."""

    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default outside chats.")] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None

    def given(self) -> dict[str, Any]:
        """Return those that were given, as ``gta_edge.generate`` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}
