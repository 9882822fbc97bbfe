"""A bundle's graph as ONNX Runtime runs it best, made once and kept in the bundle.

The bundle's own graph stays as it is: one node for each attention, standard operators, one file for every engine. For
ONNX Runtime the functions are inlined and what all layers have in common (positions, mask, shapes) is computed once.
Matmuls with integers get its kernel's own layout, in a file beside the graph; all other weights stay where they are.
This is how a form is kept, and the CPU's; the one for GPUs is in ``cuda_lower``.

    engines/onnxruntime/model.onnx, exact.onnx    the two graphs: activations rounded to int8, or not
    engines/onnxruntime/weights.data              codes and scales
    engines/onnxruntime/prepared.json             what they were made from

They are artifacts (``formats.artifacts``): what another user or machine made, and what is damaged, is made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gta_edge.errors import OutputError
from gta_edge.formats.artifacts import Artifact, RefusedError, open_artifact, require_secret, write_record
from gta_edge.formats.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.host_memory import require_memory_for_lowering
from gta_edge.support.files import new_directory
from gta_edge.support.ownership import ARTIFACTS
from gta_edge.support.partials import remove_stale
from gta_edge.support.progress import Progress, silent
from gta_edge.version import __version__

__all__ = ["GRAPH", "Form", "LoweredGraph", "kept_graph", "lower", "without_new_weights"]

GRAPH = "model.onnx"
_RECORD, _EXACT, _PACKED = "prepared.json", "exact.onnx", "weights.data"

Make = Callable[[Bundle, Path, str, Progress], dict[str, bytes]]
"""Writes a form's new weights to a file, and returns its graphs by name, serialised.

Takes the bundle, the file, what the graphs call that file (from the bundle's directory), and who is told of weights.
"""


@dataclass(frozen=True)
class Form:
    """A form of a bundle's graph that is kept in it.

    Attributes:
        directory: where, from the bundle's directory: a place below ``engines``.
        make: what makes it.
        revision: of what ``make`` does.
        options: what else the result depends on; recorded with it.
    """

    directory: str
    make: Make
    revision: int = 1
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoweredGraph:
    """A graph for ONNX Runtime.

    Attributes:
        graph: the model, serialised; its weights are external files, named from the bundle's directory.
        rounds_activations: whether matmuls round activations to int8.
        kept: whether the graph is one that is kept, with weights beside it that may be replaced at any time.
    """

    graph: bytes
    rounds_activations: bool
    kept: bool


def lower(bundle: Bundle, *, exact: bool = False, progress: Progress = silent) -> LoweredGraph:
    """Return the graph for a bundle: the one that is kept in it, or a new one, which is kept if the bundle is writable.

    Args:
        bundle: the model.
        exact: multiply by integers in float32, instead of rounding activations to int8; four times slower.
        progress: told of weights that are laid out anew.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing to make a new one.
    """
    rounds = bundle.precision in BITS and not exact
    graph = kept_graph(bundle, _CPU, _EXACT if exact else GRAPH, progress)
    return without_new_weights(bundle, exact=exact) if graph is None else LoweredGraph(graph, rounds, kept=True)


def without_new_weights(bundle: Bundle, *, exact: bool = False) -> LoweredGraph:
    """Return a graph that reads the bundle's own weights and nothing else: slower to load, and for that always right.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing.
    """
    require_memory_for_lowering()
    from gta_edge.runtime.onnxruntime.lower import graph_without_new_weights

    return LoweredGraph(graph_without_new_weights(bundle), bundle.precision in BITS and not exact, kept=False)


def _for_cpu(bundle: Bundle, weights: Path, location: str, progress: Progress) -> dict[str, bytes]:
    require_memory_for_lowering()
    from gta_edge.runtime.onnxruntime.lower import graphs

    default, exact = graphs(bundle, weights, location, progress)
    return {GRAPH: default, _EXACT: exact}


_CPU = Form("engines/onnxruntime", _for_cpu)


# --- what any form needs to be kept --------------------------------------------------------------------------------


def kept_graph(bundle: Bundle, form: Form, name: str = GRAPH, progress: Progress = silent) -> bytes | None:
    """Return a graph that is kept in a bundle, made now if there is none, or None if the bundle is not writable.

    Raises:
        BundleError, BackendError: from ``form.make``.
    """
    remove_stale(bundle.directory / ARTIFACTS)
    record = _record(bundle, form)
    kept = _kept(bundle, form, record, name, progress)
    if kept is None and _keep(bundle, form, record, progress):
        kept = _kept(bundle, form, record, name, progress)
    return None if kept is None else kept.read[name]


def _keep(bundle: Bundle, form: Form, record: dict[str, Any], progress: Progress) -> bool:
    """Make the graphs and keep them; tell whether the bundle could be written to."""
    directory = bundle.directory / form.directory
    try:
        if _leads_out(bundle, directory):
            return False
        require_secret()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(directory, force=True, artifact=True) as partial:
            contents = form.make(bundle, partial / _PACKED, f"{form.directory}/{_PACKED}", progress)
            for name, content in contents.items():
                (partial / name).write_bytes(content)
            write_record(partial, _RECORD, record, progress)
    except (OutputError, OSError):  # read-only, or full: it goes without, slower to load
        return False
    finally:
        with suppress(OSError):  # not there, or not empty
            for parent in _above(bundle, directory):
                parent.rmdir()
    return True


def _record(bundle: Bundle, form: Form) -> dict[str, Any]:
    """Return what the result depends on."""
    files = bundle.manifest["files"]
    made_from = {name: files[name]["sha256"] for name in (MODEL, WEIGHTS) if name in files}
    return {"gta_edge": __version__, "revision": form.revision, "made_from": made_from} | form.options


def _kept(bundle: Bundle, form: Form, record: dict[str, Any], name: str, progress: Progress) -> Artifact | None:
    """Return what was kept, None when there is none, it is of something else, or is not to be trusted."""
    try:
        found = open_artifact(
            bundle.directory,
            form.directory,
            _RECORD,
            read=(name,),
            mapped=(_PACKED,),
            verify_hashes=bundle.verified,
            progress=progress,
        )
    except RefusedError:
        return None
    return found if found.content == record else None


def _above(bundle: Bundle, directory: Path) -> list[Path]:
    """Return the directories between a form's and the bundle's, the innermost first."""
    return list(directory.parents)[: len(directory.relative_to(bundle.directory).parts) - 1]


def _leads_out(bundle: Bundle, directory: Path) -> bool:
    """Tell whether a directory of ours is a link to another place."""
    return any(path.is_symlink() for path in (directory, *_above(bundle, directory)))
