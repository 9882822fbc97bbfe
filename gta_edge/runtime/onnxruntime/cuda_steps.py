"""Steps of the `onnxruntime-cuda` backend that are bound: buffers for one shape of step, perhaps with a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["NO_GRAPH", "Shape", "Step", "Steps"]

NO_GRAPH = -1
"""As ``gpu_graph_id`` of a run: without one."""

Shape = tuple[int, int, int, int]
"""B, T, M and W of a step; W is 0 without trees."""

_GRAPHS_KEPT = 12  # with their inputs, logits, and what ONNX Runtime allocates for each


@dataclass(frozen=True)
class Step:
    """Buffers bound for one shape of step, which are only filled from then on.

    Attributes:
        shape: of the step.
        first_row: of the batch.
        binding: of ONNX Runtime.
        inputs: buffers by name.
        logits: a buffer.
        graph_id: number of its CUDA graph, which is captured in its first run; ``NO_GRAPH`` for none.
    """

    shape: Shape
    first_row: int
    binding: Any
    inputs: dict[str, Any]
    logits: Any
    graph_id: int


class Steps:
    """Those with a CUDA graph, of the shapes that were used last, and the last of all others.

    Args:
        release: frees a CUDA graph, by its number.
    """

    def __init__(self, release: Callable[[int], None]) -> None:
        self._release = release
        self._with_graph: dict[Shape, Step] = {}  # the last used at the end
        self._other: Step | None = None

    @property
    def shapes(self) -> list[Shape]:
        """Shapes of steps with a graph, the last used at the end."""
        return list(self._with_graph)

    def find(self, shape: Shape, first_row: int, bind: Callable[[], Step], *, with_graph: bool) -> tuple[Step, bool]:
        """Return a step, and whether it is new.

        Args:
            shape: of the step.
            first_row: of the batch.
            bind: makes one, where there is none.
            with_graph: whether it is to have a graph.
        """
        step = self._with_graph.pop(shape, None) if with_graph else self._other
        is_new = step is None or step.shape != shape or step.first_row != first_row
        if step is None or is_new:
            if step is not None:
                self._free(step)
            while with_graph and len(self._with_graph) >= _GRAPHS_KEPT:
                self._free(self._with_graph.pop(next(iter(self._with_graph))))
            step = bind()
        if with_graph:
            self._with_graph[shape] = step
        else:
            self._other = step
        return step, is_new

    def forget(self) -> None:
        """Let go of all, and of their graphs."""
        for step in self._with_graph.values():
            self._free(step)
        self.clear()

    def clear(self) -> None:
        """Let go of all, whose graphs go with the session."""
        self._with_graph, self._other = {}, None

    def _free(self, step: Step) -> None:
        if step.graph_id != NO_GRAPH:
            self._release(step.graph_id)
