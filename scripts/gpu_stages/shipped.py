"""The stage of the shipped model: exported, verified on the backend ``torch`` and generating, by the commands.

    python -m scripts.gpu_stages.shipped

Each command is a process, as a user starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.gpu_stages.figures import REHEARSAL, Verdict

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-gta"
_PROMPT = "def __init__(self, "


def main() -> int:
    """Run the commands for each precision.

    Returns:
        the status: 0 if all of them succeeded.
    """
    verdict = Verdict()
    tokens = "4" if REHEARSAL else "64"
    for precision in ("int4",) if REHEARSAL else ("bf16", "int4"):
        with tempfile.TemporaryDirectory(prefix="gta-edge-") as scratch:
            bundle = str(Path(scratch) / "bundle")
            _command("export", str(CHECKPOINT), bundle, "--precision", precision, "--no-verify")
            found, figures = _command("verify", bundle, "--checkpoint", str(CHECKPOINT), "--backend", "torch"), {}
            options = ("--prompt", _PROMPT, "--max-new-tokens", tokens)
            for _ in range(1 if REHEARSAL else 2):  # the first compiles what is not compiled yet
                figures = _command("generate", bundle, "--backend", "torch", *options)
            timings = figures.get("timings", {})
            verdict.tell(
                "shipped",
                bool(found.get("passed") and figures.get("text")),
                precision=precision,
                error=found.get("backends", {}).get("torch", {}).get("max_rel_error"),
                text=figures.get("text"),
                ttft_ms=timings.get("ttft_ms"),
                tpot_ms=timings.get("tpot_ms"),
            )
    return verdict.end()


def _command(*arguments: str) -> dict[str, Any]:
    """Run one of the package's commands, and return what it prints as JSON; nothing if it is not that."""
    command = [sys.executable, "-m", "gta_edge", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
