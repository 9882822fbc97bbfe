"""Kernels that TensorRT-RTX compiles when it first runs an engine, kept on disk: the next process starts without.

The file lies in the package's cache directory and may be removed. TensorRT-RTX checks itself whether what it holds fits
this GPU, driver and release (``IRuntimeCache.deserialize``), and leaves out what does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gta_edge.runtime.tensorrt.engine import EngineManifest
from gta_edge.support.files import cache_directory, write_cached

__all__ = ["RuntimeCache", "read_cached"]

_log = logging.getLogger(__name__)

_MAX_CACHED_BYTES = 2**30


class RuntimeCache:
    """The kernels of one engine on one GPU.

    Args:
        trt: the module ``tensorrt_rtx``.
        gpu: name of the GPU.
        record: of the engine.
    """

    def __init__(self, trt: Any, gpu: str, record: EngineManifest) -> None:
        self._trt = trt
        self._path = _path(gpu, record)
        self._cache: Any = None
        self._configs: list[Any] = []
        self._read = read_cached(self._path) if self._path is not None else b""

    def configure(self, engine: Any, strategy: Any, *, eager: bool) -> Any:
        """Return how an execution context is to be made.

        Args:
            engine: the ``ICudaEngine``.
            strategy: an ``ExecutionContextAllocationStrategy``.
            eager: compile kernels for shapes as soon as these are known, before anything runs. Where a CUDA graph is
                captured: it would go on with the kernels that are used until better ones are there. Not where shapes
                change all the time.
        """
        kinds = self._trt.DynamicShapesKernelSpecializationStrategy
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if eager else kinds.LAZY
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._read and not self._cache.deserialize(self._read):
                _log.warning("%s: is not used (TensorRT-RTX does not take it); kernels are compiled anew", self._path)
                self._cache, self._read = config.create_runtime_cache(), b""
        config.set_runtime_cache(self._cache)
        self._configs.append(config)  # the bindings keep it alive for nobody
        return config

    def keep(self) -> None:
        """Write what was compiled, if there is more than was read; where it cannot be written, nothing is lost."""
        if self._cache is None or self._path is None:
            return
        compiled = bytes(self._cache.serialize())
        if compiled != self._read:
            write_cached(self._path, compiled)


def read_cached(path: Path) -> bytes:
    """Return the content of a file that can be made again; where it cannot be read, nothing, and a warning says why."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is not a regular file")
        if info.st_size > _MAX_CACHED_BYTES:
            raise OSError(f"it has {info.st_size} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        _log.warning("%s: is not used (%s); it is made anew", path, error.strerror or error)
        return b""


def _path(gpu: str, record: EngineManifest) -> Path | None:
    directory = cache_directory()
    what = json.dumps([gpu, asdict(record)], sort_keys=True)
    name = hashlib.sha256(what.encode()).hexdigest()[:32]
    return directory / "tensorrt-rtx" / f"{name}.cache" if directory else None
