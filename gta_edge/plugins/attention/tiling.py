"""Tile sizes, splits and grids of the attention kernels, for a model and a GPU: the one place that knows them.

A kernel is compiled for one ``Variant`` (a model's sizes, the compute type, the cache's type) on one kind of GPU; what
is chosen here reaches the source as macros (``Program.defines``), and the source asserts at compile time that it needs
exactly the shared memory that is computed here. Nothing here needs CUDA, so that plans can be made anywhere.

Two ways to run the op, by the number of new tokens T:

* decode, T up to ``DECODE_TOKENS``: the rows (query head, token) of a group of heads that share cached heads are
  multiplied together with each slice of the cache, which is read once; the cache's length is divided among
  ``decode_splits`` blocks, which a second kernel combines. Trees run so too, up to ``MAX_BRANCH_TOKENS`` queries.
* prefill, above: a block takes one query head and a tile of tokens and walks over the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import gcd

from gta_edge.cuda.architecture import BLOCK_RESERVE, WARP, Launch, pitch, resident_blocks, shared_limits
from gta_edge.errors import BackendError
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import (
    BLOCK_CACHE_TYPES,
    CACHES,
    COMPUTE_TYPES,
    DTYPES,
    QUANTIZED_CACHE_TYPES,
    ROW_CACHE_TYPES,
)
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS, NO_FEATURES, Features, Sizes

__all__ = [
    "BLOCK_TOKENS",
    "DECODE_TOKENS",
    "Program",
    "Variant",
    "append_grid",
    "append_open_grid",
    "combine_grid",
    "decode_grid",
    "decode_program",
    "decode_programs",
    "decode_splits",
    "has_kernels",
    "prefill_grid",
    "prefill_program",
    "prefill_programs",
    "row_blocks",
    "with_appending",
    "with_observers",
    "workspace_parts",
]

DECODE_TOKENS = 16
"""Most new tokens per sequence for which the cache is split among blocks, where they are no tree."""

MAX_ROW_TILES = 8
"""Tiles of 16 query rows of a block, a warp each."""

ROWS = 16
"""Rows of one tensor core matmul, and tokens of the slice of the cache that it meets."""

MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS = 256, 2048
"""Tokens of a split: fewer make the combining kernel's work grow, more let one long sequence of a batch end last."""

BLOCK_TOKENS = BLOCK
"""Rows that a cache in blocks quantises together, and that its open block has room for."""

UNIT_BITS = 128
"""Bits of 16 bytes of codes: a channel's keys in a block, or 32 (64) values of a row."""

RECENT_ROWS = BLOCK_TOKENS + DECODE_TOKENS
"""Rows that the decode kernel of a cache in blocks has place for in 16 bits."""

