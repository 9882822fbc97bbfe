"""A managed cache in torch's memory: rows moved and folded, keys rotated, and what a step is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Cache, ManagedInputs
from gta_edge.model.tables import rotations
from gta_edge.plugins.cache.launches import turned_rows
from gta_edge.plugins.cache.torch import move_rows, rotate_keys
from gta_edge.runtime.cache_moves import ManagedStep, Moves

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["Received", "managed_inputs", "move", "rotate"]

_ALIGNMENT = 64  # values between two layers' beginnings, so that each begins where kernels can read several at once


class Received:
    """What the rows of each layer have received, in one piece of memory.

    Args:
        batch: B.
        capacities: of each layer.
        device: where it is.

    Attributes:
        layers: float32 [B, S] of each layer.
    """

    def __init__(self, batch: int, capacities: Sequence[int], device: torch.device) -> None:
        sizes = [-(-batch * capacity // _ALIGNMENT) * _ALIGNMENT for capacity in capacities]
        self._all = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self._starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._shapes = [(batch, capacity) for capacity in capacities]
        self.layers = self._parted(self._all)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self._all.nbytes

    def on_host(self) -> list[npt.NDArray[np.float32]]:
        """Return every layer's, in one copy; on the CPU the memory itself."""
        return [layer.numpy() for layer in self._parted(self._all.cpu())]

    def _parted(self, values: Tensor) -> list[Tensor]:
        return [
            values[start : start + batch * capacity].view(batch, capacity)
            for start, (batch, capacity) in zip(self._starts, self._shapes, strict=True)
        ]


def managed_inputs(
    step: ManagedStep, received: Sequence[Tensor], observe: str | None, device: torch.device
) -> tuple[Tensor, ManagedInputs]:
    """Return ``past_length`` [L, B] and the other inputs of a step, on the device."""

    def there(array: npt.NDArray[np.generic] | None) -> Tensor | None:
        return None if array is None else torch.tensor(array, device=device)

    inputs = ManagedInputs(
        positions=there(step.positions),
        row_bias=there(step.row_bias),
        past_received=received if observe else None,
        query_weight=there(step.query_weight),
        decay=there(step.decay),
        branch_start=there(step.branch_start),
        branches=there(step.branches),
        observe=observe or "",
    )
    return torch.tensor(step.past_length, device=device), inputs


def move(caches: Sequence[Cache], received: Sequence[Tensor], moves: Moves) -> None:
    """Fold and copy rows of caches [B, n, S, d] and of what rows received [B, S]."""
    move_rows(caches, received, moves.moves, moves.folds, moves.fold_weights)


def rotate(config: ModelConfig, caches: Sequence[Cache], shifts: Sequence[npt.NDArray[np.int64]]) -> None:
    """Rotate the keys of caches as if positions were larger by ``shifts``, [B, S] of each layer."""
    turned = [shift * (layer not in config.unrotated_layers) for layer, shift in enumerate(shifts)]
    rows, distinct = turned_rows(turned)
    rotate_keys(caches, rows, *rotations(config, distinct))
