"""Which test modules can run on a board: those with tests for a GPU that import with what is installed there.

    python scripts/board_tests.py

Prints their paths, for ``make test-jetson``; of the others, what they lack, on stderr.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS_GPU = re.compile(r"pytest\.mark\.(?:gpu|tensorrt)\b|^@on_gpu\b", re.MULTILINE)


def main() -> None:
    """Print the paths."""
    sys.path.insert(0, str(ROOT))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if not NEEDS_GPU.search(path.read_text(encoding="utf-8")):
            continue
        name = path.relative_to(ROOT)
        try:
            import_module(".".join(name.with_suffix("").parts))
        except (ModuleNotFoundError, pytest.skip.Exception) as error:  # what else is wrong, pytest will say
            print(f"left out: {name} ({error})", file=sys.stderr)
        except Exception:
            print(name)
        else:
            print(name)


if __name__ == "__main__":
    main()
