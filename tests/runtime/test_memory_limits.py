"""Sessions that run out of the host's memory: one error of ours, and a session that can be used again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import environment

PROGRAM = """
import json, resource, sys
import numpy as np
from gta_edge.formats.bundle import Bundle
from gta_edge.errors import GtaEdgeError
from gta_edge.runtime.registry import load
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession

def leave(mebibytes):
    \"\"\"Leave that much address space beside what is in use.\"\"\"
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20 if mebibytes else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

def open_session():
    if backend == "onnxruntime-cuda":
        return OnnxRuntimeCudaSession(Bundle.open(bundle), compute="fp32", device="cpu", capacity_step=128)
    return load(bundle, backend, threads=1, chunk_size=128)

def end(what, call):
    try:
        call()
        found[what] = "went well"
    except GtaEdgeError as error:
        found[what] = f"{type(error).__name__}: {error}"
    except BaseException as error:
        found[what] = f"unexpected {type(error).__name__}: {error}"
    leave(0)

found = {}
backend, bundle = sys.argv[1:]
ids = np.arange(1, 6)[None]
with open_session() as session:
    # whoever looks whether there is memory beforehand must not be asked: it is what happens otherwise that counts
    session._cache.check_memory = lambda *arguments: None
    before = session.forward(ids)
    session.reset()
    session.forward(np.ones((1, 3), np.int64))
    rows = np.ones((20000, 2), np.int64)
    session.reset()
    leave(200)
    end("a cache", lambda: session.forward(rows))
    found["after it"] = [session.length.tolist() == [0] * len(session.length), session.cache_bytes]
    session.reset()
    found["again"] = bool(np.array_equal(session.forward(ids), before))
    session.reset()
    wide = np.ones((300, 128), np.int64)
    session.forward(np.ones((300, 1), np.int64))
    session.truncate(0)
    session._cache.reserve(300, 128, session._resize)
    leave(60)
    end("a step", lambda: session.forward(wide))
    found["length"] = int(session.length.max())
    session.reset()
    session.truncate(0)
    narrow = session.forward(np.ones((300, 2), np.int64))
    found["usable"] = bool(np.isfinite(narrow).all())
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda", "torch"])
def test_a_session_outlives_a_lack_of_memory(backend: str, tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, backend, str(tiny_bundle)]
    variables = environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    process = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=200)
    assert (process.returncode, process.stderr) == (0, ""), process
    found: dict[str, Any] = json.loads(process.stdout)
    assert found["a cache"].startswith("CapacityError: "), found
    assert found["a step"].startswith("CapacityError: "), found
    assert found["after it"] == [True, 0]
    assert found["again"] and found["usable"]
    assert found["length"] == 0
    assert all(text.isprintable() for text in (found["a cache"], found["a step"]))
