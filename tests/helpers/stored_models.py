"""A model's parameters as an int8 or int4 bundle holds them, without the bundle: no ONNX is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.weights import is_kept, storage_for
from gta_edge.model.config import ModelConfig, parse_config
from gta_edge.numerics.quantization import QuantizedMatrix

__all__ = ["StoredModel"]


@dataclass(frozen=True, eq=False)
class StoredModel:
    """Quantised parameters, by checkpoint name.

    Args:
        entries: of config.json.
        weights: of a checkpoint, float32.
        precision: ``int8`` or ``int4``.
        block_size: as ``export_model`` takes it.
    """

    entries: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    precision: str
    block_size: int | None = None

    @cached_property
    def config(self) -> ModelConfig:
        return parse_config(dict(self.entries))

    @cached_property
    def _parameters(self) -> dict[str, np.ndarray | QuantizedMatrix]:
        storage = storage_for(self.config, self.precision, self.block_size)
        quantised = Quantizer(lambda name: self.weights[name], storage)
        found: dict[str, np.ndarray | QuantizedMatrix] = {}
        for name, values in self.weights.items():
            if is_kept(name):
                found[name] = values.astype(np.float16).astype(np.float32)
            else:
                found[name] = quantised(name) if values.ndim == 2 else values.astype(np.float32)
        return found

    def stored(self) -> Iterator[tuple[str, np.ndarray | QuantizedMatrix]]:
        """Names and parameters, matrices in codes, as ``read_stored`` yields them."""
        return iter(self._parameters.items())

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """The same dequantised, as ``read_weights`` yields them."""
        for name, stored in self.stored():
            yield name, stored.values if isinstance(stored, QuantizedMatrix) else stored