COMBINE_THREADS = 256
APPEND_WARPS = 4
"""Cache rows that one block of the appending kernel writes, a warp each."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Args:
        sizes: the model's.
        compute: type of activations, value decoder and tables: ``fp16`` or ``bf16``.
        cache: how the cache is stored: in the compute type, in ``int8`` or ``fp8`` (e4m3), or in blocks: ``int4``,
            ``int4v2``.
        features: which inputs of a managed cache there are. Without any, the kernels have no trace of them.

    Raises:
        BackendError: the kernels cannot do this; the message lists what they can.
    """

    sizes: Sizes
    compute: str
    cache: str
    features: Features = NO_FEATURES

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_TYPES:
            raise BackendError(f"the kernels compute in {' or '.join(COMPUTE_TYPES)}, not in {self.compute}")
        allowed = (self.compute, *QUANTIZED_CACHE_TYPES)
        if self.cache not in allowed:
            raise BackendError(
                f"a cache of type {self.cache} does not go with {self.compute}", f"expected one of {', '.join(allowed)}"
            )
        for name, width, most in (("key", self.sizes.key_dim, 128), ("latent", self.sizes.latent_dim, 256)):
            if width % 16 or width > most:
                raise BackendError(
                    f"the kernels have no {name} width of {width}", f"expected a multiple of 16 from 16 to {most}"
                )
        if self.in_blocks:
            self._check_blocks()

    def _check_blocks(self) -> None:
        """Raise BackendError where a cache in blocks is not possible."""
        width, multiple = self.sizes.latent_dim, UNIT_BITS // self.value_bits
        if width % multiple:
            raise BackendError(
                f"a cache of type {self.cache} has no latent width of {width}", f"expected a multiple of {multiple}"
            )
        if self.features != NO_FEATURES:
            raise BackendError(
                f"a cache of type {self.cache} takes no {', '.join(self.features.inputs)}: its rows cannot be managed",
                f"choose one of {', '.join((self.compute, *ROW_CACHE_TYPES))}",
            )

    @property
    def quantised(self) -> bool:
        """Whether the cache has scales."""
        return self.cache != self.compute

    @property
    def in_blocks(self) -> bool:
        """Whether the cache is quantised in blocks of ``BLOCK_TOKENS`` rows, the open one beside them."""
        return self.cache in BLOCK_CACHE_TYPES

    @property
    def value_bits(self) -> int:
        """Bits of a cached value or latent."""
        return CACHES[self.cache].value_bits

    @property
    def cache_itemsize(self) -> int:
        """Bytes of one cached value as tiles of rows have it: of a cache in blocks, of its open rows."""
        return DTYPES[self.compute if self.in_blocks else self.cache].bytes

    @property
    def row_scales(self) -> bool:
        """Whether each cached row has a scale."""
        return self.quantised and not self.in_blocks

    @property
    def expansion(self) -> int:
        """e: width of a query head's output over the latent width."""
        return self.sizes.hidden_size // (self.sizes.num_query_heads * self.sizes.latent_dim)

    @property
    def decode_tokens(self) -> int:
        """Most new tokens that the decode kernels take, which are those that observe attention."""
        return MAX_BRANCH_TOKENS if self.features.has_branches else DECODE_TOKENS

    def defines(self) -> dict[str, int]:
        """Return the macros that specialise the source to this variant."""
        return {
            "GTA_QUERY_HEADS": self.sizes.num_query_heads,
            "GTA_KEY_HEADS": self.sizes.num_key_heads,
            "GTA_LATENT_HEADS": self.sizes.num_latent_heads,
            "GTA_KEY_DIM": self.sizes.key_dim,
            "GTA_LATENT_DIM": self.sizes.latent_dim,
            "GTA_EXPANSION": self.expansion,
            "GTA_HAS_GATE": int(self.sizes.has_gate),
            "GTA_HAS_VALUE_DECODER": int(self.sizes.has_value_decoder),
            "GTA_COMPUTE_BF16": int(self.compute == "bf16"),
            "GTA_CACHE_INT8": int(self.cache == "int8"),
            "GTA_CACHE_FP8": int(self.cache == "fp8"),
            "GTA_CACHE_VALUE_BITS": self.value_bits if self.in_blocks else 0,
            "GTA_HAS_POSITIONS": int(self.features.has_positions),
            "GTA_BIAS_ROWS": self.features.bias_rows,
            "GTA_HAS_BRANCHES": int(self.features.has_branches),
            "GTA_OBSERVE": (None, "mass", "last").index(self.features.observe),
        }


def has_kernels(sizes: Sizes, compute: str, cache: str | None = None) -> bool:
    """Tell whether there are kernels for a model that computes in a type and has its cache in it, or as it is said."""
    try:
        Variant(sizes, compute, cache or compute)
    except BackendError:
        return False
    return True


@dataclass(frozen=True)
class Program:
    """One source file cut to a variant and a GPU."""

    source: str
    """File name in ``kernels/``."""
    kernels: tuple[str, ...]
    tiles: tuple[tuple[str, int], ...]
    threads: int
    """Per block of the main kernel."""
    shared_bytes: int
    """Dynamic shared memory of the main kernel, ``kernels[0]``; the others need less than any limit."""
    resident_blocks: int
    """Blocks of the main kernel that a multiprocessor has shared memory for."""
    variant: Variant

    def defines(self) -> dict[str, int]:
        """Return all macros of the source."""
        return self.variant.defines() | dict(self.tiles)

    def tile(self, name: str) -> int:
        """Return one of ``tiles``."""
        return dict(self.tiles)[name]


# --- decode ----------------------------------------------------------------------------------------------------------


def decode_programs(variant: Variant, architecture: str) -> tuple[Program, ...]:
    """Return the decode programs of a variant, the narrowest tile first.

    A managed cache has a second one of 8 tiles of 16 query rows, so that the last tokens of a prompt, which observe,
    and the tokens of a tree read the cache as few times as can be.
    """
    narrow = decode_program(variant, architecture)
    if variant.features == NO_FEATURES or narrow.tile("GTA_DECODE_WARPS_M") == MAX_ROW_TILES:
        return (narrow,)
    return narrow, decode_program(variant, architecture, MAX_ROW_TILES)


