"""The quantised matmuls' kernels on a GPU: one call with what it ought to compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import Packed, unpack
from gta_edge.plugins.matmul.tiling import Variant
from tests.helpers import gpu_calls
from tests.helpers import matmul_cases as cases
from tests.helpers.gpu_calls import TYPES, Memory, synchronize


class Call:
    """One call of the op: its memory on the device, between guards, and what should come out.

    Weights are made in their packed form, of any bits, so that large ones take no time.
    """

    def __init__(self, of: Variant, rows: int, in_features: int, sizes: tuple[int, ...], *, bias: bool = False) -> None:
        self.variant, self.sizes, self.in_features = of, sizes, in_features
        out_features, dtype = sum(sizes), TYPES[of.compute]
        rng = np.random.default_rng(rows * in_features + out_features)
        tiles, spans = -(-out_features // 16), -(-in_features // 128)
        # No padding where K and N are whole tiles, and codes of padding where not: those of zero.
        if in_features % 128 == 0 and out_features % 16 == 0:
            weight = rng.integers(-(2**31), 2**31, (tiles, spans * 16 * of.bits // 32, 32, 4), np.int64)
            blocks = 128 // of.block_size if of.block_size else 1
            scale = rng.uniform(0.01, 0.05, (tiles, spans if of.block_size else 1, 8, blocks, 2))
            packed = Packed(weight.astype(np.int32), scale.astype(np.float16))
        else:
            arrays = cases.make(of, 1, in_features, sizes, seed=rows).arrays
            packed = Packed(arrays["weight"], arrays["scale"])
        self.memory = Memory()
        self.memory.add("x", torch.from_numpy(rng.standard_normal((rows, in_features))).to(dtype))
        self.memory.add("weight", torch.from_numpy(packed.weight))
        self.memory.add("scale", torch.from_numpy(packed.scale))
        if bias:
            self.memory.add("bias", torch.from_numpy(rng.standard_normal(out_features)).to(dtype))
        for i, size in enumerate(sizes):
            self.memory.add_poisoned(f"output_{i}", (rows, size), dtype)
        codes, scales = unpack(packed, in_features, out_features, of.bits, of.block_size)
        repeats = of.block_size or in_features
        matrix = torch.from_numpy(codes).to(gpu_calls.DEVICE).double()
        matrix *= torch.from_numpy(np.atleast_2d(scales)).to(gpu_calls.DEVICE).double().repeat_interleave(repeats, 0)
        exact = self["x"].double() @ matrix
        if bias:
            exact += self["bias"].double()
        self.expected = exact.split(list(sizes), dim=1)
        self.kernels = matmul_kernels(of, current_gpu())
        self.before = {name: self.memory.bytes_of(name) for name in ("x", "weight", "scale")}
        synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self.memory.tensors[name]

    @property
    def outputs(self) -> list[Tensor]:
        return [self[f"output_{i}"] for i in range(len(self.sizes))]

    def launch(self, stream: Any = 0) -> None:
        bias = self.memory.tensors.get("bias")
        self.kernels.launch(
            stream,
            x=self["x"].data_ptr(),
            weight=self["weight"].data_ptr(),
            scale=self["scale"].data_ptr(),
            bias=bias.data_ptr() if bias is not None else 0,
            outputs=[output.data_ptr() for output in self.outputs],
            rows=len(self["x"]),
            in_features=self.in_features,
            output_sizes=self.sizes,
        )

    def run(self) -> Call:
        self.launch()
        synchronize()
        return self

    def output_errors(self) -> list[float]:
        """Of each output the largest error over the largest magnitude; NaN where there is one."""
        return [
            ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
            for found, wanted in zip(self.outputs, self.expected, strict=True)
        ]

    def check(self) -> None:
        """Compare all memory with what it was and what it should be."""
        self.memory.check_guards()
        for name, before in self.before.items():
            assert torch.equal(self.memory.bytes_of(name), before), f"{name} was written to"
        for i, error in enumerate(self.output_errors()):
            assert error <= cases.TOLERANCE[self.variant.compute], (i, error)  # NaN is not less
