"""Times the quantised matmuls of a model on the GPU here, by our plugin and by TensorRT itself.

For every kind of matmul two small engines are built, with the profiles of the model's own engine. Each holds the
matmul many times over, every time with another matrix, so that a run reads matrices from memory as a model's step
does, and not from a cache. A run is a CUDA graph, replayed; the two engines take turns, so that both meet the same
clocks.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.session import Cuda
from gta_edge.errors import BackendError, EngineError, GtaEdgeError
from gta_edge.graph.builder import Nodes, lazy_initializer
from gta_edge.graph.retype import ConvertPrecisionPass
from gta_edge.libraries.optional import optional
from gta_edge.model.kv_cache import PRESENT
from gta_edge.numerics.dtypes import integer_of
from gta_edge.plugins.domain import OPSET
from gta_edge.runtime.tensorrt.builder import Target, build_plan
from gta_edge.runtime.tensorrt.engine import IMPLEMENTATIONS, EngineSpec
from gta_edge.runtime.tensorrt.log import first_reason, new_log, started
from gta_edge.runtime.tensorrt.matmul_choice import PHASES, MatMulCall, Timing
from gta_edge.runtime.tensorrt.passes.lower_opset import LowerOpsetPass
from gta_edge.runtime.tensorrt.passes.pack_matmuls import PackMatMulsPass
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    ir, common = optional("onnx_ir", "tensorrt"), optional("onnx_ir.passes.common", "tensorrt")

__all__ = ["UnableError", "copies_of", "matmul_model", "time_matmuls"]

_CACHES = 3
"""A run reads as many times what the GPU's cache holds."""
_MIN_BYTES = 2**23  # so that a run takes much longer than the gap before it
_MAX_COPIES = 64
_ROUNDS = 7
_ROUND_SECONDS = 0.02
_OUTPUT = f"{PRESENT}y"  # what is called so stays in the compute type, as within a model


class UnableError(Exception):
    """One of the two cannot multiply here: ``who``, and why. Nothing is wrong then: the other does."""

    def __init__(self, who: str, why: GtaEdgeError) -> None:
        super().__init__(str(why))
        self.who = who


def time_matmuls(
    calls: Mapping[MatMulCall, int], spec: EngineSpec, target: Target, scratch: Path, progress: Progress = silent
) -> list[Timing]:
    """Return what each kind of matmul takes, for a token and for a chunk of a prompt.

    Args:
        calls: how often a step has each kind.
        spec: of the model's engine: its compute type and chunk size.
        target: TensorRT, and the GPU here.
        scratch: a directory with room for some hundred megabytes.
        progress: told of each kind that is timed.

    Raises:
        UnableError: TensorRT cannot build or run one of them with the plugin, or without.
        CapacityError: the GPU has no room for it.
    """
    timings: list[Timing] = []
    if not calls:
        return timings
    cuda = Cuda()
    cache_bytes = cuda.cache_bytes
    cuda.close()
    for done, (call, count) in enumerate(calls.items(), 1):
        copies = copies_of(call, cache_bytes)
        plans = {}
        for who in IMPLEMENTATIONS:
            try:
                plans[who] = _built(call, who, copies, spec, target, scratch)
            except EngineError as error:
                raise UnableError(who, error) from error
        measured = _timed(call, copies, plans, spec, target)
        timings += [Timing(call, count, phase, measured[phase]) for phase in PHASES]
        progress("timing matmuls", done, len(calls))
    return timings


