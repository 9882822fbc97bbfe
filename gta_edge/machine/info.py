"""What this machine is, as far as it says so without extra rights: for ``doctor``, and beside every measured figure."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gta_edge.machine.jetpack import jetpack_of
from gta_edge.support.cores import installed_cores, usable_cores
from gta_edge.support.memory import available_bytes, installed_bytes, total_bytes
from gta_edge.support.text import printable

__all__ = [
    "clocks_fixed",
    "clocks_hz",
    "clocks_text",
    "cpu_cache_bytes",
    "cpu_governor",
    "cuda_toolkit",
    "describe",
    "gpus",
    "is_jetson",
    "jetpack",
    "jetson_linux",
    "package_versions",
    "power_mode",
    "timing_warnings",
]

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-core",
    "cuda-bindings",
)
"""Distributions whose versions matter to what runs, and how fast."""

Clock = dict[str, int | None]
"""``min``, ``max`` and ``now``, in Hz."""

_BUSY = 0.25  # of the machine's cores, before anything of ours runs
_DRIVER = re.compile(r"\d+(\.\d+)+|\[?N/A\]?")
_DEVFREQ = Path("/sys/class/devfreq")
_CPUS = Path("/sys/devices/system/cpu")
_EMC = Path("/sys/kernel/debug/bpmp/debug/clk/emc")  # a Jetson's memory controller
_JETSON_LINUX = Path("/etc/nv_tegra_release")


def describe() -> dict[str, Any]:
    """Return system, processor, memory, clocks and, on a Jetson, board, JetPack and power mode; None where unknown.

    ``cores`` and ``installed_bytes`` are the machine's, ``usable_cores`` and ``memory_bytes`` what a container, a batch
    system or the like lets this process have of them.
    """
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": installed_cores(),
        "usable_cores": usable_cores(),
        "cpu_governor": cpu_governor(),
        "memory_bytes": total_bytes(),
        "available_bytes": available_bytes(),
        "installed_bytes": installed_bytes(),
        "board": _line(Path("/proc/device-tree/model")),
        "jetpack": jetpack(),
        "jetson_linux": jetson_linux(),
        "power_mode": power_mode(),
        "clocks_fixed": clocks_fixed(),
        "clocks_hz": clocks_hz(),
    }


def is_jetson(found: dict[str, Any]) -> bool:
    """Tell whether what ``describe`` returned is a Jetson: by its system, or by its board's name in a container."""
    return bool(found["jetson_linux"] or found["jetpack"] or "Jetson" in (found["board"] or ""))


def jetson_linux(release: Path = _JETSON_LINUX) -> str | None:
    """Return the line that says which Jetson Linux (L4T) this is; None elsewhere."""
    return _line(release)


def jetpack(release: Path = _JETSON_LINUX) -> str | None:
    """Return the version of JetPack: of the package of that name, which not every image has, or of Jetson Linux."""
    found = _run("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")
    return found if found and re.fullmatch(r"\d[\w.+:~-]*", found) else jetpack_of(jetson_linux(release))


def gpus() -> list[dict[str, str]]:
    """Return name, driver and memory of each GPU that nvidia-smi lists; a Jetson's it lists without memory.

    What it prints in place of a list, as where there is no GPU or no driver, is none, whatever its exit status.
    """
    found = _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    fields = [[part.strip() for part in line.rsplit(",", 2)] for line in (found or "").splitlines()]
    keys = ("name", "driver", "memory")
    return [dict(zip(keys, line, strict=True)) for line in fields if len(line) == 3 and _DRIVER.fullmatch(line[1])]


def cuda_toolkit() -> str | None:
    """Return the version of the CUDA toolkit that is installed, which nothing here needs."""
    found = _run("nvcc", "--version")
    release = re.search(r"release (\d+\.\d+)", found) if found else None
    return release[1] if release else None


def power_mode() -> str | None:
    """Return a Jetson's power mode, by ``nvpmodel``; None where it names none, whatever else it prints."""
    found = _run("nvpmodel", "-q")
    name = re.search(r"^NV Power Mode: *(\S.*)$", found or "", re.MULTILINE)
    return name[1].strip() if name else None


def clocks_fixed(devfreq: Path = _DEVFREQ) -> bool | None:
    """Tell whether a Jetson's GPU clock is pinned, as ``jetson_clocks`` does; None where there is no such GPU."""
    clock = _gpu_clock(devfreq)
    if clock is None or clock["min"] is None or clock["max"] is None:
        return None
    return clock["min"] == clock["max"]


