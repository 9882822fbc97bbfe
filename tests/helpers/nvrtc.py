"""NVRTC in tests: whether it is there, what it compiles for, registers of a kernel, and how to read its output."""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gta_edge.cuda import compiler
from gta_edge.errors import BackendError


def has_nvrtc() -> bool:
    try:
        compiler._nvrtc_version("sm_80")
    except BackendError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs the extra cuda12 or cuda13")

BUILT_FOR = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_110", "sm_120")
ALL_COMPILES = os.environ.get("GTA_EDGE_ALL_COMPILES") == "1"
REGISTERS = 65536  # of a multiprocessor
INSTRUCTION_BYTES = 16


def ptx_of(program: compiler.Compilable, architecture: str, sources: Path) -> str:
    """A program as PTX, which cuda.core makes only where there is a driver."""
    from cuda.bindings import nvrtc

    source, name = (sources / program.source).read_bytes(), program.source.encode()
    options = ["--std=c++17", f"--gpu-architecture={architecture}", f"--include-path={sources}", "--no-source-include"]
    options += [f"--define-macro={macro}={value}" for macro, value in program.defines().items()]
    _, handle = nvrtc.nvrtcCreateProgram(source, name, 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
    assert int(status) == 0, status
    text = bytearray(nvrtc.nvrtcGetPTXSize(handle)[1])
    nvrtc.nvrtcGetPTX(handle, text)
    nvrtc.nvrtcDestroyProgram(handle)
    return text.decode()


def reads(ptx: str) -> Iterator[tuple[str, int, bool]]:
    """Of each read of global memory: its kernel, the parameter that its address comes from, and if it may be early.

    Registers are followed without regard to the order of instructions: an address comes from every parameter that a
    value in it may have come from, but for what is loaded from memory.
    """
    for entry in re.split(r"^\s*(?:\.visible )?\.entry ", ptx, flags=re.MULTILINE)[1:]:
        kernel = re.match(r"\w+", entry)
        assert kernel
        pointers = {int(place) for place in re.findall(r"\.param \.u64[^,)]*_param_(\d+)", entry)}
        origins: dict[str, set[int]] = {}
        moves, found = [], []
        for line in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]* [^;]*);", entry.replace("\t", " "), re.MULTILINE):
            operation, operands = line.split(" ", 1)
            if parameter := re.search(r"\[\w+_param_(\d+)\]", operands):
                to = re.findall(r"%rd\d+", operands)
                if to and int(parameter[1]) in pointers:
                    origins.setdefault(to[0], set()).add(int(parameter[1]))
            elif re.match(r"ld\.(\w+\.)*global|cp\.async\.c[ag]\.", operation):
                address = re.findall(r"\[\s*(%rd\d+)", operands)[-1]
                found.append((address, ".nc" in operation))
            elif not operation.startswith(("ld", "st")):
                to, *values = re.findall(r"%rd\d+", operands) or [""]
                moves.append((to, values))
        changed = True
        while changed:
            changed = False
            for to, values in moves:
                known = origins.setdefault(to, set())
                before = len(known)
                known.update(*(origins.get(value, ()) for value in values))
                changed |= len(known) > before
        for address, early in found:
            for place in origins[address]:
                yield kernel[0], place, early


def instructions(cubin: bytes) -> Mapping[str, int]:
    """How many machine instructions each kernel has, by the sizes of an ELF file's sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<II4Q", cubin, table + size * i) for i in range(count)]
    start = sections[names][4]
    found = {}
    for name, _, _, _, _, length in sections:
        text = cubin[start + name : cubin.index(b"\0", start + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = length // INSTRUCTION_BYTES
    return found
