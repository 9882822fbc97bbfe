"""The command line as a whole: which verbs there are. A verb's module is loaded when the verb is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from gta_edge.cli.loading import loading
from gta_edge.cli.option_groups import with_option_groups
from gta_edge.cli.output import FAILED, MAX_USAGE, as_line, command
from gta_edge.version import __version__

__all__ = ["VERBS", "Verb", "app", "function_of", "run"]


@dataclass(frozen=True)
class Verb:
    """A command, as far as the help of all commands shows it.

    Attributes:
        group: heading that it stands under.
        summary: what it does, in at most 45 characters.
        function: its name in the module that is called as the verb, where it differs from the verb.
    """

    group: str
    summary: str
    function: str = ""


VERBS = {
    "init": Verb("Make", "Write a checkpoint of random weights"),
    "export": Verb("Make", "Turn a checkpoint into a bundle (ONNX)"),
    "build": Verb("Make", "Build a TensorRT engine of a bundle"),
    "calibrate-cache": Verb("Make", "Measure what rows each layer's cache needs", "calibrate_cache"),
    "generate": Verb("Run", "Continue a prompt"),
    "chat": Verb("Run", "Talk with a model"),
    "serve": Verb("Run", "Serve OpenAI's clients, and a chat page"),
    "bench": Verb("Measure", "Time backends side by side"),
    "eval": Verb("Measure", "Loss and perplexity of a text", "evaluate"),
    "plan": Verb("Measure", "Memory and speed on a device, before a build"),
    "doctor": Verb("Check", "What this machine has, and what is missing"),
    "inspect": Verb("Check", "What a checkpoint, bundle or preset is"),
    "verify": Verb("Check", "Compare a bundle's logits with PyTorch's"),
}

_EXAMPLE = """\
  gta-edge export examples/tiny-gta bundle
  gta-edge generate bundle --prompt "def main():"
"""

# The base of what is wrong with a call: click's, which some versions of typer have as a part of their own.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]


def function_of(name: str) -> Callable[..., None]:
    """Return the function of a verb, loading its module; groups of options stand in its signature one by one."""
    module = import_module(f"gta_edge.cli.{name.replace('-', '_')}")
    return with_option_groups(getattr(module, VERBS[name].function or name))


class _Commands(MutableMapping[str, Any]):
    """click's commands by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made and name in VERBS:
            with loading():
                single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
                single.command(name, short_help=VERBS[name].summary)(command(function_of(name)))
                self._made[name] = typer.main.get_command(single)
        return self._made[name]

    def __setitem__(self, name: str, made: Any) -> None:
        self._made[name] = made

    def __delitem__(self, name: str) -> None:
        raise TypeError("verbs stay")

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class _Group(typer.core.TyperGroup):
    """All verbs, in groups; none is loaded for the help that lists them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for group in dict.fromkeys(verb.group for verb in VERBS.values()):
            with formatter.section(group):
                formatter.write_dl([(f"{name:<15}", v.summary) for name, v in VERBS.items() if v.group == group])
        with formatter.section("Example"):
            formatter.write(_EXAMPLE)


app = typer.Typer(
    name="gta-edge",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gta-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run GTA language models on constrained GPUs and CPUs.

    gta-edge COMMAND -h says more of each command.
    """


def run() -> None:
    """Parse the arguments and run the verb."""
    try:
        # in this mode click leaves its errors to us: they quote what was given, however long and whatever is in it
        status = app(standalone_mode=False)
    except _USAGE_ERRORS as error:
        if not error.message.startswith("Usage:"):  # without a command it is the help
            # before what is wrong with a value some versions of typer have pydantic's word for that
            error.message = as_line(error.message.removeprefix("Value error, "), MAX_USAGE)
        error.show()
        status = error.exit_code
    except typer.Abort:
        status = FAILED
    sys.stdout.flush()
    sys.exit(status or 0)
