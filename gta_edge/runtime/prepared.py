"""A bundle's graph as ONNX Runtime runs it best on a CPU, made once and kept in the bundle.

The bundle's own graph stays as it is: one node for each attention, standard operators, one file for every engine. For
ONNX Runtime the functions are inlined and what all layers have in common (positions, mask, shapes) is computed once.
Products with integers get its kernel's own layout, in a file beside the graph; all other weights stay where they are.

    engines/onnxruntime/model.onnx, exact.onnx    the two graphs: activations rounded to int8, or not
    engines/onnxruntime/weights.data              codes and scales
    engines/onnxruntime/prepared.json             what they were made from
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gta_edge.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.errors import OutputError
from gta_edge.files import new_directory
from gta_edge.progress import Progress, silent
from gta_edge.quantization import BITS
from gta_edge.version import __version__

__all__ = ["Prepared", "prepare", "without_new_weights"]

_REVISION = 1  # of what the passes do
_DIRECTORY = "engines/onnxruntime"
_RECORD, _GRAPH, _EXACT, _PACKED = "prepared.json", "model.onnx", "exact.onnx", "weights.data"
_NAMES = {_RECORD, _GRAPH, _EXACT, _PACKED}


@dataclass(frozen=True)
class Prepared:
    """A graph for ONNX Runtime.

    Attributes:
        graph: the model, serialised; its weights are external files, named from the bundle's directory.
        rounds_activations: whether products round activations to int8.
        kept: whether the graph is one that is kept, with weights beside it that may be replaced at any time.
    """

    graph: bytes
    rounds_activations: bool
    kept: bool


def prepare(bundle: Bundle, *, exact: bool = False, progress: Progress = silent) -> Prepared:
    """Return the graph for a bundle: the one that is kept in it, or a new one, which is kept if the bundle is writable.

    Args:
        bundle: the model.
        exact: multiply by integers in float32, instead of rounding activations to int8; four times slower.
        progress: told of weights that are laid out anew.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing to make a new one.
    """
    rounds = bundle.precision in BITS and not exact
    directory, name = bundle.directory / _DIRECTORY, _EXACT if exact else _GRAPH
    record = _record(bundle)
    graph = _kept(directory, record, name)
    if graph is None and _keep(bundle, directory, record, progress):
        graph = _kept(directory, record, name)
    return without_new_weights(bundle, exact=exact) if graph is None else Prepared(graph, rounds, kept=True)


def without_new_weights(bundle: Bundle, *, exact: bool = False) -> Prepared:
    """Return a graph that reads the bundle's own weights and nothing else: slower to load, and for that always right.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing.
    """
    from gta_edge.runtime.preparation import graph_without_new_weights

    return Prepared(graph_without_new_weights(bundle), bundle.precision in BITS and not exact, kept=False)


def _keep(bundle: Bundle, directory: Path, record: dict[str, Any], progress: Progress) -> bool:
    """Make the graphs and keep them; tell whether the bundle could be written to."""
    try:
        if _leads_out(directory):
            return False
        directory.parent.mkdir(exist_ok=True)
        record_file = directory / _RECORD
        if directory.is_dir() and not record_file.exists() and {path.name for path in directory.iterdir()} <= _NAMES:
            record_file.touch()  # ours, whatever is left of it, and so to be replaced
        with new_directory(directory, force=True) as partial:
            _write(bundle, partial, record, progress)
    except (OutputError, OSError):  # read-only, or full: it goes without, slower to load
        return False
    finally:
        with suppress(OSError):  # not there, or not empty
            directory.parent.rmdir()
    return True


def _record(bundle: Bundle) -> dict[str, Any]:
    """Return what the result depends on."""
    files = bundle.manifest["files"]
    made_from = {name: files[name]["sha256"] for name in (MODEL, WEIGHTS) if name in files}
    return {"gta_edge": __version__, "revision": _REVISION, "made_from": made_from}


def _kept(directory: Path, record: dict[str, Any], name: str) -> bytes | None:
    """Return a graph that was kept, None when there is none, or it is of something else, or damaged."""
    packed = directory / _PACKED
    try:  # all of it: what belongs to somebody else may not even be looked at
        if not all(_is_own(path) for path in (directory / _RECORD, directory / name)) or _leads_out(directory):
            return None
        found = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        graph = (directory / name).read_bytes()
        intact = found["sha256"][name] == hashlib.sha256(graph).hexdigest()
        intact = intact and found["packed"] == ([*_times(packed)] if _is_own(packed) else None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return graph if intact and {key: found.get(key) for key in record} == record else None


def _is_own(path: Path) -> bool:
    """Tell whether this is a file, of a size that is read at once or mapped, and no link or pipe."""
    return path.is_file() and not path.is_symlink()


def _leads_out(directory: Path) -> bool:
    """Tell whether a directory of ours is a link to another place."""
    return directory.is_symlink() or directory.parent.is_symlink()


def _times(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write(bundle: Bundle, directory: Path, record: dict[str, Any], progress: Progress) -> None:
    from gta_edge.runtime.preparation import graphs

    packed = directory / _PACKED
    default, exact = graphs(bundle, packed, f"{_DIRECTORY}/{_PACKED}", progress)
    contents = {_GRAPH: default, _EXACT: exact}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    written = record | {"sha256": sums, "packed": _times(packed) if packed.exists() else None}
    (directory / _RECORD).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
