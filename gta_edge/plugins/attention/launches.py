"""Launch plans of the attention op: which kernels one call launches, in which order and with which arguments.

The one place that knows the order of the kernels' parameters. It needs no CUDA: ``kernels.py`` fills the names in with
device addresses, a simulation on the host with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gta_edge.cuda.architecture import MAX_GRID_YZ, MAX_INT32, Launch, Signature
from gta_edge.errors import BackendError
from gta_edge.plugins.attention import tiling
from gta_edge.plugins.attention.tiling import Program, Variant

__all__ = [
    "SIGNATURES",
    "KernelLaunch",
    "Plan",
    "Programs",
    "choose_prefill",
    "decode_launches",
    "plan_attention",
    "prefill_launches",
    "programs_for",
]

MAX_CAPACITY = 2**30
"""Tokens that a cache may have room for: twice as many is what the kernels' 32-bit positions can tell apart."""
FLOAT_BYTES = 4


_NEW = ("key", "latent")
_CACHES = ("key_cache", "latent_cache", "key_scale", "latent_scale")
_PLACES = ("past_length", "cos", "sin")
_WORKSPACE = ("mixes", "sums")

SIGNATURES: Mapping[str, Signature] = {
    "gta_decode_split": Signature(
        ("query", *_NEW, *_CACHES, *_PLACES, *_WORKSPACE), ("tokens", "capacity", "positions", "scale")
    ),
    "gta_decode_combine": Signature(
        (*_WORKSPACE, "gate", "value_decoder", "past_length", "output"), ("rows", "tokens", "capacity", "splits")
    ),
    "gta_append": Signature((*_NEW, *_CACHES, *_PLACES), ("tokens", "capacity", "positions")),
    "gta_prefill": Signature(
        ("query", "gate", "value_decoder", *_CACHES, *_PLACES, "output"), ("tokens", "capacity", "positions", "scale")
    ),
}
"""The kernels' parameters, as they stand in ``kernels/*.cu``."""


@dataclass(frozen=True)
class Programs:
    """All that is compiled for a variant on one kind of GPU."""

    decode: Program
    prefill: tuple[Program, ...]
    """The widest tile first."""

    @property
    def all(self) -> tuple[Program, ...]:
        """Decode and prefill."""
        return (self.decode, *self.prefill)


@dataclass(frozen=True)
class KernelLaunch:
    """One launch: of which kernel, and on which grid."""

    program: Program
    kernel: str
    launch: Launch

    @property
    def signature(self) -> Signature:
        """What the kernel takes, in order."""
        return SIGNATURES[self.kernel]


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order; each needs what those before it wrote."""

    launches: tuple[KernelLaunch, ...]
    numbers: Mapping[str, int]
    """The int32 arguments that follow from the sizes: ``tokens``, ``capacity``, ``rows`` and ``splits``."""
    offsets: Mapping[str, int]
    """Where ``mixes`` and ``sums`` begin in the workspace, bytes."""
    workspace_bytes: int


def programs_for(variant: Variant, architecture: str) -> Programs:
    """Return all that is compiled for a variant.

    Args:
        variant: the model's sizes and types.
        architecture: of the GPU, ``"sm_87"``.

    Raises:
        BackendError: the sizes do not fit the GPU's shared memory.
    """
    return Programs(tiling.decode_program(variant, architecture), tiling.prefill_programs(variant, architecture))


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


def decode_launches(
    program: Program, processors: int, splits: int, batch: int, tokens: int
) -> tuple[KernelLaunch, KernelLaunch]:
    """Return the two launches for few new tokens, the cache's length divided among ``splits`` blocks."""
    return (
        KernelLaunch(program, "gta_decode_split", tiling.decode_grid(program, splits, batch, tokens)),
        KernelLaunch(program, "gta_decode_combine", tiling.combine_grid(program, processors, batch, tokens)),
    )


def prefill_launches(program: Program, batch: int, tokens: int) -> tuple[KernelLaunch, KernelLaunch]:
    """Return the two launches for many new tokens."""
    return (
        KernelLaunch(program, "gta_append", tiling.append_grid(program, batch, tokens)),
        KernelLaunch(program, "gta_prefill", tiling.prefill_grid(program, batch, tokens)),
    )


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
    numbers = {"tokens": tokens, "capacity": capacity}
    if tokens > tiling.DECODE_TOKENS:
        program = choose_prefill(programs.prefill, processors, batch, tokens)
        launches, offsets, size = prefill_launches(program, batch, tokens), {}, 0
    else:
        program, sizes = programs.decode, programs.decode.variant.sizes
        splits = tiling.decode_splits(program, processors, batch, tokens, capacity)
        launches = decode_launches(program, processors, splits, batch, tokens)
        numbers |= {"rows": batch * tokens, "splits": splits}
        mixes_bytes = batch * tokens * sizes.num_query_heads * splits * sizes.latent_dim * FLOAT_BYTES
        offsets = {"mixes": 0, "sums": mixes_bytes}
        size = tiling.workspace_bytes(program, splits, batch, tokens)
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
