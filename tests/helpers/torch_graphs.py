"""Stand-ins for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from gta_edge.runtime.torch.cuda_graph import DecodeGraph, Step


class WithoutGraph(DecodeGraph):
    """The same step on the same buffers, launched operator by operator."""

    def _captured(self, model: Step, arguments: Sequence[Any]) -> Any:
        self._device_logits, _ = model(*arguments)
        return SimpleNamespace(replay=lambda: self._device_logits.copy_(model(*arguments)[0]))
