"""The commands, one file a verb: they translate between people and the package, and do nothing else."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run ``gta-edge``; the exit status is that of the command."""
    from gta_edge.cli.app import run

    run()
