"""Builds a TensorRT engine from a bundle: what ``gta-edge build`` does.

One engine holds the weights once and two profiles, single tokens and chunks of a prompt. TensorRT chooses kernels for
each, and those for 512 rows leave a GPU idle with 8: its engines have a third, of a few tokens at once, as speculation
runs them. TensorRT-RTX compiles kernels for the sizes at hand when it runs, and needs none. The graph is made for
TensorRT first (``lower.py``), then parsed, then built; the engine and its record appear in the bundle at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.cuda.session import free_gpu_bytes
from gta_edge.errors import CapacityError, EngineError, InputError
from gta_edge.formats.artifacts import artifacts_directory, made_from
from gta_edge.formats.bundle import Bundle
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import DECAY, PAST, QUERY_WEIGHT, ROW_BIAS, TOKEN_INPUTS
from gta_edge.numerics.dtypes import CACHES
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.cost import words_bytes
from gta_edge.runtime.tensorrt.engine import (
    CHOICES,
    DECODE,
    FEW,
    IMPLEMENTATIONS,
    PREFILL,
    EngineManifest,
    EngineSpec,
    engine_directory,
    engine_output,
    has_engine,
    write_engine,
)
from gta_edge.runtime.tensorrt.engine_cache import EngineCache
from gta_edge.runtime.tensorrt.engine_kind import ENGINES, TENSORRT, TENSORRT_RTX
from gta_edge.support.choices import unknown
from gta_edge.support.files import new_directory, scratch_directory
from gta_edge.support.memory import available_bytes
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.runtime.cache_policies.base import CachePolicy
    from gta_edge.runtime.tensorrt.builder import Target

__all__ = [
    "CHUNK_SIZE",
    "LOGITS_BYTES",
    "LOGIT_POSITIONS",
    "MAX_TREE_ROWS",
    "Requirement",
    "buffer_bytes",
    "build",
    "check_spec",
    "logit_positions",
    "lower_only",
    "managed_spec",
    "matmul_of",
    "profile_shapes",
    "requirement",
    "step_inputs",
]

CHUNK_SIZE = 512
"""Most tokens of a prompt in one run of an engine."""

MAX_TREE_ROWS = 8192
"""Of a sequence, for trees of tokens: each has a word in every step."""

LOGIT_POSITIONS = 16
"""Positions per row, of so many tokens, that one run gives logits for at least."""

LOGITS_BYTES = 2**24
"""Logits that there is room for if those of ``LOGIT_POSITIONS`` take less. Those of a whole chunk of GTA-1B would take
a quarter of a gigabyte on the GPU, and as much on the host."""

# TensorRT-RTX 1.7 took, without a GPU (x86_64, 2026-11-21): 0.42 GB for 2 MB of weights in 5 layers, 1.15 GB for
# 0.19 GB in one, 2.36 GB for 0.20 GB in 54, and 4.35 GB for 0.74 GB in 54, a GTA-1B in int4. That is 0.4 GB, 3.7 times
# the weights and 22 MB a layer; what is more here is for CUDA's context, an estimate.
_WEIGHT_COPIES = 4
_LAYER_BYTES = 25e6
_BUILDER_BYTES = 1e9
_WRITTEN_COPIES = 3  # on the disk: the model as it goes to TensorRT, perhaps in a wider type, and the engine
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class Requirement:
    """What a build is expected to take at its peak, in bytes: an estimate from sizes, to refuse what cannot work.

    Attributes:
        weights: the file, the parsed network, the builder's own, the engine and its serialised form hold them.
        cache: of all rows at full length, which the builder allocates to time kernels, in and out.
        logits: of one run.
        builder: TensorRT's libraries, its own representations of the layers, and CUDA's context.
        buffers: inputs and outputs beside the cache that a session has on the GPU, and pinned, once it is built: what
            cannot run need not be built.
    """

    weights: int
    cache: int
    logits: int
    builder: int
    buffers: int = 0

    @property
    def peak(self) -> int:
        """All of it; buffers are pinned on the host too."""
        return self.weights + self.cache + max(self.logits, 2 * self.buffers) + self.builder

    @property
    def on_gpu(self) -> int:
        """What a GPU with memory of its own holds of it: the weights of the layer that is timed are few."""
        return self.cache + max(self.logits, self.buffers) + self.weights // _WEIGHT_COPIES


def requirement(bundle: Bundle, spec: EngineSpec) -> Requirement:
    """Return what building an engine is expected to take."""
    return Requirement(
        weights=_WEIGHT_COPIES * _lowered_bytes(bundle),
        cache=2 * spec.cache_bytes(bundle.config),
        logits=4 * spec.max_batch * logit_positions(bundle.config, spec) * bundle.config.vocab_size,
        builder=int(_BUILDER_BYTES + _LAYER_BYTES * bundle.config.num_hidden_layers),
        buffers=buffer_bytes(bundle.config, spec),
    )


def buffer_bytes(config: ModelConfig, spec: EngineSpec) -> int:
    """Return the bytes of a session's inputs beside the caches, and of logits, which it has on the GPU and pinned."""
    inputs = sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in step_inputs(config, spec).values())
    return inputs + _LOGIT_BYTES * spec.max_batch * logit_positions(config, spec) * config.vocab_size


