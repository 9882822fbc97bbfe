"""Does a model fit a device, and what speed does the device allow: memory, and time from a roofline.

The roofline: an operator takes the longer of its bytes over the bandwidth and its FLOPs over the rate, both times the
device's efficiency; a step takes the sum of its operators. It says what well-made kernels could reach, not what any
engine does. Memory is what one process holds at its peak while it reads a prompt of the whole context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

from gta_edge.errors import InputError
from gta_edge.formats.weights import EMBEDDING, Storage, storage_for
from gta_edge.machine.devices import Device
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import CACHES, COMPUTE_TYPES, DTYPES
from gta_edge.numerics.quantization import BITS
from gta_edge.plan import cost
from gta_edge.plan.cost import Execution, Operator, Step

__all__ = [
    "DEFAULT_CONTEXT",
    "LARGEST_BATCH",
    "Memory",
    "Model",
    "Phase",
    "Plan",
    "Timed",
    "activation_bytes",
    "make_plan",
]

DEFAULT_CONTEXT = 4096
LARGEST_BATCH = 256
"""Rows that are tried at most: no engine is built for more."""

_FLOAT_BYTES = 4
_FAULT_BYTES = 65536  # Linux maps 16 pages around the one that is touched
_SCALE_COPY_BYTES = 4  # ONNX Runtime keeps the float32 scales mapped beside those it packed
# Memory that the runtime's arena takes for attention scores is this much of what is alive at once: pieces that
# shorter chunks left do not fit longer ones. Measured: docs/plan.md.
_ARENA_FACTOR = 1.5
_NODES_PER_LAYER = 36  # of the graph that ONNX Runtime runs: 27 (GQA in int4) to 44 (GTA in bf16, with its Casts)


@dataclass(frozen=True)
class Model:
    """What is planned for.

    Attributes:
        name: for people.
        config: sizes.
        storage: how the matrices are stored.
        weight_bytes: of the bundle's weights, as there or as an export would write them.
    """

    name: str
    config: ModelConfig
    storage: Storage
    weight_bytes: int

    @property
    def precision(self) -> str:
        """What the weights are stored in."""
        return self.storage.precision

    @property
    def block_size(self) -> int | None:
        """Weights that share a scale; None for whole channels or nothing quantised."""
        return self.storage.block_size

    @classmethod
    def of(
        cls,
        name: str,
        config: ModelConfig,
        precision: str,
        block_size: int | None = None,
        names: Collection[str] | None = None,
    ) -> Model:
        """Return the model that an export with this precision would write.

        Raises:
            InputError: the precision is unknown, or the block size does not fit.
        """
        storage = storage_for(config, precision, block_size)
        return cls(name, config, storage, cost.stored_bytes(config, storage, names))


@dataclass(frozen=True)
class Memory:
    """What a process holds at its peak, in bytes.

    Attributes:
        weights: in the form in which they are multiplied by, with tables.
        cache: of all rows at the full context.
        activations: of one step: what its operators hand on, attention scores where they are written, logits.
        runtime: libraries, a CUDA context.
        loading: what the weights take beside it while they are laid out; gone before the cache comes.
    """

    weights: int
    cache: int
    activations: int
    runtime: int
    loading: int = 0

    @property
    def peak(self) -> int:
        """The larger of loading and running."""
        return self.runtime + self.weights + max(self.loading, self.cache + self.activations)


@dataclass(frozen=True)
class Timed:
    """An operator with the time that the device allows.

    Attributes:
        operator: what it costs.
        bandwidth_s: seconds for its bytes.
        compute_s: seconds for its FLOPs.
    """

    operator: Operator
    bandwidth_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.bandwidth_s, self.compute_s)

    @property
    def bound(self) -> str:
        """``bandwidth`` or ``compute``."""
        return "compute" if self.compute_s > self.bandwidth_s else "bandwidth"


@dataclass(frozen=True)
class Phase:
    """Reading a prompt, or one new token: every operator's cost, and the sum.

    ``overhead_s`` is what operators take whatever they do.
    """

    operators: tuple[Timed, ...]
    overhead_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.overhead_s + sum(timed.seconds for timed in self.operators)

    @property
    def bound(self) -> str:
        """What most of the time goes to: ``bandwidth``, ``compute`` or ``overhead``."""
        shares = {"bandwidth": 0.0, "compute": 0.0, "overhead": self.overhead_s}
        for timed in self.operators:
            shares[timed.bound] += timed.seconds
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Plan:
    """A model on a device, at one context and batch. Figures that take a search are found when they are asked for.

    Attributes:
        context: tokens of each text, its prompt among them.
        batch: texts at once, each with a prompt of its own.
        prompt: tokens of the prompt.
        answers: to each prompt, which is held once for all of them.
    """

    model: Model
    device: Device
    execution: Execution
    context: int
    batch: int
    prompt: int
    answers: int = 1

    def held(self, context: int) -> int:
        """Return the tokens in the cache for each prompt, with answers up to a context: the prompt's once."""
        shared = min(self.prompt, context) if self.answers > 1 else 0
        return shared + self.answers * (context - shared)

    @cached_property
    def memory(self) -> Memory:
        """What the process holds at its peak."""
        return self.memory_at(self.context, self.batch)

    @property
    def fits(self) -> bool:
        """Whether the device has room for it beside its system."""
        return self.memory.peak <= self.device.available_bytes

    @property
    def left_bytes(self) -> int:
        """What the system has left beyond its own share; negative where it does not fit."""
        return self.device.available_bytes - self.memory.peak

    @cached_property
    def max_context(self) -> int:
        """The longest context that fits with this batch, at most the model's positions; 0 where none does."""
        return largest(self.model.config.max_position_embeddings, lambda n: self._fits(n, self.batch))

    @cached_property
    def max_batch(self) -> int:
        """The largest batch that fits at this context, at most ``LARGEST_BATCH``; 0 where none does."""
        return largest(LARGEST_BATCH, lambda rows: self._fits(self.context, rows))

    @cached_property
    def decode(self) -> Phase:
        """One new token in every answer, the last that the context holds."""
        return self._timed([Step(self.batch, self.answers, self.held(self.context) - self.answers, self.answers)])

    @cached_property
    def prefill(self) -> Phase:
        """A prompt of ``prompt`` tokens in every row, in chunks; only its last position gets logits."""
        size = self.execution.chunk_size
        starts = range(0, self.prompt, size)
        ends = [min(start + size, self.prompt) for start in starts]
        return self._timed(
            [Step(self.batch, e - s, s, 1 if e == self.prompt else 0) for s, e in zip(starts, ends, strict=True)]
        )

    def memory_at(self, context: int, batch: int) -> Memory:
        """Return what the process holds at its peak at another context and batch."""
        tokens = min(self.execution.chunk_size, context)
        weights, loading = _weights(self.model, self.execution, context * batch)
        return Memory(
            weights=weights,
            cache=self.execution.held_bytes(self.model.config, self.held(context), batch),
            activations=activation_bytes(
                self.model.config, self.execution, batch, tokens, self.execution.longest(self.held(context))
            ),
            runtime=self.device.runtime_bytes,
            loading=loading,
        )

    def at(self, context: int) -> Plan:
        """Return the same at another context, its prompt as long."""
        return replace(self, context=context, prompt=context)

    def _fits(self, context: int, batch: int) -> bool:
        return self.memory_at(context, batch).peak <= self.device.available_bytes

    def _timed(self, steps: list[Step]) -> Phase:
        device, execution = self.device, self.execution
        bandwidth = device.bandwidth * device.efficiency
        rate = device.rates["fp32" if execution.compute == "fp32" else "fp16"] * device.efficiency
        totals: dict[str, Timed] = {}
        for step in steps:
            for op in cost.operators(self.model.config, self.model.storage, execution, step):
                timed = Timed(op, op.bytes / bandwidth, op.flops / rate)
                totals[op.name] = _sum(totals[op.name], timed) if op.name in totals else timed
        overhead = len(steps) * device.operator_s * _NODES_PER_LAYER * self.model.config.num_hidden_layers
        return Phase(tuple(totals.values()), overhead)


