"""The backends `tensorrt` and `tensorrt-rtx`: an engine that ``gta-edge build`` made, token by token, without torch.

The engine's two profiles share its weights. The cache has its full capacity from the start, and past inputs and present
outputs of every layer are bound to one address, so no step copies it. A step of one token per row is a CUDA graph,
captured once for a number of rows: ids and lengths in, logits out, all through pinned memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from gta_edge.bundle import Bundle
from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.plugins import register
from gta_edge.plugins.launch import Gpu, current_gpu
from gta_edge.plugins.tensorrt_base import take_failures
from gta_edge.runtime.build import LOGIT_POSITIONS
from gta_edge.runtime.cuda import Cuda
from gta_edge.runtime.engine import SCALE_BYTES, VALUE_BYTES, compute_capability, load_engine, require_engine
from gta_edge.runtime.run_time_kernels import RunTimeKernels
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.trt import TensorRT, load

__all__ = ["TensorRTSession"]

_DECODE, _PREFILL = 0, 1  # the profiles, as build.py makes them


@dataclass(frozen=True)
class _Tensor:
    """An input or output of fixed memory: on the GPU for the largest shape, and pinned beside it."""

    address: int
    host: Any


class TensorRTSession(Session):
    """An engine behind the session's interface.

    Args:
        bundle: the model; its engine lies in it.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        device_id: CUDA's number for the GPU.
        options: as ``Session`` takes them, but for ``chunk_size``, which the engine's is the most of.

    Raises:
        BackendError: TensorRT, the driver or the GPU is missing, or the engine cannot be loaded.
        EngineError: there is no engine, or it was built from or for something else.
        CapacityError: the GPU has no room for the engine and its cache.
    """

    def __init__(
        self, bundle: Bundle, *, engine: str = "tensorrt", device_id: int = 0, chunk_size: int | None = None
    ) -> None:
        # First what costs nothing: TensorRT's libraries take seconds to load.
        require_engine(bundle, engine)
        gpu = current_gpu(device_id)
        trt = load(engine)
        here = compute_capability(gpu.architecture)
        plan, record = load_engine(bundle, engine, tensorrt=trt.version_text, compute_capability=here)
        purpose = record.purpose
        super().__init__(
            bundle.config,
            chunk_size=purpose.chunk_size if chunk_size is None else min(chunk_size, purpose.chunk_size),
            capacity_step=purpose.max_length,
        )
        self.backend = engine
        self.compute = purpose.compute
        self._record, self._directory = record, bundle.directory
        self._cuda = Cuda(device_id)
        try:
            self._open(trt, plan, gpu)
        except BaseException:
            self._cuda.close()
            raise

    def _open(self, trt: TensorRT, plan: memoryview, gpu: Gpu) -> None:
        self._check_room(len(plan))
        if trt.plugins:
            register(trt.module)
        self._log = _log(trt.module)
        self._runtime = trt.module.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"TensorRT cannot load the engine ({self._reason()}); {self._rebuild()}")
        self._kernels = RunTimeKernels(trt.module, gpu.name, self._record) if trt.compiles_at_run_time else None
        self._contexts = [self._context(trt.module) for _ in (_DECODE, _PREFILL)]
        for profile, context in enumerate(self._contexts):
            context.set_optimization_profile_async(profile, self._cuda.stream)
        purpose, vocab = self._record.purpose, self.config.vocab_size
        rows, chunk = purpose.max_batch, purpose.chunk_size
        self._ids = self._tensor("the token ids", rows * chunk, np.int64)
        self._past = self._tensor("the lengths", rows, np.int64)
        self._positions = self._tensor("the positions", rows * LOGIT_POSITIONS, np.int64)
        self._logits = self._tensor("the logits", rows * LOGIT_POSITIONS * vocab, np.float32)
        self._cache_bytes = 0
        for layer in range(self.config.num_hidden_layers):
            for cache in self.config.caches:
                size = rows * cache.heads * purpose.max_length
                self._bind_cache(f"{cache.name}.{layer}", size * cache.width * VALUE_BYTES[purpose.cache_dtype])
                if purpose.quantised_cache:
                    self._bind_cache(f"{cache.name}_scale.{layer}", size * SCALE_BYTES)
        fixed = {"input_ids": self._ids, "past_length": self._past, "logit_positions": self._positions}
        for context in self._contexts:
            for name, tensor in (*fixed.items(), ("logits", self._logits)):
                context.set_tensor_address(name, tensor.address)
        self._graphs: dict[int, Any] = {}
        self._shapes: dict[int, tuple[int, int, int]] = {}
        self._cuda.synchronize()

    def _check_room(self, engine_bytes: int) -> None:
        """Refuse what TensorRT would fail at halfway, or the system end, with a message that has figures."""
        purpose = self._record.purpose
        cache_bytes, free = purpose.cache_bytes(self.config), self._cuda.free_bytes()
        if engine_bytes + cache_bytes > free:
            raise CapacityError(
                f"the engine takes {engine_bytes / 1e9:.2f} GB, its cache of {purpose.max_length} tokens for "
                f"{purpose.max_batch} rows {cache_bytes / 1e9:.2f} GB, and the GPU has {free / 1e9:.2f} GB free; close "
                "other programs, or build with a smaller --max-length or --max-batch"
            )

    def _context(self, trt: Any) -> Any:
        """Return an execution context with as much scratch memory as its profile takes."""
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        how = self._kernels.configure(self._engine, strategy) if self._kernels else strategy
        context = self._engine.create_execution_context(how)
        if context is None:
            raise BackendError(f"TensorRT cannot make an execution context ({self._reason()}); {self._rebuild()}")
        return context

    @property
    def max_length(self) -> int:
        return self._record.purpose.max_length

    @property
    def _limit(self) -> str:
        return f"the engine was built with --max-length {self.max_length}"

    @property
    def max_batch(self) -> int:
        """Rows that the engine was built for."""
        return self._record.purpose.max_batch

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes

    def _tensor(self, what: str, values: int, dtype: Any) -> _Tensor:
        host = self._cuda.host_array((values,), dtype)
        return _Tensor(self._cuda.allocate(host.nbytes, what), host)

    def _bind_cache(self, name: str, size_bytes: int) -> None:
        """Give past input and present output of both profiles one and the same memory."""
        address = self._cuda.allocate(size_bytes, f"the cache of {self.max_length} tokens for {self.max_batch} rows")
        self._cache_bytes += size_bytes
        for context in self._contexts:
            context.set_tensor_address(f"past_{name}", address)
            context.set_tensor_address(f"present_{name}", address)

    def _resize(self, batch: int, capacity: int) -> None:
        if batch > self.max_batch:
            raise InputError(
                f"ids have {batch} rows and the engine was built for {self.max_batch}; "
                f"give fewer, or run: {replace(self._record.purpose, max_batch=batch).command(self._directory)}"
            )

    def _run(self, input_ids: Ids, past_length: Ids, logit_positions: Ids) -> Logits:
        self._cuda.make_current()
        rows, wanted = logit_positions.shape
        if input_ids.shape[1] == 1 and wanted == 1:
            return self._step(input_ids, past_length)
        # A run appends the same rows to the same places every time, so more logits are had by running again.
        parts = []
        for start in range(0, max(wanted, 1), LOGIT_POSITIONS):
            positions = logit_positions[:, start : start + LOGIT_POSITIONS]
            if not wanted:  # the engine gives logits for one position at least
                positions = np.zeros((rows, 1), np.int64)
            parts.append(self._chunk(input_ids, past_length, positions))
        result: Logits = np.concatenate(parts, axis=1)[:, :wanted]
        return result

    def _chunk(self, input_ids: Ids, past_length: Ids, positions: Ids) -> Logits:
        self._set_shapes(_PREFILL, len(input_ids), input_ids.shape[1], positions.shape[1])
        logits = self._fill(input_ids, past_length, positions)
        self._enqueue(_PREFILL, input_ids.size, len(past_length), positions.size, logits)
        self._cuda.synchronize()
        return logits.copy()

    def _step(self, input_ids: Ids, past_length: Ids) -> Logits:
        rows = len(past_length)
        logits = self._fill(input_ids, past_length, np.zeros((rows, 1), np.int64))
        if rows not in self._graphs:
            self._set_shapes(_DECODE, rows, 1, 1)
            self._enqueue(_DECODE, rows, rows, rows, logits)  # TensorRT wants one run before it is captured
            self._cuda.synchronize()
            result = logits.copy()
            self._graphs[rows] = self._captured(rows, logits)
            return result
        if self._graphs[rows] is None:
            self._set_shapes(_DECODE, rows, 1, 1)
            self._enqueue(_DECODE, rows, rows, rows, logits)
        else:
            self._cuda.replay(self._graphs[rows])
        self._cuda.synchronize()
        return logits.copy()

    def _captured(self, rows: int, logits: Logits) -> Any:
        """Return the step as a graph, or None where TensorRT says that the engine cannot be captured."""
        if not getattr(self._contexts[_DECODE], "is_stream_capturable", lambda _: True)(self._cuda.stream):
            return None
        with self._cuda.capture() as made:
            self._enqueue(_DECODE, rows, rows, rows, logits)
        return made[0]

    def _fill(self, input_ids: Ids, past_length: Ids, positions: Ids) -> Logits:
        """Put inputs into pinned memory; return where the logits will be, float32 [B, M, V]."""
        for tensor, values in ((self._ids, input_ids), (self._past, past_length), (self._positions, positions)):
            tensor.host[: values.size] = values.reshape(-1)
        shape = (*positions.shape, self.config.vocab_size)
        result: Logits = self._logits.host[: prod(shape)].reshape(shape)
        return result

    def _set_shapes(self, profile: int, rows: int, tokens: int, logits: int) -> None:
        if self._shapes.get(profile) == (rows, tokens, logits):
            return
        self._shapes.pop(profile, None)
        context = self._contexts[profile]
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (rows, tokens),
            "past_length": (rows,),
            "logit_positions": (rows, logits),
        }
        length = self.max_length
        for layer in range(self.config.num_hidden_layers):
            for cache in self.config.caches:
                shapes[f"past_{cache.name}.{layer}"] = (rows, cache.heads, length, cache.width)
                if self._record.purpose.quantised_cache:
                    shapes[f"past_{cache.name}_scale.{layer}"] = (rows, cache.heads, length)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(
                    f"TensorRT refuses {name} of shape {list(shape)} ({self._reason()}); {self._rebuild()}"
                )
        self._shapes[profile] = (rows, tokens, logits)

    def _enqueue(self, profile: int, ids: int, rows: int, positions: int, logits: Logits) -> None:
        for tensor, count in ((self._ids, ids), (self._past, rows), (self._positions, positions)):
            self._cuda.copy_in(tensor.address, tensor.host[:count])
        if not self._contexts[profile].execute_async_v3(self._cuda.stream):
            raise BackendError(f"TensorRT could not run the engine ({self._reason()}); run `gta-edge doctor`")
        self._cuda.copy_out(logits, self._logits.address)

    def _reason(self) -> str:
        """Return what went wrong last: a plugin's own words, which TensorRT does not pass on, or TensorRT's."""
        return next(iter(take_failures()), self._log.last)

    def _rebuild(self) -> str:
        return f"run: {self._record.purpose.command(self._directory)}"

    def close(self) -> None:
        if not self._closed:
            super().close()
            self._graphs = {}
            self._cuda.synchronize()
            if self._kernels:
                self._kernels.keep()
            self._contexts, self._engine, self._runtime = [], None, None
            self._cuda.close()


def _log(trt: Any) -> Any:
    """Return a logger that keeps the last error and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.last = "without a reason"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())

    return Log()
