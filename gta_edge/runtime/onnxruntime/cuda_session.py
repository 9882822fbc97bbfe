"""The `onnxruntime-cuda` backend: a bundle's graph in fp16 or bf16 on an NVIDIA GPU, by ONNX Runtime alone.

Past input and present output of every layer are bound to one buffer on the GPU, so no step copies the cache. A step of
one token per row, or of a few that continue a text or are nodes of a tree, is a CUDA graph, captured by ONNX Runtime
once for each shape and capacity: its inputs and logits have memory of their own that stays where it is. A few tokens
are padded to the widths that speculation uses, so that shapes are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.session import free_gpu_bytes
from gta_edge.errors import BackendError, CapacityError, GtaEdgeError, OutputError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.onnxruntime import (
    CUDA_PROVIDER,
    first_line,
    is_out_of_memory,
    load_onnxruntime,
    load_onnxruntime_cuda,
    quiet,
    why_no_gpu,
)
from gta_edge.model.kv_cache import (
    BRANCHES,
    INPUT_IDS,
    LOGIT_POSITIONS,
    LOGITS,
    TOKEN_INPUTS,
    CacheTensor,
    interface_names,
    managed_shapes,
    received_name,
    received_tensors,
)
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.managed_cache import OBSERVED_TOKENS, cache_state
from gta_edge.runtime.onnxruntime.cache_rows import CacheRows
from gta_edge.runtime.onnxruntime.cuda_forms import form_of, managed_form
from gta_edge.runtime.onnxruntime.cuda_steps import NO_GRAPH, Shape, Step, Steps
from gta_edge.runtime.onnxruntime.lowered import PACKED, cached_graph
from gta_edge.runtime.onnxruntime.model import OpenModel, model_files, open_model
from gta_edge.runtime.saved_cache import place_in
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.runtime.step_costs import graph_width
from gta_edge.support.files import scratch_directory
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import one_line
from gta_edge.support.threads import compute_threads

__all__ = ["CHUNK_SIZE", "OnnxRuntimeCudaSession"]

CHUNK_SIZE = 512
"""Tokens of a prompt at once: the scores of all heads lie in memory, in float32, and more keep a GPU busy no better."""

_CAPACITY_STEP = 2048
"""Every growth copies the cache through the host's memory and captures the step anew."""

_FATAL = 4
_WORDS_STEP = 1024  # of trees: words are padded to as many, so that a graph outlives a tree's growth


Inputs = dict[str, npt.NDArray[Any]]
"""Inputs of a step by name, but for caches."""


