"""Threads under a limit of processes, which binds a user other than root."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gta_edge.errors import CapacityError
from gta_edge.support.threads import startable_threads, threads_to_use
from tests.helpers.commands import environment

LIMITED = """
import os, resource, sys
from pathlib import Path
{imports}
from gta_edge.support.threads import startable_threads, threads_to_use

def tasks(user):
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                found += len(list((process / "task").iterdir()))
        except OSError:
            pass
    return found

def limit(threads):
    \"\"\"Let this user have that many threads beside those that there are.\"\"\"
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(64000 + os.getpid() % 1000)  # a user of nothing else
    own = tasks(os.getuid())
    resource.setrlimit(resource.RLIMIT_NPROC, (own + threads, own + threads))
"""


def run(program: str, imports: str = "") -> str:
    """Run a program that may limit its threads, in a process of its own; return what it printed."""
    command = [sys.executable, "-c", LIMITED.replace("{imports}", imports) + program]
    variables = environment(OPENBLAS_NUM_THREADS="1")
    found = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=100)
    assert (found.returncode, found.stderr) == (0, ""), found
    return found.stdout


def test_all_can_be_started_where_nothing_limits_them() -> None:
    assert startable_threads(5) == 5
    assert threads_to_use(4, asked=True) == threads_to_use(4, asked=False) == 4
    assert threads_to_use(1, asked=True) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux alone")
def test_a_limit_is_found_and_nothing_is_left_behind() -> None:
    program = """
import threading
limit(3)
print(startable_threads(2), startable_threads(3), startable_threads(9), threads_to_use(8, asked=False))
print(threading.active_count())
limit(0)
print(startable_threads(2), threads_to_use(8, asked=False))
"""
    assert run(program) == "2 3 3 3\n1\n0 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux alone")
def test_who_asked_for_more_is_told() -> None:
    program = """
limit(3)
try:
    threads_to_use(8, asked=True)
except Exception as error:
    print(type(error).__name__, error)
"""
    found = run(program)
    assert found.startswith(f"{CapacityError.__name__} 8 threads were asked for, and this process may start ")
    assert found.endswith("raise the limit, or give --threads 3\n")
    assert len(found.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux alone")
@pytest.mark.parametrize(("threads", "found"), [(0, "1"), (500, "None")])
def test_openblas_is_told(threads: int, found: str) -> None:
    program = f"""
os.environ.pop("OPENBLAS_NUM_THREADS")
limit({threads})
spare_threads()
print(os.environ.get("OPENBLAS_NUM_THREADS"))
"""
    assert run(program, "from gta_edge.support.threads import spare_threads\n") == f"{found}\n"


OPEN = """
bundle = {bundle!r}
for threads in (None, 1, 3):
    try:
        with load(bundle, {backend!r}, threads=threads) as session:
            print(session.forward(np.array([[1, 2, 3]])).shape)
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux alone")
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_session_opens_with_the_threads_that_there_are(backend: str, tiny_bundle: Path) -> None:
    """ONNX Runtime waits for ever, and OpenMP ends the process, where one of their threads does not start."""
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own no other user may read
        Path(temporary).chmod(0o755)
        # without graphs that were made from it: to make them anew needs modules that the other user may not read
        kept = shutil.ignore_patterns("engines")
        directory = str(shutil.copytree(tiny_bundle, Path(temporary) / "bundle", ignore=kept))
        if any(path.stat().st_mode & 0o005 != 0o005 for path in Path(directory).resolve().parents):
            pytest.skip("the directory for temporary files is private, and another user is to read there")
        imports = "import numpy as np\nfrom gta_edge.runtime.registry import load\n"
        # opened once, so that all modules are loaded, and the graph is kept, before there is a limit
        imports += (
            f"with load({directory!r}, {backend!r}, threads=1) as session:\n    session.forward(np.array([[1]]))\n"
        )
        assert run(f"limit(1)\n{OPEN.format(bundle=directory, backend=backend)}", imports) == (
            "(1, 300)\n(1, 300)\nCapacityError\n"
        )
