"""The attention kernels on a GPU: compiled and loaded once, then launched on device addresses.

Knows of no framework. Whoever holds the memory (a session, an engine's plugin) gives addresses and a stream. A launch
allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gta_edge.cuda.architecture import MAX_INT32
from gta_edge.cuda.gpu import Gpu, Launcher, check_addresses
from gta_edge.errors import BackendError
from gta_edge.plugins.attention.definition import FEATURE_INPUTS
from gta_edge.plugins.attention.launches import (
    KernelLaunch,
    Plan,
    decode_launches,
    plan_attention,
    prefill_launches,
    programs_for,
)
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.domain import KERNELS

__all__ = ["BUFFERS_OF", "AttentionKernels", "Buffers", "attention_kernels"]

_SCALES = ("key_scale", "latent_scale")
_OPEN = ("key_open", "latent_open")
_INTEGERS = ("token_positions", "branch_start", "branches")
_FLOATS = ("row_bias", "received", "query_weight", "decay")
_ALIGNMENTS = dict.fromkeys((*_SCALES, *_FLOATS), 4) | dict.fromkeys(("past_length", *_INTEGERS), 8)
BUFFERS_OF = {name: name for name in FEATURE_INPUTS} | {"positions": "token_positions", "past_received": "received"}
"""Field of ``Buffers`` of each input of a managed cache: ``positions`` is P there."""
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_OPTIONAL = (*_SCALES, *_OPEN, "gate", "value_decoder", "workspace", *_INTEGERS, *_FLOATS)
_LAUNCHES_CACHED = 256


@dataclass(frozen=True)
class Buffers:
    """Device addresses of the op's inputs and outputs: 16-bit floats of the variant's compute type, if not said else.

    All are multiples of 16 bytes, but for ``past_length`` and what else is int64 (8), the scales and what else is
    float32 (4).

    Raises:
        BackendError: an address is missing or not aligned.
    """

    query: int
    """[B, T, n_q·d_k], before RoPE."""
    key: int
    """[B, T, n_k·d_k], before RoPE."""
    latent: int
    """[B, T, n_c·d_l]"""
    gate: int
    """[B, T, H], before the sigmoid; 0 if there is none."""
    key_cache: int
    """[B, n_k, S, d_k] of the variant's cache type, updated in place; in blocks, bytes [B, n_k, S/32, d_k, 16]."""
    latent_cache: int
    """[B, n_c, S, d_l] likewise; in blocks, d_l/2 or d_l/4 bytes a row."""
    key_scale: int
    """float32 [B, n_k, S], updated in place; in blocks float16 [B, n_k, S/32, 2, d_k], a multiple of 16; 0 if the cache
    has none."""
    latent_scale: int
    """float32 [B, n_c, S], updated in place; in blocks float16 [B, n_c, S, 2], a multiple of 16; 0 if the cache has
    none."""
    past_length: int
    """int64 [B]"""
    cos: int
    """[P, d_k/2]"""
    sin: int
    """[P, d_k/2]"""
    value_decoder: int
    """[n_q, d_l, e·d_l]; 0 if there is none."""
    output: int
    """[B, T, H]"""
    workspace: int
    """``AttentionKernels.workspace_bytes`` bytes of no meaning between calls; 0 if that is 0."""
    token_positions: int = 0
    """int64 [B, T], RoPE positions of the new tokens; 0, as below, if they are not given."""
    row_bias: int = 0
    """float32 [B, R]"""
    branch_start: int = 0
    """int64 [B]"""
    branches: int = 0
    """int64 [B, W]"""
    received: int = 0
    """float32 [B, S], updated in place: of more than ``Variant.decode_tokens`` new tokens, which observe nothing, the
    new rows alone, with NaN where a query weight is not 0 or the decay not 1."""
    query_weight: int = 0
    """float32 [B, T]"""
    decay: int = 0
    """float32 [B]"""
    key_open: int = 0
    """[B, n_k, 32, d_k], the open block of a cache in blocks, updated in place; 0 of others."""
    latent_open: int = 0
    """[B, n_c, 32, d_l]"""

    def __post_init__(self) -> None:
        check_addresses(vars(self).items(), _ALIGNMENTS, _OPTIONAL)


@cache
def attention_kernels(variant: Variant, gpu: Gpu) -> AttentionKernels:
    """Return the kernels of a variant on a GPU, compiled and loaded at the first call.

    Raises:
        BackendError: as for ``AttentionKernels``.
    """
    return AttentionKernels(variant, gpu)


