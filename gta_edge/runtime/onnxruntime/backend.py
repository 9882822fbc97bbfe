"""The backends ``onnxruntime`` and ``onnxruntime-cuda``, described."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import FLOAT_TYPES
from gta_edge.runtime.backend import Asked, Backend, Importing

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from gta_edge.model.config import ModelConfig
    from gta_edge.runtime.session import Session

__all__ = ["ONNXRUNTIME", "ONNXRUNTIME_CUDA"]


class _OnnxRuntime(Backend):
    name = "onnxruntime"
    extra = "ort"
    distribution = "onnxruntime"
    modules = ("onnxruntime", "onnx_ir", "tokenizers")
    device = "cpu"
    compute_types = ("fp32",)
    manages_cache = True
    has_trees = True
    cpu_kernels = True

    def cache_types(self, config: ModelConfig, compute: str) -> tuple[str, ...]:
        return compute, "int8"

    def _check(self, found: dict[str, Any], importing: Importing) -> None:
        from gta_edge.libraries.onnxruntime import load_onnxruntime

        try:
            _require_modules(self, importing)
        finally:
            found["providers"] = _providers()
        load_onnxruntime()

    def _open(self, bundle: Bundle, asked: Asked, **options: Any) -> Session:
        from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession

        compute = self.compute_for(asked.compute, bundle.precision)
        return OnnxRuntimeSession(
            bundle,
            threads=asked.threads,
            exact=asked.exact,
            cache_dtype=self.cache_for(asked.cache_dtype, bundle.config, compute),
            progress=asked.progress,
            **options,
        )


class _OnnxRuntimeCuda(Backend):
    name = "onnxruntime-cuda"
    extra = "ort-gpu"
    distribution = "onnxruntime-gpu"
    modules = ("onnxruntime", "onnx", "onnx_ir", "tokenizers")
    device = "gpu"
    compute_types = FLOAT_TYPES
    manages_cache = True
    has_trees = True

    def _step_sizes(self) -> tuple[int, int, int]:
        from gta_edge.runtime.onnxruntime.cuda_session import CHUNK_SIZE

        return CHUNK_SIZE, 1, 0

    def _check(self, found: dict[str, Any], importing: Importing) -> None:
        from gta_edge.libraries.onnxruntime import load_onnxruntime_cuda

        _require_modules(self, importing)
        load_onnxruntime_cuda()  # runs a kernel

    def is_here(self, bundle: Bundle) -> bool:
        from gta_edge.libraries.onnxruntime import CUDA_PROVIDER

        # the same module as the CPU's, imported when it was tried
        providers = getattr(sys.modules.get("onnxruntime"), "get_available_providers", list)
        return CUDA_PROVIDER in providers()

    def _open(self, bundle: Bundle, asked: Asked, **options: Any) -> Session:
        from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession

        compute = self.compute_for(asked.compute, bundle.precision)
        self.cache_for(asked.cache_dtype, bundle.config, compute)
        return OnnxRuntimeCudaSession(bundle, compute=compute, progress=asked.progress, **options)


def _require_modules(backend: Backend, importing: Importing) -> None:
    from gta_edge.libraries.optional import require_modules

    if sys.version_info < (3, 11) and find_spec("onnxruntime") is None:
        raise BackendError("onnxruntime not installed", "use Python 3.11 or later, which onnxruntime 1.25 needs")
    require_modules(backend.modules, backend.extra, importing)


def _providers() -> list[str]:
    """Return what ONNX Runtime can run on, nothing where it is none that can be asked."""
    from gta_edge.libraries.optional import find_module

    try:
        module: Any = find_module("onnxruntime")
        return [str(name) for name in module.get_available_providers()] if module else []
    except Exception:  # a broken library raises anything; ``check`` says what is wrong with it
        return []


ONNXRUNTIME: Backend = _OnnxRuntime()
ONNXRUNTIME_CUDA: Backend = _OnnxRuntimeCuda()
