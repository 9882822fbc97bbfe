"""Where the scripts of the benchmarks are, and a GPU as they describe it."""

from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

GPU = {
    "name": "A GPU",
    "architecture": "sm_99",
    "processors": 3,
    "l2_bytes": 4 * 2**20,
    "memory_bytes": 8 * 2**30,
    "copy_bytes_per_s": 100e9,
    "read_bytes_per_s": 90e9,
    "matmul_flops_per_s": 50e12,
}
