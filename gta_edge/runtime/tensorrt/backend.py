"""The backends ``tensorrt`` and ``tensorrt-rtx``, described: one engine folder, two libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gta_edge.errors import EngineError
from gta_edge.runtime.backend import Asked, Backend, Importing
from gta_edge.runtime.tensorrt import engine_kind
from gta_edge.runtime.tensorrt.engine_kind import EngineKind

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from gta_edge.model.config import ModelConfig
    from gta_edge.runtime.session import Session

__all__ = ["TENSORRT", "TENSORRT_RTX", "TensorRTBackend"]


class TensorRTBackend(Backend):
    """Runs engines of one kind.

    Args:
        kind: of engines.
        module: the library's Python module.
    """

    device = "gpu"
    builds_engine = True
    manages_cache = True
    writes_scores = False

    def __init__(self, kind: EngineKind, module: str) -> None:
        self.kind = kind
        self.name = self.extra = self.distribution = kind.name
        self.modules = module, "cuda.bindings"
        self.compute_types = kind.compute_types
        self.has_trees = kind.takes_plugins  # whose attention they need

    def cache_types(self, config: ModelConfig, compute: str) -> tuple[str, ...]:
        return self.kind.cache_types(config, compute)

    def _step_sizes(self) -> tuple[int, int, int]:
        from gta_edge.runtime.tensorrt.build import CHUNK_SIZE, LOGIT_POSITIONS, LOGITS_BYTES

        return CHUNK_SIZE, LOGIT_POSITIONS, LOGITS_BYTES

    def _check(self, found: dict[str, Any], importing: Importing) -> None:
        from gta_edge.cuda.compiler import check_compiler
        from gta_edge.cuda.gpu import current_gpu
        from gta_edge.cuda.session import check_usable
        from gta_edge.libraries.cuda import cuda_extra
        from gta_edge.libraries.optional import require_modules
        from gta_edge.libraries.tensorrt import load
        from gta_edge.runtime.tensorrt.builder import Target
        from gta_edge.runtime.tensorrt.log import new_log, started

        trt = load(self.name)
        found["version"] = trt.version_text
        require_modules(self.modules[1:], f"tensorrt,{cuda_extra()}", importing)
        gpu = current_gpu()
        if trt.plugins:
            check_compiler(gpu.architecture)
        check_usable()
        Target.choose(self.name)
        started(trt.module.Runtime, new_log(trt.module), "runtime")

    def is_here(self, bundle: Bundle) -> bool:
        from gta_edge.runtime.tensorrt.engine import require_engine

        try:
            require_engine(bundle, self.name)
        except EngineError:
            return False
        except OSError:  # it cannot be told, which is the trouble
            return True
        return True

    def _open(self, bundle: Bundle, asked: Asked, **options: Any) -> Session:
        from gta_edge.runtime.tensorrt.session import TensorRTSession

        compute, cache_dtype = asked.compute, asked.cache_dtype
        if compute is None and cache_dtype in self.compute_types:  # a cache in such a type is in the one to compute in
            compute = cache_dtype
        # types that no engine of the kind has are no reason to build one
        self.cache_for(cache_dtype, bundle.config, self.compute_for(compute, bundle.precision))
        options |= {"compute": compute, "cache_dtype": cache_dtype}
        return TensorRTSession(bundle, engine=self.name, **options)


TENSORRT: Backend = TensorRTBackend(engine_kind.TENSORRT, "tensorrt")
TENSORRT_RTX: Backend = TensorRTBackend(engine_kind.TENSORRT_RTX, "tensorrt_rtx")
