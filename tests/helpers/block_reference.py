"""A cache in blocks written out in NumPy: quantised group by group, and attended to in float64, row by row.

It keeps every row that was ever written as it was, and follows the rule: the query at row p reads row s from codes if
s // 32 < p // 32, and as it was otherwise. How a group is quantised and packed, ``block_cases`` has.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.helpers import reference
from tests.helpers.attention_models import Sizes
from tests.helpers.block_cases import BLOCK, VALUE_BITS, packed, quantised

KEY_BITS = 4


@dataclass
class Group:
    """Values that share a scale and a minimum."""

    codes: np.ndarray
    scale: np.float16
    minimum: np.float16

    @property
    def values(self) -> np.ndarray:
        return self.codes * np.float64(self.scale) + np.float64(self.minimum)


def group(values: np.ndarray, bits: int) -> Group:
    return Group(*(each[()] for each in quantised(values.astype(np.float32), bits)))


@dataclass
class History:
    """All rows of a sequence, [n, rows, d] of keys and of latents, as they were written."""

    key: np.ndarray
    latent: np.ndarray

    @property
    def rows(self) -> int:
        return self.key.shape[1]


@dataclass
class Reference:
    """The op on a cache in blocks.

    Args:
        cache: ``int4`` or ``int4v2``.
        sizes: the model's; those of a call are its inputs'.
        dtype: of activations.
        histories: of each sequence.
    """

    cache: str
    sizes: Sizes
    dtype: type = np.float32
    histories: list[History] = field(default_factory=list)

    def begin(self, batch: int) -> None:
        n_k, n_c, d_k, d_l = self.sizes.n_k, self.sizes.n_c, self.sizes.d_k, self.sizes.d_l
        self.histories = [History(np.zeros((n_k, 0, d_k)), np.zeros((n_c, 0, d_l))) for _ in range(batch)]

    def attend(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Append the new tokens of all sequences, and return the output [B, T, H]."""
        return np.stack([self._attend(b, history, inputs) for b, history in enumerate(self.histories)])

    def _attend(self, b: int, history: History, inputs: dict[str, np.ndarray]) -> np.ndarray:
        s = self.sizes
        cos, sin = (reference.double(inputs[name]) for name in ("cos", "sin"))
        past, tokens = history.rows, inputs["query"].shape[1]
        new_keys = np.empty((s.n_k, tokens, s.d_k))
        new_latents = np.empty((s.n_c, tokens, s.d_l))
        for t in range(tokens):
            for k in range(s.n_k):
                head = reference.double(inputs["key"][b, t, k * s.d_k : (k + 1) * s.d_k])
                new_keys[k, t] = reference.rotate(head, cos[past + t], sin[past + t]).astype(self.dtype)
            new_latents[:, t] = reference.double(inputs["latent"][b, t]).reshape(s.n_c, s.d_l)
        history.key = np.concatenate([history.key, new_keys], axis=1)
        history.latent = np.concatenate([history.latent, new_latents], axis=1)
        read = [self._read(history, block) for block in range((past + tokens - 1) // BLOCK)]
        return np.stack([self._token(b, t, past + t, history, read, inputs) for t in range(tokens)])

    def _token(
        self, b: int, t: int, row: int, history: History, read: list[History], inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        s, block = self.sizes, row // BLOCK
        exact = slice(block * BLOCK, row + 1)
        keys = np.concatenate([*(each.key for each in read[:block]), history.key[:, exact]], axis=1)
        latents = np.concatenate([*(each.latent for each in read[:block]), history.latent[:, exact]], axis=1)
        width, output = s.hidden // s.n_q, []
        for q in range(s.n_q):
            head = reference.double(inputs["query"][b, t, q * s.d_k : (q + 1) * s.d_k])
            turned = reference.rotate(head, *(reference.double(inputs[name][row]) for name in ("cos", "sin")))
            weights = reference.softmax(s.scale * (keys[q * s.n_k // s.n_q] @ turned))
            value = mix = weights @ latents[q * s.n_c // s.n_q]
            if s.decoder:
                value = np.tile(mix, width // s.d_l) + mix @ reference.double(inputs["value_decoder"][q])
            if s.gate:
                value = value * reference.sigmoid(reference.double(inputs["gate"][b, t, q * width : (q + 1) * width]))
            output.append(value)
        return np.concatenate(output)

    # --- what is stored --------------------------------------------------------------------------------------------

    def _groups(self, history: History, block: int) -> tuple[list[list[Group]], list[list[Group]]]:
        """Of each key head its channels' groups, of each latent head its tokens'."""
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        keys = [[group(channel, KEY_BITS) for channel in head[rows].T] for head in history.key]
        bits = VALUE_BITS[self.cache]
        return keys, [[group(token, bits) for token in head[rows]] for head in history.latent]

    def _read(self, history: History, block: int) -> History:
        keys, latents = self._groups(history, block)
        return History(
            np.array([[each.values for each in head] for head in keys]).swapaxes(1, 2),
            np.array([[each.values for each in head] for head in latents]),
        )

    def arrays(self, capacity: int) -> list[np.ndarray]:
        """What the cache's tensors hold, those of a cache that was all zeros: in the op's order."""
        s, batch, bits = self.sizes, len(self.histories), VALUE_BITS[self.cache]
        key = np.zeros((batch, s.n_k, capacity // BLOCK, s.d_k, 16), np.uint8)
        latent = np.zeros((batch, s.n_c, capacity, s.d_l * bits // 8), np.uint8)
        key_scale = np.zeros((batch, s.n_k, capacity // BLOCK, 2, s.d_k), np.float16)
        latent_scale = np.zeros((batch, s.n_c, capacity, 2), np.float16)
        key_open = np.zeros((batch, s.n_k, BLOCK, s.d_k), self.dtype)
        latent_open = np.zeros((batch, s.n_c, BLOCK, s.d_l), self.dtype)
        for b, history in enumerate(self.histories):
            for block in range(history.rows // BLOCK):
                keys, latents = self._groups(history, block)
                for head, groups in enumerate(keys):
                    for channel, each in enumerate(groups):
                        key[b, head, block, channel] = packed(each.codes, KEY_BITS)
                        key_scale[b, head, block, :, channel] = each.scale, each.minimum
                for head, groups in enumerate(latents):
                    for token, each in enumerate(groups):
                        latent[b, head, block * BLOCK + token] = packed(each.codes, bits)
                        latent_scale[b, head, block * BLOCK + token] = each.scale, each.minimum
            for row in range(max(0, history.rows - BLOCK), history.rows):
                key_open[b, :, row % BLOCK] = history.key[:, row]
                latent_open[b, :, row % BLOCK] = history.latent[:, row]
        return [key, latent, key_scale, latent_scale, key_open, latent_open]
