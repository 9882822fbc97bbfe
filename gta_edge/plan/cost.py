"""What a model costs: bytes that it is stored in, and bytes and FLOPs of every operator of one step.

Figures follow from sizes alone; nothing here measures or knows a machine. They are what ``planning.py`` turns into
memory and time. A multiply-add is 2 FLOPs. What is left out: FLOPs of norms, softmax, gates and activations, below one
percent of the matmuls'.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from gta_edge.formats.weights import EMBEDDING, HEAD, Storage, stored_dtype
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import bytes_per_token, cache_bytes, step_bytes
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.numerics.quantization import BITS

__all__ = [
    "PARTS",
    "CacheRows",
    "Execution",
    "Operator",
    "Step",
    "cpu_blocks",
    "matrices",
    "operators",
    "read_bytes",
    "scale_bytes",
    "stored_bytes",
    "stored_parts",
    "table_bytes",
    "words_bytes",
]

PARTS = ("embedding", "attention", "mlp", "norms", "head", "tables")
"""Of a model's weights; tables are those of cos and sin."""
_PARTS_BY_WORD = {".self_attn.": "attention", ".mlp.": "mlp"}

_SCALE_BYTES = 2  # float16, as stored
_FLOAT_BYTES = _RECEIVED_BYTES = 4
_INLINE_BYTES = 1024  # tensors up to this lie in the graph's own file
_CPU_BLOCK_BYTES = 8  # ONNX Runtime's kernel keeps a float32 scale and a float32 sum for every block
# Set so that times agree with those measured (docs/plan.md): what unpacking a code costs, at the matmuls' rate, and
# that the cache is read at half of the bandwidth, maybe because float32 matmuls pack what they multiply by.
_CPU_UNPACK_FLOPS = 4
_CPU_CACHE_READS = 2
_CPU_CHANNEL_BLOCK = 256  # how many weights share a scale there where the bundle has one for a whole channel


@dataclass(frozen=True)
class CacheRows:
    """The rows of a cache that a policy keeps small; tokens beyond them are evicted.

    Attributes:
        budgets: that stay, of each layer.
        capacities: that there is memory for, of each layer, from the start.
        interval: tokens between evictions while single ones come.
        observes: whether what each row receives of attention is held too, a float32 number.
    """

    budgets: tuple[int, ...]
    capacities: tuple[int, ...]
    interval: int
    observes: bool

    def in_use(self, past: int, tokens: int) -> list[int]:
        """Return the rows of each layer before a step of ``tokens``, when ``past`` were seen: a mean in decoding."""
        more = self.interval // 2 if tokens == 1 else 0
        return [min(past, budget + more) for budget in self.budgets]


@dataclass(frozen=True)
class Execution:
    """How weights lie in memory and what is computed in.

    Attributes:
        compute: ``fp32``, ``fp16`` or ``bf16``.
        cache_dtype: how the cache is stored, one of ``CACHES``.
        chunk_size: most tokens of a prompt in one step.
        logit_positions: for how many positions of a step there is room for logits.
        logits_bytes: room that is filled with those of more positions, as far as it goes.
        writes_scores: whether attention scores go through memory; a fused kernel keeps them on the chip.
        cpu_kernels: whether ONNX Runtime's CPU kernels run it, which hold quantised weights in a form of their own.
        rows: of a cache that a policy keeps small; None where every token stays.
    """

    compute: str
    cache_dtype: str
    chunk_size: int
    logit_positions: int = 1
    logits_bytes: int = 0
    writes_scores: bool = False
    cpu_kernels: bool = False
    rows: CacheRows | None = None

    def past_rows(self, past: int, tokens: int, layers: int) -> int:
        """Return the rows of all layers before a step of ``tokens``, when ``past`` have been seen."""
        return layers * past if self.rows is None else sum(self.rows.in_use(past, tokens))

    def held_bytes(self, config: ModelConfig, tokens: int, batch: int) -> int:
        """Return the bytes of a cache for so many tokens in each of ``batch`` rows."""
        if self.rows is None:
            return cache_bytes(config, self.cache_dtype, tokens, batch, compute=self.compute)
        width = bytes_per_token(config, self.cache_dtype) // config.num_hidden_layers
        return batch * sum(self.rows.capacities) * (width + _RECEIVED_BYTES * self.rows.observes)

    def longest(self, tokens: int) -> int:
        """Return the rows of the longest layer's cache when so many tokens have been seen."""
        return tokens if self.rows is None else min(tokens, max(self.rows.capacities))


@dataclass(frozen=True)
class Step:
    """One run of the model: ``tokens`` new ones in each of ``batch`` rows, after ``past`` that are in the cache.

    ``logits`` positions of each row go through the head.
    """

    batch: int
    tokens: int
    past: int
    logits: int = 1


