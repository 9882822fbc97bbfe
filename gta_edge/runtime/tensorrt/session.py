"""The backends `tensorrt` and `tensorrt-rtx`: an engine that ``gta-edge build`` made, token by token, without torch.

The engine's profiles share its weights. The cache has its full capacity from the start, and past inputs and present
outputs of every layer are bound to one address, so no step copies it. A step of one token per row is a CUDA graph,
captured once for a number of rows: ids and lengths in, logits out, all through pinned memory. So is one of a few tokens
that continue a text, or are nodes of a tree, of each of the widths that speculation uses, to which others are padded
(not in a cache in blocks, which padding would close). Each shape has an execution context of its own for that, since a
graph is only good while its context's shapes do not change. They cost little: weights are the engine's, and scratch
memory is one for all, as one runs after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import Gpu, current_gpu
from gta_edge.cuda.session import Cuda
from gta_edge.errors import BackendError, CapacityError, EngineError, InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.tensorrt import TensorRT, load
from gta_edge.model.kv_cache import INPUT_IDS, LOGIT_POSITIONS, LOGITS
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, CACHES
from gta_edge.plugins import register
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.cache_state import CacheState
from gta_edge.runtime.managed_cache import OBSERVED_TOKENS, cache_state
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.runtime.step_costs import graph_width
from gta_edge.runtime.tensorrt.build import buffer_bytes, logit_positions, step_inputs
from gta_edge.runtime.tensorrt.engine import (
    DECODE,
    PREFILL,
    EngineSpec,
    Wanted,
    compute_capability,
    engine_directory,
    load_engine,
    require_engine,
)
from gta_edge.runtime.tensorrt.engine_cache import EngineCache, policy_options
from gta_edge.runtime.tensorrt.engine_kind import ENGINES, TENSORRT
from gta_edge.runtime.tensorrt.engine_memory import EngineMemory
from gta_edge.runtime.tensorrt.log import first_reason, new_log, started
from gta_edge.runtime.tensorrt.runtime_cache import RuntimeCache
from gta_edge.runtime.tensorrt.step_inputs import StepInputs, Values, step_values

__all__ = ["TensorRTSession"]

_DECODERS_KEPT = 8  # of single tokens, for as many numbers of rows, and again of a few

TREE_ROWS = 256
"""What a session suggests to build an engine with, where one without room for trees is asked for them."""


@dataclass(frozen=True)
class _Tensor:
    """An input or output of fixed memory: on the GPU for the largest shape, and pinned beside it."""

    address: int
    host: Any


@dataclass
class _Decoder:
    """A context for one token, or a few, of each of a number of rows, and its run as a CUDA graph."""

    context: Any
    graph: Any = None
    """None where TensorRT cannot be captured; then the context is run as it is."""


class TensorRTSession(Session):
    """An engine behind the session's interface.

    Args:
        bundle: the model; its engine lies in it.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        compute: type that the engine has to compute in; None for any.
        cache_dtype: how it has to store its cache; None for any.
        device_id: CUDA's number for the GPU.
        chunk_size: tokens of a prompt at once, at most the engine's.
        cache: policy that says which rows of the cache stay, which the engine has to be built for; None for all.
        trees: whether the engine has to have room for trees of tokens; one that has, holds them in any case.

    Raises:
        BackendError: TensorRT, the driver or the GPU is missing, or the engine cannot be loaded.
        EngineError: there is no engine, or it was built from or for something else, another policy or type among it.
        InputError: the policy makes no sense for the model.
        CapacityError: the GPU has no room for the engine and its cache.
    """

    device = "gpu"
    reads_rows = copies_rows = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str = TENSORRT.name,
        compute: str | None = None,
        cache_dtype: str | None = None,
        device_id: int = 0,
        chunk_size: int | None = None,
        cache: CachePolicy | None = None,
        trees: bool = False,
    ) -> None:
        # First what costs nothing: TensorRT's libraries take seconds to load.
        if trees or (cache is not None and cache_dtype in BLOCK_CACHE_TYPES):
            cache_state(bundle.config, cache_dtype or "fp32", cache, trees=trees)  # refuses what no engine is for
        wanted = Wanted(compute, cache_dtype, policy_options(cache) if cache is not None else "", TREE_ROWS * trees)
        require_engine(bundle, engine, wanted)
        gpu = current_gpu(device_id)
        trt = load(engine)
        here = compute_capability(gpu.architecture)
        found = {"tensorrt": trt.version_text, "compute_capability": here, "gpu": gpu.name}
        plan, record = load_engine(bundle, engine, **found, wanted=wanted)
        spec = record.spec
        chunk = spec.chunk_size if chunk_size is None else min(chunk_size, spec.chunk_size)
        super().__init__(bundle.config, _state(bundle, spec, cache, chunk))
        self.backend = engine
        self.compute = spec.compute
        self._record, self._spec, self._directory = record, spec, bundle.directory
        self._prefill: Any = None
        self._prefill_row = 0  # of the batch, that its caches begin with
        self._engine: Any = None
        self._runtime: Any = None
        self._kernels: RuntimeCache | None = None
        self._decoders: dict[tuple[int, int], _Decoder] = {}  # by rows and tokens of each
        self._addresses: dict[str, int] = {}
        self._cuda = Cuda(device_id)
        try:
            self._open(trt, plan, gpu)
        except BaseException:
            self._drop()
            raise

    def _open(self, trt: TensorRT, plan: memoryview, gpu: Gpu) -> None:
        self._check_room(len(plan))
        if trt.plugins:
            register(trt.module)
        self._user_managed = trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._log = new_log(trt.module)
        self._runtime = started(trt.module.Runtime, self._log, "runtime")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"TensorRT cannot load the engine ({self._reason()})", f"{self._rebuild()}")
        if trt.compiles_at_run_time:
            self._kernels = RuntimeCache(trt.module, gpu.name, self._record)
        spec = self._record.spec
        self._inputs = StepInputs(self._cuda, step_inputs(self.config, spec))
        self._addresses |= self._inputs.addresses
        self._positions = logit_positions(self.config, spec)
        self._logits = self._tensor(LOGITS, spec.max_batch * self._positions * self.config.vocab_size, np.float32)
        attends_by_plugin = ENGINES[spec.engine].attends_by_plugin(self.config)
        self._memory = EngineMemory(self._cuda, self.config, spec, gpu if attends_by_plugin else None)
        self._addresses |= self._memory.addresses
        profiles = {DECODE, PREFILL, spec.few_profile}
        sizes = [int(self._engine.get_device_memory_size_for_profile_v2(each)) for each in profiles]
        self._scratch_bytes = max(*sizes, 1)
        self._scratch = self._cuda.allocate(self._scratch_bytes, "TensorRT's scratch memory")
        self._prefill = self._context(PREFILL, eager=False)
        self._prefill_shape = (0, 0, 0)
        self._cuda.synchronize()

    def _check_room(self, engine_bytes: int) -> None:
        """Refuse what TensorRT would fail at halfway, or the system end, with a message that has figures."""
        spec = self._record.spec
        cache_bytes, free = spec.cache_bytes(self.config), self._cuda.free_bytes()
        buffers = buffer_bytes(self.config, spec)
        needed = (
            engine_bytes + cache_bytes + buffers * (2 if self._cuda.shares_memory else 1)
        )  # pinned ones beside them
        if needed > free:
            raise CapacityError(
                f"the engine takes {engine_bytes / 1e9:.2f} GB, its cache of {spec.max_length} tokens for "
                f"{spec.max_batch} rows {cache_bytes / 1e9:.2f} GB, its buffers {buffers / 1e9:.2f} GB: all of it "
                f"takes {needed / 1e9:.3f} GB and the GPU has {free / 1e9:.3f} GB free",
                "close other programs, or build with a smaller --max-length or --max-batch",
            )

    def _move(self, moves: Moves) -> None:
        assert self._memory.rows is not None  # the engine is for a policy
        self._cuda.make_current()
        self._memory.rows.move(moves)

    def _received(self) -> list[npt.NDArray[np.float32]]:
        self._cuda.make_current()
        return self._memory.received(self._cache.batch)

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        assert self._memory.rows is not None  # likewise
        self._cuda.make_current()
        self._memory.rows.rotate(shifts)

    def _reopen(self, sequence: int, block: int) -> None:
        self._cuda.make_current()
        self._memory.reopen(sequence, block)

    def _rows_of_step(self, first: int, stop: int, tokens: int) -> slice:
        # a graph of single tokens is for a number of rows, from the first; prompts may begin at another
        return slice(0, stop) if tokens == 1 or self._memory.addresses_from(first) is None else slice(first, stop)

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        self._cuda.make_current()
        return self._memory.read(row, 0, tokens)

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._cuda.make_current()
        self._memory.write(row, 0, arrays)

    def _copy_row(self, source: int, targets: Sequence[int], rows: Sequence[int]) -> None:
        self._cuda.make_current()
        self._memory.copy(source, targets)

    def _zero_free_rows(self) -> None:
        self._cuda.make_current()
        self._memory.zero_behind(self._cache.rows)

    def _context(self, profile: int, *, eager: bool) -> Any:
        """Return a new execution context for a profile, all its tensors bound.

        Args:
            profile: of the engine.
            eager: whether a run waits for kernels that are compiled for its sizes, where they are.
        """
        self._log.errors.clear()
        how, strategy = self._user_managed, self._user_managed
        if self._kernels:
            how = self._kernels.configure(self._engine, strategy, eager=eager)
        context = self._engine.create_execution_context(how)
        if context is None:
            raise BackendError(f"TensorRT cannot make an execution context ({self._reason()})", f"{self._rebuild()}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        if not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise BackendError(f"TensorRT does not take the engine's profile ({self._reason()})", f"{self._rebuild()}")
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"the engine has no {name} ({self._reason()})", f"{self._rebuild()}")
        return context

    @property
    def max_batch(self) -> int:
        """Rows that the engine was built for."""
        return self._record.spec.max_batch

    @property
    def cache_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def cuda_graph(self) -> bool | None:
        single = [each.graph is not None for (_, tokens), each in self._decoders.items() if tokens == 1]
        return all(single) if single else None

    def _tensor(self, name: str, values: int, dtype: Any) -> _Tensor:
        host = self._cuda.host_array((values,), dtype, f"a buffer for {name}")
        self._addresses[name] = self._cuda.allocate(host.nbytes, name)
        return _Tensor(self._addresses[name], host)

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        if batch > self.max_batch:
            raise InputError(
                f"ids have {batch} rows and the engine was built for {self.max_batch}",
                f"give fewer, or run: {replace(self._record.spec, max_batch=batch).command(self._directory)}",
            )

    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        self._cuda.make_current()
        (rows, tokens), wanted = input_ids.shape, logit_positions.shape[1]
        if wanted > self._positions:
            return self._run_in_pieces(input_ids, past_length, managed)
        if not wanted:  # the engine gives logits for one position at least
            logit_positions = np.zeros((rows, 1), np.int64)
        width = self._width(tokens, wanted, past_length, managed)
        if width > tokens:
            input_ids = np.pad(input_ids, ((0, 0), (0, width - tokens)))
            logit_positions = np.broadcast_to(np.arange(width), input_ids.shape)
            managed = managed and managed.padded(width - tokens)
        given = input_ids, past_length, logit_positions, managed
        values = step_values(self._spec.managed, self.config, *given, tree_words=self._spec.tree_words)
        logits = self._step(values) if width else self._chunk(values)
        return logits[:, :wanted]

    def _width(self, tokens: int, wanted: int, past_length: Ids, managed: ManagedStep | None) -> int:
        """Return the tokens per row of the graph that runs a step, padded to it; 0 where there is none for it."""
        if wanted != tokens or self._first_row:
            return 0
        rows = past_length if managed is None else managed.past_length
        limit, padding = self._spec.few_tokens, not CACHES[self.cache_dtype].in_blocks
        return graph_width(tokens, rows, self._memory.capacities, limit=limit, padding=padding)

    def _run_in_pieces(self, input_ids: Ids, past_length: Ids, managed: ManagedStep | None) -> Logits:
        """Append tokens, of all of which logits are wanted, in runs of as many as have some."""
        parts = []
        for start in range(0, input_ids.shape[1], self._positions):
            ids = input_ids[:, start : start + self._positions]
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            full = self._cache.capacity  # where idle rows of a cache in blocks are said to be
            past = np.minimum(past_length + start, full)
            part = managed and managed.of_tokens(start, start + ids.shape[1])
            parts.append(self._run(ids, past, positions, part))
        result: Logits = np.concatenate(parts, axis=1)
        return result

    def _chunk(self, values: Values) -> Logits:
        if self._first_row != self._prefill_row:
            self._move_prefill(self._first_row)
        shape = (*values[INPUT_IDS].shape, values[LOGIT_POSITIONS].shape[1])
        if shape != self._prefill_shape:
            self._prefill_shape = (0, 0, 0)
            self._set_shapes(self._prefill, *shape)
            self._prefill_shape = shape
        logits = self._fill(values)
        self._enqueue(self._prefill, logits)
        self._cuda.synchronize()
        return logits.copy()

    def _move_prefill(self, row: int) -> None:
        """Let the prefill context see the cache from this row on."""
        for name, address in (self._memory.addresses_from(row) or {}).items():
            if not self._prefill.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refuses {name} of row {row} ({self._reason()})", f"{self._rebuild()}")
        self._prefill_row = row

    def _step(self, values: Values) -> Logits:
        rows, tokens = shape = values[INPUT_IDS].shape
        logits = self._fill(values)
        decoder = self._decoders.get(shape)
        if decoder is None:
            self.step_costs.leave_out()
            result, decoder = self._first_step(rows, tokens, logits)
            alike = [each for each in self._decoders if (each[1] == 1) == (tokens == 1)]
            if len(alike) == _DECODERS_KEPT:
                self._cuda.forget(self._decoders.pop(alike[0]).graph)
            self._decoders[rows, tokens] = decoder
            return result
        if decoder.graph is None:
            self._enqueue(decoder.context, logits)
        else:
            self._cuda.replay(decoder.graph)
        self._cuda.synchronize()
        return logits.copy()

    def _first_step(self, rows: int, tokens: int, logits: Logits) -> tuple[Logits, _Decoder]:
        """Run a step, which TensorRT wants before it is captured, and capture the next one like it."""
        context = self._context(DECODE if tokens == 1 else self._spec.few_profile, eager=True)
        self._set_shapes(context, rows, tokens, tokens)
        self._enqueue(context, logits)
        self._cuda.synchronize()
        decoder, result = _Decoder(context), logits.copy()
        if getattr(context, "is_stream_capturable", lambda _: True)(self._cuda.stream):
            try:
                with self._cuda.capture() as made:
                    self._enqueue(context, logits)
                decoder.graph = made[0]
            except BackendError:  # an engine may have what cannot be captured, and runs all the same
                first_reason(self._log.errors)
                self._log.errors.clear()
        return result, decoder

    def _fill(self, values: Values) -> Logits:
        """Put inputs into pinned memory; return where the logits will be, float32 [B, M, V]."""
        self._inputs.fill(values)
        shape = (*values[LOGIT_POSITIONS].shape, self.config.vocab_size)
        result: Logits = self._logits.host[: prod(shape)].reshape(shape)
        return result

    def _set_shapes(self, context: Any, rows: int, tokens: int, logits: int) -> None:
        shapes = self._spec.input_shapes(self.config, batch=rows, tokens=tokens, positions=logits)
        self._log.errors.clear()
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(
                    f"TensorRT refuses {name} of shape {list(shape)} ({self._reason()})", f"{self._rebuild()}"
                )

    def _enqueue(self, context: Any, logits: Logits) -> None:
        self._inputs.copy_in()
        self._log.errors.clear()
        if not context.execute_async_v3(self._cuda.stream):
            raise BackendError(f"TensorRT could not run the engine ({self._reason()})", "run `gta-edge doctor`")
        self._memory.settle()
        self._cuda.copy_out(logits, self._logits.address)

    def _reason(self) -> str:
        """Return the first of what TensorRT said of the step that failed: what follows only follows from it."""
        return first_reason(self._log.errors)

    def _rebuild(self) -> str:
        return f"run: {self._record.spec.command(self._directory)}"

    def _release(self) -> None:
        if self._kernels:
            with suppress(BackendError):
                self._cuda.make_current()
            self._kernels.keep()
        self._drop()

    def _drop(self) -> None:
        """Free TensorRT's objects, contexts first, and then the memory that they use."""
        with suppress(BackendError):  # after an error of CUDA nothing works any more
            self._cuda.make_current()
            self._cuda.synchronize()
        self._decoders, self._prefill, self._engine, self._runtime, self._kernels = {}, None, None, None, None
        self._cuda.close()


