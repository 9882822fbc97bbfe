"""Stand-ins for CUDA graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gta_edge.model.decoder import Decoder


class WithoutGraph:
    """In the place of ``DecodeGraph``: the same step, launched operator by operator."""

    def __init__(self, model: Decoder, caches: Any, batch: int) -> None:
        self._model, self._caches = model, caches

    def replay(self, ids: np.ndarray, past_length: np.ndarray) -> torch.Tensor:
        inputs = [torch.tensor(x, device="cuda") for x in (ids, past_length, np.zeros_like(ids))]
        return self._model(*inputs, self._caches)[0].cpu()
