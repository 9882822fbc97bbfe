"""The `torch` backend: the reference model, its cache updated in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gta_edge.config import GTAConfig
from gta_edge.model import Cache, Decoder, empty_cache
from gta_edge.optional import optional
from gta_edge.plugins import torch_ops
from gta_edge.runtime.session import Ids, Logits, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["TorchSession"]


def _latent_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch_ops.grouped_latent_attention_(*arguments), arguments[4], arguments[5]


def _query_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch_ops.grouped_query_attention_(*arguments), arguments[3], arguments[4]


class TorchSession(Session):
    """A ``Decoder`` in float32 behind the session's interface.

    Args:
        model: the model; its attention is switched to the in-place op.
        threads: threads for one operator, for the whole process; None leaves torch's own choice.
        options: as ``Session`` takes them.
    """

    backend = "torch"

    def __init__(self, model: Decoder, *, threads: int | None = None, **options: Any) -> None:
        super().__init__(model.config, **options)
        if threads:
            torch.set_num_threads(threads)
        in_place = _latent_in_place if isinstance(model.config, GTAConfig) else _query_in_place
        for layer in model.model.layers:
            layer.self_attn.attention = in_place  # type: ignore[union-attr]  # torch types every module's child so
        self._model = model.eval()
        self._caches: list[Cache] = []

    @property
    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._caches for tensor in layer)

    def _resize(self, batch: int, capacity: int) -> None:
        old, keep = self._caches, len(self._length) == batch
        if not (old and keep):
            self._caches = empty_cache(self.config, batch, capacity)
            return
        for i, layer in enumerate(old):  # a layer at a time: never twice the whole cache
            self._caches[i] = (_grown(layer[0], capacity), _grown(layer[1], capacity))

    def _run(self, input_ids: Ids, past_length: Ids, logit_positions: Ids) -> Logits:
        inputs = (torch.tensor(x) for x in (input_ids, past_length, logit_positions))
        with torch.inference_mode():
            logits, _ = self._model(*inputs, self._caches)
        result: Logits = logits.numpy()
        return result

    def close(self) -> None:
        super().close()
        self._caches = []


def _grown(cache: Tensor, capacity: int) -> Tensor:
    b, n, s, d = cache.shape
    grown = torch.zeros(b, n, capacity, d)
    grown[:, :, :s] = cache
    return grown
