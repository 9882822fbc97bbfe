"""The attention's kernels on a GPU with a managed cache: one call, and what it ought to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from gta_edge.plugins.attention.definition import Features
from gta_edge.plugins.attention.tiling import Variant
from tests.helpers.gpu_calls import (
    DEVICE,
    GQA,
    GTA_1B,
    TYPES,
    Call,
    exact_output,
    rotated_at,
    split_heads,
)

FEATURES = {
    "all, mass": Features("mass", 3, True, True),
    "last": Features("last", 8, True, False),
    "mass in branches": Features("mass", 0, False, True),
    "bias and positions": Features(None, 1, True, False),
}
COMPUTES = {"bf16": "bf16", "int8": "fp16", "fp8": "bf16"}
"""What is computed in, by type of cache."""
CASES = (
    *(("gta", "all, mass", cache) for cache in COMPUTES),
    *(("gqa", "all, mass", "bf16"), ("gta", "last", "bf16"), ("gqa", "last", "int8"), ("gta", "last", "fp8")),
    *(("gta", "mass in branches", "int8"), ("gqa", "mass in branches", "fp8")),
    *(("gqa", "bias and positions", "int8"), ("gta", "bias and positions", "bf16")),
)
"""Model, features and cache: not all together, since each takes its own compilation."""
VARIANTS = {
    f"{model}, {features}, {cache}": Variant(
        {"gta": GTA_1B, "gqa": GQA}[model], COMPUTES[cache], cache, FEATURES[features]
    )
    for model, features, cache in CASES
}
ALLOWED = 1e-3
"""Relative error of what a row has received, of numbers of magnitude 1: float32 sums and approximate powers."""


class ManagedCall(Call):
    """A call whose memory has the inputs of the variant's features too.

    Args:
        variant: sizes, types and features.
        past: rows in use, per sequence.
        tokens: T.
        capacity: S.
        seed: of the random numbers.
        observes: whether anything is observed; a prompt's kernels do not.
    """

    def __init__(
        self,
        variant: Variant,
        past: tuple[int, ...],
        tokens: int,
        capacity: int,
        *,
        seed: int = 0,
        observes: bool = True,
    ) -> None:
        super().__init__(variant, past, tokens, capacity, seed=seed)
        features, random = variant.features, torch.Generator().manual_seed(seed)
        batch, add = len(past), self.memory.add
        held = torch.tensor(self.past)

        def drawn(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=random)

        if features.has_positions:
            add("token_positions", drawn(0, capacity, batch, tokens))
        if features.bias_rows:
            add("row_bias", drawn(1, 40, batch, features.bias_rows).float().log())
        if features.has_branches:
            add("branch_start", torch.tensor([int(drawn(0, length + tokens + 1, 1)) for length in self.past]))
            words = drawn(0, 2**32, batch, max(1, capacity // 2))
            add("branches", words << 32 | drawn(0, 2**32, batch, words.shape[1]))
        if features.observe:
            weight = torch.rand(batch, tokens, generator=random) + 0.1
            if features.observe == "last":
                weight = held[:, None] + torch.arange(tokens) + 1.0
            weight = torch.where(torch.rand(batch, tokens, generator=random) < 0.3, 0, weight) * observes
            add("query_weight", weight.float())
            add("decay", torch.rand(batch, generator=random) / 2 + 0.5 if observes else torch.ones(batch))
            received = drawn(-1, capacity, batch, capacity).float()
            add("received", received.masked_fill(torch.arange(capacity) >= held[:, None], torch.nan))
        self.before = {name: self.memory.bytes_of(name) for name in self.memory.tensors}
        self.received_before = self["received"].clone() if features.observe else torch.empty(0)

    def launch(self, stream: object = 0) -> None:
        sizes = {"batch": self.batch, "tokens": self.tokens, "capacity": self.capacity, "positions": self.capacity}
        width = self["branches"].shape[1] if self.variant.features.has_branches else 0
        self.kernels.launch(stream, self.buffers(), **sizes, scale=self.scale, branch_rows=width)

    def token_positions(self) -> Tensor:
        """RoPE positions [B, T]."""
        rows = torch.tensor(self.past, device=DEVICE)[:, None] + torch.arange(self.tokens, device=DEVICE)
        return self["token_positions"] if self.variant.features.has_positions else rows

    def new_rows(self) -> dict[str, Tensor]:
        key = split_heads(self["key"], self.variant.sizes.num_key_heads)
        return {
            "key": rotated_at(key, self.token_positions(), self["cos"], self["sin"]),
            "latent": split_heads(self["latent"], self.variant.sizes.num_latent_heads),
        }

    def hidden(self) -> Tensor:
        """Rows that a query does not see, bool [B, T, S]."""
        rows = torch.arange(self.capacity, device=DEVICE)
        past = torch.tensor(self.past, device=DEVICE)[:, None]
        if not self.variant.features.has_branches:
            return rows > (past + torch.arange(self.tokens, device=DEVICE))[:, :, None]
        words, start = self["branches"], self["branch_start"]
        place = rows - start[:, None]  # [B, S]
        bits = (
            words.gather(1, place.clamp(0, words.shape[1] - 1))[:, None] >> torch.arange(self.tokens).to(past)[:, None]
        )
        seen = (place < 0)[:, None] | ((place < words.shape[1])[:, None] & (bits & 1 == 1))
        return ~seen | (rows >= past + self.tokens)[:, None]

    def output_errors(self) -> list[float]:
        present = {}
        in_use = torch.tensor(self.past, device=DEVICE)[:, None] + self.tokens
        unused = torch.arange(self.capacity, device=DEVICE) >= in_use  # [B, S]
        for name in ("key", "latent"):
            present[name] = self.stored(name).masked_fill(unused[:, None, :, None], 0)
        query = split_heads(self["query"], self.variant.sizes.num_query_heads)
        query = rotated_at(query, self.token_positions(), self["cos"], self["sin"])
        query = query.to(TYPES[self.variant.compute]).double()
        gate, decoder = (self.memory.tensors.get(name) for name in ("gate", "value_decoder"))
        bias = self["row_bias"].double()[:, None] if self.variant.features.bias_rows else None
        heads: list[Tensor] = []
        expected = exact_output(
            query,
            gate,
            present["key"],
            present["latent"],
            torch.tensor(self.past, device=DEVICE),
            None if decoder is None else decoder.double(),
            self.scale,
            hidden=self.hidden(),
            bias=bias,
            observer=heads.append,
        )
        if self.variant.features.observe:
            self.check_received(torch.stack(heads), unused)
        errors = (self["output"].double() - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2)).clamp(1e-30)
        return [float("inf") if error.isnan() else error.item() for error in errors]

    def check_received(self, weights: Tensor, unused: Tensor) -> None:
        """Compare what rows have received with ``weights`` [n_q, B, T, S]; rows not in use are as they were."""
        found, before = self["received"], self.received_before
        assert torch.equal(found[unused].view(torch.int32), before[unused].view(torch.int32)), "rows not in use"
        old = torch.arange(self.capacity, device=DEVICE) < torch.tensor(self.past, device=DEVICE)[:, None]
        counted = weights * self["query_weight"].double()[None, :, :, None]
        if self.variant.features.observe == "mass":
            expected = torch.where(old, before.double(), 0) * self["decay"].double()[:, None] + counted.sum((0, 2))
            wrong = (found.double() - expected).abs() > ALLOWED * (1 + expected.abs())
        else:
            largest = counted.amax(0)  # [B, T, S]
            newest = torch.where(largest >= 1, self.token_positions()[:, :, None], -1).amax(1).double()
            expected = torch.maximum(torch.where(old, before.double(), -1), newest)
            wrong = (found != expected) & ~((counted - 1).abs() < ALLOWED).any(0).any(1)
        assert not (wrong & ~unused).any(), f"{int((wrong & ~unused).sum())} rows have received something else"
