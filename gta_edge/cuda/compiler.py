"""Kernel sources to machine code, with NVRTC, and a cache of the results on disk.

The sources include nothing but each other, so that NVRTC's library is all that is needed: no toolkit, no headers. The
cache is in ``$GTA_EDGE_CACHE``, else ``$XDG_CACHE_HOME/gta_edge``, else ``~/.cache/gta_edge``, in a directory
``kernels``: a ``.cubin`` and, beside it, a ``.json`` with its hash and what the code takes of a GPU. Their name is a
hash over all that the code depends on, so nothing there is ever out of date, and all of it may be removed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from gta_edge.errors import BackendError
from gta_edge.libraries.cuda import cuda_extra, nvrtc_distribution
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import optional
from gta_edge.support.files import cache_directory, write_cached

__all__ = [
    "Compilable",
    "Compiled",
    "Resources",
    "check_compiler",
    "compile_program",
]

_OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "ptxas_options": ["-v"],
    "no_source_include": True,  # it would be the working directory
}
# NVRTC takes further options from these.
_OPTION_VARIABLES = ("NVRTC_PREPEND_FLAGS", "NVRTC_APPEND_FLAGS")


class Compilable(Protocol):
    """One source file cut to what it is for."""

    @property
    def source(self) -> str:
        """File name among the sources."""

    def defines(self) -> dict[str, int]:
        """Return the macros of the source."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor."""

    registers: int
    """Of each thread, 32 bits each."""
    spill_bytes: int
    """Written to and read from local memory by each thread, for want of registers."""
    stack_bytes: int
    """Of each thread."""
    shared_bytes: int
    """Of each block, without what a launch adds."""


@dataclass(frozen=True)
class Compiled:
    """A program's machine code."""

    cubin: bytes = field(repr=False)
    resources: Mapping[str, Resources]
    """By kernel."""
    log: str = field(repr=False)
    """What NVRTC said, warnings included."""


def compile_program(program: Compilable, architecture: str, sources: Path) -> Compiled:
    """Return a program's machine code, from the cache or newly compiled.

    Args:
        program: what to compile.
        architecture: for which GPUs, ``"sm_87"``.
        sources: directory of the sources.

    Raises:
        BackendError: NVRTC is missing or does not know the architecture, or the source does not compile.
    """
    version = _nvrtc_version(architecture)
    key = _key(program, architecture, version, sources)
    directory = _cache_directory()
    entry = directory / key if directory else None
    compiled = _read(entry) if entry else None
    if compiled is None:
        compiled = _compile(program, architecture, sources)
        # What was compiled is what was hashed, unless someone was editing the sources meanwhile.
        if entry and _key(program, architecture, version, sources) == key:
            _write(entry, compiled)
    return compiled


def check_compiler(architecture: str) -> None:
    """See that there is a compiler for a GPU's kernels.

    Raises:
        BackendError: NVRTC is missing or does not know the architecture.
    """
    _nvrtc_version(architecture)


# --- NVRTC ------------------------------------------------------------------------------------------------------------


def _nvrtc_version(architecture: str) -> tuple[int, int]:
    """Return NVRTC's version, once it is known to compile for this architecture."""
    extra = cuda_extra()
    nvrtc = optional("cuda.bindings.nvrtc", extra)
    try:
        _, major, minor = nvrtc.nvrtcVersion()
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except BackendError:
        raise
    except Exception as error:  # of a kind that differs from release to release
        raise BackendError(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({_first_line(error)})",
            f"run: {install_command(extra)}",
        ) from error
    if architecture not in [f"sm_{number}" for number in known]:
        raise BackendError(
            f"NVRTC {major}.{minor} does not compile for {architecture}, but for "
            f"{', '.join(f'sm_{number}' for number in known)}",
            f"run: {install_command(extra, upgrade=nvrtc_distribution())}",
        )
    return major, minor


