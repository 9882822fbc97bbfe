"""TensorRT, found in one place: which one is installed, and what it can do.

There are several packages of that kind, and their releases differ in what they know. The rest of this package asks for
a ``TensorRT`` and looks at its capabilities; no other module compares versions.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gta_edge.errors import BackendError
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import UnusableError, find_module

__all__ = ["FLAVOURS", "TensorRT", "describe", "load"]

FLAVOURS = {
    "tensorrt": ("tensorrt",),
    "tensorrt-lean": ("tensorrt_lean", "tensorrt_lean_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
"""Names of the modules of each flavour, in the order in which they are looked for."""

_OLDEST = {"tensorrt": (10, 3), "tensorrt-lean": (10, 3), "tensorrt-rtx": (1, 7)}
_NAMESPACE_BY_DOMAIN = (10, 10)
_NEWER_OPS = (10, 15)
_ONLY_STRONGLY_TYPED = (11,)


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT module and what it can do."""

    module: Any
    flavour: str
    """``tensorrt``, ``tensorrt-lean`` (it runs engines and cannot build them) or ``tensorrt-rtx``."""
    version: tuple[int, ...]
    version_text: str
    builds: bool
    """Whether it has a builder and a parser."""
    plugins: bool
    """Whether networks or engines may hold plugins of ours."""
    namespace_by_domain: bool
    """Whether the parser takes a node's domain for the plugin's namespace, instead of its attribute only."""
    strongly_typed_flag: bool
    """Whether a strongly typed network has to be asked for; otherwise there are no others."""
    parses_newer_ops: bool
    """Whether the parser knows TensorScatter, RotaryEmbedding and RMSNormalization."""
    times_kernels: bool
    """Whether a build times kernels on the GPU, and can keep what it found."""
    compiles_at_run_time: bool
    """Whether an engine's kernels are compiled when it runs, and can be kept."""


def load(flavour: str | None = None, *, rtx_would_do: bool = False) -> TensorRT:
    """Import TensorRT and say what it can do.

    Args:
        flavour: one of ``FLAVOURS``; the first that is installed, if none is given.
        rtx_would_do: whether TensorRT-RTX can do what it is wanted for, too; then that is said where it is missing.

    Raises:
        BackendError: it is not installed, cannot be loaded, or is too old.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise BackendError(f"there is no TensorRT called {flavour!r}", f"expected one of {', '.join(FLAVOURS)}")
    for each in [flavour] if flavour else FLAVOURS:
        for name in FLAVOURS[each]:
            module = _import(name, each)
            if module is not None:
                return describe(module)
    wanted = flavour or "tensorrt"
    remedy = _install(wanted)
    if rtx_would_do and wanted == "tensorrt" and not _on_jetson():
        remedy += f", or use the engine tensorrt-rtx, which needs no plugin: {install_command('tensorrt-rtx')}"
    raise BackendError(f"the Python module {FLAVOURS[wanted][0]} is needed and not installed", remedy)


def describe(module: Any) -> TensorRT:
    """Say what a TensorRT module that is already imported can do.

    Args:
        module: ``tensorrt``, ``tensorrt_rtx``, ``tensorrt_lean`` or their ``_bindings``.

    Raises:
        BackendError: it is not TensorRT, or too old.
    """
    flavour = _flavour(module)
    text = getattr(module, "__version__", None)
    found = re.match(r"\d+(\.\d+)+", text) if isinstance(text, str) else None
    if found is None or not hasattr(module, "get_plugin_registry"):
        where = getattr(module, "__name__", type(module).__name__)
        raise BackendError(f"the Python module {where} is not a whole TensorRT", f"{_install(flavour)}")
    version = tuple(int(part) for part in found[0].split("."))
    oldest = _OLDEST[flavour]
    if version < oldest:
        raise BackendError(
            f"{flavour} {text} is too old", f"expected {'.'.join(map(str, oldest))} or later: {_install(flavour)}"
        )
    rtx = flavour == "tensorrt-rtx"  # counts its versions by itself, and knows all that is asked for below
    network = getattr(module, "INetworkDefinition", None)
    return TensorRT(
        module=module,
        flavour=flavour,
        version=version,
        version_text=str(text),
        builds=hasattr(module, "Builder") and hasattr(module, "OnnxParser"),
        plugins=hasattr(module, "IPluginV3") and (network is None or hasattr(network, "add_plugin_v3")),
        namespace_by_domain=rtx or version >= _NAMESPACE_BY_DOMAIN,
        strongly_typed_flag=not rtx and version < _ONLY_STRONGLY_TYPED,
        parses_newer_ops=rtx or version >= _NEWER_OPS,
        times_kernels=not rtx and hasattr(module, "ITimingCache"),
        compiles_at_run_time=hasattr(module, "IRuntimeCache"),
    )


def _import(name: str, flavour: str) -> Any:
    """Return a module, None where it is not installed."""
    try:
        return find_module(name)
    except UnusableError as error:
        raise BackendError(str(error), error.remedy or _install(flavour)) from error


def _flavour(module: Any) -> str:
    name = str(getattr(module, "__name__", "")).partition(".")[0]
    return next(
        (each for each in ("tensorrt-rtx", "tensorrt-lean") if name.startswith(each.replace("-", "_"))), "tensorrt"
    )


def _install(flavour: str) -> str:
    """Say what to do on this platform to have TensorRT."""
    if flavour == "tensorrt-rtx":
        return f"run: {install_command('tensorrt-rtx', upgrade='tensorrt-rtx')}"
    if flavour == "tensorrt-lean":
        return "run: pip install --upgrade tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs"
    if _on_jetson():
        return (
            "it comes with JetPack 6.2 and later: run sudo apt install python3-libnvinfer, and make the environment "
            f"with --system-site-packages from JetPack's own Python (this one is {platform.python_version()})"
        )
    return "run: pip install --upgrade tensorrt"


def _on_jetson() -> bool:
    return Path("/etc/nv_tegra_release").exists() or "tegra" in platform.release()
