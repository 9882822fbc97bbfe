"""The command line as a whole: which verbs there are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gta_edge.cli import bench, build, doctor, export, generate, init, inspect, plan, verify
from gta_edge.cli import eval as evaluate
from gta_edge.cli.output import FAILED, as_line, command
from gta_edge.version import __version__

__all__ = ["app", "run"]

app = typer.Typer(
    name="gta-edge",
    help="From a GTA language model to tokens on a constrained GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The base of what is wrong with a call: click's, which some versions of typer have as a part of their own.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]

_VERBS: dict[str, Callable[..., None]] = {
    "init": init.init,
    "export": export.export,
    "build": build.build,
    "inspect": inspect.inspect,
    "plan": plan.plan,
    "verify": verify.verify,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}
for _name, _function in _VERBS.items():
    app.command(_name)(command(_function))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gta-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """From a GTA language model to tokens on a constrained GPU."""


def run() -> None:
    """Parse the arguments and run the verb."""
    try:
        # in this mode click leaves its errors to us: they quote what was given, however long and whatever is in it
        status = app(standalone_mode=False)
    except _USAGE_ERRORS as error:
        if not error.message.startswith("Usage:"):  # without a command it is the help
            error.message = as_line(error.message)
        error.show()
        status = error.exit_code
    except typer.Abort:
        status = FAILED
    sys.stdout.flush()
    sys.exit(status or 0)