@dataclass(frozen=True)
class Operator:
    """What one kind of operator costs in one step, over all layers.

    Attributes:
        name: as in a checkpoint for matmuls; else ``embedding``, ``attention``, ``elementwise``.
        flops: of matmuls and attention.
        weight_bytes: read, each weight once.
        cache_bytes: read and written.
        activation_bytes: read and written.
    """

    name: str
    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All that goes through memory."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


# --- what is stored --------------------------------------------------------------------------------------------------


def matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters of rank 2 by name; a tied head is the embedding and has no entry."""
    return {name: shape for name, shape in config.parameter_shapes().items() if len(shape) == 2}


def table_bytes(config: ModelConfig, value_bytes: int = _FLOAT_BYTES) -> int:
    """Return the bytes of all cos and sin tables ``[P, d_k/2]``: a pair, and one for layers without RoPE."""
    return _table_pairs(config) * value_bytes * config.max_position_embeddings * config.key_width


def _table_pairs(config: ModelConfig) -> int:
    return 2 if config.unrotated_layers else 1


def stored_bytes(config: ModelConfig, storage: Storage, names: Collection[str] | None = None) -> int:
    """Return the bytes of a bundle's file of weights, ``model.onnx.data``; see ``stored_parts``."""
    return sum(stored_parts(config, storage, names).values())


