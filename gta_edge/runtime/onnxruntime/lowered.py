"""A bundle's graph as ONNX Runtime runs it best, lowered once and cached in the bundle.

The bundle's own graph stays as it is: one node for each attention, standard operators, one file for every engine. For
ONNX Runtime the functions are inlined and what all layers have in common (positions, mask, shapes) is computed once.
Quantised weights are repacked for its kernel, in a file beside the graph; all other weights stay where they are. This
is how a form is cached, and the CPU's; the one for GPUs is in ``cuda_lower``.

    engines/onnxruntime/model.onnx, exact.onnx    the two graphs: activations rounded to int8, or not
    engines/onnxruntime/weights.data              quantised weights and scales
    engines/onnxruntime/graph.json                what they were made from

With a cache of int8, and with a managed one (``graph.manage_cache``) for each set of features, there are two graphs
more, and no more weights:

    engines/onnxruntime-int8/                       graphs alike, and their record
    engines/onnxruntime-managed/mass-2-branches/    likewise, and mass-2-branches-int8

They are artifacts (``formats.artifacts``): what another user or machine made, and what is damaged, is made anew. So is
what other code made, an earlier commit as well as another version: the record has a hash of ``SOURCES``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gta_edge.formats.artifacts import cached_artifact, origin
from gta_edge.formats.bundle import Bundle
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.host_memory import require_memory_for_lowering
from gta_edge.plugins.attention.definition import Features
from gta_edge.support.ownership import ARTIFACTS
from gta_edge.support.progress import Progress, silent

__all__ = ["CPU", "GRAPH", "PACKED", "SOURCES", "Form", "LoweredGraph", "cached_graph", "lower", "without_new_weights"]

GRAPH, PACKED = "model.onnx", "weights.data"
"""Files of a form: a graph, and the weights that are its own."""
_RECORD, _EXACT = "graph.json", "exact.onnx"

SOURCES = (
    "formats/weights.py",
    "graph/*.py",
    "model/*.py",
    "numerics/*.py",
    "plugins/*.py",
    "plugins/*/definition.py",
    "plugins/attention/function.py",
    "plugins/matmul/packing.py",
    "runtime/onnxruntime/*lower.py",
    "runtime/onnxruntime/passes/*.py",
)
"""The package's files that shape a lowered graph, as patterns; what else takes part reads, checks or reports."""

Make = Callable[[Bundle, Path, str, Progress], dict[str, bytes]]
"""Writes a form's new weights to a file, and returns its graphs by name, serialised.

Takes the bundle, the file, what the graphs call that file (from the bundle's directory), and who is told of weights.
"""


@dataclass(frozen=True)
class Form:
    """A form of a bundle's graph that is cached in it.

    Attributes:
        directory: where, from the bundle's directory: a place below ``engines``.
        make: what makes it.
        options: what else the result depends on; recorded with it.
    """

    directory: str
    make: Make
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoweredGraph:
    """A graph for ONNX Runtime.

    Attributes:
        graph: the model, serialised; its weights are external files, named from the bundle's directory.
        rounds_activations: whether matmuls round activations to int8.
        cached: whether the graph is a cached one, with weights beside it that may be replaced at any time.
    """

    graph: bytes
    rounds_activations: bool
    cached: bool


def lower(
    bundle: Bundle,
    *,
    exact: bool = False,
    features: Features | None = None,
    cache_dtype: str = "fp32",
    progress: Progress = silent,
) -> LoweredGraph:
    """Return the graph for a bundle: the cached one, or a new one, which is cached if the bundle is writable.

    Args:
        bundle: the model.
        exact: multiply by integers in float32, instead of rounding activations to int8; four times slower.
        features: of a managed cache; None for none.
        cache_dtype: type of the cache, ``fp32`` or ``int8``.
        progress: told of weights that are repacked.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing to make a new one.
    """
    rounds = bundle.precision in BITS and not exact
    name = _EXACT if exact else GRAPH
    plain = features is None and cache_dtype == "fp32"
    graph = cached_graph(bundle, CPU, name if plain else GRAPH, progress)
    if graph is not None and not plain:
        graph = cached_graph(bundle, _variant(features, cache_dtype, graph), name, progress)
    if graph is None:
        return without_new_weights(bundle, exact=exact, features=features, cache_dtype=cache_dtype)
    return LoweredGraph(graph, rounds, cached=True)


def without_new_weights(
    bundle: Bundle, *, exact: bool = False, features: Features | None = None, cache_dtype: str = "fp32"
) -> LoweredGraph:
    """Return a graph that reads the bundle's own weights and nothing else: slower to load, and for that always right.

    Raises:
        BackendError: the bundle's graph cannot be read, or onnx-ir is missing.
    """
    require_memory_for_lowering()
    from gta_edge.runtime.onnxruntime.lower import graph_without_new_weights

    graph = graph_without_new_weights(bundle, features, cache_dtype)
    return LoweredGraph(graph, bundle.precision in BITS and not exact, cached=False)


def _variant(features: Features | None, cache_dtype: str, plain: bytes) -> Form:
    """Return the form of another cache, beside that of ``plain``, whose weights it reads."""

    def make(bundle: Bundle, weights: Path, location: str, progress: Progress) -> dict[str, bytes]:
        require_memory_for_lowering()
        from gta_edge.runtime.onnxruntime.lower import variant_graphs

        default, exact = variant_graphs(bundle, features, cache_dtype, plain)
        return {GRAPH: default, _EXACT: exact}

    options = {"weights_of": hashlib.sha256(plain).hexdigest()}
    if features is None:
        return Form(f"{CPU.directory}-{cache_dtype}", make, options=options)
    parts = [features.observe or "unobserved", str(features.bias_rows), *["branches"] * features.has_branches]
    parts += [cache_dtype] * (cache_dtype != "fp32")
    return Form(f"{CPU.directory}-managed/{'-'.join(parts)}", make, options=options)


def _for_cpu(bundle: Bundle, weights: Path, location: str, progress: Progress) -> dict[str, bytes]:
    require_memory_for_lowering()
    from gta_edge.runtime.onnxruntime.lower import graphs

    default, exact = graphs(bundle, weights, location, progress)
    return {GRAPH: default, _EXACT: exact}


CPU = Form(f"{ARTIFACTS}/onnxruntime", _for_cpu)


def cached_graph(bundle: Bundle, form: Form, name: str = GRAPH, progress: Progress = silent) -> bytes | None:
    """Return a graph that is cached in a bundle, made now if there is none, or None if the bundle is not writable.

    Raises:
        BundleError, BackendError: from ``form.make``.
    """

    def make(directory: Path) -> None:
        graphs = form.make(bundle, directory / PACKED, f"{form.directory}/{PACKED}", progress)
        for each, content in graphs.items():
            (directory / each).write_bytes(content)

    content = origin(bundle) | {"sources": _sources_digest()} | form.options
    files: dict[str, Any] = {"read": (name,), "mapped": (PACKED,)}
    found = cached_artifact(bundle, form.directory, _RECORD, content, make, **files, progress=progress)
    return None if found is None else found.read[name]


@cache
def _sources_digest() -> str:
    """Return the SHA-256 of ``SOURCES``, names and contents."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in package.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
