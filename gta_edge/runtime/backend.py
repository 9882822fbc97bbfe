"""What the package knows of a backend: its descriptor, one for each, in the folder of its engine.

A descriptor is made when the registry is imported, so it imports nothing that takes long: libraries, and the session
over them, are loaded by what needs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from gta_edge.errors import BackendError, GtaEdgeError, InputError
from gta_edge.numerics.dtypes import COMPUTE_TYPES, cache_types
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from gta_edge.model.config import ModelConfig
    from gta_edge.plan.cost import Execution
    from gta_edge.runtime.session import Session

__all__ = ["Asked", "Availability", "Backend", "Importing"]

Importing = Callable[["str | None"], None]
"""Told of each module before it is imported, which may end the process, and of None when that is done."""


def _untold(module: str | None) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend works on this machine.

    Attributes:
        error: why it does not, and what to do; None where it works.
        found: what was seen beside that, such as ``version`` and ``providers``.
    """

    error: GtaEdgeError | None
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What was asked of a session, of which a backend takes what it has a use for.

    Attributes:
        threads: threads for one operator; None for one for each core that this process may use.
        exact: whether to multiply by int8 and int4 weights in float32 where activations would be rounded to int8.
        compute: type to compute in; None for the backend's own choice.
        cache_dtype: type of the cache; None for the backend's own choice.
        progress: told of what takes long.
    """

    threads: int | None
    exact: bool
    compute: str | None
    cache_dtype: str | None
    progress: Progress


class Backend(ABC):
    """A backend: what it is called and needs, what it can do, whether it works here, and how it opens a bundle."""

    name: str
    """As ``--backend`` takes it."""

    extra: str
    """The extra of this package that brings what it needs."""

    distribution: str
    """What pip calls the library that runs the model."""

    modules: tuple[str, ...]
    """What is imported to run a bundle; the first is the library that runs the model."""

    device: Literal["cpu", "gpu", "either"]
    """What it runs on; ``either`` is a GPU where there is one."""

    compute_types: tuple[str, ...]
    """Types that it can compute in."""

    fallback_compute: str = "fp16"
    """Type that a GPU computes in by default where weights are stored in none of ``COMPUTE_TYPES``."""

    builds_engine: bool = False
    """Whether it runs an engine that ``gta-edge build`` has to make of the bundle first."""

    reference: bool = False
    """Whether it is the model that every bundle is checked against."""

    manages_cache: bool = False
    """Whether it can hold a cache that a policy keeps small."""

    has_trees: bool = False
    """Whether its sessions can hold trees of tokens."""

    has_free_trees: bool = False
    """Whether calls without a tree take no longer in a session that could hold one."""

    cpu_kernels: bool = False
    """Whether ONNX Runtime's CPU kernels multiply, which hold and read weights in a form of their own."""

    writes_scores: bool = True
    """Whether attention scores go through memory; a fused kernel keeps them on the chip."""

    # --- types -------------------------------------------------------------------------------------------------

    def default_compute(self, precision: str, device: str | None = None) -> str:
        """Return the type to compute in for weights stored in ``precision``: on a GPU their own 16-bit type if it can.

        Args:
            precision: what the weights are stored in.
            device: ``cpu``, which computes in fp32, or another; what the backend runs on by default.
        """
        if (device or self.device) == "cpu":
            return "fp32"
        return precision if precision in COMPUTE_TYPES else self.fallback_compute

    def compute_for(self, compute: str | None, precision: str, device: str | None = None) -> str:
        """Return the type to compute in: the one asked for, or where that is None, ``default_compute``.

        Raises:
            BackendError: it cannot compute in what was asked for; in which it can.
        """
        if compute is None:
            return self.default_compute(precision, device)
        if compute not in self.compute_types:
            raise BackendError(
                f"{self.name} computes in {', '.join(self.compute_types)}, not in {compute}",
                "choose one of them, or leave the type to compute in out",
            )
        return compute

    def cache_types(self, config: ModelConfig, compute: str) -> tuple[str, ...]:
        """Return the types that the cache of a model may have beside activations in ``compute``, the default first."""
        return cache_types(compute, kernels=False)

    def cache_for(self, cache_dtype: str | None, config: ModelConfig, compute: str) -> str:
        """Return the type of the cache: the one asked for, or where that is None, the first of ``cache_types``.

        Raises:
            BackendError: it cannot have what was asked for; which it can.
        """
        allowed = self.cache_types(config, compute)
        if cache_dtype is None:
            return allowed[0]
        if cache_dtype not in allowed:
            raise BackendError(
                f"{self.name} has no cache of {cache_dtype} for {config.architecture} in {compute}",
                f"expected {' or '.join(allowed)}, or leave the type of the cache out",
            )
        return cache_dtype

    # --- what a plan asks --------------------------------------------------------------------------------------

    def runs_on(self, *, gpu: bool) -> str:
        """Return ``cpu`` or ``gpu``: what it runs on, on a machine with or without a GPU."""
        if self.device != "either":
            return self.device
        return "gpu" if gpu else "cpu"

    def execution(self, config: ModelConfig, precision: str, cache_dtype: str | None = None) -> Execution:
        """Return how it runs a model by default, for a plan.

        Args:
            config: the model's sizes.
            precision: what the weights are stored in.
            cache_dtype: type of the cache; by default the type to compute in.

        Raises:
            InputError: the cache cannot have this type.
        """
        from gta_edge.plan.cost import Execution

        compute = self.default_compute(precision)
        allowed = self.cache_types(config, compute)
        if cache_dtype is not None and cache_dtype not in allowed:
            raise InputError(
                f"a cache of {cache_dtype} is not possible for {config.architecture} with weights in {precision} on "
                f"{self.name}",
                f"expected {' or '.join(allowed)}",
            )
        chunk_size, logit_positions, logits_bytes = self._step_sizes()
        return Execution(
            compute,
            cache_dtype or compute,
            chunk_size,
            logit_positions,
            logits_bytes,
            writes_scores=self.writes_scores,
            cpu_kernels=self.cpu_kernels,
        )

    def _step_sizes(self) -> tuple[int, int, int]:
        """Return how many tokens of a prompt are run at once, and room for logits, as ``Execution`` has all three."""
        from gta_edge.runtime.cache_state import CHUNK_SIZE

        return CHUNK_SIZE, 1, 0

    # --- here, and now -----------------------------------------------------------------------------------------

    def availability(self, importing: Importing = _untold) -> Availability:
        """Try on this machine what a session needs.

        Args:
            importing: told of the modules that are imported.

        Raises:
            Exception: a library's own, where something is wrong that nobody expected.
        """
        found: dict[str, Any] = {}
        try:
            self._check(found, importing)
        except GtaEdgeError as error:
            return Availability(error, found)
        return Availability(None, found)

    @abstractmethod
    def _check(self, found: dict[str, Any], importing: Importing) -> None:
        """Raise, as a GtaEdgeError, what keeps a session from working here; note in ``found`` what is seen."""

    def is_here(self, bundle: Bundle) -> bool:
        """Tell whether it is meant to be used here: installed, and where it needs an engine of the bundle, built.

        What is and does not work is worth a word; what was never installed is not.
        """
        return find_spec(self.modules[0]) is not None

    def open(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        exact: bool = False,
        compute: str | None = None,
        cache_dtype: str | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Session:
        """Return a session for a bundle; options are those of ``registry.load``, and of ``Session``.

        Raises:
            GtaEdgeError: it does not work here, or not with this bundle or these options.
        """
        if options.get("cache") is not None and not self.manages_cache:
            raise BackendError(f"{self.name} cannot hold a cache with a policy", "leave the policy out, or take torch")
        if options.get("trees") and not self.has_trees:
            raise BackendError(f"{self.name} cannot hold trees of tokens", "leave trees out, or take torch")
        return self._open(bundle, Asked(threads, exact, compute, cache_dtype, progress), **options)

    @abstractmethod
    def _open(self, bundle: Bundle, asked: Asked, **options: Any) -> Session:
        """Return a session, made with what it knows of what was asked for, and with ``Session``'s options."""
