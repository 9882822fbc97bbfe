"""The commands, one file a verb: they translate between people and the package, and do nothing else."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from gta_edge.cli.loading import loading
from gta_edge.cli.signals import exit_status, handled, received_status

__all__ = ["main"]


def main() -> None:
    """Run ``gta-edge``; the exit status is that of the command."""
    try:
        with handled():
            _prepare_streams()
            from gta_edge.support.threads import spare_threads
            from gta_edge.support.truncation import report_truncated_files

            spare_threads()  # before numpy is loaded
            report_truncated_files()
            with loading():
                from gta_edge.cli.app import run
            run()
    except KeyboardInterrupt as interrupt:  # before or after the command proper; importing takes a second on a board
        sys.exit(exit_status(interrupt))
    except SystemExit:
        if (status := received_status()) is not None:  # whatever became of the exception
            sys.exit(status)
        raise
    except OSError as error:  # what is printed cannot be written
        if (status := received_status()) is not None:
            sys.exit(status)
        print(f"error: output: {error.strerror}; check where it goes", file=sys.stderr)
        sys.exit(1)


def _prepare_streams() -> None:
    """Make every text printable on any stream: what its encoding cannot say is escaped, a closed one takes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open as long as Python
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
