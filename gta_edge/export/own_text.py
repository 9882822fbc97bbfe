"""Text that a model writes itself: calibration without data, as in LLM-QAT (arXiv 2305.17888).

Every sequence begins with a token drawn from the whole vocabulary, so that what follows is of many kinds, and goes on
as the model predicts, at temperature 1. It runs in PyTorch, in float32, all sequences at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.reference import build_decoder
from gta_edge.errors import ExportError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import SelfAttention, empty_cache
from gta_edge.plugins.attention.torch import attention_in_place
from gta_edge.support.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = ["own_text", "shape_for"]

_SEQUENCES, _TOKENS = 32, 256
_FEWEST_SEQUENCES = 8
_WORK = 1.2e12  # tokens times parameters: all sequences up to 146 million parameters, the fewest from 586 million on
_SEED = 0


def shape_for(config: ModelConfig) -> tuple[int, int]:
    """Return how many sequences a model writes, of how many tokens each: the larger it is, the fewer."""
    tokens = min(_TOKENS, config.max_position_embeddings)
    affordable = int(_WORK / (config.parameters * tokens))
    return max(_FEWEST_SEQUENCES, min(_SEQUENCES, affordable)), tokens


def own_text(source: Checkpoint, progress: Progress = silent) -> npt.NDArray[np.int64]:
    """Return tokens that a checkpoint's model writes, int64 [rows, T]; the same each time on the same machine.

    Args:
        source: the checkpoint; all of it is held in float32.
        progress: told of tokens written.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ExportError: its logits are not finite.
    """
    config = source.config
    rows, tokens = shape_for(config)
    model = build_decoder(config, ((name, source.read(name)) for name in source.names))
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention = attention_in_place
    random = np.random.Generator(np.random.PCG64(_SEED))
    ids = np.empty((rows, tokens), np.int64)
    ids[:, 0] = random.choice(_beginnings(config), rows)
    caches = empty_cache(config, rows, tokens)
    last = torch.zeros(rows, 1, dtype=torch.int64)
    with torch.inference_mode():
        for position in range(1, tokens):
            progress("writing a text to calibrate with", position - 1, tokens - 1)
            length = torch.full((rows,), position - 1, dtype=torch.int64)
            newest = torch.from_numpy(ids[:, position - 1 : position])
            logits = model(newest, length, last, caches)[0][:, 0]
            ids[:, position] = _drawn(logits, random.random(rows))
    progress("writing a text to calibrate with", tokens - 1, tokens - 1)
    return ids


def _beginnings(config: ModelConfig) -> npt.NDArray[np.int64]:
    """Return the ids that a text may begin with: any but the special ones that the config names."""
    special = {config.bos_token_id, *config.eos_token_ids}
    return np.array([token for token in range(config.vocab_size) if token not in special] or [0])


def _drawn(logits: Tensor, uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return a token for each row of ``logits`` [B, V], drawn with the numbers ``uniform`` [B] from 0 to 1."""
    summed = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = summed[:, -1]
    if not torch.isfinite(total).all():
        raise ExportError(
            "what the model makes of its own text is not finite", "check the weights, or export with --calibrate none"
        )
    found = torch.searchsorted(summed, (torch.from_numpy(uniform) * total)[:, None], right=True)[:, 0]
    result: npt.NDArray[np.int64] = found.clamp(max=logits.shape[1] - 1).numpy()
    return result
