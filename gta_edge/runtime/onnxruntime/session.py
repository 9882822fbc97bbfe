"""The `onnxruntime` backend: a bundle's graph on the CPU, the cache updated in place.

Past input and present output of every layer are bound to one buffer of ours, so TensorScatter writes the new rows
where they belong and no step copies the cache. ONNX Runtime logs "in-place optimization not activated" if that ever
fails (at the severity of warnings, in ``_run_options``).

Attention costs as the capacity S that a step is given, so a step is given as much of the buffers as it needs: after
``reset`` or ``truncate`` a short prompt costs as in a new session, although the memory of the longest one is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, CapacityError, GtaEdgeError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.onnxruntime import EXACT_PRODUCTS, INT8_PRODUCTS, first_line, is_out_of_memory, load_onnxruntime
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import (
    LOGIT_POSITIONS,
    LOGITS,
    PAST,
    PRESENT,
    TOKEN_INPUTS,
    interface_names,
    managed_shapes,
    received_name,
    received_tensors,
)
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.plan.host_memory import require_memory_for_onnxruntime
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.cache_state import CacheState
from gta_edge.runtime.managed_cache import cache_state
from gta_edge.runtime.onnxruntime.cache_rows import CacheRows
from gta_edge.runtime.onnxruntime.int8_cache import MAX_ROWS, require_exact_products, rows_for
from gta_edge.runtime.onnxruntime.lowered import CPU, LoweredGraph, lower, without_new_weights
from gta_edge.runtime.onnxruntime.model import OpenModel, model_files, open_model
from gta_edge.runtime.saved_cache import place_in
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.support.progress import Progress, silent
from gta_edge.support.threads import compute_threads

__all__ = ["OnnxRuntimeSession"]

_DEVICE = ("cpu", 0)
_FATAL = 4
_RECEIVED = received_name(0).partition(".")[0]
_KEPT_STEPS = 8  # shapes of step, so that guesses of changing width are not bound anew
_KEPT_BYTES = 2**22  # of a step's logits at most: beside larger ones it takes no time to bind


@dataclass(frozen=True)
class _Step:
    """Buffers bound for one shape of step; decode binds once and then only fills them."""

    key: tuple[object, ...]  # what it is bound for: the first row of the batch, and the inputs' shapes
    binding: Any
    inputs: dict[str, npt.NDArray[Any]]  # by name
    logits: Logits


class OnnxRuntimeSession(Session):
    """A bundle on ONNX Runtime's CPU provider.

    Args:
        bundle: the model.
        threads: threads for one operator; None for one on each core that this process may use.
        exact: multiply by int8 and int4 weights in float32, instead of rounding activations to int8.
        cache_dtype: type of the cache, ``fp32`` or ``int8``.
        cache: policy that says which rows of the cache stay; None for all.
        progress: told of weights that are repacked.
        options: as ``cache_state`` takes them.

    Raises:
        BackendError: ONNX Runtime is missing, too old, or refuses the model; or the processor's products of integers
            saturate, and the cache is to be of int8.
        InputError: more threads than could be of use, or a policy that makes no sense for the model or with trees.
        CapacityError: there is no memory for it, or the system lets fewer threads start than were asked for.
    """

    backend = "onnxruntime"
    reads_rows = copies_rows = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        exact: bool = False,
        cache_dtype: str = "fp32",
        cache: CachePolicy | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> None:
        super().__init__(bundle.config, _cache_state(bundle.config, cache_dtype, cache, options))
        self._features = self._cache.features
        require_memory_for_onnxruntime(bundle.config, bundle.storage)
        self._onnxruntime = load_onnxruntime()
        self._in_int8 = cache_dtype == "int8"
        if self._in_int8:
            require_exact_products(self._onnxruntime)
        form: dict[str, Any] = {"exact": exact, "cache_dtype": cache_dtype, "features": self._features}
        lowered = lower(bundle, **form, progress=progress)
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
            self._model = self._open(without_new_weights(bundle, **form))
        if {value.name for value in self._model.session.get_inputs()} != set(self._interface()):
            self._model.close()
            raise BackendError(f"{bundle.model_path}: the graph is not that of config.json", "export the bundle again")
        self._run_options = self._onnxruntime.RunOptions()
        self._run_options.log_severity_level = _FATAL  # likewise
        # no graph is captured here; ONNX Runtime asks in every call, and a missing entry costs it an exception
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._tensors = self._cache.tensors
        if self._features is not None and self._features.observe:
            self._tensors += received_tensors(self.config.num_hidden_layers)
        self._buffers: dict[str, npt.NDArray[Any]] = {}  # with as many rows as there is memory for
        self._caches: dict[str, npt.NDArray[Any]] = {}  # at their start, with S rows, as steps see them
        self._shown: tuple[int, ...] | None = None  # tokens of each layer that they were last to show
        self._step: _Step | None = None  # the last one
        self._kept_steps: dict[tuple[object, ...], _Step] = {}

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
        names = interface_names(self.config, self._cache.dtype)[0]
        if self._features is None:
            return names
        sizes = {"batch": 1, "tokens": 1}
        return names + list(managed_shapes(self._features, **sizes, capacities=[1] * self.config.num_hidden_layers))

    @property
    def cache_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in list(self._buffers.values()))  # which a step may replace meanwhile

    def _release(self) -> None:
        self._clear()
        if self._model is not None:
            self._model.close()

    def _clear(self) -> None:
        self._unbind()
        self._shown, self._buffers, self._caches = None, {}, {}

    def _unbind(self) -> None:
        self._step = None
        self._kept_steps.clear()

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        self._unbind()  # steps hold addresses of the old buffers
        self._shown = None
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

    def _rows_of_step(self, first: int, stop: int, tokens: int) -> slice:
        return slice(first, stop)  # which lie together in every buffer

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        return {each.name: self._caches[each.name][place_in(each, row, tokens)].copy() for each in self._tensors}

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._show(self._capacities_of_step(np.array([[tokens]]), 0))
        for tensor in self._tensors:
            self._caches[tensor.name][place_in(tensor, row, tokens)] = arrays[tensor.name]

    def _copy_row(self, source: int, targets: Sequence[int], rows: Sequence[int]) -> None:
        self._show(self._capacities_of_step(np.array(rows)[:, None], 0))
        for tensor in self._tensors:
            cache, count = self._caches[tensor.name], rows[tensor.layer]
            for target in targets:
                cache[place_in(tensor, target, count)] = cache[place_in(tensor, source, count)]

    def _zero_free_rows(self) -> None:
        for tensor in self._tensors:
            cache, rows = self._caches[tensor.name], self._cache.rows[tensor.layer].tolist()
            places = [place_in(tensor, row, count) for row, count in enumerate(rows)]
            kept = [cache[place].copy() for place in places]
            self._buffers[tensor.name].fill(0)  # which is more than steps are shown
            for place, values in zip(places, kept, strict=True):
                cache[place] = values

    def _rows_for(self, capacity: int) -> int:
        return rows_for(capacity) if self._in_int8 else capacity

    def _show(self, capacities: tuple[int, ...]) -> None:
        """Give steps as many rows of every layer's buffers as it is to have, or more where that would cost.

        Where rows are the first axis that is longer than 1, they are a prefix, whatever is in it. Otherwise parts are
        moved apart as S grows, and moved together where it at least halves. It takes no memory, so only Ctrl-C ends it
        halfway; the cache is emptied then.
        """
        if capacities == self._shown:
            return
        batch, single = self._cache.batch, all(tensor.parts(self._cache.batch) == 1 for tensor in self._tensors)
        in_use = self._cache.rows.max(1).tolist()
        with self._cache.replacing(batch, self._clear):
            for tensor in self._tensors:
                rows, filled = self._rows_for(capacities[tensor.layer]), in_use[tensor.layer]
                before = self._caches[tensor.name].shape[tensor.capacity_axis]
                worth_it = 2 * rows <= before and rows >= filled and self._features is None
                if rows == before or (rows < before and filled and not single and not worth_it):
                    continue
                self._unbind()
                shape, parts = tensor.shape(batch, rows), tensor.parts(batch)
                values = self._buffers[tensor.name].reshape(-1)
                if filled and not single:
                    width = prod(shape) // (parts * rows)  # of a row in a part
                    move = _move_apart if rows > before else _move_together
                    move(values, parts, before * width, rows * width, filled * width)
                self._caches[tensor.name] = values[: prod(shape)].reshape(shape)
            self._shown = capacities

    def _capacities_of_step(self, in_use: Ids, tokens: int) -> tuple[int, ...]:
        """Return the tokens that each layer is to show for a step, from the rows in use, int64 [L, B] or [1, B].

        Behind a step's rows there is one for each residual row: what lies in its place is set aside before it begins.
        Behind those of trees there is one for rows that change places.
        """
        spare = 0 if self._features is None else self._features.bias_rows + self._features.has_branches
        ends = (in_use.max(1) + tokens + spare).tolist()
        sizes = {end: self._cache.capacity_for(end) for end in set(ends)}
        shown = [sizes[end] for end in ends] if len(ends) > 1 else [sizes[ends[0]]] * len(self._cache.capacities)
        return tuple(map(min, shown, self._cache.capacities))

    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        assert self._model is not None  # it is open
        self._model.check()
        inputs: dict[str, npt.NDArray[Any]] = dict(
            zip(TOKEN_INPUTS, (input_ids, past_length, logit_positions), strict=True)
        )
        if managed is not None and self._features is not None:
            inputs |= managed.given(self._features)
        in_use = past_length[None] if managed is None else managed.past_length
        self._show(self._capacities_of_step(in_use, input_ids.shape[1]))
        try:
            step = self._step = self._bound(inputs)
            for name, array in inputs.items():
                step.inputs[name][...] = array
            self._model.session.run_with_iobinding(step.binding, self._run_options)
            return step.logits.copy()
        except Exception as error:  # likewise
            self._unbind()
            if is_out_of_memory(error):
                raise CapacityError(
                    f"no memory for a step of {input_ids.size} tokens at once",
                    "give a smaller chunk_size, fewer rows, or close other programs",
                ) from error
            raise BackendError(
                f"ONNX Runtime failed in a step ({first_line(error)})", "export the bundle again"
            ) from error

    def _bound(self, inputs: dict[str, npt.NDArray[Any]]) -> _Step:
        """Return buffers for steps with inputs of these shapes: those of the last step, or of some before it."""
        key = self._first_row, *[array.shape for array in inputs.values()]
        if self._step is not None and self._step.key == key:
            return self._step
        if key in self._kept_steps:
            return self._kept_steps[key]
        step = self._bind(key, inputs)
        if step.logits.nbytes <= _KEPT_BYTES:
            if len(self._kept_steps) == _KEPT_STEPS:
                del self._kept_steps[next(iter(self._kept_steps))]  # the one that was bound first
            self._kept_steps[key] = step
        return step

    def _bind(self, key: tuple[object, ...], inputs: dict[str, npt.NDArray[Any]]) -> _Step:
        """Bind buffers for steps with inputs of these shapes."""
        assert self._model is not None  # it is open
        batch, positions = inputs[LOGIT_POSITIONS].shape
        step = _Step(
            key=key,
            binding=self._model.session.io_binding(),
            inputs={name: np.zeros(array.shape, array.dtype) for name, array in inputs.items()},  # in C order
            logits=np.zeros((batch, positions, self.config.vocab_size), np.float32),
        )
        for name, buffer in step.inputs.items():
            _bind(step.binding.bind_input, name, buffer)
        if positions:
            _bind(step.binding.bind_output, LOGITS, step.logits)
        else:
            step.binding.bind_output(LOGITS, *_DEVICE)
        for name, whole in self._caches.items():
            cache = whole[self._first_row : self._first_row + batch]
            seen = cache[:, 0] if name.startswith(_RECEIVED) else cache  # which has no heads
            _bind(step.binding.bind_input, PAST + name, seen)
            _bind(step.binding.bind_output, PRESENT + name, seen)
        return step

    # --- a managed cache -------------------------------------------------------------------------------------------

    def _move(self, moves: Moves) -> None:
        with self._changing() as rows:
            rows.move(moves)

    def _received(self) -> list[npt.NDArray[np.float32]]:
        return [self._caches[received_name(layer)][:, 0] for layer in range(self.config.num_hidden_layers)]

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        with self._changing() as rows:
            rows.rotate(shifts)

    @contextmanager
    def _changing(self) -> Iterator[CacheRows]:
        """Yield the rows of the cache, and say what a lack of memory means while they change."""
        try:
            yield CacheRows(self.config, self._tensors, self._caches)
        except MemoryError as error:
            raise CapacityError(
                "no memory to move rows of the cache, which was emptied", "give fewer rows, or close other programs"
            ) from error


def _cache_state(config: ModelConfig, dtype: str, policy: CachePolicy | None, options: dict[str, Any]) -> CacheState:
    """Return what a cache of a type holds, of which one in int8 has a limit of its own."""
    if dtype == "int8":
        options = {"compute": "fp32", "transposed": True} | options
        if options.get("trees"):
            options = {"max_rows": MAX_ROWS} | options
        if config.max_position_embeddings > MAX_ROWS:
            options = {"max_length": MAX_ROWS, "limit": f"a cache of int8 holds at most {MAX_ROWS} tokens"} | options
    return cache_state(config, dtype, policy, on_host=True, **options)


def _move_apart(values: npt.NDArray[Any], parts: int, before: int, after: int, filled: int) -> None:
    """Move the first ``filled`` values of each part from ``i * before`` to ``i * after``, which is not less.

    From the last to the first, so that none is overwritten before it has moved; numpy takes care of a part that
    overlaps its own new place, in one dimension without a copy. What then lies between the parts is what was there.
    """
    for i in reversed(range(1, parts)):
        values[i * after : i * after + filled] = values[i * before : i * before + filled]


def _move_together(values: npt.NDArray[Any], parts: int, before: int, after: int, filled: int) -> None:
    """Move the first ``filled`` values of each part from ``i * before`` to ``i * after``, which is not more."""
    for i in range(1, parts):  # from the first to the last, likewise
        values[i * after : i * after + filled] = values[i * before : i * before + filled]


def _bind(bind: Any, name: str, buffer: npt.NDArray[Any]) -> None:
    bind(name, *_DEVICE, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
