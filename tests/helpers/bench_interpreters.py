"""Interpreters for ``NAME@PYTHON`` that are real ones, behind a script that does something to them."""

import sys
from pathlib import Path


def interpreter(path: Path, body: str) -> Path:
    """A shell script that is called as Python is; ``$PYTHON`` is the one that runs the tests."""
    path.write_text(f'#!/bin/sh\nPYTHON="{sys.executable}"\n{body}\n')
    path.chmod(0o755)
    return path


def wrong(path: Path, bundle: Path, other: Path) -> Path:
    """Python, but asked to open one bundle it opens another: a worker that gives wrong answers at full speed."""
    return interpreter(path, f"""sed -u 's#"{bundle}"#"{other}"#' | "$PYTHON" "$@\"""")


def dying(path: Path, requests: int) -> Path:
    """Python, but a worker hears only so many requests and then ends."""
    # what only imports, to see whether it can, reads nothing
    return interpreter(path, f'[ "$1" = -c ] && exec "$PYTHON" "$@"\nsed -u {requests}q | "$PYTHON" "$@"')
