"""The `onnxruntime` backend: a bundle's graph on the CPU, the cache updated in place.

Past input and present output of every layer are bound to one buffer of ours, so TensorScatter writes the new rows
where they belong and no step copies the cache. ONNX Runtime logs "in-place optimization not activated" if that ever
fails (at the severity of warnings, in ``_run_options``).

Attention costs as the capacity S that a step is given, so a step is given as much of the buffers as it needs: after
``reset`` or ``truncate`` a short prompt costs as in a new session, although the memory of the longest one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, CapacityError, GtaEdgeError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.onnxruntime import EXACT_PRODUCTS, INT8_PRODUCTS, first_line, is_out_of_memory, load_onnxruntime
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import LOGITS, PAST, PRESENT, TOKEN_INPUTS, interface_names
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plan.host_memory import require_memory_for_onnxruntime
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.cache_state import CacheState
from gta_edge.runtime.onnxruntime.int8_cache import MAX_ROWS, require_exact_products, rows_for
from gta_edge.runtime.onnxruntime.lowered import CPU, LoweredGraph, lower, without_new_weights
from gta_edge.runtime.onnxruntime.model import OpenModel, model_files, open_model
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.support.progress import Progress, silent
from gta_edge.support.threads import compute_threads

__all__ = ["OnnxRuntimeSession"]

_DEVICE = ("cpu", 0)
_FATAL = 4


@dataclass(frozen=True)
class _Step:
    """Buffers bound for one shape of step; decode binds once and then only fills them."""

    binding: Any
    input_ids: Ids
    past_length: Ids
    logit_positions: Ids
    logits: Logits


class OnnxRuntimeSession(Session):
    """A bundle on ONNX Runtime's CPU provider.

    Args:
        bundle: the model.
        threads: threads for one operator; None for one on each core that this process may use.
        exact: multiply by int8 and int4 weights in float32, instead of rounding activations to int8.
        cache_dtype: type of the cache, ``fp32`` or ``int8``.
        progress: told of weights that are repacked.
        options: as ``CacheState`` takes them.

    Raises:
        BackendError: ONNX Runtime is missing, too old, or refuses the model; or the processor's products of integers
            saturate, and the cache is to be of int8.
        InputError: more threads than could be of use.
        CapacityError: there is no memory for it, or the system lets fewer threads start than were asked for.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        exact: bool = False,
        cache_dtype: str = "fp32",
        progress: Progress = silent,
        **options: Any,
    ) -> None:
        super().__init__(bundle.config, _cache_state(bundle.config, cache_dtype, options))
        require_memory_for_onnxruntime(bundle.config, bundle.storage)
        self._onnxruntime = load_onnxruntime()
        self._in_int8 = cache_dtype == "int8"
        if self._in_int8:
            require_exact_products(self._onnxruntime)
        lowered = lower(bundle, exact=exact, cache_dtype=cache_dtype, progress=progress)
        self.rounds_activations = lowered.rounds_activations
        self._bundle, self._exact = bundle, exact
        self._threads = compute_threads(threads)  # its own default are all cores of the machine
        self._model: OpenModel | None = None
        try:
            self._model = self._open(lowered)
        except Exception:  # ONNX Runtime's errors have no common base
            if not lowered.cached:
                raise
            # another process may have replaced what was cached, between our reading and ONNX Runtime's
            self._model = self._open(without_new_weights(bundle, exact=exact, cache_dtype=cache_dtype))
        if {value.name for value in self._model.session.get_inputs()} != set(self._interface()):
            self._model.close()
            raise BackendError(f"{bundle.model_path}: the graph is not that of config.json", "export the bundle again")
        self._run_options = self._onnxruntime.RunOptions()
        self._run_options.log_severity_level = _FATAL  # likewise
        self._tensors = self._cache.tensors
        self._buffers: dict[str, npt.NDArray[Any]] = {}  # with as many rows as there is memory for
        self._caches: dict[str, npt.NDArray[Any]] = {}  # at their start, with S rows, as steps see them
        self._step: _Step | None = None

    def _open(self, lowered: LoweredGraph) -> OpenModel:
        """Return a graph in ONNX Runtime.

        Raises:
            CapacityError: there is no memory for it.
            BackendError: it is refused.
        """
        module, bundle = self._onnxruntime, self._bundle
        settings = module.SessionOptions()
        settings.log_severity_level = _FATAL  # its errors are raised, and must not stand beside ours on stderr
        settings.intra_op_num_threads = self._threads
        settings.add_session_config_entry(*(EXACT_PRODUCTS if self._exact else INT8_PRODUCTS))
        try:
            files = model_files(bundle, CPU.directory if lowered.cached else None)
            return open_model(module, lowered.graph, files, settings, ["CPUExecutionProvider"])
        except GtaEdgeError:
            raise
        except Exception as error:  # likewise
            if is_out_of_memory(error):
                raise CapacityError(
                    f"{bundle.model_path}: there is no memory for the model",
                    "close other programs, or export with --precision int4",
                ) from error
            raise BackendError(
                f"{bundle.model_path}: ONNX Runtime {module.__version__} refuses the model ({first_line(error)})",
                "export the bundle again",
            ) from error

    def _interface(self) -> list[str]:
        return interface_names(self.config, self._cache.dtype)[0]

    @property
    def cache_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _release(self) -> None:
        self._clear()
        if self._model is not None:
            self._model.close()

    def _clear(self) -> None:
        self._step, self._buffers, self._caches = None, {}, {}

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        self._step = None  # it holds addresses of the old buffers
        try:
            with self._cache.replacing(batch, self._clear):
                for tensor in self._tensors:  # one at a time: never twice the whole cache
                    old = self._caches.pop(tensor.name, None)
                    self._buffers.pop(tensor.name, None)
                    # zeroed: rows that are not visible get weight zero, and zero times garbage could be NaN
                    shape = tensor.shape(batch, self._rows_for(capacities[tensor.layer]))
                    new = np.zeros(shape, DTYPES[tensor.dtype].numpy)
                    if old is not None:
                        axis = tensor.capacity_axis
                        new.swapaxes(0, axis)[: old.shape[axis]] = old.swapaxes(0, axis)
                    self._buffers[tensor.name] = self._caches[tensor.name] = new
        except MemoryError as error:
            raise self._cache.no_memory(batch, capacities) from error

    def _rows_for(self, capacity: int) -> int:
        return rows_for(capacity) if self._in_int8 else capacity

    def _show(self, capacity: int) -> None:
        """Give steps as many rows of every buffer as ``capacity`` takes, or more where that would cost.

        Where rows are the first axis that is longer than 1, they are a prefix, whatever is in it. Otherwise parts are
        moved apart as S grows, and moved together only while nothing is in them. It takes no memory, so only Ctrl-C
        ends it halfway; the cache is emptied then.
        """
        rows, filled = self._rows_for(capacity), self._cache.filled
        first = self._caches[self._tensors[0].name]
        before = first.shape[self._tensors[0].capacity_axis]
        if rows == before:
            return
        batch = len(first)
        single = all(tensor.parts(batch) == 1 for tensor in self._tensors)
        if rows < before and filled and not single:
            return
        self._step = None
        with self._cache.replacing(batch, self._clear):
            for tensor in self._tensors:
                shape, parts = tensor.shape(batch, rows), tensor.parts(batch)
                values = self._buffers[tensor.name].reshape(-1)[: prod(shape)]
                if filled and not single:
                    width = prod(shape) // (parts * rows)  # of a row in a part
                    _move_apart(values, parts, before * width, rows * width, filled * width)
                self._caches[tensor.name] = values.reshape(shape)

    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        assert self._model is not None  # it is open
        self._model.check()
        shapes = input_ids.shape, logit_positions.shape
        self._show(min(self._cache.capacity_for(int(past_length.max()) + input_ids.shape[1]), self._cache.capacity))
        try:
            step = self._step
            if step is None or (step.input_ids.shape, step.logit_positions.shape) != shapes:
                step = self._step = self._bind(input_ids.shape, logit_positions.shape[1])
            step.input_ids[...] = input_ids
            step.past_length[...] = past_length
            step.logit_positions[...] = logit_positions
            self._model.session.run_with_iobinding(step.binding, self._run_options)
            return step.logits.copy()
        except Exception as error:  # likewise
            self._step = None
            if is_out_of_memory(error):
                raise CapacityError(
                    f"no memory for a step of {input_ids.size} tokens at once",
                    "give a smaller chunk_size, fewer rows, or close other programs",
                ) from error
            raise BackendError(
                f"ONNX Runtime failed in a step ({first_line(error)})", "export the bundle again"
            ) from error

    def _bind(self, shape: tuple[int, ...], positions: int) -> _Step:
        """Bind buffers for steps of ``shape`` [B, T] with logits for ``positions`` of them."""
        assert self._model is not None  # it is open
        batch = shape[0]
        step = _Step(
            binding=self._model.session.io_binding(),
            input_ids=np.zeros(shape, np.int64),
            past_length=np.zeros(batch, np.int64),
            logit_positions=np.zeros((batch, positions), np.int64),
            logits=np.zeros((batch, positions, self.config.vocab_size), np.float32),
        )
        for name in TOKEN_INPUTS:
            _bind(step.binding.bind_input, name, getattr(step, name))
        if positions:
            _bind(step.binding.bind_output, LOGITS, step.logits)
        else:
            step.binding.bind_output(LOGITS, *_DEVICE)
        for name, cache in self._caches.items():
            _bind(step.binding.bind_input, PAST + name, cache)
            _bind(step.binding.bind_output, PRESENT + name, cache)
        return step


def _cache_state(config: ModelConfig, dtype: str, options: dict[str, Any]) -> CacheState:
    """Return what a cache of a type holds, of which one in int8 has a limit of its own."""
    if dtype == "int8":
        options = {"compute": "fp32", "transposed": True} | options
        if config.max_position_embeddings > MAX_ROWS:
            options = {"max_length": MAX_ROWS, "limit": f"a cache of int8 holds at most {MAX_ROWS} tokens"} | options
    return CacheState(config, dtype, on_host=True, **options)


def _move_apart(values: npt.NDArray[Any], parts: int, before: int, after: int, filled: int) -> None:
    """Move the first ``filled`` values of each part from ``i * before`` to ``i * after``, which is not less.

    From the last to the first, so that none is overwritten before it has moved; numpy takes care of a part that
    overlaps its own new place, in one dimension without a copy. What then lies between the parts is what was there.
    """
    for i in reversed(range(1, parts)):
        values[i * after : i * after + filled] = values[i * before : i * before + filled]


def _bind(bind: Any, name: str, buffer: npt.NDArray[Any]) -> None:
    bind(name, *_DEVICE, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
