"""A systemd unit that runs a service from the machine's start on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["systemd_unit"]


def systemd_unit(
    command: Sequence[str], *, user: str, description: str, writable: Sequence[Path], stop_seconds: float
) -> str:
    """Return a unit of type service (systemd.service(5)).

    Args:
        command: what it runs, the program's path first, which must be absolute.
        user: whom it runs as.
        description: of the service, in one line.
        writable: directories that it may write into, where they are there; all others are read-only to it.
        stop_seconds: that it may take to end.
    """
    return f"""\
[Unit]
Description={_escaped(description)}
After=network.target

[Service]
ExecStart={" ".join(_quoted(word).replace("$", "$$") for word in command)}
User={_escaped(user)}
Restart=on-failure
RestartSec=2
TimeoutStopSec={stop_seconds:.0f}
# after SIGTERM, when it has answered what it had
SuccessExitStatus=143
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={" ".join(_quoted(f"-{path}") for path in writable)}

[Install]
WantedBy=multi-user.target
"""


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")


def _quoted(word: str) -> str:
    """Return a word as systemd reads it: its own quotes and specifiers. Variables are those of commands alone."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("\n", "\\n")):
        word = word.replace(character, escape)
    return f'"{word}"'
