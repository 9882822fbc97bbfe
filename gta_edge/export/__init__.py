"""Checkpoint to bundle. Calling this module exports: ``gta_edge.export(checkpoint, bundle)``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gta_edge.export.pipeline import Export

__all__: list[str] = []


class _CallableModule(ModuleType):
    """``gta_edge.export`` is this package and, by contract, also the function: importing it must not hide that."""

    def __call__(self, *arguments: Any, **options: Any) -> Export:
        from gta_edge.export.pipeline import export

        return export(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
