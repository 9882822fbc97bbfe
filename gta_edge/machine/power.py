"""What a board draws, by the sensor on its input: Jetson boards have an INA3221, whose driver is Linux's hwmon.

A channel ``n`` has its name in ``in<n>_label``, its voltage in ``in<n>_input`` (mV) and its current in
``curr<n>_input`` (mA): Linux, Documentation/hwmon/ina3221.rst and sysfs-interface.rst. The channel of the whole board
is ``VDD_IN`` on Orin's modules, and ``VIN`` on others.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["power_watts"]

_SENSORS = Path("/sys/class/hwmon")
_CHIP = "ina3221"
_CHANNELS = frozenset({"VDD_IN", "VIN", "VIN_SYS_5V0"})


def power_watts(sensors: Path = _SENSORS) -> float | None:
    """Return the power that the board draws now, in watts; None where nothing tells."""
    for label in sorted(sensors.glob("hwmon*/in*_label")):
        if _read(label.with_name("name")) == _CHIP and _read(label) in _CHANNELS:
            channel = label.name.removeprefix("in").removesuffix("_label")
            millivolts, milliamperes = (
                _read(label.with_name(f"in{channel}_input")),
                _read(label.with_name(f"curr{channel}_input")),
            )
            if millivolts.isdigit() and milliamperes.isdigit():
                return int(millivolts) * int(milliamperes) / 1e6
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # gone, or busy
        return ""