def copies_of(call: MatMulCall, cache_bytes: int) -> int:
    """Return how many matrices a run takes so that none is in the GPU's cache when it is read."""
    matrix_bytes = call.in_features * sum(call.output_sizes) * call.bits // 8
    return max(1, min(_MAX_COPIES, -(-max(_MIN_BYTES, _CACHES * cache_bytes) // matrix_bytes)))


def matmul_model(call: MatMulCall, who: str, compute: str, copies: int, *, newer_ops: bool = True) -> ir.Model:
    """Return a model that has a matmul several times, each with an input and outputs of its own.

    Inputs are ``x.{copy}`` [B, T, K], outputs ``present_y.{copy}.{i}`` [B, T, output_sizes[i]]. It is made as a
    bundle's graph is, of random matrices, and goes through the same passes.

    Args:
        call: the matmul.
        who: ``plugin`` or ``native``.
        compute: ``fp16`` or ``bf16``.
        copies: how often.
        newer_ops: whether the parser knows operators of opset 24.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="matmuls")
    for copy in range(copies):
        _add_copy(graph, call, copy)
    model = ir.Model(graph, ir_version=11)
    passes: list[ir.passes.PassBase] = [PackMatMulsPass()] if who == "plugin" else []
    passes.append(ConvertPrecisionPass(compute))
    if not newer_ops:
        passes.append(LowerOpsetPass())
    ir.passes.Sequential(*passes, common.NameFixPass())(model)
    return model


def _add_copy(graph: ir.Graph, call: MatMulCall, copy: int) -> None:
    x = ir.Value(name=f"x.{copy}", shape=ir.Shape(["B", "T", call.in_features]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(x)
    nodes = Nodes()
    for i, outputs in enumerate(call.output_sizes):
        name, shape = f"w.{copy}.{i}", (call.in_features, outputs)
        scale_shape = (call.in_features // call.block_size, outputs) if call.block_size else (outputs,)
        scales = _stored(graph, f"{name}.scale", np.full(scale_shape, 0.01, np.float16))
        inputs = _codes(graph, name, shape, call.bits), nodes("Cast", scales, to=ir.DataType.FLOAT)
        if call.block_size:
            matrix = nodes("DequantizeLinear", *inputs, axis=0, block_size=call.block_size)
        else:
            matrix = nodes("DequantizeLinear", *inputs, axis=1)
        y = nodes("MatMul", x, matrix)
        if call.bias:
            y = nodes("Add", y, _stored(graph, f"{name}.bias", np.zeros(outputs, np.float32)))
        y.name, y.type = f"{_OUTPUT}.{copy}.{i}", ir.TensorType(ir.DataType.FLOAT)
        y.shape = ir.Shape(["B", "T", outputs])
        graph.outputs.append(y)
    graph.extend(nodes.made)


def _stored(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _codes(graph: ir.Graph, name: str, shape: tuple[int, int], bits: int) -> ir.Value:
    """Return random codes, which are made when they are written."""
    dtype = ir.DataType[integer_of(bits).onnx]

    def data() -> ir.TensorProtocol:
        seed = zlib.crc32(name.encode())
        content = np.random.default_rng(seed).integers(0, 256, -(-shape[0] * shape[1] * bits // 8), np.uint8)
        if bits == 4:
            return ir.PackedTensor(content, dtype, shape=ir.Shape(shape))
        return ir.tensor(content.view(np.int8).reshape(shape))

    return lazy_initializer(graph, name, dtype, shape, data)


# --- on the GPU ------------------------------------------------------------------------------------------------------


def _built(call: MatMulCall, who: str, copies: int, spec: EngineSpec, target: Target, scratch: Path) -> memoryview:
    model = matmul_model(call, who, spec.compute, copies, newer_ops=target.newer_ops)
    path = scratch / "matmuls.onnx"
    ir.save(model, path, external_data="matmuls.data")
    profiles = []
    for phase in PHASES:
        shape = (1, call.rows(phase, spec.chunk_size), call.in_features)
        profiles.append({f"x.{copy}": (shape, shape, shape) for copy in range(copies)})
    return build_plan(path, spec, profiles, target)


def _timed(
    call: MatMulCall, copies: int, plans: Mapping[str, memoryview], spec: EngineSpec, target: Target
) -> dict[str, dict[str, float]]:
    """Return microseconds of one matmul, by phase and by who multiplies."""
    cuda = Cuda()
    runs: dict[str, _Run] = {}
    try:
        for who, plan in plans.items():
            with _blamed(who):
                runs[who] = _Run(call, copies, plan, spec, target, cuda)
        found = {}
        for place, phase in enumerate(PHASES):
            steps: dict[str, Callable[[], None]] = {}
            for who, run in runs.items():
                with _blamed(who):
                    steps[who] = run.prepared(place, phase)
            rounds: dict[str, list[float]] = {who: [] for who in steps}
            for _ in range(_ROUNDS):
                for who, step in steps.items():
                    rounds[who].append(_repeated(cuda, step))
            found[phase] = {who: 1e6 * median(each) / copies for who, each in rounds.items()}
        return found
    finally:
        for run in runs.values():
            run.close()
        cuda.close()


@contextmanager
def _blamed(who: str) -> Iterator[None]:
    try:
        yield
    except BackendError as error:
        raise UnableError(who, error) from error


def _repeated(cuda: Cuda, step: Callable[[], None]) -> float:
    """Return the seconds of a step, of as many in a row as take long enough to be measured."""
    steps, seconds = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds >= _ROUND_SECONDS:
            return seconds / steps
        steps = max(2 * steps, int(1.2 * steps * _ROUND_SECONDS / max(seconds, 1e-6)))


class _Run:
    """An engine of matmuls; all inputs are one memory, and so are all outputs."""

    def __init__(
        self, call: MatMulCall, copies: int, plan: memoryview, spec: EngineSpec, target: Target, cuda: Cuda
    ) -> None:
        trt = target.trt.module
        self.call, self.copies, self.spec, self.cuda = call, copies, spec, cuda
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._log = new_log(trt)
        self._runtime = started(trt.Runtime, self._log, "runtime")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"TensorRT cannot load an engine that it has just built ({self._reason()})")
        rows = max(call.rows(phase, spec.chunk_size) for phase in PHASES)
        widest = max(call.output_sizes)
        self._x = cuda.allocate(2 * rows * call.in_features, "a matmul's input")
        self._y = cuda.allocate(2 * rows * widest, "a matmul's output")
        sizes = [int(self._engine.get_device_memory_size_for_profile_v2(i)) for i in range(len(PHASES))]
        self._scratch = cuda.allocate(max(*sizes, 1), "TensorRT's scratch memory"), max(*sizes, 1)
        self._contexts: list[Any] = []

    def prepared(self, profile: int, phase: str) -> Callable[[], None]:
        """Return what starts a run in one of the profiles: a graph, or TensorRT itself where it cannot be captured."""
        context = self._engine.create_execution_context(self._strategy)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise BackendError(f"TensorRT cannot prepare an engine of matmuls ({self._reason()})")
        context.set_device_memory(*self._scratch)
        self._contexts.append(context)
        shape = (1, self.call.rows(phase, self.spec.chunk_size), self.call.in_features)
        for copy in range(self.copies):
            context.set_input_shape(f"x.{copy}", shape)
            context.set_tensor_address(f"x.{copy}", self._x)
            for i in range(len(self.call.output_sizes)):
                context.set_tensor_address(f"{_OUTPUT}.{copy}.{i}", self._y)
        self._enqueue(context)  # TensorRT wants one run before it is captured
        self.cuda.synchronize()
        try:
            with self.cuda.capture() as made:
                self._enqueue(context)
        except BackendError:
            self._log.errors.clear()
            return lambda: self._enqueue(context)
        return lambda: self.cuda.replay(made[0])

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self.cuda.stream):
            raise BackendError(
                f"TensorRT could not run an engine of matmuls ({self._reason()})", "run `gta-edge doctor`"
            )

    def _reason(self) -> str:
        return first_reason(self._log.errors)

    def close(self) -> None:
        """Free the engine, before the memory that it uses."""
        self._contexts, self._engine, self._runtime = [], None, None