class AttentionKernels:
    """All kernels of one variant, loaded on one GPU.

    Args:
        variant: the model's sizes and types.
        gpu: where they run.

    Raises:
        BackendError: the kernels do not fit the GPU, cannot be compiled, or not be loaded.
    """

    def __init__(self, variant: Variant, gpu: Gpu) -> None:
        self.variant, self.gpu = variant, gpu
        self.programs = programs_for(variant, gpu.architecture)
        self._presence = _presence(variant)
        self._launcher = Launcher(gpu, "attention", KERNELS)
        # Neither the kernels nor their shared memory depend on a call's sizes.
        samples: list[tuple[KernelLaunch, ...]] = []
        samples += [decode_launches(program, gpu.processors, 1, 1, 1) for program in self.programs.decodes]
        samples += [prefill_launches(program, 1, 1) for program in self.programs.prefill]
        self._kernels = self._launcher.load(
            {launches[0].program: {each.kernel: each.launch.shared_bytes for each in launches} for launches in samples}
        )
        self._planned = lru_cache(_LAUNCHES_CACHED)(self._plan)
        self._prepared = lru_cache(_LAUNCHES_CACHED)(self._prepare)

    def plan(self, batch: int, tokens: int, capacity: int) -> Plan:
        """Return what a call with these sizes launches.

        Raises:
            BackendError: a size that the kernels cannot take.
        """
        return self._planned(batch, tokens, capacity)

    def workspace_bytes(self, batch: int, tokens: int, capacity: int) -> int:
        """Return the size of the workspace that a call with these sizes needs; 0 for long prompts.

        Args:
            batch: B.
            tokens: T.
            capacity: S.

        Raises:
            BackendError: a size that the kernels cannot take.
        """
        return self.plan(batch, tokens, capacity).workspace_bytes

    def launch(
        self,
        stream: Any,
        buffers: Buffers,
        *,
        batch: int,
        tokens: int,
        capacity: int,
        positions: int,
        scale: float,
        branch_rows: int = 0,
    ) -> None:
        """Launch one call of the op.

        Args:
            stream: of the GPU: a ``cuda.core.Stream``, anything with ``__cuda_stream__``, or a handle. The GPU's
                context is current in the calling thread: handle 0 means the default stream of what is current.
            buffers: of the sizes below; they must live until the stream has passed the launches.
            batch: B, up to 65535.
            tokens: T, at most ``capacity``.
            capacity: S.
            positions: P, rows of ``cos`` and ``sin``.
            scale: factor of the scores, before the softmax; more than 0.
            branch_rows: W, rows that ``branches`` has a word for.

        Raises:
            BackendError: a size or an address that the kernels cannot take, or a launch failed.
        """
        plan, launches = self._prepared(batch, tokens, capacity, positions, scale, branch_rows)
        for name, expected, reason in self._presence:
            if bool(getattr(buffers, name)) != expected:
                raise BackendError(f"{name} is {'missing' if expected else 'given'}", reason)
        if plan.workspace_bytes and not buffers.workspace:
            raise BackendError("there is no workspace", f"expected {plan.workspace_bytes} bytes of the GPU's memory")
        if self.variant.in_blocks and (buffers.key_scale | buffers.latent_scale) % 16:
            raise BackendError(
                f"the scales are at addresses {buffers.key_scale:#x} and {buffers.latent_scale:#x}",
                f"expected multiples of 16 for a cache of type {self.variant.cache}",
            )
        addresses = dict(vars(buffers))
        for name, offset in plan.offsets.items():
            addresses[name] = buffers.workspace + offset
        self._launcher.launch(
            stream,
            (
                (config, kernel, *map(addresses.__getitem__, names), *numbers)
                for config, kernel, names, numbers in launches
            ),
        )

    def _plan(self, batch: int, tokens: int, capacity: int) -> Plan:
        return plan_attention(self.programs, self.gpu.processors, batch=batch, tokens=tokens, capacity=capacity)

    def _prepare(
        self, batch: int, tokens: int, capacity: int, positions: int, scale: float, branch_rows: int
    ) -> tuple[Plan, tuple[Any, ...]]:
        """Return the plan, and of each launch all that does not depend on addresses, as cuda.core takes it."""
        plan = self.plan(batch, tokens, capacity)
        if tokens > capacity:
            raise BackendError(f"tokens is {tokens}", f"expected at most the capacity, {capacity}")
        # The largest dot product must give the largest score; what counts is the float32 that the kernels get.
        if not (0 < scale <= _MAX_FLOAT32 and np.float32(scale) > 0):
            raise BackendError(f"scale is {scale}", "expected more than 0, and a number that float32 has")
        if not 1 <= positions <= MAX_INT32:
            raise BackendError(f"positions is {positions}", f"expected 1 to {MAX_INT32}")
        if not 0 <= branch_rows <= MAX_INT32:
            raise BackendError(f"branches has words for {branch_rows} rows", f"expected 0 to {MAX_INT32}")
        # An int of Python would be passed as 8 bytes, a float too.
        values: dict[str, Any] = {name: np.int32(value) for name, value in plan.numbers.items()}
        values |= {"positions": np.int32(positions), "branch_rows": np.int32(branch_rows), "scale": np.float32(scale)}
        return plan, tuple(
            (
                self._launcher.config(each.launch),
                self._kernels[each.program, each.kernel],
                each.signature.addresses,
                tuple(values[name] for name in each.signature.numbers),
            )
            for each in plan.launches
        )


def _presence(variant: Variant) -> tuple[tuple[str, bool, str], ...]:
    """Return of each address that some variants lack its name, whether this one has it, and why."""
    scales = f"a cache of type {variant.cache} has {'scales' if variant.quantised else 'none'}"
    features = variant.features
    has = {
        "gate": variant.sizes.has_gate,
        "value_decoder": variant.sizes.has_value_decoder,
        "token_positions": features.has_positions,
        "row_bias": bool(features.bias_rows),
        **dict.fromkeys(("branch_start", "branches"), features.has_branches),
        **dict.fromkeys(("received", "query_weight", "decay"), bool(features.observe)),
    }
    return (
        *((name, variant.quantised, scales) for name in _SCALES),
        *(
            (
                name,
                variant.in_blocks,
                f"a cache of type {variant.cache} has {'an' if variant.in_blocks else 'no'} open block",
            )
            for name in _OPEN
        ),
        *(
            (name, given, f"the kernels are compiled {'with' if given else 'without'} one")
            for name, given in has.items()
        ),
    )
