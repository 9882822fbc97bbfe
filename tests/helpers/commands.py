"""Commands run as users run them, and what they left."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'gta-edge'; from gta_edge.cli import main; main()"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document of a command that succeeded, with nothing beside it."""
        assert (self.status, self.err) == (0, "")
        assert self.out.endswith("\n")
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def content(self) -> dict[str, Any]:
        """The document without what every document has."""
        document = self.document
        assert document.pop("schema_version") == 1
        return document

    @property
    def error(self) -> str:
        """The message of a command that failed as commands must: status 1, one line, no results."""
        assert (self.status, self.out) == (1, ""), self
        assert self.err.startswith("error: "), self
        assert self.err.endswith("\n")
        assert len(self.err.splitlines()) == 1, self
        assert "Traceback" not in self.err
        assert "unexpected" not in self.err, self
        return self.err[len("error: ") : -1]

    @property
    def usage(self) -> str:
        """What a command says that was called wrongly: status 2, the reason, and mostly a hint at its help."""
        assert (self.status, self.out) == (2, ""), self
        assert re.search(r"^Error: .+$", self.err, re.MULTILINE), self
        assert "Traceback" not in self.err
        return self.err


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def environment(**changes: str) -> dict[str, str]:
    """Variables under which a process of its own finds the package that is tested."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}


def run(*arguments: object, timeout: float = 120, extra: dict[str, str] | None = None, **options: Any) -> Result:
    """Run the command in a process of its own, as a shell would, with ``extra`` variables."""
    process = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(**(extra or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    return Result(process.returncode, process.stdout, process.stderr)


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Everything below a directory, hidden files too, with what would betray a change."""
    found = {}
    for path in sorted(directory.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(directory))] = (info.st_mode, 0 if path.is_dir() else info.st_mtime_ns)
    return found
