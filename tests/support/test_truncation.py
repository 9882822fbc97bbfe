"""A file that is cut short while it is mapped: one line and status 1, in whatever thread and language it is read."""

import subprocess
import sys

import pytest

from tests.helpers.commands import environment

SETUP = """
import mmap, os, sys, tempfile
import numpy as np
from gta_edge.support.truncation import report_truncated_files
file = tempfile.NamedTemporaryFile()
file.write(bytes(2**22))
file.flush()
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
values = np.frombuffer(mapped, np.float32)
def read():
    os.truncate(file.name, 0)
    print(values.sum(), mapped[2**21])
"""

READERS = {
    "here": "read()",
    "in a thread": "import threading; thread = threading.Thread(target=read); thread.start(); thread.join()",
    # the simplest of ONNX Runtime's own threads: of its copy into another buffer, the GIL released
    "in a library": """
os.truncate(file.name, 0)
import ctypes
ctypes.CDLL(None).memcpy(ctypes.create_string_buffer(2**21), ctypes.c_void_p(values.ctypes.data + 2**20), 2**20)
""",
}


def run(program: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SETUP + program]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("reader", READERS)
def test_one_line_and_status_1(reader: str) -> None:
    found = run(f"report_truncated_files()\nreport_truncated_files()\n{READERS[reader]}\nprint('went on')")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("error: a file in use was cut short or changed on its disk; ")
    assert len(found.stderr.splitlines()) == 1


def test_without_it_the_process_ends_without_a_word() -> None:
    found = run(READERS["here"])
    assert (found.returncode < 0, found.stderr) == (True, "")


def test_the_command_has_it() -> None:
    program = """
import os, signal, sys
from gta_edge.cli import main
sys.argv = ["gta-edge", "--version"]
try:
    main()
except SystemExit:
    os.kill(os.getpid(), signal.SIGBUS)
"""
    found = run(program)
    assert found.returncode == 1
    assert found.stderr.startswith("error: a file in use was cut short or changed on its disk; ")