def _compile(program: Compilable, architecture: str, sources: Path) -> Compiled:
    extra = cuda_extra()
    core = optional("cuda.core", extra)
    try:
        source = (sources / program.source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BackendError(
            f"the kernel source {sources / program.source} cannot be read ({error})", "reinstall gta-edge"
        ) from error
    options = core.ProgramOptions(
        name=program.source,
        arch=architecture,
        include_path=[str(sources)],
        define_macro=[(name, str(value)) for name, value in program.defines().items()],
        **_OPTIONS,
    )
    log = StringIO()
    try:
        cubin = core.Program(source, "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # its class is not public
        raise BackendError(
            f"{program.source} does not compile for {architecture} ({_first_error(error)})",
            f"run: {install_command(extra, upgrade=nvrtc_distribution())}, or report this line",
        ) from error
    # without what differs from one compilation to the next
    text = re.sub(r"^.*Compile time = .*\n?", "", log.getvalue().replace("\0", ""), flags=re.MULTILINE).strip()
    return Compiled(bytes(cubin), _resources(text), text)


def _first_error(error: Exception) -> str:
    """Return the first line of a compiler's log that tells of an error."""
    lines = [line.strip() for line in str(error).replace("\0", "").splitlines()]
    found = (line for line in lines[1:] if re.search(r"\berror\b", line))
    return next(found, _first_line(error))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _resources(log: str) -> dict[str, Resources]:
    """Return what ``ptxas -v`` says of each kernel; a function that was not inlined counts as part of its kernel."""
    _, *parts = re.split(r"Compiling entry function '(\w+)'", log)
    report = {}
    for kernel, text in zip(parts[::2], parts[1::2], strict=True):
        registers = re.search(r"Used (\d+) registers", text)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        shared = re.search(r"(\d+) bytes smem", text)
        if registers and memory:
            report[kernel] = Resources(
                registers=int(registers[1]),
                spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in memory),
                stack_bytes=max(int(stack) for stack, _, _ in memory),
                shared_bytes=int(shared[1]) if shared else 0,
            )
    return report


# --- the cache --------------------------------------------------------------------------------------------------------


def _key(program: Compilable, architecture: str, nvrtc: tuple[int, int], sources: Path) -> str:
    """Return a hash over all that the machine code depends on."""
    options = {
        "source": program.source,
        "architecture": architecture,
        "nvrtc": nvrtc,
        "defines": program.defines(),
        "options": _OPTIONS,
        "environment": {name: os.environ.get(name) for name in _OPTION_VARIABLES},
    }
    digest = sha256(json.dumps(options, sort_keys=True).encode())
    try:
        for path in sorted(path for path in sources.iterdir() if path.is_file()):
            digest.update(path.name.encode() + b"\0" + sha256(path.read_bytes()).digest())
    except OSError as error:
        raise BackendError(f"the kernel sources cannot be read ({error})", "reinstall gta-edge") from error
    return digest.hexdigest()


def _cache_directory() -> Path | None:
    """Return where compiled kernels are kept, None where that cannot be told."""
    directory = cache_directory()
    return directory / "kernels" if directory else None


def _read(entry: Path) -> Compiled | None:
    """Return what is cached, None where there is nothing or it is damaged."""
    try:
        cubin = entry.with_suffix(".cubin").read_bytes()
        report = json.loads(entry.with_suffix(".json").read_bytes())
        if report["sha256"] != sha256(cubin).hexdigest():
            return None
        resources = {name: Resources(**values) for name, values in report["kernels"].items()}
        if not all(type(value) is int for each in resources.values() for value in vars(each).values()):
            return None
        return Compiled(cubin, resources, str(report["log"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _write(entry: Path, compiled: Compiled) -> None:
    """Cache what was compiled, if that is possible; each file appears complete or not at all."""
    report = {
        "sha256": sha256(compiled.cubin).hexdigest(),
        "kernels": {name: asdict(resources) for name, resources in compiled.resources.items()},
        "log": compiled.log,
    }
    write_cached(entry.with_suffix(".cubin"), compiled.cubin)
    write_cached(entry.with_suffix(".json"), json.dumps(report, indent=1).encode())
