"""``GTA_EDGE_REQUIRE_GPU=1``: tests for a GPU that are skipped have failed, and no others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED_IN_THE_TEST = "tests/runtime/tensorrt/test_matmul_timing.py"
SKIPPED_BY_A_MARK = "tests/runtime/tensorrt/test_session.py"


def run(module: str, choice: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", choice, module]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", [SKIPPED_IN_THE_TEST, SKIPPED_BY_A_MARK])
def test_a_skip_is_a_failure_where_a_gpu_is_required(module: str) -> None:
    done = run(module, "gpu", GTA_EDGE_REQUIRE_GPU="1")
    assert done.returncode == 1
    assert "GTA_EDGE_REQUIRE_GPU=1 and this test was not run (" in done.stdout
    assert re.search(r"\d (failed|errors?)\b", done.stdout.splitlines()[-1])
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_without_it_a_skip_is_a_skip() -> None:
    done = run(SKIPPED_IN_THE_TEST, "gpu", GTA_EDGE_REQUIRE_GPU="")
    assert done.returncode == 0
    assert "2 skipped" in done.stdout.splitlines()[-1]
