"""Which sets of dependencies can be installed on a Jetson: asked of pip, not believed.

    python scripts/resolve_jetson.py

For each JetPack's Python and each way to use the package, pip resolves the extras of ``pyproject.toml`` for Linux
aarch64 from wheels alone; nothing is installed. Prints a table in Markdown, with pip's reason where there is none.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    sys.exit("error: this script needs Python 3.11 or later; the board does not need the script")

ROOT = Path(__file__).parents[1]
# glibc 2.35 (Ubuntu 22.04, JetPack 6) and 2.39 (24.04, JetPack 7)
PLATFORMS = {"3.10": 35, "3.12": 39}
NVRTC_12, NVRTC_13 = "nvidia-cuda-nvrtc-cu12==12.6.*", "nvidia-cuda-nvrtc==13.0.*"
# Extras, and requirements beside them, that docs/jetson and the Makefile tell people to install.
SETS = {
    "JetPack 6": (
        "3.10",
        [
            ("base",),
            ("tensorrt", "cuda12", NVRTC_12),
            ("test", "tensorrt", "cuda12", NVRTC_12),
            ("export",),
            ("ort",),
        ],
    ),
    "JetPack 6, a newer Python": ("3.12", [("ort",)]),
    "JetPack 7.x": (
        "3.12",
        [
            ("base",),
            ("tensorrt", "cuda13", NVRTC_13),
            ("ort", "tensorrt", "cuda13", NVRTC_13),
            ("test", "tensorrt", "cuda13", NVRTC_13),
            ("export", "ort"),
            ("ort",),
            ("dev", "tensorrt"),
        ],
    ),
}


# What is on PyPI as a source that only chooses wheels: pip cannot look into it for another platform.
CHOOSERS = {"tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")}


def requirements(extras: tuple[str, ...]) -> list[str]:
    """Return the package's requirements with these extras, and those given with a version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(project["dependencies"])
    found += [requirement for requirement in extras if "=" in requirement]
    todo = [extra for extra in extras if extra != "base" and "=" not in extra]
    while todo:
        for requirement in project["optional-dependencies"][todo.pop()]:
            own = re.fullmatch(r"gta-edge\[(.*)\]", requirement)
            name, marker = re.match(r"[\w-]+", requirement), requirement.partition(";")[2]
            if own:
                todo += own[1].split(",")
            elif name and name[0] in CHOOSERS:
                found += CHOOSERS[name[0]]
            elif marker:  # pip would judge it by the Python that runs it
                found.append(requirement.partition(";")[0])
            else:
                found.append(requirement)
    return found


def resolve(python: str, extras: tuple[str, ...]) -> tuple[bool, str]:
    """Return whether pip finds wheels for everything, and how many packages or the reason."""
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, PLATFORMS[python] + 1)] + ["manylinux2014_aarch64"]
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--target", target]
        command += [part for tag in tags for part in ("--platform", tag)]
        done = subprocess.run([*command, *requirements(extras)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        would = next((line for line in done.stdout.splitlines() if line.startswith("Would install")), "")
        return True, f"{len(would.split()) - 2} packages"
    reasons = [line for line in done.stderr.splitlines() if re.match("ERROR: (No matching|Cannot install)", line)]
    return False, (reasons or ["ERROR: pip failed"])[0].removeprefix("ERROR: ")


def main() -> None:
    """Print the table."""
    print("| | Python | extras | wheels for aarch64 |\n|---|---|---|---|")
    for board, (python, sets) in SETS.items():
        for extras in sets:
            works, detail = resolve(python, extras)
            what = ", ".join(f"`{extra}`" if "=" in extra else extra for extra in extras)
            print(f"| {board} | {python} | {what} | {'yes' if works else 'no'}: {detail} |", flush=True)


if __name__ == "__main__":
    main()