def make_plan(
    model: Model,
    device: Device,
    execution: Execution,
    *,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    answers: int = 1,
) -> Plan:
    """Return a plan; the context is ``DEFAULT_CONTEXT`` or the model's positions by default, the prompt as long.

    Raises:
        InputError: a context beyond the model's positions, a prompt longer than the context, or a number below 1;
            several answers behind a prompt that leaves no room for them, or with a cache that drops rows, or is in
            blocks.
    """
    positions = model.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, positions) if context is None else context
    prompt = context if prompt is None else prompt
    if not 1 <= context <= positions:
        raise InputError(f"--context is {context}", f"{model.name} has positions for 1 to {positions}")
    if not 1 <= prompt <= context:
        raise InputError(f"--prompt is {prompt}", f"expected 1 to the context, {context}")
    if not 1 <= batch <= LARGEST_BATCH:
        raise InputError(f"--batch is {batch}", f"expected 1 to {LARGEST_BATCH}")
    if not 1 <= answers <= LARGEST_BATCH:
        raise InputError(f"--n is {answers}", f"expected 1 to {LARGEST_BATCH}")
    if answers > 1 and prompt + 1 > context:
        raise InputError(
            f"--n is {answers} with a prompt as long as the context, {context}",
            "give --prompt: what is left of the context are the tokens of each answer",
        )
    if answers > 1 and execution.rows is not None:
        raise InputError(
            "several answers are branches of a cache that drops no rows", "leave --cache-policy or --n out"
        )
    if answers > 1 and CACHES[execution.cache_dtype].in_blocks:
        raise InputError(
            f"several answers are branches, and a cache of {execution.cache_dtype} has none",
            "take another --cache-dtype, or leave --n out",
        )
    return Plan(model, device, execution, context, batch, prompt, answers)


