"""The stage of Nsight Compute: the large launches under it, and its table as figures.

    python -m scripts.gpu_stages.profile NCU FILE.csv

The clock is left as it is, so durations are those of other runs.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from scripts.gpu_stages.figures import tell

__all__ = ["figures"]

_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
_METRICS = (
    *("Duration", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput", "Compute (SM) Throughput"),
    *("Registers Per Thread", "Achieved Occupancy", "Theoretical Occupancy", "Waves Per SM", "L1/TEX Hit Rate"),
)


def main(ncu: str, path: Path) -> int:
    """Run ncu, and tell its figures.

    Returns:
        ncu's status, or 1 where its table has none of the kernels.
    """
    sections = [part for section in _SECTIONS for part in ("--section", section)]
    command = [ncu, "--clock-control", "none", "--target-processes", "all", "--kernel-name", "regex:gta_", *sections]
    command += ["--csv", "--log-file", str(path), sys.executable, "-m", "scripts.gpu_stages.launches", "large"]
    status = subprocess.run(command).returncode
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = figures(text)
    for number, (kernel, metrics) in found.items():
        tell("profile", id=number, kernel=kernel, metrics=metrics)
    if not found:  # it says why there: without leave to read the counters, for one
        print(text[-2000:])
    return status or int(not found)


def figures(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return each launch's kernel and metrics by its number, of ncu's CSV with whatever stands before it."""
    rows = [row for row in csv.reader(text.splitlines()) if "Kernel Name" in row or len(row) > 10]
    if not rows or "Kernel Name" not in rows[0]:
        return {}
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for values in rows[1:]:
        row = dict(zip(rows[0], values, strict=False))
        if row.get("Metric Name") in _METRICS:
            _, metrics = found.setdefault(row["ID"], (row["Kernel Name"], {}))
            metrics[f"{row['Metric Name']} [{row.get('Metric Unit', '')}]"] = row.get("Metric Value", "")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
