"""Runs CUDA kernels on the host, so that they are tested where there is no GPU, by rules stricter than a GPU's.

What is simulated, and how a wrong kernel shows, is in `simulation/driver.cpp`. A kernel is compiled by g++ with the
sanitizers for addresses and undefined behaviour, and runs in a process of its own.
"""

import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

__all__ = ["LaunchSpec", "Pointer", "SimulationError", "Simulator", "Words", "available", "shared_directory"]

HERE = Path(__file__).parent / "simulation"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMMON = ["-std=c++17", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", *WARNINGS]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
# AddressSanitizer calls functions instead of checking in line, so that the driver can look for races there. Where a
# statement reads and writes the same place, it calls only one of the two functions.
CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
ACCESSES = [f"{kind}{size}" for kind in ("load", "store") for size in (1, 2, 4, 8, 16, "N")]
WRAP = "-Wl," + ",".join(f"--wrap=__asan_{access}" for access in ACCESSES)
# Local variables start as garbage, too. -Og compiles in two thirds of the time of -O1, and runs as fast.
KERNEL = [*COMMON, "-Og", "-fno-omit-frame-pointer", "-ftrivial-auto-var-init=pattern", *SANITIZERS, *CALLS]
DRIVER = [*COMMON, "-O3"]
ENVIRONMENT = {
    # Blocks' shared memory is freed often: what is kept of it, to find later uses, is bounded.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=16:print_legend=0:exitcode=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
REPORT_LINES = 40

_builds: dict[str, Path] = {}


class SimulationError(Exception):
    """A kernel did what a GPU would not have let it do, or does not compile."""


@dataclass(frozen=True, eq=False)
class Pointer:
    """An address inside an array."""

    array: np.ndarray
    offset_bytes: int


@dataclass(frozen=True, eq=False)
class Words:
    """Memory of 64-bit words, some of which are addresses: what a kernel reads further addresses from."""

    words: "Sequence[np.ndarray | Pointer | int | np.int64]"


Value: TypeAlias = np.ndarray | Pointer | Words | int | float | np.int32 | np.uint32 | np.int64 | np.float32 | None


@dataclass(frozen=True, eq=False)
class LaunchSpec:
    """One launch. An array is passed as a pointer to its bytes, an int as int32 and a float as float32."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    args: Sequence[Value]


def shared_directory() -> Path:
    """Where programs lie that all processes of a test run share."""
    return Path(os.environ["GTA_EDGE_CACHE"], "simulation")


@functools.cache
def available() -> bool:
    """Whether this machine has a compiler with the sanitizers."""
    if _compiler() is None:
        return False
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "main.cpp"), Path(directory, "main")
        source.write_text("int main() { return 0; }\n")
        command = [str(_compiler()), *KERNEL, str(source), "-o", str(program)]
        return subprocess.run(command, capture_output=True).returncode == 0


@dataclass(frozen=True, eq=False)
class Simulator:
    """Kernels of one source, compiled with macros."""

    source: Path
    kernels: Sequence[str]
    defines: Mapping[str, int] = field(default_factory=dict)
    include: Sequence[Path] = ()
    timeout_s: float = 300
    races_are_faults: bool = True

    def compile(self, directory: Path) -> Path:
        """Return the program; it lies in `directory` unless this process has built the same one elsewhere."""
        driver = [_build(directory, HERE / name, DRIVER, [HERE], "-c") for name in ("arithmetic.cpp", "driver.cpp")]
        names = " ".join(f"X({name})" for name in self.kernels)
        flags = [
            *KERNEL,
            WRAP,
            f'-DGTA_SIMULATION_SOURCE="{self.source.resolve()}"',
            f"-DGTA_SIMULATION_KERNELS={names}",
        ]
        flags += [f"-D{name}={value}" for name, value in self.defines.items()]
        include = [HERE, *(path.resolve() for path in self.include)]
        return _build(directory, HERE / "kernels.cpp", flags, include, *map(str, driver), depends=[self.source.parent])

    def run(self, launches: Sequence[LaunchSpec], seed: int) -> int:
        """Run the launches one after the other and update the arrays that they have as arguments.

        Returns:
            Bytes of global memory that asynchronous copies have read.
        """
        program = self.compile(shared_directory())  # if nobody has before
        buffers = _Buffers()
        rest = b"".join(_launch(launch, buffers, seed * 1_000_003 + i) for i, launch in enumerate(launches))
        with tempfile.TemporaryDirectory(prefix="simulation-") as scratch:
            job, result = Path(scratch, "job"), Path(scratch, "result")
            job.write_bytes(buffers.job() + _numbers(len(launches)) + rest)
            command = [str(program), str(job), str(result), str(int(self.races_are_faults))]
            environment = {**os.environ, **ENVIRONMENT}
            try:
                done = subprocess.run(command, env=environment, capture_output=True, timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                raise SimulationError(f"the kernels still run after {self.timeout_s} s") from None
            if done.returncode:
                raise SimulationError(_report(done.stderr.decode(errors="replace")) or f"exit {done.returncode}")
            content = result.read_bytes()
            buffers.update(content)
            return int.from_bytes(content[-8:], "little")


class _Buffers:
    """The arrays among the arguments, each once."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def index(self, array: np.ndarray) -> int:
        for i, known in enumerate(self._arrays):
            if known is array:
                return i
            if np.may_share_memory(known, array):
                raise ValueError("two arrays share memory: pass one of them, or a Pointer into it")
        if not array.flags.c_contiguous:
            raise ValueError("an array that is passed to a kernel must be contiguous")
        self._arrays.append(array)
        return len(self._arrays) - 1

    def job(self) -> bytes:
        parts = [_numbers(len(self._arrays))]
        for array in self._arrays:
            parts += [_numbers(array.nbytes), array.tobytes()]
        return b"".join(parts)

    def update(self, result: bytes) -> None:
        begin = 0
        for i, array in enumerate(self._arrays):
            part, begin = result[begin : begin + array.nbytes], begin + array.nbytes
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = np.frombuffer(part, np.uint8)
            elif part != array.tobytes():
                raise SimulationError(f"argument array {i}, of shape {array.shape}, is read-only and was written to")


def _numbers(*values: int) -> bytes:
    return b"".join((value % (1 << 64)).to_bytes(8, "little") for value in values)


def _argument(value: Value, buffers: _Buffers) -> bytes:
    if value is None:
        return _numbers(0, 0, 0)
    if isinstance(value, np.ndarray):
        return _numbers(1, buffers.index(value), 0)
    if isinstance(value, Pointer):
        return _numbers(1, buffers.index(value.array), value.offset_bytes)
    if isinstance(value, Words):
        words = (np.int64(word) if isinstance(word, int) else word for word in value.words)
        return _numbers(5, len(value.words), 0) + b"".join(_argument(word, buffers) for word in words)
    if isinstance(value, np.int64):
        return _numbers(3, int(value), 0)
    if isinstance(value, float | np.float32):
        return _numbers(4, int.from_bytes(struct.pack("<f", value), "little"), 0)
    if isinstance(value, np.int32 | np.uint32) or (isinstance(value, int) and -(1 << 31) <= value < 1 << 31):
        return _numbers(2, int(value), 0)
    raise TypeError(f"{value!r} cannot be passed to a kernel")


def _launch(launch: LaunchSpec, buffers: _Buffers, seed: int) -> bytes:
    name, grid = launch.kernel.encode(), (*launch.grid, 1, 1)[:3]
    if not 1 <= len(launch.grid) <= 3 or min(grid) < 1:
        raise ValueError(f"no grid: {launch.grid}")
    head = _numbers(len(name)) + name + _numbers(*grid, launch.threads, launch.shared_bytes, seed, len(launch.args))
    return head + b"".join(_argument(value, buffers) for value in launch.args)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _content(directories: Iterable[Path]) -> bytes:
    """A digest of everything that a source in these directories may include."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.suffix in {".cpp", ".cu", ".cuh", ".h"}:
                digest.update(f"{path.resolve()}\0".encode() + path.read_bytes() + b"\0")
    return digest.digest()


def _build(
    directory: Path,
    source: Path,
    flags: Sequence[str],
    include: Sequence[Path],
    *more: str,
    depends: Sequence[Path] = (),
) -> Path:
    compiler = _compiler()
    if compiler is None:
        raise SimulationError("there is no C++ compiler: install g++ or name one in CXX")
    arguments = [*flags, *(f"-I{path}" for path in include), str(source)]
    # Where an object file lies says what is in it, so that a program's key also covers the objects that it links.
    key = hashlib.sha256("\0".join([_compiler_version(compiler), *arguments, *more]).encode())
    key.update(_content([*include, *depends]))
    name = key.hexdigest()[:32]
    if name in _builds and _builds[name].exists():
        return _builds[name]
    directory.mkdir(parents=True, exist_ok=True)
    target = (directory / f"{source.stem}-{name}").resolve()
    if target.exists():  # another process has built it: its name says from what
        _builds[name] = target
        return target
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = Path(scratch, "made")
        done = subprocess.run([compiler, *arguments, *more, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise SimulationError("\n".join(done.stderr.splitlines()[:REPORT_LINES]))
        made.replace(target)  # at once: another process may build the same
    _builds[name] = target
    return target


def _report(text: str) -> str:
    """What went wrong, and then where, without the picture of the memory around it."""
    lines = [line for line in text.partition("Shadow bytes around")[0].splitlines() if line.strip("= ")]
    threads = [line for line in text.splitlines() if line.startswith("simulation fault: ")]
    return "\n".join([*threads, *(line for line in lines if line not in threads)][:REPORT_LINES])