def logit_positions(config: ModelConfig, spec: EngineSpec) -> int:
    """Return the positions of each row that a run gives logits for at most, and that sessions have buffers for."""
    room = LOGITS_BYTES // (_LOGIT_BYTES * spec.max_batch * config.vocab_size)
    return min(max(room // LOGIT_POSITIONS, 1) * LOGIT_POSITIONS, spec.chunk_size)


def step_inputs(config: ModelConfig, spec: EngineSpec) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return of each of an engine's inputs beside the caches its largest shape and its numpy type, by name."""
    sizes = {"batch": spec.max_batch, "tokens": spec.chunk_size, "positions": logit_positions(config, spec)}
    shapes = spec.input_shapes(config, **sizes)
    floats = (ROW_BIAS, QUERY_WEIGHT, DECAY)
    return {
        name: (shape, np.float32 if name in floats else np.int64)
        for name, shape in shapes.items()
        if name in TOKEN_INPUTS or not name.startswith(PAST)
    }


def build(
    bundle: Bundle,
    spec: EngineSpec,
    *,
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Build an engine and keep it in the bundle.

    Args:
        bundle: the model.
        spec: what the engine is for.
        compute_capabilities: of the GPUs to build for, ``8.6``; by default that of the GPU here, and where there is
            none, all that TensorRT-RTX knows. TensorRT itself builds for no other than the one here.
        force: replace an engine that is there.
        progress: told of the graph's making, and of TensorRT's phases.

    Returns:
        The engine's directory.

    Raises:
        InputError: the spec does not fit the model.
        EngineError: TensorRT cannot build it, or an engine is there and not ``force``.
        CapacityError: the memory that is free here is less than the build is expected to take.
        BackendError: TensorRT or the GPU is missing.
    """
    check_spec(bundle, spec)
    directory = engine_directory(bundle, spec.engine)
    if not force and has_engine(bundle, spec.engine):
        raise EngineError(f"{directory}: there is an engine already", "give --force to replace it")
    needed = requirement(bundle, spec)
    _check_memory(needed, needed.peak, available_bytes(), "here", spec, bundle.precision)

    from gta_edge.runtime.tensorrt.builder import Target, build_plan

    target = Target.choose(spec.engine, compute_capabilities, rtx_would_do=_builds_with_rtx(bundle, spec))
    if target.gpu:
        _check_memory(needed, needed.on_gpu, free_gpu_bytes(), f"on {target.gpu}", spec, bundle.precision)
    disk = _WRITTEN_COPIES * _lowered_bytes(bundle)
    with engine_output(bundle, spec.engine, force=force, needed_bytes=disk) as output:
        # On the bundle's disk, which has room for an engine: a system's temporary directory may lie in memory.
        with scratch_directory(artifacts_directory(bundle)) as scratch:
            matmul, timings = _matmul(bundle, spec, target, scratch, progress)
            model = _lowered(bundle, spec, scratch / "model", target.newer_ops, matmul, progress)
            plan = build_plan(model, spec, profile_shapes(bundle, spec), target, progress)
        capabilities = list(target.compute_capabilities)
        record = EngineManifest(
            spec,
            made_from(bundle),
            target.tensorrt,
            capabilities,
            matmul=matmul,
            matmul_timings=timings,
            gpu=target.gpu_name,
        )
        write_engine(output, record, plan)
    return directory


def _builds_with_rtx(bundle: Bundle, spec: EngineSpec) -> bool:
    """Tell whether TensorRT-RTX can build an engine for the same."""
    try:
        check_spec(bundle, replace(spec, engine=TENSORRT_RTX.name))
    except InputError:
        return False
    return True


def lower_only(
    bundle: Bundle,
    spec: EngineSpec,
    output: Path | None = None,
    *,
    newer_ops: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the model as it would go to TensorRT, for trtexec, polygraphy and other tools.

    Args:
        bundle: the model.
        spec: what an engine of it would be for.
        output: directory to write; by default one among the bundle's engines.
        newer_ops: whether the parser that will read it knows RMSNormalization (TensorRT 10.15 and later).
        force: replace the directory.
        progress: told of the weights written.

    Returns:
        The ONNX file.

    Raises:
        InputError: the spec does not fit the model.
        OutputError: the directory exists or cannot be written.
    """
    check_spec(bundle, spec)
    # among the engines is the one place in the bundle that may be written to
    inputs = () if output is None else (bundle.directory,)
    if output is None:
        output = artifacts_directory(bundle) / f"{spec.engine}-onnx"
    with new_directory(
        output, force=force, inputs=inputs, needed_bytes=_lowered_bytes(bundle), kind="gta-edge-model"
    ) as partial:
        matmul = "plugin" if ENGINES[spec.engine].takes_plugins and spec.matmul != "native" else "native"
        name = _lowered(bundle, spec, partial, newer_ops, matmul, progress).name
    return Path(output) / name


def _lowered_bytes(bundle: Bundle) -> int:
    """Return the bytes of the weights of the model as the parser gets it."""
    return bundle.weight_bytes + words_bytes(bundle.config, bundle.storage)


def profile_shapes(bundle: Bundle, spec: EngineSpec) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
    """Return the least, usual and largest shape of every input by name, for each of the engine's profiles."""
    few, chunk, positions = spec.few_tokens, spec.chunk_size, logit_positions(bundle.config, spec)
    sizes = {  # tokens and logits
        DECODE: ((1, 1, 1), (1, 1, 1)),
        PREFILL: ((1, chunk, chunk), (1, 1, positions)),
        FEW: ((2, min(8, few), few), (2, min(8, few), few)),
    }
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = []
    for profile in sorted({DECODE, PREFILL, spec.few_profile}):
        least, usual, largest = (
            spec.input_shapes(bundle.config, batch=b, tokens=t, positions=m)
            for b, t, m in zip((1, 1, spec.max_batch), *sizes[profile], strict=True)
        )
        profiles.append({name: (shape, usual[name], largest[name]) for name, shape in least.items()})
    return profiles


def managed_spec(bundle: Bundle, spec: EngineSpec, policy: CachePolicy) -> EngineSpec:
    """Return what an engine for a cache policy is built for.

    Args:
        bundle: the model, perhaps with measured budgets.
        spec: what it would be built for without; of its chunk so much stays as suits the policy.
        policy: which rows of the cache stay.

    Raises:
        InputError: the policy makes no sense for this model.
    """
    from gta_edge.runtime.managed_cache import GPU_CHUNK_SIZE

    _check_length(bundle.config, spec)
    chunk = min(spec.chunk_size, GPU_CHUNK_SIZE)
    options: dict[str, Any] = {"chunk_size": chunk, "max_length": spec.max_length}
    options["limit"] = f"--max-length is {spec.max_length}"
    managed = EngineCache.of(policy.for_bundle(bundle), bundle.config, spec.cache_dtype, **options)
    return replace(spec, chunk_size=chunk, managed=managed)


def check_spec(bundle: Bundle, spec: EngineSpec) -> None:
    """Refuse what no engine of this model can be built for, before anything is worked out from it.

    Raises:
        InputError: a name that there is not, or a size outside of what the model has; which, and what is expected.
    """
    config = bundle.config
    if spec.engine not in ENGINES:
        raise InputError(*unknown("no engine is called {}; there are {}", spec.engine, ENGINES))
    kind = ENGINES[spec.engine]
    if spec.compute not in kind.compute_types:
        message = f"{spec.engine} does not compute in {{}}; expected {{}}"
        raise InputError(*unknown(message, spec.compute, kind.compute_types))
    caches = kind.cache_types(config, spec.compute)
    if spec.cache_dtype not in caches:
        raise InputError(
            *unknown(
                f"a cache of {{}} is not possible with --engine {spec.engine} and --compute {spec.compute} for "
                f"{config.architecture}; expected {{}}",
                spec.cache_dtype,
                caches,
            )
        )
    _check_matmul_choice(bundle, spec)
    _check_trees(config, spec)
    _check_length(config, spec)
    room = min(spec.capacities(config))
    if not 1 <= spec.chunk_size <= room:
        raise InputError(f"a chunk has {spec.chunk_size} tokens", f"expected 1 to the {room} of the cache")
    if not 1 <= spec.max_batch <= 256:
        raise InputError(f"--max-batch is {brief(spec.max_batch)}", "expected 1 to 256")


def _check_trees(config: ModelConfig, spec: EngineSpec) -> None:
    if not spec.tree_rows:
        return
    if not 1 <= spec.tree_rows <= MAX_TREE_ROWS:
        raise InputError(f"--trees is {brief(spec.tree_rows)}", f"expected 1 to {MAX_TREE_ROWS} rows")
    if not ENGINES[spec.engine].attends_by_plugin(config):
        raise InputError(
            f"trees of tokens take the attention's plugin, which {spec.engine} does not have for this model",
            "leave out --trees" + (", or build with --engine tensorrt" if TENSORRT.attends_by_plugin(config) else ""),
        )
    if spec.managed is not None or CACHES[spec.cache_dtype].in_blocks:
        other = "--cache-policy" if spec.managed is not None else f"--cache-dtype {spec.cache_dtype}"
        raise InputError(f"an engine with --trees has no {other}", "leave out one of both")


def _check_length(config: ModelConfig, spec: EngineSpec) -> None:
    if not 1 <= spec.max_length <= config.max_position_embeddings:
        raise InputError(
            f"--max-length is {brief(spec.max_length)}",
            f"the model has positions for 1 to {config.max_position_embeddings}",
        )


def _check_memory(
    needed: Requirement, peak: int, free: int | None, where: str, spec: EngineSpec, precision: str
) -> None:
    """Refuse what the system would end halfway, without a word, for want of memory."""
    if free is not None and peak > free:
        help_ = "close other programs"
        if needed.cache > needed.weights:
            length = (
                f"--cache-rows {max(spec.managed.capacities)}" if spec.managed else f"--max-length {spec.max_length}"
            )
            help_ += f", or give less than {length} --max-batch {spec.max_batch}"
        elif precision != "int4":
            help_ += ", or export with --precision int4"
        raise CapacityError(
            f"the build is expected to take {peak / 1e9:.2f} GB at its peak ({needed.weights / 1e9:.2f} for "
            f"weights, {needed.cache / 1e9:.2f} for the cache) and {free / 1e9:.2f} GB are free {where}",
            f"{help_}",
        )


def _check_matmul_choice(bundle: Bundle, spec: EngineSpec) -> None:
    if spec.matmul not in CHOICES:
        raise InputError(*unknown("--matmul is {}; expected {}", spec.matmul, CHOICES))
    if spec.matmul == "plugin" and not ENGINES[spec.engine].takes_plugins:
        raise InputError(
            f"{spec.engine} takes no plugins", "leave out --matmul plugin, or build with --engine tensorrt"
        )
    if spec.matmul == "plugin" and bundle.precision not in BITS:
        raise InputError(
            f"--matmul plugin is for matrices of int4 or int8, and the bundle's are {bundle.precision}",
            "leave it out, or export with --precision int4",
        )


def _matmul(
    bundle: Bundle, spec: EngineSpec, target: Target, scratch: Path, progress: Progress
) -> tuple[str, list[dict[str, Any]]]:
    """Return who multiplies by quantised matrices, and the timings that this was decided by."""
    if not ENGINES[spec.engine].takes_plugins:
        return "native", []
    if spec.matmul != "auto":
        return spec.matmul, []
    from gta_edge.runtime.tensorrt.lower import load_model
    from gta_edge.runtime.tensorrt.matmul_choice import calls_of, choose
    from gta_edge.runtime.tensorrt.matmul_timing import UnableError, time_matmuls

    try:
        timings = time_matmuls(calls_of(load_model(bundle)), spec, target, scratch, progress)
    except UnableError as unable:  # if the other cannot either, the engine's own build says so
        other = next(who for who in IMPLEMENTATIONS if who != unable.who)
        return other, [{"unable": unable.who, "reason": str(unable)}]
    return choose(timings).matmul, [each.document() for each in timings]


def matmul_of(written: Path) -> str:
    """Return who multiplies by quantised matrices in what was written: ``plugin`` or ``native``.

    Args:
        written: what ``build`` or ``lower_only`` returned.
    """
    path = written / "engine.json" if written.is_dir() else written.parent / "lowered.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    return str(document.get("content", document)["matmul"])


def _lowered(
    bundle: Bundle, spec: EngineSpec, directory: Path, newer_ops: bool, matmul: str, progress: Progress
) -> Path:
    from gta_edge.runtime.tensorrt.lower import lower

    capacities = spec.capacities(bundle.config)
    options: dict[str, Any] = {"compute": spec.compute, "capacity": capacities[0], "newer_ops": newer_ops}
    options["matmul"] = matmul
    if spec.features is not None:
        options |= {"capacity": capacities, "features": spec.features}
    plugin = ENGINES[spec.engine].attends_by_plugin(bundle.config)
    if plugin and spec.cache_dtype != spec.compute:
        options["cache_dtype"] = spec.cache_dtype
    return lower(bundle, directory, form="plugin" if plugin else "function", progress=progress, **options)
