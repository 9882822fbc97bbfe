"""NVRTC in tests: whether it is there, what it compiles for, and registers of a kernel."""

import os

import pytest

from gta_edge.cuda import compiler
from gta_edge.errors import BackendError


def has_nvrtc() -> bool:
    try:
        compiler._nvrtc_version("sm_80")
    except BackendError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs the extra cuda12 or cuda13")

BUILT_FOR = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_110", "sm_120")
ALL_COMPILES = os.environ.get("GTA_EDGE_ALL_COMPILES") == "1"
REGISTERS = 65536  # of a multiprocessor
