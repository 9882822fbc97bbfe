"""A TensorRT engine that lies in a bundle, and what it was made from and for.

    engines/tensorrt/engine.plan, engines/tensorrt-rtx/engine.plan    the engine, tied to a TensorRT version and a GPU
    engines/…/engine.json                                             the record that is checked before it is loaded

TensorRT refuses some engines that do not fit with a message of its own, late, and runs others wrongly or slowly. So
everything that matters is recorded, and a difference is an error that names it and the command that builds anew.

An engine is native code, as TensorRT runs it: only one that this user built on this machine is loaded
(``formats.artifacts``).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gta_edge.errors import EngineError
from gta_edge.formats.artifacts import (
    Artifact,
    RefusedError,
    difference,
    made_from,
    new_artifact,
    open_artifact,
    write_record,
)
from gta_edge.formats.bundle import Bundle
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import (
    INPUT_IDS,
    LOGIT_POSITIONS,
    PAST_LENGTH,
    TREES,
    CacheTensor,
    cache_tensors,
    capacity_of,
    managed_shapes,
)
from gta_edge.numerics.dtypes import FLOAT_TYPES, QUANTIZED_CACHE_TYPES
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS, Features
from gta_edge.runtime.step_costs import WIDTHS
from gta_edge.runtime.tensorrt.engine_cache import EngineCache
from gta_edge.runtime.tensorrt.engine_kind import ENGINES
from gta_edge.support.ownership import ARTIFACTS
from gta_edge.support.text import one_line
from gta_edge.version import __version__

__all__ = [
    "CHOICES",
    "DECODE",
    "FEW",
    "IMPLEMENTATIONS",
    "PREFILL",
    "EngineManifest",
    "EngineSpec",
    "Wanted",
    "compute_capability",
    "engine_directory",
    "engine_output",
    "has_engine",
    "load_engine",
    "require_engine",
    "write_engine",
]

IMPLEMENTATIONS = ("plugin", "native")
"""Who multiplies by quantised matrices."""
CHOICES = ("auto", *IMPLEMENTATIONS)
"""What ``gta-edge build --matmul`` takes."""
DECODE, PREFILL, FEW = range(3)
"""The profiles: single tokens, chunks of a prompt, and, of some engines, a few tokens that continue a text."""
PLAN, RECORD = "engine.plan", "engine.json"
_REVISION = 2  # of the profiles that engines have: before 2 there were two, and logits of 16 positions
_ROWS_STEP = 16
_RECEIVED_BYTES = 4  # of what a row received, a float32


@dataclass(frozen=True)
class Wanted:
    """What a session wants of an engine.

    Attributes:
        compute: type of activations; None for any.
        cache_dtype: how the cache is stored; None for any.
        policy: options of ``gta-edge build`` for a cache policy; empty for none.
        tree_rows: rows for trees of tokens; 0 for none.
    """

    compute: str | None = None
    cache_dtype: str | None = None
    policy: str = ""
    tree_rows: int = 0

    def command(self, bundle: Path, engine: str) -> str:
        """Return the command that builds such an engine, where nothing else is known of it."""
        options = f" --compute {self.compute}" if self.compute else ""
        options += f" --cache-dtype {self.cache_dtype}" if self.cache_dtype else ""
        options += f" {self.policy}" if self.policy else ""
        options += f" --trees {self.tree_rows}" if self.tree_rows else ""
        return f"gta-edge build {shlex.quote(str(bundle))} --engine {engine}{options}"

    def check(self, spec: EngineSpec, bundle: Bundle) -> None:
        """Raise EngineError where an engine has other types; with the command that builds it with these."""
        for expected, found, what in (
            (self.compute, spec.compute, "computes"),
            (self.cache_dtype, spec.cache_dtype, "caches"),
        ):
            if expected not in (None, found):
                raise EngineError(
                    f"{engine_directory(bundle, spec.engine)}: the engine {what} in {found}, not in {expected}",
                    f"run: {spec.command(bundle.directory, self)}",
                )
        if self.tree_rows and not spec.tree_rows:
            raise EngineError(
                f"{engine_directory(bundle, spec.engine)}: the engine was built without room for trees of tokens",
                f"run: {spec.command(bundle.directory, self)}",
            )


ANY = Wanted()


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built for, as the options of ``gta-edge build`` say it.

    Attributes:
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        compute: type of activations, ``fp16``, ``bf16`` or ``fp32``.
        cache_dtype: how the cache is stored: the compute type, or one of ``QUANTIZED_CACHE_TYPES``.
        max_length: tokens that a row may have: what its cache has room for, or with a managed one, positions.
        max_batch: rows at once.
        chunk_size: tokens of a prompt at once.
        matmul: who computes products with int4 and int8 matrices: ``plugin``, ``native``, or ``auto``, the faster.
        managed: what the cache is managed with; None keeps every token.
        tree_rows: rows that a sequence has for trees of tokens behind its text; 0 for none.
    """

    engine: str
    compute: str
    cache_dtype: str
    max_length: int
    max_batch: int
    chunk_size: int
    matmul: str = "auto"
    managed: EngineCache | None = None
    tree_rows: int = 0

    @property
    def features(self) -> Features | None:
        """Inputs that the graph has for a managed cache, or for trees; None without either."""
        if self.tree_rows:
            return TREES
        return self.managed.features if self.managed else None

    @property
    def few_tokens(self) -> int:
        """Most tokens of a call that continues a text for which there are CUDA graphs."""
        return min(WIDTHS[-1], self.chunk_size)

    @property
    def few_profile(self) -> int:
        """The profile that such calls of more than one token are run with."""
        return FEW if ENGINES[self.engine].chooses_kernels and self.few_tokens > 1 else PREFILL

    @property
    def tree_words(self) -> int:
        """Words of ``branches``: of every step as many, so that single tokens have one shape."""
        return -(-self.tree_rows // MAX_BRANCH_TOKENS) * MAX_BRANCH_TOKENS

    def capacities(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the rows that each layer's cache has room for: whole blocks, of a cache in blocks."""
        if self.managed is not None:
            return self.managed.capacities
        if self.tree_rows:  # and one for rows that change places
            rows = -(-(self.max_length + self.tree_rows + 1) // _ROWS_STEP) * _ROWS_STEP
            return (rows,) * config.num_hidden_layers
        return (capacity_of(self.cache_dtype, self.max_length),) * config.num_hidden_layers

    def cache_tensors(self, config: ModelConfig) -> list[CacheTensor]:
        """Return what the cache consists of."""
        return cache_tensors(config, self.cache_dtype, compute=self.compute)

    def input_shapes(
        self, config: ModelConfig, *, batch: int, tokens: int, positions: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input of the engine by name.

        Args:
            config: the model's sizes.
            batch: rows.
            tokens: new ones per row.
            positions: of each row, that logits are given for.
        """
        capacities = self.capacities(config)
        shapes: dict[str, tuple[int, ...]] = {
            INPUT_IDS: (batch, tokens),
            PAST_LENGTH: (batch,),
            LOGIT_POSITIONS: (batch, positions),
        }
        for tensor in self.cache_tensors(config):
            shapes[tensor.past] = tensor.shape(batch, capacities[tensor.layer])
        if self.features is not None:
            sizes = {"batch": batch, "tokens": tokens, "words": self.tree_words}
            shapes |= managed_shapes(self.features, **sizes, capacities=capacities)
        return shapes

    def cache_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of the cache of all layers and rows, with scales, open blocks and what rows received."""
        capacities = self.capacities(config)
        size = sum(each.nbytes(self.max_batch, capacities[each.layer]) for each in self.cache_tensors(config))
        if self.managed is not None and self.managed.observe is not None:
            size += _RECEIVED_BYTES * self.max_batch * sum(capacities)
        return size

    def command(self, bundle: Path, wanted: Wanted | None = None) -> str:
        """Return the command that builds such an engine, replacing the one there is.

        Args:
            bundle: the model's directory.
            wanted: what such an engine is to have other than this.
        """
        wanted = wanted or ANY
        compute = wanted.compute or self.compute
        cache_dtype = wanted.cache_dtype or (compute if self.cache_dtype == self.compute else self.cache_dtype)
        options = f"--engine {self.engine} --compute {compute} --cache-dtype {cache_dtype}"
        options += f" --max-length {self.max_length} --max-batch {self.max_batch}"
        policy = wanted.policy or (self.managed.policy if self.managed else "")
        options += f" {policy}" if policy else ""
        tree_rows = wanted.tree_rows or (0 if policy else self.tree_rows)
        options += f" --trees {tree_rows}" if tree_rows else ""
        options += f" --matmul {self.matmul} --force" if self.matmul != "auto" else " --force"
        return f"gta-edge build {shlex.quote(str(bundle))} {options}"


@dataclass(frozen=True)
class EngineManifest:
    """What an engine was made from, by and for.

    Attributes:
        spec: what it was built for.
        made_from: SHA-256 of the bundle's graph and weights, by file name.
        tensorrt: version of TensorRT that built it, which alone can load it.
        compute_capabilities: of the GPUs that it was built for, ``8.7``.
        gta_edge: version of this package that built it; its plugin is part of that.
        matmul: its implementation of products with quantised matrices, ``plugin`` or ``native``.
        matmul_timings: what that was decided by, if it was: of each kind of matmul, see ``Timing.document``; or who
            could not multiply here, and why.
        gpu: name of the GPU that kernels were timed on; empty where there was none.
        revision: which profiles it has.
    """

    spec: EngineSpec
    made_from: dict[str, str]
    tensorrt: str
    compute_capabilities: list[str]
    gta_edge: str = __version__
    matmul: str = "native"
    matmul_timings: list[dict[str, Any]] = field(default_factory=list)
    gpu: str = ""
    revision: int = _REVISION


def engine_directory(bundle: Bundle, engine: str) -> Path:
    """Return where a bundle's engine lies."""
    return bundle.directory / ARTIFACTS / engine


def has_engine(bundle: Bundle, engine: str) -> bool:
    """Tell whether a bundle has an engine of this kind that was built here, whatever it was built for."""
    try:
        _open_engine(bundle, engine)
    except EngineError:
        return False
    return True


def engine_output(bundle: Bundle, engine: str, *, force: bool, needed_bytes: int = 0) -> AbstractContextManager[Path]:
    """Return a context manager of the directory to write an engine into, as ``new_artifact`` does.

    An engine that this machine would not load is replaced in any case.

    Raises:
        OutputError: there is one already and not ``force``, the bundle cannot be written to, or the disk is too full.
    """
    force = force or not has_engine(bundle, engine)
    return new_artifact(bundle, f"{ARTIFACTS}/{engine}", force=force, needed_bytes=needed_bytes)


def write_engine(directory: Path, record: EngineManifest, plan: bytes | memoryview) -> None:
    """Write an engine and its record.

    Raises:
        OSError: they cannot be written.
    """
    (directory / PLAN).write_bytes(plan)
    write_record(directory, RECORD, asdict(record))


def compute_capability(architecture: str) -> str:
    """Return ``8.7`` for ``sm_87``."""
    digits = architecture.removeprefix("sm_")
    return f"{digits[:-1]}.{digits[-1]}"


def load_engine(
    bundle: Bundle,
    engine: str,
    *,
    tensorrt: str,
    compute_capability: str,
    gpu: str = "",
    wanted: Wanted = ANY,
) -> tuple[memoryview, EngineManifest]:
    """Return a bundle's engine, mapped from its file, and its record, if it fits what is here.

    The file is hashed where its modification time is not the one recorded: a copy, or a change.

    Args:
        bundle: the model.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        tensorrt: version of TensorRT that will load it.
        compute_capability: of the GPU that will run it.
        gpu: that GPU's name; boards of one compute capability differ, and kernels were timed on one of them.
        wanted: types and policy that are wanted of it.

    Raises:
        EngineError: there is none, it is damaged or of another machine, or it was made from or for something else, or
            with other types; which, and the command that builds it anew.
    """
    directory = engine_directory(bundle, engine)
    artifact, record = _open_engine(bundle, engine, wanted)
    names = (
        "the bundle's files",
        "gta-edge",
        "TensorRT",
        "the GPU's compute capability",
        "the GPU",
        "the revision of engines",
    )
    now = made_from(bundle), __version__, tensorrt, compute_capability, gpu or record.gpu, str(_REVISION)
    built_for = _built_for(record, compute_capability)
    then = record.made_from, record.gta_edge, record.tensorrt, built_for, record.gpu or gpu, str(record.revision)
    found = difference(dict(zip(names, now, strict=True)), dict(zip(names, then, strict=True)))
    if found is not None:
        remedy = record.spec.command(bundle.directory, wanted)
        raise EngineError(f"{directory}: {found} when the engine was built", f"run: {remedy}")
    wanted.check(record.spec, bundle)
    return artifact.mapped[PLAN], record


def _built_for(record: EngineManifest, compute_capability: str) -> str:
    """Return the compute capability if the engine was built for it, otherwise those that it was built for."""
    known = record.compute_capabilities
    return compute_capability if compute_capability in known else ", ".join(known)


def require_engine(bundle: Bundle, engine: str, wanted: Wanted = ANY) -> None:
    """Raise EngineError where a bundle has no engine of this kind; what there is may still not fit.

    Args:
        bundle: the model.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        wanted: types and policy that are wanted of it, for the command that builds it.
    """
    directory = engine_directory(bundle, engine)
    try:
        for link in (directory.parent, directory):
            if link.is_symlink():
                raise EngineError(f"{link}: is a link, and engines are read from the bundle itself", "remove the link")
        there = directory.is_dir()
    except OSError as error:  # a directory that may not be searched
        raise EngineError(
            f"{directory}: cannot be read ({error.strerror})", "give yourself access, or choose another backend"
        ) from error
    if not there:
        raise EngineError(f"{directory}: there is no engine", f"run: {wanted.command(bundle.directory, engine)}")


def _open_engine(bundle: Bundle, engine: str, wanted: Wanted = ANY) -> tuple[Artifact, EngineManifest]:
    """Return a bundle's engine and its record, if it is this machine's and as it was written."""
    require_engine(bundle, engine, wanted)
    directory, remedy = engine_directory(bundle, engine), f"run: {wanted.command(bundle.directory, engine)}"
    try:
        artifact = open_artifact(
            bundle.directory, f"{ARTIFACTS}/{engine}", RECORD, mapped=(PLAN,), verify_hashes=bundle.verified
        )
    except RefusedError as refused:
        raise EngineError(f"{directory}: the engine is not used ({refused})", remedy) from refused
    try:
        record = _read(artifact.content)
        _check_types(record)
        if PLAN not in artifact.mapped or record.spec.engine != engine:
            raise ValueError(f"it is of {record.spec.engine}, or lists no {PLAN}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of another version of this package
        raise EngineError(
            f"{directory / RECORD}: is not the record of an engine ({one_line(error)})", remedy
        ) from error
    return artifact, record


def _read(entries: Mapping[str, Any]) -> EngineManifest:
    """Return a record, whose values may be of any type."""
    spec = dict(entries["spec"])
    if spec.get("managed") is not None:
        spec["managed"] = EngineCache(**spec["managed"])
    return EngineManifest(**{"revision": 1, **entries, "spec": EngineSpec(**spec)})


def _check_types(record: EngineManifest) -> None:
    """Raise ValueError where a value is not of its type; dataclasses take anything."""
    spec, lists = record.spec, record.compute_capabilities
    texts = [record.tensorrt, record.gta_edge, record.gpu, spec.engine, spec.compute, spec.cache_dtype]
    texts += [*record.made_from, *record.made_from.values(), *lists, spec.matmul, record.matmul]
    numbers = [spec.max_length, spec.max_batch, spec.chunk_size, record.revision]
    if spec.managed is not None:
        texts.append(spec.managed.policy)
        numbers += spec.managed.capacities
        _ = spec.managed.features  # which refuses what there is not
    if not (isinstance(lists, list) and isinstance(record.matmul_timings, list)):
        raise ValueError("a list is expected and something else found")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is expected and something else found")
    known = spec.compute in FLOAT_TYPES and spec.cache_dtype in (spec.compute, *QUANTIZED_CACHE_TYPES)
    if not known or record.matmul not in IMPLEMENTATIONS:
        raise ValueError("a type, or a word, that there is not")
    if type(spec.tree_rows) is not int or spec.tree_rows < 0:
        raise ValueError("a whole number is expected and something else found")
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("a positive whole number is expected and something else found")
