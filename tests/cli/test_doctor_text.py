"""How ``doctor`` looks: a mark a line, each reason once, and at the end what to do next."""

import io
from typing import Any

import pytest
import rich.console

from gta_edge.cli import doctor_text

REASON = "there is no NVIDIA driver, which is said here in so many words that a line of 80 columns does not hold them"
MISSING = {"works": False, "reason": REASON, "remedy": "pip install 'something[with,extras]' that-is-long && pip check"}
WORKS: dict[str, Any] = {"works": True, "reason": None, "remedy": None}
MACHINE = {
    **dict.fromkeys(("board", "jetpack", "jetson_linux", "power_mode", "clocks_fixed", "clocks_hz", "cpu_governor")),
    "system": "Linux",
    "architecture": "x86_64",
    "python": "3.11",
    "cpu": "a CPU",
    "cores": 4,
    "usable_cores": 2,
    "memory_bytes": 2**33,
    "available_bytes": 2**32,
    "installed_bytes": 2**34,
}
REPORT: dict[str, Any] = {
    "gta_edge": "1.0",
    "machine": MACHINE,
    "gpu": {"devices": [], "cuda_driver": None, "cuda_problem": REASON, "cuda_toolkit": None},
    "packages": {"numpy": "2.0", "torch": "2.13"},
    "kernels": MISSING | {"gpu": None},
    "tensorrt": {"tensorrt": None, "tensorrt-rtx": "1.7"},
    "backends": {"tensorrt-rtx": MISSING, "torch": WORKS},
    "features": {"export": WORKS, "plot": {"works": False, "reason": "another", "remedy": None}},
}


def shown(encoding: str = "utf-8", **changes: Any) -> str:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, write_through=True) as file:
        doctor_text.show(rich.console.Console(file=file, width=80), REPORT | changes, MISSING)
        return raw.getvalue().decode(encoding)


def test_each_reason_is_said_once() -> None:
    text = shown()
    assert " ".join(text.split()).count(REASON) == 1
    lines = text.splitlines()
    assert [line.split()[1:] for line in lines if " as " in line] == [
        ["CUDA", "kernels", "as", "CUDA", "driver"],
        ["tensorrt-rtx", "as", "CUDA", "driver"],
    ]
    assert lines.count(f"    {MISSING['remedy']}") == 1  # whole, so that it can be copied
    assert max(map(len, lines)) <= 80
    assert "✓ torch            2.13" in lines
    assert "· memory           8.0 GiB of the machine's 16.0, 4.0 available" in lines
    assert "· CPU              a CPU, 4 cores, 2 of them usable" in lines


@pytest.mark.parametrize(
    ("working", "export", "ends"),
    [
        ("tensorrt-rtx", True, "Best backend here: tensorrt-rtx. Next: gta-edge build BUNDLE --engine tensorrt-rtx"),
        ("torch", True, "Best backend here: torch. Next: gta-edge export CHECKPOINT BUNDLE"),
        ("torch", False, 'Best backend here: torch. Next: gta-edge generate BUNDLE --prompt "…"'),
        ("", True, "✗ plot             another"),
    ],
)
def test_the_last_line_says_what_to_do_next(working: str, export: bool, ends: str) -> None:
    backends = {name: WORKS if name == working else MISSING for name in REPORT["backends"]}
    features = {"export": WORKS if export else MISSING, "plot": REPORT["features"]["plot"]}
    assert shown(backends=backends, features=features).splitlines()[-1] == ends


def test_marks_on_a_stream_that_cannot_say_them() -> None:
    text = shown("ascii")
    assert text.isascii()
    assert "\n+ torch " in text
    assert "\nx tensorrt-rtx " in text
