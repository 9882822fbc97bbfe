"""Damaged graphs, with a manifest that fits them, on every path to a session or an engine.

Each ends in one line, or in numbers that may be wrong. None ends the process, takes for ever or all memory, or writes
outside of the bundle. The cases run in processes of their own (``graph_cases``).
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gta_edge.export.pipeline import export_model
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.commands import environment
from tests.helpers.fuzz import CASES

SECONDS = 120
"""A case takes less than one, on an idle machine."""
AT_ONCE = 500


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    small = {"vocab_size": 40, "max_position_embeddings": 32}
    models = {
        "gta": (reference.gta_entries(**small), ("int4", "fp32")),
        "gqa": (reference.llama_entries(tie_word_embeddings=False, **small), ("bf16", "int8")),
    }
    (directory / "bundles").mkdir()
    for name, (entries, precisions) in models.items():
        write_checkpoint(directory / name, entries, reference.random_weights(entries))
        for precision in precisions:
            export_model(
                directory / name, directory / "bundles" / f"{name}-{precision}", precision=precision, verify=False
            )
    return directory


def run(directory: Path, cases: list[int]) -> list[dict[str, Any]]:
    """Run cases, in a new process after each that one did not outlive; return what was found of each."""
    found: list[dict[str, Any]] = []
    while cases:
        command = [sys.executable, "-m", "tests.fuzz.graph_cases", str(directory), *map(str, cases[:AT_ONCE])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            lines = list(lines_of(process))
            process.kill()
        documents = [json.loads(line) for line in lines]
        found += [document for document in documents if "case" in document]
        begun = next((d["begins"] for d in reversed(documents) if "begins" in d), None)
        assert begun is not None, (directory / "said").read_text(errors="replace")
        if "begins" in documents[-1]:
            said = (directory / "said").read_text(errors="replace")[:2000]
            found.append({"case": begun, "ends": {}, "faults": {"process": f"ended by {process.returncode}: {said}"}})
            shutil.rmtree(directory / "scratch", ignore_errors=True)
        cases = cases[cases.index(begun) + 1 :]
    return found


def lines_of(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    """Yield what a process writes, line by line, until it ends or nothing comes for too long."""
    assert process.stdout is not None
    pending, last = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, last + SECONDS - time.monotonic()))
        block = os.read(process.stdout.fileno(), 2**16) if ready else b""
        if not block:
            return
        last = time.monotonic()
        *lines, pending = (pending + block).split(b"\n")
        yield from lines


def test_damaged_graphs_end_in_one_line(directory: Path) -> None:
    found = run(directory, list(range(CASES)))
    assert [each["case"] for each in found] == list(range(CASES))
    faults = [each for each in found if each["faults"]]
    kept = os.environ.get("GTA_EDGE_FUZZ_REPORT")
    if kept:
        Path(kept).write_text("\n".join(json.dumps(each) for each in found))
    assert not faults, f"{len(faults)} of {len(found)}, the first: {json.dumps(faults[:3], indent=1)}"
    refused = sum(any(each["ends"].values()) for each in found)
    assert 0.3 * CASES < refused < CASES  # the damage is neither none nor all the same


def test_a_fault_would_be_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory a process cannot even begin: that is attributed to its first case, and the others still run."""
    program = directory / "sitecustomize.py"
    program.write_text(
        "import sys\n"
        "if 'tests.fuzz.graph_cases' in ' '.join(sys.orig_argv):\n"
        "    import os, tests.fuzz.graph_cases as cases\n"
        "    whole = cases.run_case\n"
        "    cases.run_case = lambda bundles, case: os.abort() if case == 1 else whole(bundles, case)\n"
        "    cases.main(cases.Path(sys.orig_argv[-4]), [int(each) for each in sys.orig_argv[-3:]])\n"
        "    os._exit(0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = run(directory, [0, 1, 2])
    assert [each["case"] for each in found if "process" in each["faults"]] == [1]
    assert [each["case"] for each in found] == [0, 1, 2]
