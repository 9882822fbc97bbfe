"""Loading what a command needs: a library that is always needed may be there and broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from gta_edge.cli.signals import received_status
from gta_edge.support.text import one_line

__all__ = ["load_libraries", "loading"]

_ALWAYS_NEEDED = ("numpy", "safetensors", "rich")


@contextmanager
def loading() -> Iterator[None]:
    """End the command with one line where an import in the body fails, whatever that import raises."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if "--debug" in sys.argv:
            raise
        if (status := received_status()) is not None:  # in the middle of an import in C, which makes an error of it
            sys.exit(status)
        from gta_edge.libraries.install import reinstall_command

        said = f"{type(error).__name__}: {one_line(error)}"
        remedy = f"run: {reinstall_command()}"
        print(f"error: a library that gta-edge needs cannot be loaded ({said}); {remedy}", file=sys.stderr)
        sys.exit(1)


def load_libraries() -> None:
    """Load what every verb needs sooner or later."""
    with loading():
        for name in _ALWAYS_NEEDED:
            import_module(name)
