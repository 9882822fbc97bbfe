"""Devices that can be planned for: what the table ``devices.toml`` says of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from gta_edge.errors import InputError
from gta_edge.support.choices import unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["MEASURED", "Device", "device", "device_names"]

MEASURED = ("this", "this-cpu")
"""Names that stand for the machine itself, which is measured: its GPU if it has one, or in any case its CPU."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A machine, as far as a plan cares.

    Attributes:
        name: as ``--device`` takes it.
        title: for people.
        kind: ``cpu`` or ``gpu``.
        memory_bytes: what programs and the system share, of the GPU where that has memory of its own.
        system_bytes: what the system takes of it.
        runtime_bytes: what the process takes before it holds a model: libraries, a CUDA context.
        bandwidth: bytes per second of its memory.
        rates: operations per second of ``fp32``, ``fp16`` and ``int8``, dense.
        efficiency: share of bandwidth and rates that real kernels get.
        shared_memory: whether CPU and GPU share it: an engine is then built in the same memory.
        operator_s: seconds that an operator takes whatever it does.
        source: where the figures are from.
        verified: whether that was checked.
        assumptions: sentences on what is not from the source.
        fallback_reason: why this is the CPU where a GPU would have been taken; None elsewhere.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    system_bytes: int
    runtime_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    efficiency: float
    shared_memory: bool = True
    operator_s: float = 0.0
    source: str = ""
    verified: bool = False
    assumptions: tuple[str, ...] = field(default=())
    fallback_reason: str | None = None

    @property
    def available_bytes(self) -> int:
        """What the system leaves to a program."""
        return max(0, self.memory_bytes - self.system_bytes)


def device_names() -> tuple[str, ...]:
    """Return the names of the table, and those of the machine itself."""
    return (*_table()["devices"], *MEASURED)


def device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        InputError: the table has no such device.
    """
    table = _table()
    if name not in table["devices"]:
        raise InputError(*unknown("no device is called {}; there are {}", name, device_names()))
    entry = table["devices"][name]
    kind = table["classes"][entry["class"]]
    return Device(
        name=name,
        title=entry["title"],
        kind="gpu",
        memory_bytes=entry["memory_bytes"],
        system_bytes=kind["system_bytes"],
        runtime_bytes=kind["runtime_bytes"],
        bandwidth=float(entry["bandwidth"]),
        rates={key: float(entry[key]) for key in ("fp32", "fp16", "int8")},
        efficiency=float(kind["efficiency"]),
        shared_memory=kind["shared_memory"],
        source=entry["source"],
        verified=entry["verified"],
        assumptions=(
            f"memory: {entry['memory_source']}",
            f"system: {kind['system_source']}",
            f"runtime: {kind['runtime_source']}",
            f"efficiency: {kind['efficiency_source']}",
        ),
    )


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("gta_edge.machine").joinpath("devices.toml").read_text(encoding="utf-8"))
