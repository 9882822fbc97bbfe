"""The attention's kernels on a GPU with a cache in blocks: one call, memory between guards, and what it ought to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gta_edge.plugins.attention.kernels import Buffers
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers import attention_cases as cases
from tests.helpers import block_cases as blocks
from tests.helpers.gpu_calls import INPUTS, TOLERANCE, Memory, exact_output, kernels_of, synchronize


def tensor_of(array: np.ndarray) -> Tensor:
    """The same numbers, to the bit."""
    if array.dtype == cases.TYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: Tensor) -> np.ndarray:
    """And back, from the device."""
    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().view(torch.int16).numpy().view(cases.TYPES["bf16"])
    return np.asarray(tensor.cpu().numpy())


class BlockCall:
    """One call with a cache in blocks; as ``gpu_calls.Call``, but keys are turned by quarters, which is exact."""

    def __init__(self, variant: Variant, past: tuple[int, ...], tokens: int, capacity: int, *, seed: int = 0) -> None:
        self.variant, self.tokens, self.capacity = variant, tokens, capacity
        self.case, self.history = blocks.make(variant, past, tokens, capacity, seed, quarter_turns=True)
        self.memory = Memory()
        for name, array in self.case.arrays.items():
            self.memory.add(name, tensor_of(array))
        self.kernels = kernels_of(variant)
        self.workspace_bytes = self.kernels.workspace_bytes(self.case.batch, tokens, capacity)
        self.memory.add_poisoned("workspace", (self.workspace_bytes,), torch.uint8)
        self.before = {name: self.memory.bytes_of(name) for name in self.memory.tensors}
        synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self.memory.tensors[name]

    def launch(self, stream: Any = 0) -> None:
        self._launch(stream, self.memory.tensors, self.tokens)

    def launch_part(self, tensors: dict[str, Tensor], first: int) -> None:
        """Launch on some of the tokens, from ``first`` on, whose tensors are given."""
        lengths = torch.from_numpy(cases.held(self.case) + first).to(self["past_length"].device)
        tokens = tensors["query"].shape[1]
        size = self.kernels.workspace_bytes(self.case.batch, tokens, self.capacity)
        workspace = torch.empty(size, dtype=torch.uint8, device=lengths.device)
        changed = tensors | {"past_length": lengths, "workspace": workspace}
        self._launch(0, self.memory.tensors | changed, tokens)
        synchronize()  # before their memory is given to others

    def _launch(self, stream: Any, tensors: dict[str, Tensor], tokens: int) -> None:
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self.kernels.launch(
            stream,
            Buffers(**dict.fromkeys(("gate", "value_decoder"), 0) | addresses),
            batch=self.case.batch,
            tokens=tokens,
            capacity=self.capacity,
            positions=len(self["cos"]),
            scale=self.case.scale,
        )

    def run(self) -> BlockCall:
        self.launch()
        synchronize()
        return self

    def check(self) -> None:
        """Compare all memory with what it was and what it should be, the cache bit for bit."""
        self.memory.check_guards()
        for name in INPUTS & self.before.keys():
            assert torch.equal(self.memory.bytes_of(name), self.before[name]), f"{name} was written to"
        for name, expected in blocks.stored(self.history, blocks.present(self.case), self.variant).items():
            assert blocks.same(array_of(self[name]), expected), name
        errors = self.output_errors()
        assert max(errors) <= TOLERANCE[self.variant.compute], errors

    def output_errors(self) -> list[float]:
        """Per row of the batch the largest error over the largest magnitude, of tokens that fit the cache."""
        sizes, device = self.variant.sizes, self["query"].device
        rows = np.arange(self.capacity)
        places = np.minimum(cases.held(self.case)[:, None] + np.arange(self.tokens), self.capacity - 1)[..., None]
        in_codes = rows // blocks.BLOCK < places // blocks.BLOCK  # [B, T, S]
        open_rows = (rows // blocks.BLOCK == places // blocks.BLOCK) & (rows <= places)
        hidden = torch.from_numpy(~np.concatenate([in_codes, open_rows], 2)).to(device)
        caches = {}
        for name, values in self.history.items():  # both forms of all rows, of which each query sees one or none
            coded = blocks.read_rows(values, name, self.variant)
            both = np.concatenate([coded, values.astype(np.float16).astype(np.float64)], 2)
            caches[name] = torch.from_numpy(np.nan_to_num(both)).to(device)
        query = cases.rotated(self.case, "query", sizes.num_query_heads).astype(np.float16).astype(np.float64)
        expected = exact_output(
            torch.from_numpy(query).to(device),
            self.memory.tensors.get("gate"),
            caches["key"],
            caches["latent"],
            self["past_length"],
            self["value_decoder"].double() if sizes.has_value_decoder else None,
            self.case.scale,
            hidden=hidden,
        )
        errors = []
        for row, count in enumerate(blocks.present(self.case) - cases.held(self.case)):
            found, wanted = self["output"][row, :count].double(), expected[row, :count]
            error = (found - wanted).abs().max() / wanted.abs().max() if count else torch.zeros(())
            errors.append(float("inf") if error.isnan() else error.item())
        return errors