def stored_parts(config: ModelConfig, storage: Storage, names: Collection[str] | None = None) -> dict[str, int]:
    """Return the bytes of a bundle's file of weights by part of the model: ``PARTS``.

    That is every matrix in its precision, or in codes and float16 scales (quantised: the value decoder stays float16,
    and an int4 embedding lies in words beside the codes of a tied head, sharing the scales), norms and biases in
    float32, and the tables of cos and sin. Tensors of up to 1 KiB lie in the graph's file and are not counted.

    Args:
        config: the model's sizes.
        storage: how its matrices are stored.
        names: parameters that there are; all by default. A checkpoint may lack biases.
    """
    parts = dict.fromkeys(PARTS, 0)

    def add(part: str, *sizes: int) -> None:
        parts[part] += sum(size for size in sizes if size > _INLINE_BYTES)

    tables = 2 * _table_pairs(config)
    add("tables", *[table_bytes(config) // tables] * tables)
    shapes = config.parameter_shapes()
    for name in shapes if names is None else names:
        shape = shapes[name]
        values = math.prod(shape)
        precision, block_size = storage.of(name)
        if precision not in BITS or len(shape) == 1:
            add(_part(name), values * stored_dtype(len(shape), precision).itemsize)
            continue
        codes, scales = values * BITS[precision] // 8, scale_bytes(shape, block_size)
        add(_part(name), codes, scales)
        if name == EMBEDDING and config.tie_word_embeddings and precision == "int4":
            add("head", codes)  # which lie the other way; in int8 the rows are looked up there
    return parts


def words_bytes(config: ModelConfig, storage: Storage) -> int:
    """Return what a lowered graph holds beside a bundle's weights: a tied int8 table in words, to look rows up in."""
    precision, _ = storage.of(EMBEDDING)
    return config.vocab_size * config.hidden_size if config.tie_word_embeddings and precision == "int8" else 0


def _part(parameter: str) -> str:
    if parameter in (EMBEDDING, HEAD):
        return "embedding" if parameter == EMBEDDING else "head"
    return next((part for word, part in _PARTS_BY_WORD.items() if word in parameter), "norms")


def scale_bytes(shape: tuple[int, ...], block_size: int | None) -> int:
    """Return the bytes of the float16 scales of a quantised matrix ``[out, in]``."""
    return _SCALE_BYTES * shape[0] * (shape[1] // block_size if block_size else 1)


# --- what a step moves and computes ----------------------------------------------------------------------------------


def read_bytes(shape: tuple[int, ...], precision: str, block_size: int | None, execution: Execution) -> int:
    """Return the bytes that one matmul with a matrix ``[out, in]`` reads of it.

    On a CPU floats are float32 by then, and codes lie with a float32 scale and sum for each block (ONNX Runtime's
    ``MatMulNBits``). On a GPU floats are in the compute type, and codes lie as stored.
    """
    values = math.prod(shape)
    if precision not in BITS:
        return values * DTYPES[execution.compute].bytes
    codes = values * BITS[precision] // 8
    if execution.cpu_kernels:
        return codes + cpu_blocks(shape, block_size) * _CPU_BLOCK_BYTES
    return codes + scale_bytes(shape, block_size)


def cpu_blocks(shape: tuple[int, ...], block_size: int | None) -> int:
    """Return in how many blocks, each with a float32 scale, ONNX Runtime holds a quantised matrix ``[out, in]``."""
    return shape[0] * -(-shape[1] // (block_size or min(_CPU_CHANNEL_BLOCK, shape[1])))


def operators(config: ModelConfig, storage: Storage, execution: Execution, step: Step) -> tuple[Operator, ...]:
    """Return what a step costs, by operator, in the order of the forward pass.

    Attention of one layer is ``attention_flops_per_pair`` (config.py; arXiv 2506.17286) for every pair of a query and
    a token that it sees, the new one included. The cache is read once per step, as a fused kernel does, and the new
    tokens are written. A weight is read once per step. ONNX Runtime's CPU kernels cost more: they read the cache
    twice, write scores, and unpack codes.
    """
    rows, layers, width = step.batch * step.tokens, config.num_hidden_layers, DTYPES[execution.compute].bytes
    found = [Operator("embedding", weight_bytes=_row_bytes(config, storage, execution, rows))]
    shapes = _layer_shapes(config)
    last = [name for name in shapes if name.startswith(("self_attn.v_b_proj", "self_attn.o_proj", "mlp."))]
    first = [name for name in shapes if name not in last]

    def matmuls(name: str, parameters: Collection[str], shape: tuple[int, ...], tokens: int) -> Operator:
        """Return the matmuls with matrices of one shape as one operator."""
        values, formats = math.prod(shape), [storage.of(parameter) for parameter in parameters]
        unpacked = sum(precision in BITS for precision, _ in formats) if execution.cpu_kernels else 0
        return Operator(
            name,
            flops=2 * tokens * values * len(parameters) + _CPU_UNPACK_FLOPS * values * unpacked,
            weight_bytes=sum(read_bytes(shape, *each, execution) for each in formats),
            activation_bytes=len(parameters) * tokens * width * sum(shape),
        )

    def of_layers(name: str) -> Operator:
        parameters = [f"model.layers.{i}.{name}" for i in range(layers)]
        title = name.removeprefix("self_attn.").removesuffix(".weight")
        return matmuls(title, parameters, shapes[name], rows)

    found += map(of_layers, first)
    found.append(_attention(config, execution, step))
    found += map(of_layers, last)
    found.append(_elementwise(config, rows, width))
    head = [EMBEDDING if config.tie_word_embeddings else HEAD] if step.logits else []
    found.append(matmuls("lm_head", head, (config.vocab_size, config.hidden_size), step.batch * step.logits))
    return tuple(found)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    prefix = "model.layers.0."
    return {name.removeprefix(prefix): shape for name, shape in matrices(config).items() if name.startswith(prefix)}


def _row_bytes(config: ModelConfig, storage: Storage, execution: Execution, rows: int) -> int:
    """Return the bytes of the embedding table's rows that are looked up."""
    values = rows * config.hidden_size
    precision, block_size = storage.of(EMBEDDING)
    if precision in BITS:
        return values * BITS[precision] // 8 + rows * scale_bytes((1, config.hidden_size), block_size)
    if execution.cpu_kernels:
        return values * DTYPES[precision].bytes
    return values * DTYPES[execution.compute].bytes


def _attention(config: ModelConfig, execution: Execution, step: Step) -> Operator:
    queries, layers = step.batch * step.tokens, config.num_hidden_layers
    past = execution.past_rows(step.past, step.tokens, layers)  # of all layers
    pairs = step.batch * (step.tokens * past + layers * (step.tokens * (step.tokens + 1) // 2))
    heads, mixed = config.attention.num_query_heads, config.attention.latent_dim
    activations = DTYPES[execution.compute].bytes * queries * heads * (config.key_width + mixed)
    if execution.writes_scores:  # written and read by the matmul, the mask, the softmax, and read by the mix
        scores = step.batch * heads * step.tokens * (past // layers + step.tokens)
        activations += _SCORE_PASSES * DTYPES[execution.compute].bytes * scores
    reads = _CPU_CACHE_READS if execution.cpu_kernels else 1
    seen = past + layers * step.tokens
    moved = reads * seen + layers * step.tokens
    cache = step_bytes(config, execution.cache_dtype, moved, step.batch, compute=execution.compute)
    if execution.rows is not None and execution.rows.observes:  # read and written
        cache += 2 * _RECEIVED_BYTES * step.batch * seen
    return Operator(
        "attention",
        flops=config.attention_flops_per_pair * pairs,
        cache_bytes=cache,
        activation_bytes=layers * activations,
    )


_SCORE_PASSES = 6


def _elementwise(config: ModelConfig, rows: int, width: int) -> Operator:
    """Norms, residual sums, the activation of the MLP and the gate: what they read and write."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate = 3 * config.attention.hidden_size if config.attention.has_gate else 0  # gate and values in, matmul out
    per_row = config.num_hidden_layers * (2 * 5 * hidden + 3 * inner + gate) + 2 * hidden
    return Operator("elementwise", activation_bytes=rows * per_row * width)
