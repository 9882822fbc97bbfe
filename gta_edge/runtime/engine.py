"""A TensorRT engine that lies in a bundle, and what it was made from and for.

    engines/tensorrt/engine.plan, engines/tensorrt-rtx/engine.plan    the engine, tied to a TensorRT version and a GPU
    engines/…/engine.json                                             the record that is checked before it is loaded

TensorRT refuses some engines that do not fit with a message of its own, late, and runs others wrongly or slowly. So
everything that matters is recorded, and a difference is an error that names it and the command that builds anew.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gta_edge.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.errors import EngineError
from gta_edge.files import new_directory
from gta_edge.version import __version__

__all__ = [
    "ENGINES",
    "EngineRecord",
    "Purpose",
    "engine_directory",
    "keep_engine",
    "load_engine",
    "made_from",
    "require_engine",
]

ENGINES = ("tensorrt", "tensorrt-rtx")
PLAN, RECORD = "engine.plan", "engine.json"
_BLOCK_BYTES = 2**22
_LARGEST_RECORD_BYTES = 2**20


@dataclass(frozen=True)
class Purpose:
    """What an engine is built for, as the options of ``gta-edge build`` say it.

    Attributes:
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        compute: type of activations, ``fp16``, ``bf16`` or ``fp32``.
        cache_dtype: type of the cache: the compute type, ``int8`` or ``fp8``.
        max_length: tokens that a row's cache has room for.
        max_batch: rows at once.
        chunk_size: tokens of a prompt at once.
    """

    engine: str
    compute: str
    cache_dtype: str
    max_length: int
    max_batch: int
    chunk_size: int

    def command(self, bundle: Path) -> str:
        """Return the command that builds such an engine, replacing the one there is."""
        options = f"--engine {self.engine} --compute {self.compute} --cache-dtype {self.cache_dtype}"
        options += f" --max-length {self.max_length} --max-batch {self.max_batch} --force"
        return f"gta-edge build {shlex.quote(str(bundle))} {options}"


@dataclass(frozen=True)
class EngineRecord:
    """What an engine was made from, by and for.

    Attributes:
        purpose: what it was built for.
        made_from: SHA-256 of the bundle's graph and weights, by file name.
        tensorrt: version of TensorRT that built it, which alone can load it.
        compute_capability: of the GPU that it was built for, ``8.7``.
        gta_edge: version of this package that built it; its plugin is part of that.
    """

    purpose: Purpose
    made_from: dict[str, str]
    tensorrt: str
    compute_capability: str
    gta_edge: str = __version__


def made_from(bundle: Bundle) -> dict[str, str]:
    """Return the hashes of what an engine depends on."""
    files = bundle.manifest["files"]
    return {name: files[name]["sha256"] for name in (MODEL, WEIGHTS) if name in files}


def engine_directory(bundle: Bundle, engine: str) -> Path:
    """Return where a bundle's engine lies."""
    return bundle.directory / "engines" / engine


def keep_engine(bundle: Bundle, record: EngineRecord, plan: bytes | memoryview, *, force: bool = False) -> Path:
    """Write an engine and its record into the bundle; both appear at once, complete.

    Raises:
        OutputError: there is one already and not ``force``, or the bundle cannot be written to.
    """
    directory = engine_directory(bundle, record.purpose.engine)
    directory.parent.mkdir(exist_ok=True)
    with new_directory(directory, force=force) as partial:
        (partial / PLAN).write_bytes(plan)
        document = {"record": asdict(record), "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
        (partial / RECORD).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return directory


def load_engine(bundle: Bundle, engine: str, *, tensorrt: str, compute_capability: str) -> tuple[bytes, EngineRecord]:
    """Return a bundle's engine and its record, if it fits what is here.

    Args:
        bundle: the model.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        tensorrt: version of TensorRT that will load it.
        compute_capability: of the GPU that will run it.

    Raises:
        EngineError: there is none, it is damaged, or it was made from or for something else; which, and the command
            that builds it anew.
    """
    directory = engine_directory(bundle, engine)
    record, size, digest = _read_record(bundle, directory, engine)
    here = {
        "the bundle's files": (made_from(bundle), record.made_from),
        "gta-edge": (__version__, record.gta_edge),
        "TensorRT": (tensorrt, record.tensorrt),
        "the GPU's compute capability": (compute_capability, record.compute_capability),
    }
    for name, (now, then) in here.items():
        if now != then:
            found = f"is {now} here and was {then}" if isinstance(now, str) else "are others"
            remedy = record.purpose.command(bundle.directory)
            raise EngineError(f"{directory}: {name} {found} when the engine was built; run: {remedy}")
    try:
        plan = (directory / PLAN).read_bytes()
    except OSError as error:
        raise EngineError(
            f"{directory / PLAN}: cannot be read ({error.strerror}); run: {record.purpose.command(bundle.directory)}"
        ) from error
    if len(plan) != size or hashlib.sha256(plan).hexdigest() != digest:
        raise EngineError(
            f"{directory / PLAN}: is not what was written; run: {record.purpose.command(bundle.directory)}"
        )
    return plan, record


def require_engine(bundle: Bundle, engine: str) -> None:
    """Raise EngineError where a bundle has no engine of this kind; what there is may still not fit."""
    if not engine_directory(bundle, engine).is_dir():
        raise _no_engine(bundle, engine)


def _no_engine(bundle: Bundle, engine: str) -> EngineError:
    return EngineError(
        f"{engine_directory(bundle, engine)}: there is no engine; "
        f"run: gta-edge build {shlex.quote(str(bundle.directory))} --engine {engine}"
    )


def _read_record(bundle: Bundle, directory: Path, engine: str) -> tuple[EngineRecord, int, str]:
    build = f"gta-edge build {shlex.quote(str(bundle.directory))} --engine {engine}"
    path = directory / RECORD
    for link in (directory.parent, directory, path, directory / PLAN):
        if link.is_symlink():
            raise EngineError(f"{link}: is a link; engines are read from the bundle itself: run {build} --force")
    try:
        if path.stat().st_size > _LARGEST_RECORD_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = dict(document["record"])
        record = EngineRecord(**entries | {"purpose": Purpose(**entries["purpose"])})
        size, digest = document["bytes"], document["sha256"]
        _check_types(record, size, digest)
    except FileNotFoundError as error:
        raise _no_engine(bundle, engine) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineError(f"{path}: is not the record of an engine ({error}); run: {build} --force") from error
    if record.purpose.engine != engine:
        raise EngineError(f"{path}: is of an engine for {record.purpose.engine}; run: {build} --force")
    return record, size, digest


def _check_types(record: EngineRecord, size: object, digest: object) -> None:
    """Raise ValueError where a value is not of its type; dataclasses take anything."""
    texts = [record.tensorrt, record.compute_capability, record.gta_edge, record.purpose.compute, digest]
    texts += [record.purpose.engine, record.purpose.cache_dtype, *record.made_from, *record.made_from.values()]
    numbers = [size, record.purpose.max_length, record.purpose.max_batch, record.purpose.chunk_size]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is expected and something else found")
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("a positive whole number is expected and something else found")
