"""The kernels between matmuls on a GPU: both calls, with what they ought to compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins.elementwise.kernels import elementwise_kernels
from tests.helpers import elementwise_cases as cases
from tests.helpers.gpu_calls import Memory, synchronize

TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2}
"""Of an output: largest error over the largest magnitude; three roundings at most."""


class Call:
    """A residual's addition with its norm, and SiLU(gate) times up: memory on the device, between guards.

    Args:
        compute: type of everything.
        rows: of x.
        width: of a row.
        with_addend: whether something is added before the norm.
    """

    def __init__(self, compute: str, rows: int, width: int, *, with_addend: bool = True) -> None:
        self.rows, self.width, self.with_addend = rows, width, with_addend
        self.memory = Memory()
        for seed, name in enumerate(("x", "addend", "gate", "up")):
            scale = 4.0 if name == "gate" else 1.0
            self.memory.add(name, cases.values(rows, width, compute=compute, seed=seed, scale=scale))
        self.memory.add("weight", 1 + 0.2 * cases.values(width, compute=compute, seed=9))
        for name in ("sum", "normed", "output"):
            self.memory.add_poisoned(name, (rows, width), cases.TYPES[compute])
        self.kernels = elementwise_kernels(compute, current_gpu())
        written = {"normed", "output"} | ({"sum"} if with_addend else set())
        self.before = {name: self.memory.bytes_of(name) for name in self.memory.tensors if name not in written}
        synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self.memory.tensors[name]

    def launch(self, stream: Any = 0) -> None:
        address = {name: tensor.data_ptr() for name, tensor in self.memory.tensors.items()}
        self.kernels.add_norm(
            stream,
            x=address["x"],
            addend=address["addend"] if self.with_addend else 0,
            weight=address["weight"],
            sum=address["sum"] if self.with_addend else 0,
            normed=address["normed"],
            rows=self.rows,
            width=self.width,
            epsilon=cases.EPSILON,
        )
        values = self.rows * self.width
        self.kernels.silu_multiply(
            stream, gate=address["gate"], up=address["up"], output=address["output"], values=values
        )

    def run(self) -> Call:
        self.launch()
        synchronize()
        return self

    @property
    def total(self) -> Tensor:
        """What torch adds."""
        return cases.added(self["x"], self["addend"] if self.with_addend else None)

    def check_memory(self) -> None:
        """See that nothing but the outputs was written to."""
        self.memory.check_guards()
        for name, before in self.before.items():
            assert (self.memory.bytes_of(name) == before).all(), f"{name} was written to"
