"""The text of the small example model: the sources of the Python standard library, some modules held out.

Every Python installation has them, so anyone can train and measure on (nearly) the same text without a download.

    python examples/corpus.py heldout.txt      # writes the held-out text, for `gta-edge eval --text`
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

# Whole modules, so that no part of a held-out file was seen in training.
HELD_OUT = frozenset(
    [
        "argparse.py",
        "bisect.py",
        "calendar.py",
        "cmd.py",
        "csv.py",
        "fnmatch.py",
        "fractions.py",
        "gzip.py",
        "heapq.py",
        "textwrap.py",
        "json/decoder.py",
        "json/encoder.py",
        "queue.py",
        "sched.py",
        "shlex.py",
        "statistics.py",
        "string.py",
        "tempfile.py",
        "uuid.py",
        "asyncio/locks.py",
        "asyncio/queues.py",
        "email/message.py",
        "http/cookies.py",
        "logging/config.py",
        "unittest/case.py",
        "concurrent/futures/thread.py",
        "xml/dom/minidom.py",
    ]
)
# Tests, tables, vendored code and demos: little to learn Python from.
_SKIPPED = frozenset(
    [
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "turtledemo",
        "msilib",
        "config-3",
    ]
)


def read(held_out: bool, root: Path | None = None) -> list[str]:
    """Return the files of one part as texts, in a fixed order.

    Args:
        held_out: True for the modules kept from training, False for all others.
        root: the standard library's directory; that of this Python by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED & set(name.split("/")[:-1]) or (name in HELD_OUT) != held_out:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/corpus.py OUTPUT")
    Path(sys.argv[1]).write_text("\n".join(read(held_out=True)), encoding="utf-8")