def clocks_hz(devfreq: Path = _DEVFREQ, cpus: Path = _CPUS, emc: Path = _EMC) -> dict[str, Clock | None]:
    """Return the clocks of a Jetson's GPU, of the first core and of a Jetson's memory, in Hz.

    Each has what it may be set to, ``min`` and ``max``, and what it is ``now``, so while nothing runs; None for what
    the system does not say, and for the clock if it says nothing of it. Only root may read the memory's.
    """
    cpu = cpus / "cpu0" / "cpufreq"
    return {
        "gpu": _gpu_clock(devfreq),
        "cpu": _clock(cpu / "scaling_min_freq", cpu / "scaling_max_freq", cpu / "scaling_cur_freq", unit=1000),
        "memory": _clock(emc / "min_rate", emc / "max_rate", emc / "rate"),
    }


def clocks_text(clocks: dict[str, Clock | None]) -> str:
    """Return what ``clocks_hz`` returned, for people."""
    parts = []
    for name, title in (("gpu", "GPU"), ("cpu", "CPU"), ("memory", "memory")):
        clock = clocks[name]
        if clock is None:
            parts.append(f"{title} not known")
        else:
            least, most, now = ("?" if hz is None else f"{hz / 1e6:.0f}" for hz in clock.values())
            parts.append(f"{title} {least} to {most} MHz, now {now}")
    return "; ".join(parts)


def cpu_governor(cpus: Path = _CPUS) -> str | None:
    """Return what sets the CPU's clock, such as ``performance`` or ``schedutil``; None where the system has none."""
    found = sorted({_line(path) or "" for path in cpus.glob("cpu*/cpufreq/scaling_governor")} - {""})
    return ", ".join(found) or None


def cpu_cache_bytes(cpus: Path = _CPUS) -> int | None:
    """Return the size of the largest cache that the first core has, by the system's table."""
    sizes = [_line(path) or "" for path in cpus.glob("cpu0/cache/index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if re.fullmatch(r"\d+[KMG]", size)), default=None)


def timing_warnings(found: dict[str, Any], load: float | None = None) -> list[str]:
    """Return what on this machine makes times vary, in a sentence each.

    Args:
        found: what ``describe`` returned.
        load: programs that are running or want to, the mean of the last minute; asked of the system by default.
    """
    warnings, on_jetson = [], is_jetson(found)
    if on_jetson and found["clocks_fixed"] is False:
        warnings.append("the GPU's clock is not fixed, so times vary; run: sudo jetson_clocks")
    if on_jetson and not found["power_mode"]:
        warnings.append("the power mode is not known, and sets how fast the board is; see: sudo nvpmodel -q")
    governor = found["cpu_governor"]
    if governor and governor != "performance" and not found["clocks_fixed"]:
        warnings.append(f"the CPU's clock follows the load ({governor}), so short runs vary")
    load = _load() if load is None else load
    cores = found.get("cores") or found["usable_cores"] or 1  # the load is the whole machine's
    if load is not None and load > _BUSY * cores:
        busy = f"{load:.1f} of {cores} cores busy" if load <= cores else f"all {cores} cores busy, and more waiting,"
        warnings.append(
            f"other programs have kept {busy} in the last minute; what is measured beside them is slower and varies"
        )
    return warnings


def package_versions() -> dict[str, str]:
    """Return the versions of those of ``PACKAGES`` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return names.get("model name") or platform.processor() or None


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _gpu_clock(devfreq: Path) -> Clock | None:
    for device in sorted(devfreq.glob("*gpu*")) + sorted(devfreq.glob("*ga10b*")) + sorted(devfreq.glob("*gb10b*")):
        clock = _clock(device / "min_freq", device / "max_freq", device / "cur_freq")
        if clock is not None:
            return clock
    return None


def _clock(least: Path, most: Path, now: Path, unit: int = 1) -> Clock | None:
    """Return what the files of a clock say, whole numbers of ``unit`` Hz; None if none does."""
    lines = {name: _line(path) or "" for name, path in (("min", least), ("max", most), ("now", now))}
    clock = {name: unit * int(line) if re.fullmatch(r"\d+", line) else None for name, line in lines.items()}
    return clock if any(hz is not None for hz in clock.values()) else None


def _line(path: Path) -> str | None:
    try:
        return printable(path.read_text(encoding="utf-8", errors="replace").strip("\0\n ").splitlines()[0])
    except (OSError, IndexError):
        return None


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return "\n".join(map(printable, result.stdout.splitlines())).strip() or None
