"""Launch plans of the attention op: which kernels one call launches, in which order and with which arguments.

The one place that knows the order of the kernels' parameters. It needs no CUDA: ``kernels.py`` fills the names in with
device addresses, a simulation on the host with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gta_edge.cuda.architecture import MAX_GRID_YZ, MAX_INT32, Launch, Signature
from gta_edge.errors import BackendError
from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.definition import NO_FEATURES, Features
from gta_edge.plugins.attention.tiling import Program, Variant

__all__ = [
    "SIGNATURES",
    "KernelLaunch",
    "Plan",
    "Programs",
    "choose_decode",
    "choose_prefill",
    "decode_launches",
    "plan_attention",
    "prefill_launches",
    "programs_for",
    "signature",
]

MAX_CAPACITY = 2**30
"""Tokens that a cache may have room for: twice as many is what the kernels' 32-bit positions can tell apart."""
_NEW = ("key", "latent")
_CACHES = ("key_cache", "latent_cache", "key_scale", "latent_scale")
_PLACES = ("past_length", "cos", "sin")
_WORKSPACE = ("mixes", "sums")

_OBSERVED = ("query_weight", "decay")

_SIGNATURES: Mapping[str, Signature] = {
    "gta_decode_split": Signature(
        (
            *("query", *_NEW, *_CACHES, *_PLACES, *_WORKSPACE),
            *("token_positions", "row_bias", "branch_start", "branches", "query_weight", "scores"),
        ),
        ("tokens", "capacity", "positions", "branch_rows", "scale"),
    ),
    "gta_decode_combine": Signature(
        (
            *(*_WORKSPACE, "gate", "value_decoder", "past_length", "output"),
            *("observed_positions", *_OBSERVED, "scores", "received"),
        ),
        ("rows", "tokens", "capacity", "splits", "mix_blocks"),
    ),
    "gta_append": Signature(
        (*_NEW, *_CACHES, *_PLACES, "token_positions", *_OBSERVED, "received"), ("tokens", "capacity", "positions")
    ),
    "gta_prefill": Signature(
        ("query", "gate", "value_decoder", *_CACHES, *_PLACES, "output", "token_positions", "row_bias"),
        ("tokens", "capacity", "positions", "scale"),
    ),
}


_OPEN = ("key_open", "latent_open")
_BLOCK_SIGNATURES: Mapping[str, Signature] = {
    "gta_decode_split": Signature(
        ("query", *_NEW, *_CACHES, *_OPEN, *_PLACES, *_WORKSPACE), ("tokens", "capacity", "positions", "scale")
    ),
    "gta_decode_combine": Signature(
        (*_WORKSPACE, "gate", "value_decoder", "past_length", "output", *_NEW, *_OPEN, "cos", "sin"),
        ("rows", "tokens", "capacity", "splits", "mix_blocks", "positions"),
    ),
    "gta_append": Signature((*_NEW, *_CACHES, *_OPEN, *_PLACES), ("tokens", "capacity", "positions")),
    "gta_prefill": Signature(
        ("query", *_NEW, "gate", "value_decoder", *_CACHES, *_OPEN, *_PLACES, "output"),
        ("tokens", "capacity", "positions", "scale"),
    ),
    "gta_append_open": Signature((*_NEW, *_OPEN, *_PLACES), ("tokens", "capacity", "positions")),
}
"""The same of a cache in blocks."""


def signature(kernel: str, variant: Variant) -> Signature:
    """Return a kernel's parameters, as they stand in ``kernels/*.cu``, in the build for a variant."""
    return _BLOCK_SIGNATURES[kernel] if variant.in_blocks else _signature(kernel, variant.features)


def _signature(kernel: str, features: Features) -> Signature:
    absent = {
        "token_positions": not features.has_positions,
        "observed_positions": not (features.has_positions and features.observe),
        "row_bias": not features.bias_rows,
        **dict.fromkeys(("branch_start", "branches", "branch_rows"), not features.has_branches),
        **dict.fromkeys((*_OBSERVED, "scores", "received", "mix_blocks"), not features.observe),
    }
    of = _SIGNATURES[kernel]
    addresses = (name.replace("observed_", "token_") for name in of.addresses if not absent.get(name))
    return Signature(tuple(addresses), tuple(name for name in of.numbers if not absent.get(name)))


SIGNATURES: Mapping[str, Signature] = {kernel: _signature(kernel, NO_FEATURES) for kernel in _SIGNATURES}
"""The kernels' parameters without the inputs of a managed cache, and of one that is not in blocks."""


@dataclass(frozen=True)
class Programs:
    """All that is compiled for a variant on one kind of GPU."""

    decode: Program
    prefill: tuple[Program, ...]
    """The widest tile first; they read no branches, which so many new tokens have none of."""
    wide_decode: Program | None = None
    """For more query rows than ``decode`` takes at once, where the cache is managed."""

    @property
    def all(self) -> tuple[Program, ...]:
        """Decode and prefill."""
        return (*self.decodes, *self.prefill)

    @property
    def decodes(self) -> tuple[Program, ...]:
        """Decode, the narrowest tile first."""
        return (self.decode,) if self.wide_decode is None else (self.decode, self.wide_decode)


