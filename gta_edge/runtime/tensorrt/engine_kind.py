"""The kinds of engines: which of two libraries builds and runs them, and what they can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gta_edge.numerics.dtypes import COMPUTE_TYPES, FLOAT_TYPES, cache_types
from gta_edge.plugins.attention.tiling import has_kernels

if TYPE_CHECKING:
    from gta_edge.model.config import ModelConfig

__all__ = ["ENGINES", "TENSORRT", "TENSORRT_RTX", "EngineKind"]


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine.

    Attributes:
        name: as ``--engine`` and ``--backend`` take it; its library is the flavour of this name.
        compute_types: types that engines can compute in.
        takes_plugins: whether engines hold this package's plugins; otherwise attention is standard operators.
        builds_for_others: whether engines can be built for GPUs other than the one here, and without any.
        chooses_kernels: whether kernels are chosen when an engine is built, for the usual size of a profile, and not
            made for the sizes at hand when it runs.
    """

    name: str
    compute_types: tuple[str, ...]
    takes_plugins: bool
    builds_for_others: bool
    chooses_kernels: bool

    def attends_by_plugin(self, config: ModelConfig) -> bool:
        """Tell whether this package's kernels are a model's attention, and keep its cache."""
        return self.takes_plugins and has_kernels(config.attention, COMPUTE_TYPES[0])  # in all alike

    def cache_types(self, config: ModelConfig, compute: str) -> tuple[str, ...]:
        """Return the types that the cache of a model may have beside activations in ``compute``, the default first."""
        types = cache_types(compute, kernels=self.attends_by_plugin(config))
        return tuple(name for name in types if name == compute or has_kernels(config.attention, compute, name))


TENSORRT = EngineKind("tensorrt", COMPUTE_TYPES, takes_plugins=True, builds_for_others=False, chooses_kernels=True)
TENSORRT_RTX = EngineKind("tensorrt-rtx", FLOAT_TYPES, False, builds_for_others=True, chooses_kernels=False)

ENGINES = {kind.name: kind for kind in (TENSORRT, TENSORRT_RTX)}
"""By name."""
