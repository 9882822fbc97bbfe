"""Which JetPack a board has, from the release of Jetson Linux that it runs: what the table ``jetpack.toml`` says."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.resources import files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["jetpack_of", "jetpacks"]

_RELEASE = re.compile(r"# R([0-9]{1,4}) \(release\), REVISION: ([0-9]{1,4})\.([0-9]{1,4})\b")


def jetpack_of(line: str | None) -> str | None:
    """Return the JetPack, such as ``6.2``; None for a release that is not in the table, and for what is none.

    Args:
        line: the first one of ``/etc/nv_tegra_release``, ``# R36 (release), REVISION: 4.3, GCID: …``.
    """
    found = _RELEASE.match(line or "")
    return jetpacks().get(".".join(str(int(number)) for number in found.groups())) if found else None


@cache
def jetpacks() -> dict[str, str]:
    """Return the table: JetPack by release of Jetson Linux, both as text."""
    text = files("gta_edge.machine").joinpath("jetpack.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["jetpack"])