def _sum(a: Timed, b: Timed) -> Timed:
    """Return two steps of one operator as one; what bounds it is what bounds most of its time."""
    x, y = a.operator, b.operator
    both = Operator(
        x.name,
        x.flops + y.flops,
        x.weight_bytes + y.weight_bytes,
        x.cache_bytes + y.cache_bytes,
        x.activation_bytes + y.activation_bytes,
    )
    return Timed(both, a.bandwidth_s + b.bandwidth_s, a.compute_s + b.compute_s)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to ``limit`` that fits, 0 if none does; above one that does not, none may."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- memory ----------------------------------------------------------------------------------------------------------


def _weights(model: Model, execution: Execution, tokens: int) -> tuple[int, int]:
    """Return what the weights take in memory, and what they take beside that while they are loaded."""
    config = model.config
    vectors = sum(math.prod(shape) for shape in config.parameter_shapes().values() if len(shape) == 1)
    if execution.cpu_kernels:
        held, loading = _on_cpu(model, execution, tokens)
        return held + _FLOAT_BYTES * vectors + cost.table_bytes(config), loading
    value_bytes = DTYPES[execution.compute].bytes
    held = value_bytes * vectors + cost.table_bytes(config, value_bytes)
    for name, shape in cost.matrices(config).items():
        held += cost.read_bytes(shape, *model.storage.of(name), execution)
    precision, _ = model.storage.of(EMBEDDING)
    if precision in BITS and config.tie_word_embeddings:  # the head's codes lie the other way
        held += math.prod(cost.matrices(config)[EMBEDDING]) * BITS[precision] // 8
    return held, 0


def _on_cpu(model: Model, execution: Execution, tokens: int) -> tuple[int, int]:
    """Return what the matrices take under ONNX Runtime, and what beside it while they are loaded.

    The file of weights is mapped. Matmuls have a packed copy of their own, and what was mapped for it is let go, but
    for the embedding, of which what is looked up stays: whole blocks of pages. Floats of 16 bits become float32 one
    matrix at a time.
    """
    config, shapes = model.config, cost.matrices(model.config)
    matmuls = {name: shape for name, shape in shapes.items() if name != EMBEDDING or config.tie_word_embeddings}
    held = 0
    for name, shape in matmuls.items():
        precision, block_size = model.storage.of(name)
        held += cost.read_bytes(shape, precision, block_size, execution)
        if precision in BITS:
            held += _SCALE_COPY_BYTES * cost.cpu_blocks(shape, block_size)
    table = math.prod(shapes[EMBEDDING])
    precision, block_size = model.storage.of(EMBEDDING)
    if precision in BITS:
        stored = table * BITS[precision] // 8
        held += cost.scale_bytes(shapes[EMBEDDING], block_size)
    else:
        stored = table * DTYPES[precision].bytes
    packed_from_table = model.precision == "fp32" and config.tie_word_embeddings  # read as a whole, and kept
    held += stored if packed_from_table else min(stored, tokens * _FAULT_BYTES)
    widest = max(math.prod(shape) for shape in matmuls.values())
    return held, _FLOAT_BYTES * widest if model.precision in COMPUTE_TYPES else 0


def activation_bytes(config: ModelConfig, execution: Execution, batch: int, tokens: int, context: int) -> int:
    """Return what one step of ``tokens`` takes beside weights and cache, its last token at the end of the context."""
    value_bytes = DTYPES[execution.compute].bytes
    attention = sum(shape[0] for name, shape in config.attention_shapes().items() if len(shape) == 2)
    per_token = 4 * config.hidden_size + 2 * attention + 3 * config.intermediate_size
    position = _FLOAT_BYTES * batch * config.vocab_size
    logits = max(position * min(tokens, execution.logit_positions), min(position * tokens, execution.logits_bytes))
    size = value_bytes * batch * tokens * per_token + 2 * logits
    if execution.writes_scores:
        # scores, masked, weights, and the mask laid out for every query head
        maps = 4 * config.attention.num_query_heads + 1
        size += int(_ARENA_FACTOR * value_bytes * maps * batch * tokens * context)
    return size
