"""The PyTorch model with given weights: what everything else is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BundleError
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Decoder, empty_cache
from gta_edge.support.threads import compute_threads

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

__all__ = ["build_decoder", "reference_logits", "use_startable_threads"]


def build_decoder(config: ModelConfig, weights: Iterable[tuple[str, npt.NDArray[Any]]]) -> Decoder:
    """Return a ``Decoder`` in float32 that holds the given parameters, without a second copy of them.

    Args:
        config: the model's sizes.
        weights: checkpoint names and arrays; biases that are not among them are absent.

    Raises:
        BundleError: a parameter is missing.
    """
    use_startable_threads()
    tensors = {name: torch.from_numpy(array.astype(np.float32, copy=False)) for name, array in weights}
    missing = [n for n in config.parameter_shapes() if n not in tensors and not config.is_optional(n)]
    if missing:
        raise BundleError(f"the weights lack {missing[0]} and {len(missing) - 1} more", "export the bundle again")
    with torch.device("meta"):
        model = Decoder(config, tensors.keys())
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def use_startable_threads(asked: int | None = None) -> None:
    """Let torch compute with as many threads as the system lets start: where one does not, OpenMP ends the process.

    Args:
        asked: how many, for the whole process; None for torch's own choice, or fewer.

    Raises:
        InputError: more than could be of use.
        CapacityError: fewer can be started than were asked for.
    """
    possible = compute_threads(asked)
    # torch counts the cores that the process may run on, and not how much of their time it gets
    if asked or possible < torch.get_num_threads():
        torch.set_num_threads(possible)


def reference_logits(model: Decoder, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return float32 logits [B, T, V] of ``ids`` [B, T], in one pass from an empty cache."""
    batch, tokens = ids.shape
    positions = torch.arange(tokens).expand(batch, -1)
    caches = empty_cache(model.config, batch, tokens)
    with torch.inference_mode():
        logits, _ = model(torch.tensor(ids), torch.zeros(batch, dtype=torch.int64), positions, caches)
    result: npt.NDArray[np.float32] = logits.numpy()
    return result