@dataclass(frozen=True)
class KernelLaunch:
    """One launch: of which kernel, and on which grid."""

    program: Program
    kernel: str
    launch: Launch

    @property
    def signature(self) -> Signature:
        """What the kernel takes, in order."""
        return signature(self.kernel, self.program.variant)


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order; each needs what those before it wrote."""

    launches: tuple[KernelLaunch, ...]
    numbers: Mapping[str, int]
    """The int32 arguments that follow from the sizes, by name."""
    offsets: Mapping[str, int]
    """Where ``mixes``, ``sums`` and ``scores`` begin in the workspace, bytes."""
    workspace_bytes: int


def programs_for(variant: Variant, architecture: str) -> Programs:
    """Return all that is compiled for a variant.

    Args:
        variant: the model's sizes and types.
        architecture: of the GPU, ``"sm_87"``.

    Raises:
        BackendError: the sizes do not fit the GPU's shared memory.
    """
    decodes = tiling.decode_programs(variant, architecture)
    causal = replace(variant, features=replace(variant.features, has_branches=False))
    prefill = tiling.prefill_programs(causal, architecture)
    return Programs(decodes[0], prefill, decodes[1] if len(decodes) > 1 else None)


def choose_prefill(candidates: tuple[Program, ...], processors: int, batch: int, tokens: int) -> Program:
    """Return the widest tile whose blocks still give every multiprocessor one, otherwise the narrowest.

    Args:
        candidates: the widest tile first.
        processors: multiprocessors of the GPU.
        batch: B.
        tokens: T.
    """
    for program in candidates:
        x, y, z = tiling.prefill_grid(program, batch, tokens).grid
        if x * y * z >= processors:
            return program
    return candidates[-1]


def choose_decode(candidates: tuple[Program, ...], tokens: int) -> Program:
    """Return the narrowest tile that takes all of a group's query rows at once, otherwise the widest."""
    return next((each for each in candidates if tiling.row_blocks(each, tokens) == 1), candidates[-1])


def decode_launches(
    program: Program, processors: int, splits: int, batch: int, tokens: int, capacity: int = 1
) -> tuple[KernelLaunch, KernelLaunch]:
    """Return the two launches for few new tokens, the cache's length divided among ``splits`` blocks."""
    combine = tiling.combine_grid(program, processors, batch, tokens)
    if program.variant.features.observe:
        combine = tiling.with_observers(combine, processors, batch, capacity)
    if program.variant.in_blocks:
        combine = tiling.with_appending(combine, batch, tokens, program.variant)
    return (
        KernelLaunch(program, "gta_decode_split", tiling.decode_grid(program, splits, batch, tokens)),
        KernelLaunch(program, "gta_decode_combine", combine),
    )


def prefill_launches(program: Program, batch: int, tokens: int) -> tuple[KernelLaunch, ...]:
    """Return the launches for many new tokens: two, or, of a cache in blocks, whose open rows come last, three."""
    append = KernelLaunch(program, "gta_append", tiling.append_grid(program, batch, tokens))
    prefill = KernelLaunch(program, "gta_prefill", tiling.prefill_grid(program, batch, tokens))
    if not program.variant.in_blocks:
        return append, prefill
    return append, prefill, KernelLaunch(program, "gta_append_open", tiling.append_open_grid(program, batch, tokens))


def plan_attention(programs: Programs, processors: int, *, batch: int, tokens: int, capacity: int) -> Plan:
    """Return what one call of the op launches.

    Args:
        programs: of the variant.
        processors: multiprocessors of the GPU.
        batch: B, up to 65535.
        tokens: T, new tokens of each sequence.
        capacity: S, cached tokens that there is room for.

    Raises:
        BackendError: a size that the kernels cannot take.
    """
    _check(batch, tokens, capacity)
    if programs.decode.variant.in_blocks and capacity % tiling.BLOCK_TOKENS:
        raise BackendError(
            f"capacity is {capacity}",
            f"expected a multiple of {tiling.BLOCK_TOKENS} for a cache of type {programs.decode.variant.cache}",
        )
    numbers = {"tokens": tokens, "capacity": capacity}
    offsets: dict[str, int] = {}
    size = 0
    launches: tuple[KernelLaunch, ...]
    if tokens > programs.decode.variant.decode_tokens:
        program = choose_prefill(programs.prefill, processors, batch, tokens)
        launches = prefill_launches(program, batch, tokens)
    else:
        program = choose_decode(programs.decodes, tokens)
        splits = tiling.decode_splits(program, processors, batch, tokens, capacity)
        launches = decode_launches(program, processors, splits, batch, tokens, capacity)
        numbers |= {"rows": batch * tokens, "splits": splits}
        if program.variant.features.observe or program.variant.in_blocks:
            numbers["mix_blocks"] = tiling.combine_grid(program, processors, batch, tokens).grid[0]
        for name, part_bytes in tiling.workspace_parts(program, splits, batch, tokens, capacity).items():
            offsets[name] = size
            size += part_bytes
    for launch in launches:
        if max(launch.launch.grid[1:]) > MAX_GRID_YZ:
            raise BackendError(
                f"{tokens} new tokens of {batch} sequences take a grid of {launch.launch.grid}, whose last two numbers "
                f"go up to {MAX_GRID_YZ}",
                "append them in smaller chunks",
            )
    return Plan(launches, numbers, offsets, size)


def _check(batch: int, tokens: int, capacity: int) -> None:
    """Raise BackendError where a size is out of range."""
    sizes = (("batch", batch, MAX_GRID_YZ), ("tokens", tokens, MAX_INT32), ("capacity", capacity, MAX_CAPACITY))
    for name, value, most in sizes:
        if not 1 <= value <= most:
            raise BackendError(f"{name} is {value}", f"expected 1 to {most}")
    if batch * tokens > MAX_INT32:
        raise BackendError(
            f"{batch} sequences of {tokens} new tokens are more than {MAX_INT32}", "append smaller chunks"
        )
