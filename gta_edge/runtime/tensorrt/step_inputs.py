"""The inputs of a step beside the caches: pinned memory that a step fills, and the GPU's that the engine reads."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.session import Cuda
from gta_edge.errors import CapacityError
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import (
    BRANCHES,
    DECAY,
    INPUT_IDS,
    LOGIT_POSITIONS,
    PAST_LENGTH,
    POSITIONS,
    QUERY_WEIGHT,
    ROW_BIAS,
    TREES,
)
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.session import Ids
from gta_edge.runtime.tensorrt.engine_cache import EngineCache

__all__ = ["StepInputs", "Values", "step_values"]

Values = dict[str, npt.NDArray[Any]]
"""Inputs of a step by the graph's names."""


class StepInputs:
    """Memory for inputs of the largest step.

    Args:
        cuda: where.
        largest: of each input by name, its largest shape and its numpy type.

    Raises:
        CapacityError: there is not as much.
    """

    def __init__(self, cuda: Cuda, largest: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        self._cuda = cuda
        self._hosts: Values = {}
        self.addresses: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        for name, (shape, dtype) in largest.items():
            host = self._hosts[name] = cuda.host_array((prod(shape),), dtype, f"a buffer for {name}")
            self.addresses[name] = cuda.allocate(host.nbytes, name)

    def fill(self, values: Values) -> None:
        """Put a step's inputs into pinned memory, all of them."""
        for name, array in values.items():
            self._hosts[name][: array.size] = array.reshape(-1)
            self._counts[name] = array.size

    def copy_in(self) -> None:
        """Start the copies to the GPU of what was filled last."""
        for name, host in self._hosts.items():
            self._cuda.copy_in(self.addresses[name], host[: self._counts[name]])


def step_values(
    cache: EngineCache | None,
    config: ModelConfig,
    input_ids: Ids,
    past_length: Ids,
    logit_positions: Ids,
    managed: ManagedStep | None,
    tree_words: int = 0,
) -> Values:
    """Return the inputs of a step by the graph's names.

    Args:
        cache: what the engine's cache is managed with; None if it is not.
        config: the model's sizes.
        input_ids: int64 [B, T].
        past_length: tokens in the cache, int64 [B].
        logit_positions: int64 [B, M].
        managed: what a policy gives; None without one, where an engine that takes it is told that nothing is to be
            observed, every row stands for one token, and rows are positions.
        tree_words: words of ``branches`` of an engine that holds trees; 0 of another.

    Raises:
        CapacityError: a tree has more rows than words.
    """
    values: Values = {INPUT_IDS: input_ids, PAST_LENGTH: past_length, LOGIT_POSITIONS: logit_positions}
    if tree_words:
        assert managed is not None  # a session of such an engine has a TreeCache
        given = managed.given(TREES)
        found = given[BRANCHES]
        if found.shape[1] > tree_words:
            raise CapacityError(
                f"a tree of tokens takes {found.shape[1]} rows, and the engine was built for {tree_words}",
                "drop nodes of it, or build with more --trees",
            )
        words = np.zeros((len(input_ids), tree_words), np.int64)  # a row that has none is not seen
        words[:, : found.shape[1]] = found
        return values | given | {BRANCHES: words}
    if cache is None:
        return values
    batch, tokens = input_ids.shape
    layers = config.num_hidden_layers
    if managed is None:
        everywhere = np.broadcast_to(past_length, (layers, batch))
        managed = ManagedStep(everywhere, past_length[:, None] + np.arange(tokens))
    values |= {PAST_LENGTH: managed.past_length, POSITIONS: managed.positions}
    if cache.bias_rows:
        bias = values[ROW_BIAS] = np.zeros((layers, batch, cache.bias_rows), np.float32)
        if managed.row_bias is not None:  # an engine may have more of them than the policy
            bias[..., : managed.row_bias.shape[2]] = managed.row_bias
    if cache.observe:
        weight, decay = managed.query_weight, managed.decay
        values[QUERY_WEIGHT] = np.zeros((batch, tokens), np.float32) if weight is None else weight
        values[DECAY] = np.ones(batch, np.float32) if decay is None else decay
    return values
