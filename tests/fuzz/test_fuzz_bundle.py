"""Damaged and forged bundles and artifacts: refused in one line, or as they were."""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.errors import BundleError, EngineError
from gta_edge.formats.artifacts import RefusedError, made_from, open_artifact
from gta_edge.formats.bundle import MANIFEST, MODEL, WEIGHTS, Bundle
from gta_edge.runtime.onnxruntime.lowered import CPU, GRAPH, PACKED, cached_graph
from gta_edge.runtime.tensorrt.engine import EngineManifest, EngineSpec, load_engine
from tests.helpers.engines import keep_engine
from tests.helpers.fuzz import CASES, ends_well, rng

HERE = {"tensorrt": "10.3.0", "compute_capability": "8.7"}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**30), 0.5, 1e308, float("inf"), float("nan"), "",
    "\x1b[2J",
    "x" * 10**5, "\ud800", "../../etc/passwd", "/etc/passwd", "a\0b", "fp16", [], [[]], [0] * 10**4, {}, {"": {}},
    {"bytes": 0, "mtime_ns": 0, "sha256": ""},
]  # fmt: skip


def mutate(document: Any, chance: random.Random) -> Any:
    """Return JSON with one to three places changed: replaced, removed, doubled, renamed, or swapped."""
    for _ in range(chance.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return copy.deepcopy(chance.choice(ODD))
        container, key = chance.choice(places)
        kind = chance.choice(["replace", "replace", "remove", "rename", "swap"])
        if kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[chance.choice(["", "name", "../x", "x" * 5000, "\x1b", MODEL, WEIGHTS])] = container.pop(key)
        elif kind == "swap":
            other, its = chance.choice(places)
            if its in other if isinstance(other, dict) else its < len(other):
                container[key] = json.loads(json.dumps(other[its]))
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    found = []
    if isinstance(document, (dict, list)):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            found += [(document, key), *_places(document[key])]
    return found


@pytest.fixture(scope="module")
def complete(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a lowered graph and an engine."""
    directory = tmp_path_factory.mktemp("fuzz") / "bundle"
    shutil.copytree(tiny_bundle, directory, ignore=shutil.ignore_patterns("engines"))
    bundle = Bundle.open(directory)
    assert cached_graph(bundle, CPU) is not None
    purpose = EngineSpec("tensorrt", "fp16", "fp16", max_length=64, max_batch=2, chunk_size=32)
    keep_engine(bundle, EngineManifest(purpose, made_from(bundle), HERE["tensorrt"], ["8.7"]), b"the engine")
    return directory


def restored(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("signed", [True, False])
def test_manifests(complete: Path, signed: bool) -> None:
    path = complete / MANIFEST
    before = path.read_bytes()
    try:
        for case in range(CASES):
            manifest = json.loads(before)
            manifest.pop("sha256")
            manifest = mutate(manifest, rng(f"manifest {signed}", case))
            if signed and isinstance(manifest, dict):  # whoever forges a bundle can count as we do
                text = json.dumps(manifest, sort_keys=True).encode()
                manifest["sha256"] = hashlib.sha256(text).hexdigest()
            path.write_text(json.dumps(manifest))
            error = ends_well(lambda: Bundle.open(complete))
            assert error is None or isinstance(error, BundleError), f"case {case}: {error}"
            assert signed or error, f"case {case}"
    finally:
        restored(path, before)


def test_any_byte_of_any_file(complete: Path) -> None:
    """Every damage is found but in a large file with its time set back, and none of these is large."""
    files = sorted(path for path in complete.iterdir() if path.is_file())
    for case in range(CASES):
        chance = rng("bytes", case)
        path = chance.choice(files)
        before, times = path.read_bytes(), path.stat()
        try:
            path.write_bytes(damaged(before, chance))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            error = ends_well(lambda: Bundle.open(complete))
            same = path.read_bytes() == before or _same_manifest(path, before)
            assert same or isinstance(error, BundleError), f"case {case}: {path.name}"
        finally:
            restored(path, before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return other bytes: one changed, a part cut out, put in, or repeated, or all beyond some place gone."""
    if not content:
        return b"\0"
    at, size = chance.randrange(len(content)), chance.choice([1, 1, 7, 4096])
    kind = chance.choice(["change", "change", "cut", "insert", "repeat", "end"])
    if kind == "change":
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    if kind == "cut":
        return content[:at] + content[at + size :]
    if kind == "insert":
        return content[:at] + chance.randbytes(size) + content[at:]
    if kind == "repeat":
        return content[: at + size] + content[at:]
    return content[:at]


def _same_manifest(path: Path, before: bytes) -> bool:
    """Tell whether only white space of the manifest has changed."""
    try:
        return path.name == MANIFEST and json.loads(path.read_bytes()) == json.loads(before)
    except ValueError:
        return False


def _graph_of(complete: Path) -> Callable[[], bytes | None]:
    def call() -> bytes | None:
        try:
            found = open_artifact(complete, CPU.directory, "graph.json", read=(GRAPH,), mapped=(PACKED,))
        except RefusedError:
            return None
        return found.read[GRAPH]

    return call


@pytest.mark.parametrize("place", ["onnxruntime", "tensorrt"])
def test_artifacts(complete: Path, place: str) -> None:
    """Not one damaged artifact is used: whichever file, whichever byte, with its time set back."""
    directory = complete / "engines" / place
    files = sorted(directory.iterdir())
    bundle = Bundle.open(complete)
    wanted = (directory / GRAPH).read_bytes() if place == "onnxruntime" else b"the engine"
    for case in range(CASES):
        chance = rng(f"artifact {place}", case)
        path = chance.choice(files)
        before, times = path.read_bytes(), path.stat()
        try:
            path.write_bytes(damaged(before, chance))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if place == "onnxruntime":
                found = _graph_of(complete)()
                assert found in (None, wanted), f"case {case}: {path.name}"
                used = found is not None
            else:
                error = ends_well(lambda: load_engine(bundle, "tensorrt", **HERE))
                assert error is None or isinstance(error, EngineError)
                used = error is None
            # white space of a record, and what the graph asked for does not name
            harmless = path.suffix == ".json" or path.name == "exact.onnx" or path.read_bytes() == before
            assert not used or harmless, f"case {case}: {path.name}"
        finally:
            restored(path, before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