def decode_program(variant: Variant, architecture: str, row_tiles: int = 1) -> Program:
    """Return the decode kernels' tiles, at least ``row_tiles`` of 16 query rows.

    A block serves one group of heads: all query heads that reach each other by sharing a key or a latent head, so that
    every cached row is read once. Its query rows fill ``warps_m`` tiles of 16; ``warps_n`` warps take slices of 16
    tokens in turn, fewer of them where shared memory is short. Where even one does not fit, a group is the query heads
    that share both heads, and what groups share is read again. As many stages of slices as fit are kept in flight,
    with two blocks on a multiprocessor if that leaves two stages each.
    """
    sizes, (per_processor, per_block) = variant.sizes, shared_limits(architecture)
    n_q, n_k, n_c = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
    shared_by_all, shared_by_both = gcd(n_k, n_c), n_q // gcd(n_q // n_k, n_q // n_c)
    for groups, max_warps in product((shared_by_all, shared_by_both), (4, 2, 1)):
        enough = max(row_tiles, -(-(n_q // groups) // ROWS))
        warps_m = next(w for w in (1, 2, 4, MAX_ROW_TILES) if w >= enough or w == MAX_ROW_TILES)
        warps_n = max(1, max_warps // warps_m)
        keys, latents = max(1, n_k // groups), max(1, n_c // groups)
        row_bytes = keys * pitch(sizes.key_dim * variant.cache_itemsize)
        row_bytes += latents * pitch(sizes.latent_dim * variant.cache_itemsize)
        row_bytes += 4 * (keys + latents) if variant.row_scales else 0
        slice_bytes, recent = ROWS * row_bytes, 0
        if variant.in_blocks:
            slice_bytes = keys * _key_block_bytes(sizes) + latents * _value_block_bytes(variant)
            recent = RECENT_ROWS * row_bytes + slice_bytes
        stage = warps_n * slice_bytes
        query = ROWS * warps_m * pitch(2 * sizes.key_dim)
        merge = ROWS * warps_m * warps_n * 4 * (sizes.latent_dim + 4) if warps_n > 1 else 0
        fitting = [
            (blocks, stages)
            for blocks, stages in product((2, 1), (4, 3, 2))
            if max(max(stages * stage, recent) + query, merge)
            <= min(per_block, per_processor // blocks - BLOCK_RESERVE)
        ]
        if fitting:
            break
    else:
        raise BackendError(
            f"the decode kernel of {sizes} does not fit {per_block} bytes of shared memory", "choose another backend"
        )
    stages = fitting[0][1]
    shared_bytes = max(max(stages * stage, recent) + query, merge)
    columns = next((c for c in (64, 32, 16) if sizes.latent_dim % c == 0 and sizes.has_value_decoder), sizes.latent_dim)
    combine_bytes = _combine_shared_bytes(variant, columns)
    if combine_bytes > per_block:
        raise BackendError(
            f"observing attention of {n_q} query heads takes {combine_bytes} bytes of shared memory",
            f"expected at most {per_block}: choose another backend",
        )
    tiles = {
        "GTA_DECODE_GROUPS": groups,
        "GTA_DECODE_WARPS_M": warps_m,
        "GTA_DECODE_WARPS_N": warps_n,
        "GTA_DECODE_STAGES": stages,
        "GTA_DECODE_MIN_TOKENS": MIN_SPLIT_TOKENS,
        "GTA_DECODE_SHARED_BYTES": shared_bytes,
        "GTA_COMBINE_COLUMNS": columns,
        "GTA_COMBINE_THREADS": COMBINE_THREADS,
        "GTA_COMBINE_SHARED_BYTES": combine_bytes,
    }
    return Program(
        source="decode_blocks.cu" if variant.in_blocks else "decode.cu",
        kernels=("gta_decode_split", "gta_decode_combine"),
        tiles=tuple(tiles.items()),
        threads=WARP * warps_m * warps_n,
        shared_bytes=shared_bytes,
        resident_blocks=resident_blocks(shared_bytes, architecture),
        variant=variant,
    )


def _key_block_bytes(sizes: Sizes) -> int:
    """Return the bytes of a block's keys: codes, scales and minima."""
    return sizes.key_dim * (BLOCK_TOKENS // 2 + 4)


def _value_block_bytes(variant: Variant) -> int:
    """Return what a block's values take of shared memory: rows of codes, their scales and minima."""
    return BLOCK_TOKENS * (pitch(variant.sizes.latent_dim * variant.value_bits // 8) + 4)


def _combine_shared_bytes(variant: Variant, columns: int) -> int:
    """Return the combining kernel's shared memory: parts of a mix; the mix, and parts of its matmul; float32.

    Its blocks that observe have instead what each query row's scores are relative to, and the factor of their powers.
    """
    sizes = variant.sizes
    splits, decoder_rows = COMBINE_THREADS // (sizes.latent_dim // 4), COMBINE_THREADS // (columns // 8)
    decoded = sizes.latent_dim + decoder_rows * columns if sizes.has_value_decoder else 0
    observed = 2 * variant.decode_tokens * sizes.num_query_heads if variant.features.observe else 0
    return 4 * max(splits * sizes.latent_dim + decoded, observed)


def row_blocks(program: Program, tokens: int) -> int:
    """Return how many blocks a group's query rows take."""
    rows = program.variant.sizes.num_query_heads // program.tile("GTA_DECODE_GROUPS") * tokens
    return -(-rows // (ROWS * program.tile("GTA_DECODE_WARPS_M")))


def decode_splits(program: Program, processors: int, batch: int, tokens: int, capacity: int) -> int:
    """Return among how many blocks the cache's length is divided.

    As many as are resident at once, within ``MIN_SPLIT_TOKENS`` and ``MAX_SPLIT_TOKENS`` for a full cache. The
    blocks share out the true length by themselves, so the number depends on nothing that changes from step to step.
    Of a cache in blocks there is one more, for the rows that are not in codes.
    """
    others = batch * program.tile("GTA_DECODE_GROUPS") * row_blocks(program, tokens)
    # 8 warps of a managed cache's kernel have more than half of the registers
    alone = program.variant.features != NO_FEATURES and program.threads >= MAX_ROW_TILES * WARP
    resident = processors * min(program.resident_blocks, 1 if alone else 2)
    fewest, most = -(-capacity // MAX_SPLIT_TOKENS), -(-capacity // program.tile("GTA_DECODE_MIN_TOKENS"))
    if program.variant.in_blocks:
        fewest, most = fewest + 1, most + 1
    return min(max(resident // others, fewest), most)


def decode_grid(program: Program, splits: int, batch: int, tokens: int) -> Launch:
    """Return the launch of ``gta_decode_split``."""
    groups = program.tile("GTA_DECODE_GROUPS") * row_blocks(program, tokens)
    return Launch((splits, groups, batch), program.threads, program.shared_bytes)


def combine_grid(program: Program, processors: int, batch: int, tokens: int) -> Launch:
    """Return the launch of ``gta_decode_combine``: query tokens, query heads, blocks of output columns.

    Each block keeps its part of the value decoder in registers and takes tokens in turn, where there are more than
    keep the GPU busy.
    """
    sizes = program.variant.sizes
    columns = program.variant.expansion * sizes.latent_dim // program.tile("GTA_COMBINE_COLUMNS")
    rows = min(batch * tokens, max(1, 6 * processors // (sizes.num_query_heads * columns)))
    shared_bytes = program.tile("GTA_COMBINE_SHARED_BYTES")
    return Launch((rows, sizes.num_query_heads, columns), COMBINE_THREADS, shared_bytes)


def with_observers(combine: Launch, processors: int, batch: int, capacity: int) -> Launch:
    """Return the launch of ``gta_decode_combine`` with blocks that observe attention behind the others.

    As many along the first axis as find rows of the cache to work on, up to two a multiprocessor.
    """
    x, y, z = combine.grid
    blocks = min(batch * -(-capacity // COMBINE_THREADS), 2 * processors)
    return Launch((x + -(-blocks // (y * z)), y, z), combine.threads, combine.shared_bytes)


def with_appending(combine: Launch, batch: int, tokens: int, variant: Variant) -> Launch:
    """Return the launch of ``gta_decode_combine`` with blocks behind the others that write new rows, a warp each."""
    x, y, z = combine.grid
    rows = batch * tokens * (variant.sizes.num_key_heads + variant.sizes.num_latent_heads)
    return Launch((x + -(-rows * WARP // (COMBINE_THREADS * y * z)), y, z), combine.threads, combine.shared_bytes)


def workspace_parts(program: Program, splits: int, batch: int, tokens: int, capacity: int) -> dict[str, int]:
    """Return the sizes of the parts of the decode kernels' workspace, bytes.

    Per token, head and split a mix, its maximum and its sum; where attention is observed, per token and head the score
    of each row of the cache.
    """
    sizes = program.variant.sizes
    rows = batch * tokens * sizes.num_query_heads
    parts = {"mixes": rows * splits * sizes.latent_dim * 4, "sums": -(-rows * splits * 8 // 16) * 16}
    if program.variant.features.observe:
        return parts | {"scores": rows * -(-capacity // ROWS) * ROWS * 4}
    return parts | {"sums": rows * splits * 8}


# --- prefill ---------------------------------------------------------------------------------------------------------


def prefill_program(variant: Variant, architecture: str, row_tiles: int) -> Program:
    """Return the prefill kernels' tiles: 4 warps of ``row_tiles`` tiles of 16 query rows each.

    Two row tiles halve the reads of shared memory per matmul; one leaves more blocks for short prompts.
    """
    sizes, (_, per_block) = variant.sizes, shared_limits(architecture)
    warps = 4
    query = ROWS * row_tiles * warps * pitch(2 * sizes.key_dim)
    # more keys, or columns with wide latents, would not fit the registers
    max_keys = 64 if row_tiles == 1 and sizes.latent_dim <= 128 else 32
    max_columns = 64 if sizes.latent_dim <= 128 else 32
    all_columns = (64, 32, 16) if sizes.has_value_decoder else (16,)  # of no use then, but the source wants some
    candidates = [
        (
            keys,
            columns,
            query
            + max(
                _prefill_cache_bytes(variant, keys), 2 * sizes.latent_dim * pitch(2 * columns) * sizes.has_value_decoder
            ),
        )
        for keys, columns in product((64, 32), all_columns)
        if keys <= max_keys and columns <= max_columns and sizes.latent_dim % columns == 0
    ]
    fitting = [entry for entry in candidates if entry[2] <= per_block]
    if not fitting:
        raise BackendError(
            f"the prefill kernel of {sizes} does not fit {per_block} bytes of shared memory", "choose another backend"
        )
    # the largest tiles that leave room for a second block, which works while the first waits
    keys, columns, shared_bytes = next((e for e in fitting if resident_blocks(e[2], architecture) > 1), fitting[0])
    tiles = {
        "GTA_PREFILL_WARPS": warps,
        "GTA_PREFILL_ROW_TILES": row_tiles,
        "GTA_PREFILL_KEYS": keys,
        "GTA_PREFILL_COLUMNS": columns,
        "GTA_PREFILL_SHARED_BYTES": shared_bytes,
        "GTA_APPEND_WARPS": APPEND_WARPS,
    }
    blocks = variant.in_blocks
    return Program(
        source="prefill_blocks.cu" if blocks else "prefill.cu",
        kernels=("gta_prefill", "gta_append", "gta_append_open") if blocks else ("gta_prefill", "gta_append"),
        tiles=tuple(tiles.items()),
        threads=WARP * warps,
        shared_bytes=shared_bytes,
        resident_blocks=resident_blocks(shared_bytes, architecture),
        variant=variant,
    )


def _prefill_cache_bytes(variant: Variant, keys: int) -> int:
    """Return the bytes of tiles of ``keys`` rows: two, or, in blocks, two of codes and then, there, one of rows."""
    sizes = variant.sizes
    row = pitch(sizes.key_dim * variant.cache_itemsize) + pitch(sizes.latent_dim * variant.cache_itemsize)
    if variant.in_blocks:
        codes = keys // BLOCK_TOKENS * (_key_block_bytes(sizes) + _value_block_bytes(variant))
        return max(2 * codes, keys * row)
    return 2 * keys * (row + (8 if variant.row_scales else 0))


def prefill_programs(variant: Variant, architecture: str) -> tuple[Program, ...]:
    """Return the prefill programs of a variant, the widest tile first; wide latents leave registers for one only."""
    return tuple(
        prefill_program(variant, architecture, n) for n in ((2, 1) if variant.sizes.latent_dim <= 128 else (1,))
    )


def prefill_grid(program: Program, batch: int, tokens: int) -> Launch:
    """Return the launch of ``gta_prefill``: query heads, tiles of tokens, sequences."""
    tile = ROWS * program.tile("GTA_PREFILL_ROW_TILES") * program.tile("GTA_PREFILL_WARPS")
    return Launch(
        (program.variant.sizes.num_query_heads, -(-tokens // tile), batch), program.threads, program.shared_bytes
    )


def append_grid(program: Program, batch: int, tokens: int) -> Launch:
    """Return the launch of ``gta_append``: tokens, or blocks that they may fill, then cached heads, sequences."""
    heads = program.variant.sizes.num_key_heads + program.variant.sizes.num_latent_heads
    each = BLOCK_TOKENS if program.variant.in_blocks else APPEND_WARPS
    return Launch((-(-tokens // each), heads, batch), WARP * APPEND_WARPS)


def append_open_grid(program: Program, batch: int, tokens: int) -> Launch:
    """Return the launch of ``gta_append_open``: the last rows, cached heads, sequences."""
    heads = program.variant.sizes.num_key_heads + program.variant.sizes.num_latent_heads
    return Launch((-(-min(tokens, BLOCK_TOKENS) // APPEND_WARPS), heads, batch), WARP * APPEND_WARPS)