class OnnxRuntimeCudaSession(Session):
    """A bundle on ONNX Runtime's CUDA provider.

    Args:
        bundle: the model.
        compute: ``fp16``, ``bf16`` or ``fp32``.
        device: ``cuda``, or ``cpu`` for the same session on ONNX Runtime's CPU provider, which lacks bf16 and CUDA
            graphs: it is for tests.
        device_id: CUDA's number for the GPU.
        cache: policy that says which rows of the cache stay; None for all.
        progress: told of weights that are converted or repacked.
        options: as ``CacheState`` takes them; ``capacity_step`` as large as the longest context avoids all growth.

    Raises:
        BackendError: ONNX Runtime or its CUDA provider is missing, there is no GPU, or the model is refused.
        EngineError: a weight is beyond float16's range.
        CapacityError: the GPU has no room for the weights.
        InputError: the policy makes no sense for the model, or with trees.
    """

    backend = "onnxruntime-cuda"
    reads_rows = copies_rows = True
    device = "gpu"

    def __init__(
        self,
        bundle: Bundle,
        *,
        compute: str,
        device: str = "cuda",
        device_id: int = 0,
        cache: CachePolicy | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> None:
        self.compute = compute
        options = {"chunk_size": CHUNK_SIZE, "capacity_step": _CAPACITY_STEP} | options
        if cache is not None:
            options["observed_tokens"] = OBSERVED_TOKENS
        state = cache_state(bundle.config, compute, cache, **options)
        super().__init__(bundle.config, state)
        self._features = state.features
        self._tensors = state.tensors
        if self._features is not None and self._features.observe:
            self._tensors += received_tensors(bundle.config.num_hidden_layers)
        on_gpu = device == "cuda"
        self.device = "gpu" if on_gpu else "cpu"
        self._onnxruntime = load_onnxruntime_cuda(device_id) if on_gpu else load_onnxruntime("ort-gpu")
        self._device = device, device_id
        self._bundle, self._progress = bundle, progress
        self.graph_refused: str | None = None if on_gpu else "there is no GPU"  # why no step is a CUDA graph
        self._model: OpenModel | None = self._open()
        self._caches: dict[str, Any] = {}
        self._steps = Steps(self._release_graph)
        self._graph_ids = 0
        self._received_before: list[npt.NDArray[np.float32]] = []  # a step that a CUDA graph is captured of

    @property
    def cache_bytes(self) -> int:
        held = list(self._caches.values())  # which a step of another thread may replace meanwhile
        return sum(int(cache.tensor_size_in_bytes()) for cache in held)

    @property
    def cuda_graph(self) -> bool | None:
        """Whether single tokens are replays of a CUDA graph; if False, ``graph_refused`` says why. None on the CPU, and
        before the first token after the cache was made or grew.
        """
        if self._device[0] == "cpu":
            return None
        if self.graph_refused is not None:
            return False
        return True if any(shape[1] == 1 for shape in self._steps.shapes) else None

    # --- the model -------------------------------------------------------------------------------------------------

    def _open(self) -> OpenModel:
        """Return the model in ONNX Runtime: of the graph that is cached in the bundle, or of one made for now."""
        bundle, compute = self._bundle, self.compute
        form = form_of(compute)
        graph = cached_graph(bundle, form, progress=self._progress)
        if graph is not None and self._features is not None:
            graph = cached_graph(bundle, managed_form(compute, self._features, graph), progress=self._progress)
        if graph is not None:
            try:
                return self._created(graph, model_files(bundle, form.directory))
            except CapacityError:
                raise
            except BackendError:  # another process may have replaced what was cached, while ONNX Runtime read it
                pass
        from gta_edge.runtime.onnxruntime.cuda_lower import cuda_graph

        try:
            with scratch_directory() as temporary:
                weights = temporary.resolve() / PACKED
                options: dict[str, Any] = {"everything": True, "features": self._features}
                graph = cuda_graph(bundle, compute, weights, weights.name, self._progress, **options)
                return self._created(graph, {weights.name: weights})
        except (OSError, OutputError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            raise BackendError(
                f"{bundle.directory} cannot be written to, and neither can a copy of its weights in {compute} "
                f"({one_line(reason)})",
                "free some space, or set TMPDIR to a place that has more",
            ) from error

    def _created(self, graph: bytes, files: Mapping[str, Path]) -> OpenModel:
        if self.graph_refused is not None:
            return self._create(graph, files, "0")
        try:
            return self._create(graph, files, "1")
        except CapacityError:
            raise
        except BackendError as error:
            refusal = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)
        opened = self._create(graph, files, "0")
        self.graph_refused = refusal
        return opened

    def _create(self, graph: bytes, files: Mapping[str, Path], enable_cuda_graph: str) -> OpenModel:
        module = self._onnxruntime
        settings = module.SessionOptions()
        settings.log_severity_level = _FATAL  # its errors are raised, and must not stand beside ours on stderr
        settings.intra_op_num_threads = compute_threads()
        # The graph has its fusions. Of the others one makes a Split of Slices again, see cuda_lower.
        settings.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_BASIC
        device, device_id = self._device
        on_cuda = (
            CUDA_PROVIDER,
            {
                "device_id": str(device_id),
                "enable_cuda_graph": enable_cuda_graph,
                "arena_extend_strategy": "kSameAsRequested",  # not twice what is needed
                "use_tf32": "0",  # fp32 means float32
            },
        )
        providers = [on_cuda] if device == "cuda" else ["CPUExecutionProvider"]
        model = self._bundle.model_path
        try:
            with quiet(module):
                opened = open_model(module, graph, files, settings, providers)
        except GtaEdgeError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            if is_out_of_memory(error):
                raise CapacityError(
                    f"{model}: the GPU has no room for the weights in {self.compute}{_free()}",
                    "close other programs, or export with --precision int4",
                ) from error
            if "cuDNN is unavailable" in str(error):
                raise why_no_gpu(module, error) from error
            raise BackendError(
                f"{model}: ONNX Runtime {module.__version__} refuses the model ({first_line(error)})",
                "export the bundle again",
            ) from error
        if device == "cuda" and CUDA_PROVIDER not in opened.session.get_providers():
            raise BackendError(f"ONNX Runtime {module.__version__} left the GPU unused", "run `gta-edge doctor`")
        if {value.name for value in opened.session.get_inputs()} != self._interface():
            opened.close()
            raise BackendError(f"{model}: the graph is not that of config.json", "export the bundle again")
        return opened

    def _interface(self) -> set[str]:
        names = set(interface_names(self.config)[0])
        if self._features is None:
            return names
        sizes = {"batch": 1, "tokens": 1}
        return names | set(managed_shapes(self._features, **sizes, capacities=[1] * self.config.num_hidden_layers))

    def _release(self) -> None:
        self._clear()
        self._close_model()

    def _close_model(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None

    @property
    def _session(self) -> Any:
        return None if self._model is None else self._model.session

    # --- the cache -------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._caches = {}
        self._steps.clear()

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        self._steps.forget()  # they hold addresses of the old buffers
        # zeroed: rows that are not visible get weight zero, and zero times garbage could be NaN
        try:
            with self._cache.replacing(batch, self._clear):
                filled = self._cache.filled
                for tensor in self._tensors:  # one at a time: never twice the whole cache
                    old = self._caches.pop(tensor.name, None)
                    content = np.zeros(tensor.shape(batch, capacities[tensor.layer]), _carried(tensor))
                    if old is not None:
                        content[:, :, :filled] = old.numpy()[:, :, :filled]
                    del old
                    self._caches[tensor.name] = self._buffer(content)
        except Exception as error:  # ONNX Runtime's errors have no common base
            if is_out_of_memory(error):
                raise self._cache.no_memory(batch, capacities, _free()) from error
            raise BackendError(f"ONNX Runtime made no cache ({first_line(error)})", "run `gta-edge doctor`") from error

    def _buffer(self, content: Any) -> Any:
        """Return a buffer on the device that holds a copy of an array."""
        buffer = self._onnxruntime.OrtValue.ortvalue_from_shape_and_type(content.shape, content.dtype, *self._device)
        buffer.update_inplace(content)
        return buffer

    def _rows_of_step(self, first: int, stop: int, tokens: int) -> slice:
        # single tokens are replays of one graph, of all rows, of which idle ones cost a GPU little
        return slice(None) if tokens == 1 else slice(first, stop)

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        return {each.name: self._on_host(each)[place_in(each, row, tokens)].copy() for each in self._tensors}

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for tensor in self._tensors:
            whole = self._on_host(tensor)
            whole[place_in(tensor, row, tokens)] = arrays[tensor.name]
            self._caches[tensor.name].update_inplace(whole.view(_carried(tensor)))

    def _copy_row(self, source: int, targets: Sequence[int], rows: Sequence[int]) -> None:
        for tensor in self._tensors:
            whole, count = self._on_host(tensor), rows[tensor.layer]
            for target in targets:
                whole[place_in(tensor, target, count)] = whole[place_in(tensor, source, count)]
            self._caches[tensor.name].update_inplace(whole.view(_carried(tensor)))

    def _zero_free_rows(self) -> None:
        for tensor in self._tensors:
            held = self._on_host(tensor)
            whole = np.zeros_like(held)
            for row, count in enumerate(self._cache.rows[tensor.layer].tolist()):
                place = place_in(tensor, row, count)
                whole[place] = held[place]
            self._caches[tensor.name].update_inplace(whole.view(_carried(tensor)))

    def _on_host(self, tensor: CacheTensor) -> npt.NDArray[Any]:
        """Return a copy of a tensor of the cache, of all rows: ONNX Runtime's interface copies no part of one."""
        values: npt.NDArray[Any] = np.array(self._caches[tensor.name].numpy())
        return values.view(DTYPES[tensor.dtype].numpy)

    # --- a step ----------------------------------------------------------------------------------------------------

    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        wanted = logit_positions.shape[1]
        if self._model is not None and self._device[0] == "cpu":  # a GPU has the weights in its own memory
            self._model.check()
        if not wanted:  # logits for one position at least: not every kernel takes none
            logit_positions = np.zeros((len(input_ids), 1), np.int64)
        tokens = input_ids.shape[1]
        width = 0
        if logit_positions.shape[1] == tokens and self.graph_refused is None:
            rows = past_length if managed is None else managed.past_length
            width = graph_width(tokens, rows, self._cache.capacities)
        if width > tokens:
            input_ids = np.pad(input_ids, ((0, 0), (0, width - tokens)))
            logit_positions = np.broadcast_to(np.arange(width), input_ids.shape)
        if managed is not None and width:
            words = 0 if managed.branches is None else -(-managed.branches.shape[1] // _WORDS_STEP) * _WORDS_STEP
            managed = managed.padded(width - tokens, words)
        inputs: Inputs = dict(zip(TOKEN_INPUTS, (input_ids, past_length, logit_positions), strict=True))
        if managed is not None and self._features is not None:
            inputs |= managed.given(self._features)
        try:
            found = self._appended(inputs, with_graph=width > 0)[:, :wanted]
            self._received_before = []
            return found
        except Exception as error:  # ONNX Runtime's errors have no common base
            self._reject(error, input_ids, width)
            self.graph_refused = first_line(error)
        # Again, without a graph: it writes the same rows to the same places, and adds to what they had received before.
        # What is left of a capture may not be run on, so first that session goes, which the error held.
        self._restore_received()
        self._steps.forget()
        self._close_model()
        self._model = self._open()
        return self._run(input_ids, past_length, logit_positions, managed)[:, :wanted]

    def _reject(self, error: Exception, input_ids: Ids, width: int) -> None:
        """Raise our error for one of ONNX Runtime's, unless a CUDA graph may be what failed."""
        if is_out_of_memory(error):
            self._steps.forget()
            raise CapacityError(
                f"the GPU has too little memory left for {input_ids.size} tokens at once{_free()}",
                "give a smaller chunk_size or fewer rows",
            ) from error
        if not width:
            raise BackendError(
                f"ONNX Runtime failed in a step ({first_line(error)})", "export the bundle again"
            ) from error

    def _appended(self, inputs: Inputs, *, with_graph: bool) -> Logits:
        (batch, tokens), positions = inputs[INPUT_IDS].shape, inputs[LOGIT_POSITIONS].shape[1]
        shape = batch, tokens, positions, inputs[BRANCHES].shape[1] if BRANCHES in inputs else 0
        bind = partial(self._bound, shape, inputs, with_graph)
        step, is_new = self._steps.find(shape, self._first_row, bind, with_graph=with_graph)
        for name, buffer in step.inputs.items():
            if name != LOGIT_POSITIONS or inputs[INPUT_IDS].shape[1] > 1:  # of a single token the position is known
                buffer.update_inplace(np.ascontiguousarray(inputs[name]))
        self._launch(step)
        if is_new and step.graph_id != NO_GRAPH:
            self.step_costs.leave_out()
            if self._received_before:  # ONNX Runtime has run it more than once, and attention would count as often
                self._restore_received()
                self._launch(step)
        logits: Logits = step.logits.numpy()
        return logits.copy() if self._device[0] == "cpu" else logits  # a GPU's are copied as they are brought here

    def _launch(self, step: Step) -> None:
        options = self._onnxruntime.RunOptions()
        options.log_severity_level = _FATAL
        options.add_run_config_entry("gpu_graph_id", str(step.graph_id))
        self._session.run_with_iobinding(step.binding, options)

    def _restore_received(self) -> None:
        """Put back what rows had received before the graph at hand was captured; nothing in a replay."""
        for name, received in zip(self._received_names, self._received_before, strict=False):
            self._caches[name].update_inplace(received)

    def _release_graph(self, graph_id: int) -> None:
        if hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph_id)

    def _bound(self, shape: Shape, inputs: Inputs, with_graph: bool) -> Step:
        batch, _, positions, _ = shape
        if with_graph:
            self._graph_ids += 1  # never one that was used: ONNX Runtime would replay the old graph
            self._received_before = [np.array(self._caches[name].numpy()) for name in self._received_names]
        step = Step(
            shape=shape,
            first_row=self._first_row,
            binding=self._session.io_binding(),
            inputs={name: self._buffer(np.zeros(array.shape, array.dtype)) for name, array in inputs.items()},
            logits=self._buffer(np.zeros((batch, positions, self.config.vocab_size), np.float32)),
            graph_id=self._graph_ids if with_graph else NO_GRAPH,
        )
        for name, buffer in step.inputs.items():
            step.binding.bind_ortvalue_input(name, buffer)
        step.binding.bind_ortvalue_output(LOGITS, step.logits)
        for tensor in self._tensors:
            cache, dtype = self._caches[tensor.name], DTYPES[tensor.dtype]
            rest = cache.shape()[1:] if tensor.name not in self._received_names else [cache.shape()[2]]
            start = cache.data_ptr() + self._first_row * prod(rest) * dtype.bytes
            place = *self._device, dtype.onnx_number, [batch, *rest], start
            step.binding.bind_input(tensor.past, *place)
            step.binding.bind_output(tensor.present, *place)
        return step

    # --- a managed cache -------------------------------------------------------------------------------------------

    @property
    def _received_names(self) -> list[str]:
        observe = self._features is not None and self._features.observe
        return [received_name(layer) for layer in range(self.config.num_hidden_layers)] if observe else []

    def _received(self) -> list[npt.NDArray[np.float32]]:
        return [self._caches[name].numpy()[:, 0] for name in self._received_names]

    def _move(self, moves: Moves) -> None:
        for layer in sorted({*moves.moves[:, 0].tolist(), *moves.folds[:, 0].tolist()}):
            self._change(layer, partial(CacheRows.move, moves=moves.of_layer(layer)))

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        for layer, shift in enumerate(shifts):
            if shift.any():
                alone = [each if i == layer else np.zeros_like(each) for i, each in enumerate(shifts)]
                self._change(layer, partial(CacheRows.rotate, shifts=alone))

    def _change(self, layer: int, change: Callable[[CacheRows], None]) -> None:
        """Change rows of a layer: what is its own comes to the host's memory, and goes back."""
        try:
            tensors = [tensor for tensor in self._tensors if tensor.layer == layer]
            arrays = {tensor.name: np.array(self._caches[tensor.name].numpy()) for tensor in tensors}
            values = {each.name: arrays[each.name].view(DTYPES[each.dtype].numpy) for each in tensors}
            change(CacheRows(self.config, tensors, values))
            for name, array in arrays.items():
                self._caches[name].update_inplace(array)
        except MemoryError as error:
            raise CapacityError(
                "no memory to move rows of the cache, which was emptied", "give fewer rows, or close other programs"
            ) from error


def _carried(tensor: CacheTensor) -> npt.DTypeLike:
    """Return the type of arrays that carry a tensor's values: the 16 bits of bf16 as float16."""
    return np.float32 if tensor.dtype == "fp32" else np.float16


def _free() -> str:
    """Return how much the GPU has left, for a message, where that is known."""
    try:
        free = free_gpu_bytes()
    except Exception:  # whatever ails the driver: it is only a figure in a message about something else
        free = None
    return "" if free is None else f", and the GPU has {free / 2**20:.0f} MiB free"
