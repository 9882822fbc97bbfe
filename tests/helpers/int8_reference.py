"""Attention on a cache of int8 in float64: quantised and attended to as is documented, one row after the other."""

from dataclasses import dataclass

import numpy as np

from tests.helpers import reference
from tests.helpers.attention_models import Sizes

SMALLEST = 1e-18
"""Magnitude of a row of zeros, which its scale is made of."""


@dataclass
class Cache:
    """Codes in float64 [B, n, S, d] and scales [B, n, S], rows in order."""

    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Cache":
        """Values [B, n, S, d], each row rounded."""
        scales = np.maximum(np.abs(values.astype(np.float64)).max(axis=-1), SMALLEST) / 127
        return cls(np.rint(values / scales[..., None]), scales)

    @property
    def values(self) -> np.ndarray:
        return self.codes * self.scales[..., None]


@dataclass
class Attended:
    output: np.ndarray
    key: Cache
    latent: Cache


def attend(inputs: dict[str, np.ndarray], past: tuple[Cache, Cache], sizes: Sizes, *, in_place: bool) -> Attended:
    """The op on a cache of int8.

    Args:
        inputs: the op's; its past_key and past_latent are not looked at.
        past: the key's and the latent's.
        sizes: of the call.
        in_place: whether queries and weights are rounded too, as where the cache is read as it is.
    """
    n_q, n_k, n_c = sizes.heads
    new = {name: reference.double(inputs[name]) for name in ("query", "key", "latent", "cos", "sin")}
    key, latent = (Cache(cache.codes.copy(), cache.scales.copy()) for cache in past)
    batch, tokens = new["query"].shape[:2]
    width = sizes.hidden // n_q
    output = np.empty((batch, tokens, sizes.hidden))

    def turned(name: str, head: int, b: int, t: int) -> np.ndarray:
        position = int(inputs["past_length"][b]) + t
        part = new[name][b, t, head * sizes.d_k : (head + 1) * sizes.d_k]
        return reference.rotate(part, new["cos"][position], new["sin"][position])

    for b in range(batch):
        for t in range(tokens):
            row = int(inputs["past_length"][b]) + t
            for cache, values in (
                (key, [turned("key", k, b, t) for k in range(n_k)]),
                (latent, new["latent"][b, t].reshape(n_c, sizes.d_l)),
            ):
                rounded = Cache.of(np.stack([np.asarray(values)])[:, :, None])
                cache.codes[b, :, row], cache.scales[b, :, row] = rounded.codes[0, :, 0], rounded.scales[0, :, 0]
            for q in range(n_q):
                k, c = q * n_k // n_q, q * n_c // n_q
                query = turned("query", q, b, t)
                if in_place:
                    query = Cache.of(query[None, None, None]).values[0, 0, 0]
                scores = sizes.scale * key.values[b, k, : row + 1] @ query
                weights = reference.softmax(scores) * latent.scales[b, c, : row + 1]
                if in_place:
                    unit = weights.max() / 65535
                    weights = np.floor(weights / unit + 0.5) * unit
                value = mix = weights @ latent.codes[b, c, : row + 1]
                if sizes.decoder:
                    decoder = reference.double(inputs["value_decoder"][q])
                    value = np.tile(mix, width // sizes.d_l) + mix @ decoder
                if sizes.gate:
                    gate = reference.double(inputs["gate"][b, t, q * width : (q + 1) * width])
                    value = value * reference.sigmoid(gate)
                output[b, t, q * width : (q + 1) * width] = value
    return Attended(output, key, latent)