def _state(bundle: Bundle, spec: EngineSpec, policy: CachePolicy | None, chunk_size: int) -> CacheState:
    """Return what an engine's cache holds: of a managed one rows, which without a policy are as many as tokens.

    Raises:
        EngineError: the engine was not built for the policy.
        InputError: the policy makes no sense for the model.
    """
    config, managed = bundle.config, spec.managed
    options: dict[str, Any] = {"chunk_size": chunk_size, "max_length": spec.max_length}
    options["limit"] = f"the engine was built with --max-length {spec.max_length}"
    if policy is None and spec.tree_rows:
        rows = min(spec.capacities(config))
        options |= {"compute": spec.compute, "capacity_step": rows, "max_rows": rows}
        return cache_state(config, spec.cache_dtype, trees=True, **options)
    if policy is None:
        room = min(spec.capacities(config))
        if room < spec.max_length:
            options["limit"] = f"the engine has room for {room} rows, and without a cache policy every token keeps one"
        options["max_length"] = options["capacity_step"] = min(room, spec.max_length)
        return cache_state(config, spec.cache_dtype, compute=spec.compute, **options)
    needed = EngineCache.of(policy, config, spec.cache_dtype, **options)
    lack = "was built without a cache policy" if managed is None else managed.lacks(needed)
    if lack is not None:
        raise EngineError(
            f"{engine_directory(bundle, spec.engine)}: the engine {lack}",
            f"run: {replace(spec, managed=needed).command(bundle.directory)}",
        )
    return cache_state(config, spec.cache_dtype, policy, observed_tokens=OBSERVED_TOKENS, **options)
