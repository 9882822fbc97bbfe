"""A whole model over a managed cache in NumPy float64: rows in a list, dropped and folded as a policy says.

Written from the formulas of the op and of the models; of the package it uses the policy alone, which decides here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gta_edge.runtime.cache_policies.base import CachePolicy, Rows
from tests.helpers import reference
from tests.helpers.reference import Array, double

SHORT = 16  # tokens of a call that is no prompt


@dataclass
class Row:
    """A row of one layer's cache: the token's place in time, its key [n_k, d_k] and its latent or value [n_c, d_l]."""

    time: int
    position: int
    key: Array
    latent: Array
    received: float
    count: float = 1.0
    residual: int | None = None


class ManagedModel:
    """One sequence of a model.

    Args:
        entries: of config.json.
        weights: of the checkpoint.
        policy: which rows stay; None for all.
        chunk_size: tokens of a prompt at once.
        observed: tokens of a chunk that are observed, its last; None for all.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        weights: Mapping[str, Array],
        policy: CachePolicy | None = None,
        chunk_size: int = 256,
        observed: int | None = None,
    ) -> None:
        self.entries, self.policy, self.chunk_size, self.observed = entries, policy, chunk_size, observed
        self.weights = {name: double(weight) for name, weight in weights.items()}
        self.is_gta = "num_query_heads" in entries
        if self.is_gta:
            self.heads = entries["num_query_heads"], entries["num_key_heads"], entries["num_value_heads"]
            self.d_k, self.d_l = entries["key_dim"], entries["value_dim"]
        else:
            n_kv = entries["num_key_value_heads"]
            self.heads, self.d_k = (entries["num_attention_heads"], n_kv, n_kv), entries["head_dim"]
            self.d_l = self.d_k
        self.cos, self.sin = reference.tables_of(entries, self.d_k, entries["max_position_embeddings"])
        self.layers: list[list[Row]] = [[] for _ in range(entries["num_hidden_layers"])]
        self.length = self.evicted_at = self.ahead = 0

    # --- what a session does ---------------------------------------------------------------------------------------

    def forward(self, ids: Sequence[int] | Array) -> Array:
        """Append tokens as a session does, chunk by chunk; returns logits [T, V] of all."""
        found = []
        is_prompt = len(ids) > SHORT
        for start in range(0, len(ids), self.chunk_size):
            if self.policy and (start == 0 or not is_prompt) and self.length - self.evicted_at >= self.policy.interval:
                self.evict()
            chunk = ids[start : start + self.chunk_size]
            first = max(0, len(chunk) - self.observed) if self.observed is not None else 0
            if first:
                found.append(self.call(chunk[:first], observes=False))
            found.append(self.call(chunk[first:], before=first))
            if self.policy and is_prompt:
                self.evict()
        return np.concatenate(found)

    # --- the model -------------------------------------------------------------------------------------------------

    def call(self, ids: Sequence[int] | Array, observes: bool = True, before: int = 0) -> Array:
        """Run tokens at once, behind so many of the same chunk that did not observe; returns logits [T, V]."""
        x = [self.weights["model.embed_tokens.weight"][int(token)] for token in ids]
        eps = self.entries["rms_norm_eps"]
        times = np.arange(self.length, self.length + len(ids))
        rows_before = round(float(np.mean([len(rows) for rows in self.layers])))
        query_weight, decay = np.zeros(len(ids)), 1.0
        if self.policy and self.policy.observe and observes:
            chunk = np.arange(-before, len(ids))
            weight, decays = self.policy.weights(self.length + chunk[None], rows_before + 1 + chunk[None])
            query_weight, decay = double(weight[0, before:]), float(decays[0])
        for layer in range(len(self.layers)):
            name = f"model.layers.{layer}"
            norm = self.weights[f"{name}.input_layernorm.weight"]
            normed = [reference.rms_norm(token, norm, eps) for token in x]
            mixed = self.attention(layer, f"{name}.self_attn", normed, times - self.ahead, query_weight, decay)
            x = [token + change for token, change in zip(x, mixed, strict=True)]
            norm = self.weights[f"{name}.post_attention_layernorm.weight"]
            x = [
                token + reference.mlp(self.weights, f"{name}.mlp", reference.rms_norm(token, norm, eps)) for token in x
            ]
        self.length += len(ids)
        norm = self.weights["model.norm.weight"]
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return np.stack([head @ reference.rms_norm(token, norm, eps) for token in x])

    def attention(
        self, layer: int, name: str, x: list[Array], positions: Array, query_weight: Array, decay: float
    ) -> list[Array]:
        n_q, n_k, n_c = self.heads
        observe = self.policy.observe if self.policy else None
        rows, result = self.layers[layer], []
        for row in rows:
            row.received *= decay if observe == "mass" else 1.0
        for t, token in enumerate(x):
            position = int(positions[t])
            turn = self.cos[position], self.sin[position]
            query, key, latent = (reference.linear(self.weights, f"{name}.{kind}_proj", token) for kind in "qkv")
            keys = np.stack([reference.rotate(head, *turn) for head in key.reshape(n_k, -1)])
            never = -1.0 if observe == "last" else 0.0
            rows.append(Row(self.length + t, position, keys, latent.reshape(n_c, -1), never))
            mixed = []
            shown = self.visible(layer, rows)
            all_keys, all_latents = (np.stack([getattr(row, kind) for row in shown]) for kind in ("key", "latent"))
            bias = np.log([row.count for row in shown])
            for q, head in enumerate(query.reshape(n_q, -1)):
                turned, k, c = reference.rotate(head, *turn), q // (n_q // n_k), q // (n_q // n_c)
                attention = reference.softmax(all_keys[:, k] @ turned / np.sqrt(self.d_k) + bias)
                mixed.append(attention @ all_latents[:, c])
                for share, row in zip(attention if observe else (), shown, strict=bool(observe)):
                    if observe == "mass":
                        row.received += query_weight[t] * share
                    elif query_weight[t] * share >= 1:
                        row.received = max(row.received, position)
            result.append(self.output(name, token, mixed))
        return result

    def visible(self, layer: int, rows: list[Row]) -> list[Row]:
        """Return the rows that the newest token sees."""
        return rows

    def output(self, name: str, token: Array, mixed: list[Array]) -> Array:
        if self.is_gta:
            decoder = reference.value_decoder(self.weights[f"{name}.v_b_proj.weight"], self.heads[0], self.d_l)
            expansion = decoder.shape[2] // self.d_l
            parts = [np.concatenate([mix] * expansion) + mix @ decoder[q] for q, mix in enumerate(mixed)]
            gate = reference.sigmoid(reference.linear(self.weights, f"{name}.g_proj", token))
            return reference.linear(self.weights, f"{name}.o_proj", gate * np.concatenate(parts))
        return reference.linear(self.weights, f"{name}.o_proj", np.concatenate(mixed))

    # --- eviction --------------------------------------------------------------------------------------------------

    def evict(self) -> None:
        assert self.policy is not None
        budgets = self.policy.budgets(len(self.layers))
        for layer, rows in enumerate(self.layers):
            budget = None if budgets is None else int(budgets[layer])
            if budget is not None and len(rows) <= budget:
                continue
            seen = Rows(
                layer=layer,
                budget=budget,
                length=self.length,
                positions=np.array([row.time for row in rows]),
                received=np.array([row.received for row in rows], np.float32) if self.policy.observe else None,
                counts=np.array([row.count for row in rows], np.float32),
                begun=np.array([row.residual is not None for row in rows]),
            )
            decision = self.policy.keep(seen)
            into = np.full(len(rows), -1) if decision.residual is None else decision.residual
            stay = [row for row, keep in zip(rows, decision.keep, strict=True) if keep]
            for index in range(self.policy.bias_rows):
                folded = [
                    row for row, keep, i in zip(rows, decision.keep, into, strict=True) if not keep and i == index
                ]
                if folded:
                    old = [row for row in stay if row.residual == index]
                    stay = [row for row in stay if row.residual != index]
                    stay.append(_folded(folded + old, folded, index))
            self.layers[layer] = stay
        self.evicted_at = self.length


def _folded(members: list[Row], new: list[Row], index: int) -> Row:
    count = sum(row.count for row in members)
    newest = max(members, key=lambda row: row.time)
    return Row(
        time=newest.time,
        position=newest.position,
        key=sum(row.count / count * row.key for row in members),
        latent=sum(row.count / count * row.latent for row in members),
        received=members[-1].received,
        count=count,
        residual=index,
    )


class MaskedModel(ManagedModel):
    """The same model with every token in the cache, of which a query is shown some.

    Args:
        entries: of config.json.
        weights: of the checkpoint.
        seen: takes a layer and the number of a query, and returns those of the tokens that it sees, itself included.
    """

    def __init__(
        self, entries: Mapping[str, Any], weights: Mapping[str, Array], seen: Callable[[int, int], Sequence[int]]
    ) -> None:
        super().__init__(entries, weights)
        self.seen = seen

    def visible(self, layer: int, rows: list[Row]) -> list[Row]:
        return [rows[token] for token in self.seen(layer, len(rows) - 1)]
