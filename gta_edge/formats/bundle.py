"""The bundle: a directory that holds a model in ONNX with all that is needed to run it, and says what it holds.

    model.onnx         the graph; model.onnx.data beside it, its weights
    config.json        as in the checkpoint
    gta_edge.json      the manifest: format version, precision, cache layout, size and hash of every file
    tokenizer.json …   as in the checkpoint, if it has them

A reader trusts nothing: a newer format, a file that is not as recorded, and a path that leads out of the directory
are refused. Small files are hashed at every opening, large ones when their size or modification time changed. A bundle
is never written to by who reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gta_edge.errors import BundleError, ConfigError
from gta_edge.formats.checkpoint import COMPANIONS
from gta_edge.formats.integrity import describe_file, is_entry, problem_of
from gta_edge.formats.weights import Storage, is_kept
from gta_edge.model.config import ModelConfig, read_config
from gta_edge.numerics.quantization import BLOCK_SIZES
from gta_edge.support.arguments import path_argument
from gta_edge.support.files import bundle_file, plain_name
from gta_edge.support.json_files import read_json
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief

__all__ = ["CONFIG", "FORMAT", "FORMAT_VERSION", "MANIFEST", "MODEL", "WEIGHTS", "Bundle", "write_manifest"]

FORMAT = "gta-edge-bundle"
FORMAT_VERSION = 1
MANIFEST = "gta_edge.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
CONFIG = "config.json"

_MAX_MANIFEST_BYTES = 2**20
_MAX_GRAPH_BYTES = 2**28  # a graph of a thousand layers has a tenth of that; weights lie elsewhere
_MAX_COMPANION_BYTES = 2**26
_TRIES = 10  # a bundle may be replaced while it is opened
_BYTES_PER_LAYER = 100  # far fewer than the nodes of one take in the graph's file
_REMEDY = "export the bundle again, or copy it anew"
_ROTATED = "rotated_values"  # in a manifest, where it holds


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files are as its manifest says.

    Attributes:
        directory: where it lies.
        config: the model's sizes.
        precision: what the weights are stored in: fp32, fp16, bf16, int8 or int4.
        manifest: the content of ``gta_edge.json``.
        verified: whether every file was hashed, whatever its size and time.
        identity: of the directory: another one may get its name.
    """

    directory: Path
    config: ModelConfig
    precision: str
    manifest: Mapping[str, Any]
    verified: bool = False
    identity: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def was_replaced(self) -> bool:
        """Whether another directory is at its place by now: what is read there is not what was checked."""
        return _identity(self.directory) != self.identity

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.directory / MODEL

    @property
    def file_bytes(self) -> dict[str, int]:
        """Size in bytes of every file that the manifest lists."""
        return {name: entry["bytes"] for name, entry in self.manifest["files"].items()}

    @property
    def hash(self) -> str:
        """SHA-256 of graph, weights and config by what the manifest says of them: the same model, the same hash."""
        hashes = {name: self.manifest["files"].get(name, {}).get("sha256") for name in (MODEL, WEIGHTS, CONFIG)}
        return _digest(hashes)

    @property
    def block_size(self) -> int | None:
        """Weights that share a scale; None for whole output channels, and where nothing is quantised."""
        size: int | None = self.manifest.get("block_size")
        return size

    @property
    def storage(self) -> Storage:
        """How each matrix is stored."""
        return Storage(self.precision, self.block_size, frozenset(self.manifest.get("int8", ())))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file that holds the weights."""
        return self.file_bytes.get(WEIGHTS, 0)

    @property
    def rotated_values(self) -> bool:
        """Whether the weights are those of the checkpoint with its values rotated (``formats.rotated_checkpoint``)."""
        return self.manifest.get(_ROTATED) is True

    @classmethod
    def open(cls, directory: str | Path, *, verify_hashes: bool = False, progress: Progress = silent) -> Bundle:
        """Check a directory against its manifest.

        Args:
            directory: the bundle.
            verify_hashes: hash the weights too, though their size and modification time are as recorded.
            progress: told of bytes hashed.

        Raises:
            BundleError: no bundle, a newer format, or a file that is missing, changed or outside the directory.
        """
        directory = path_argument(directory, "the bundle")
        for remaining in reversed(range(_TRIES)):
            identity = _identity(directory)
            try:
                bundle = cls._open(directory, verify_hashes, progress, identity)
            except BundleError:
                if not remaining or _identity(directory) == identity:
                    raise
            else:
                if not remaining or not bundle.was_replaced:
                    return bundle
        raise AssertionError("the last try returns or raises")

    @classmethod
    def _open(
        cls, directory: Path, verify_hashes: bool, progress: Progress, identity: tuple[int, int] | None
    ) -> Bundle:
        manifest = _read_manifest(directory)
        for name in COMPANIONS:
            if name not in manifest["files"] and os.path.lexists(directory / name):
                raise BundleError(
                    f"{directory / name}: is not in the manifest", "put it into the checkpoint and export"
                )
        for name, entry in manifest["files"].items():
            _check_file(directory, name, entry, verify_hashes, progress)
        try:
            config = read_config(directory / CONFIG)
        except ConfigError as error:
            raise BundleError(error.problem, error.remedy) from error
        layers, graph_bytes = config.num_hidden_layers, manifest["files"][MODEL]["bytes"]
        if layers * _BYTES_PER_LAYER > graph_bytes:
            raise BundleError(f"{directory / CONFIG}: asks for {layers} layers, {MODEL} is too small for them", _REMEDY)
        if manifest["cache"] != _cache_layout(config):
            raise BundleError(
                f"{directory / MANIFEST}: the cache layout {brief(manifest['cache'])} is not that of {CONFIG}, "
                f"{brief(_cache_layout(config))}",
                f"{_REMEDY}",
            )
        _check_int8(directory / MANIFEST, manifest, config)
        return cls(directory, config, manifest["precision"], manifest, verify_hashes, identity)


def write_manifest(
    directory: Path,
    config: ModelConfig,
    storage: Storage,
    made_with: Mapping[str, str],
    progress: Progress = silent,
    *,
    rotated_values: bool = False,
) -> None:
    """Write the manifest of all files that lie in ``directory``, which makes it a bundle."""
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": config.architecture,
        "precision": storage.precision,
        "block_size": storage.block_size,
        "int8": sorted(storage.int8),
        "cache": _cache_layout(config),
        "made_with": dict(made_with),
        "files": {name: describe_file(directory / name, progress) for name in names},
    }
    if rotated_values:
        manifest[_ROTATED] = True
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        info = directory.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return info.st_dev, info.st_ino


def _cache_layout(config: ModelConfig) -> list[dict[str, Any]]:
    return [asdict(cache) | {"dtype": "float32"} for cache in config.caches]


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        is_directory, exists = directory.is_dir(), directory.exists()
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise BundleError(f"{directory}: cannot be read ({error.strerror})", "give a bundle's directory") from error
    if not is_directory:
        found = "is a file" if exists else "does not exist"
        raise BundleError(f"{directory} {found}", "expected a bundle directory, as `gta-edge export` writes it")
    if not os.path.lexists(path):
        hint = "it looks like a checkpoint: run `gta-edge export` first" if (directory / CONFIG).exists() else _REMEDY
        raise BundleError(f"{directory}: is not a bundle, it has no {MANIFEST}", hint)
    manifest = read_json(bundle_file(directory, MANIFEST), BundleError, _REMEDY, max_bytes=_MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path}: is not the manifest of a bundle (no format {FORMAT!r})", _REMEDY)
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:  # JSON's true is an int to Python
        raise BundleError(f"{path}: format_version is {brief(version)}; expected 1 to {FORMAT_VERSION}", _REMEDY)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version is {brief(version)}",
            f"this version of gta-edge reads up to {FORMAT_VERSION}: upgrade it",
        )
    try:
        intact = manifest.pop("sha256", None) == _digest(manifest)
    except RecursionError:
        intact = False
    if not intact:
        raise BundleError(f"{path}: was changed after it was written", _REMEDY)
    _check_fields(path, manifest)
    return manifest


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """A checksum can be forged: what is used later must have the right type."""
    from gta_edge.numerics.dtypes import PRECISIONS

    files = manifest.get("files")
    precision = manifest.get("precision")
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise BundleError(f"{path}: precision is {brief(precision)}; expected one of {known}", _REMEDY)
    block_size = manifest.get("block_size")  # none in bundles of earlier versions
    if block_size is not None and (type(block_size) is not int or block_size not in BLOCK_SIZES):
        raise BundleError(f"{path}: block_size is {brief(block_size)}; expected one of {BLOCK_SIZES} or none", _REMEDY)
    if not isinstance(files, dict) or not {MODEL, CONFIG} <= files.keys() or "cache" not in manifest:
        raise BundleError(f"{path}: does not list {MODEL} and {CONFIG} with their cache layout", _REMEDY)
    if not isinstance(manifest.get("made_with"), dict):
        raise BundleError(f"{path}: does not say what made the bundle (made_with)", _REMEDY)
    for name, entry in files.items():
        if not plain_name(name):
            raise BundleError(f"{path}: lists the file {brief(name)}, which is outside the directory", _REMEDY)
        if not is_entry(entry):
            raise BundleError(f"{path}: the entry of {brief(name)} lacks bytes, mtime_ns or sha256", _REMEDY)
        limit = _MAX_GRAPH_BYTES if name == MODEL else _MAX_COMPANION_BYTES if name in (CONFIG, *COMPANIONS) else None
        if limit is not None and entry["bytes"] > limit:
            raise BundleError(f"{path}: {name} has {brief(entry['bytes'])} bytes, expected at most {limit}", _REMEDY)


def _check_int8(path: Path, manifest: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuse a list of matrices in int8 that the model does not have, or that nothing else is narrower than."""
    names = manifest.get("int8", [])  # none in bundles of earlier versions
    shapes = config.parameter_shapes()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BundleError(f"{path}: int8 is {brief(names)}, expected a list of parameters", _REMEDY)
    unknown = next((name for name in names if len(shapes.get(name, ())) != 2 or is_kept(name)), None)
    if unknown is not None or (names and manifest["precision"] != "int4"):
        found = f"lists {brief(unknown if unknown is not None else names[0])} among the matrices in int8"
        raise BundleError(f"{path}: {found}, expected matrices of {CONFIG} in an int4 bundle", _REMEDY)


def _check_file(directory: Path, name: str, entry: Mapping[str, Any], verify_hashes: bool, progress: Progress) -> None:
    path, real = directory / name, bundle_file(directory, name)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            problem = problem_of(file, real, entry, verify_hashes=verify_hashes, progress=progress)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})", _REMEDY) from error
    if problem:
        raise BundleError(f"{path}: {problem}", _REMEDY)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
