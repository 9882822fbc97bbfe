"""Where graphs for the CUDA provider are cached in a bundle, and how they are made."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.onnxruntime.lowered import GRAPH, Form
from gta_edge.support.progress import Progress

__all__ = ["form_of", "managed_form"]


def managed_form(compute: str, features: Features, plain: bytes) -> Form:
    """Return the form of a managed cache, beside that of ``plain``, whose weights it reads."""

    def make(bundle: Bundle, weights: Path, location: str, progress: Progress) -> dict[str, bytes]:
        from gta_edge.runtime.onnxruntime.cuda_lower import managed_cuda_graph

        return {GRAPH: managed_cuda_graph(bundle, compute, features, plain)}

    kind = "trees" if features == TREES else f"{features.observe or 'unobserved'}-{features.bias_rows}"
    name = f"{form_of(compute).directory}-{kind}"
    options = {"compute": compute, "weights_of": hashlib.sha256(plain).hexdigest()}
    return Form(name, make, options)


def form_of(compute: str) -> Form:
    """Return the form of a graph without a policy and trees."""

    def make(bundle: Bundle, weights: Path, location: str, progress: Progress) -> dict[str, bytes]:
        from gta_edge.runtime.onnxruntime.cuda_lower import cuda_graph

        return {GRAPH: cuda_graph(bundle, compute, weights, location, progress)}

    return Form(f"engines/onnxruntime-cuda/{compute}", make, {"compute": compute})
