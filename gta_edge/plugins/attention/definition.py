"""``gta::GroupedLatentAttention``, defined once: name, inputs, outputs, attributes, shape rules, meaning.

The meaning is the ONNX function beside it (``function``), in standard operators of opset 24; every other implementation
(torch, kernels) is tested against it and against the formulas of arXiv 2506.17286 and 2305.13245. This module imports
nothing heavy.

With ``B`` sequences, ``T`` new tokens of each, capacity ``S``, max context ``P``, hidden size ``H``:

    q, k   = rope(query), rope(key)             at positions past_length[b] + t
    cache  = past with k and latent written at rows past_length[b] ... past_length[b] + T - 1
    A_q    = softmax(q_q · present_key[k(q)]^T · scale), over cache rows s <= past_length[b] + t
    Z_q    = A_q · present_latent[c(q)]          [T, d_l]
    output = sigmoid(gate) * concat_q(tile(Z_q, e) + Z_q · value_decoder[q]),   e = H / (n_q · d_l)

where ``k(q) = q // (n_q / n_k)`` and ``c(q) = q // (n_q / n_c)``. Query heads that share a cached head are rows of one
matmul, so the cache is read once per cached head and not once per query head.

Without a gate the output is not multiplied by one; without a value decoder it is ``concat_q(Z_q)``, and n_k is n_c.
With neither, this is grouped-query attention: the latent is the value, and H is n_q · d_l.

A cache whose rows are evicted, merged or branched needs more, each an optional input (``Features``):

    positions                of the new tokens, for RoPE alone, where rows of the cache no longer are positions
    row_bias                 is added to the scaled scores of rows 0 ... R - 1: the log of how many rows each stands for
    branch_start, branches   row s >= branch_start is seen by query t iff bit t of branches[s - branch_start] is set
                             (no row past the last word); rows before it by all; none from past_length + T on. A query
                             that sees no row mixes zeros. With T > 64 there are no bits: what is seen is as without
    past_received            what each row has received of attention (arXiv 2306.14048, 2503.10714, 2404.15949):
        observe = "mass"     decay · past + sum over t of query_weight[t] · sum over q of A_q[t, s]
        observe = "last"     max of past and of positions[t] over all t, q with query_weight[t] · A_q[t, s] >= 1

where past_received counts as 0 ("mass") or -1 ("last") in rows from past_length on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gta_edge.plugins.domain import DOMAIN, VERSION

__all__ = [
    "ATTRIBUTES",
    "FEATURE_INPUTS",
    "INPUTS",
    "INT64_INPUTS",
    "MAX_BIAS_ROWS",
    "MAX_BRANCH_TOKENS",
    "MODEL_INPUTS",
    "MODEL_OPTIONAL_INPUTS",
    "MODEL_OUTPUTS",
    "NO_FEATURES",
    "OBSERVATIONS",
    "OBSERVE",
    "OP",
    "OPEN_INPUTS",
    "OUTPUTS",
    "SCALE_INPUTS",
    "Features",
    "Sizes",
    "attributes",
    "given_features",
    "given_inputs",
    "output_shapes",
]

OP = "GroupedLatentAttention"
MODEL_INPUTS = (
    "query",  # [B, T, n_q·d_k]   before RoPE
    "key",  # [B, T, n_k·d_k]   before RoPE
    "latent",  # [B, T, n_c·d_l]
    "gate",  # [B, T, H]         before the sigmoid; optional
    "past_key",  # [B, n_k, S, d_k]  after RoPE
    "past_latent",  # [B, n_c, S, d_l]
    "past_length",  # int64 [B]         rows in use: where new rows are written, and what is visible
    "cos",  # [P, d_k/2]
    "sin",  # [P, d_k/2]
    "value_decoder",  # [n_q, d_l, e·d_l]; optional
)
"""Inputs that every graph of a bundle has, but for those its model lacks."""
FEATURE_INPUTS = (
    "positions",  # int64 [B, T]
    "row_bias",  # float32 [B, R]
    "branch_start",  # int64 [B]
    "branches",  # int64 [B, W]
    "past_received",  # float32 [B, S]
    "query_weight",  # float32 [B, T]
    "decay",  # float32 [B]; there in "last" too, and of no effect
)
"""Inputs of a managed cache (``Features``), all optional, float32 in every compute type."""
SCALE_INPUTS = ("past_key_scale", "past_latent_scale")
OPEN_INPUTS = ("past_key_open", "past_latent_open")
"""Of a cache that is quantised, and of one in blocks (``model.kv_cache``); behind all others, and updated in place."""
INT64_INPUTS = ("past_length", "positions", "branch_start", "branches")
INPUTS = MODEL_INPUTS + FEATURE_INPUTS
MODEL_OPTIONAL_INPUTS = ("gate", "value_decoder")
"""Those that its model may lack, as a node may any of ``FEATURE_INPUTS``: they are empty, or left off at the end."""
MODEL_OUTPUTS = ("output", "present_key", "present_latent")
OUTPUTS = (*MODEL_OUTPUTS, "present_received")
"""The last, float32 [B, S], only with ``past_received``; its rows from past_length + T on are unspecified."""
ATTRIBUTES = ("num_query_heads", "num_key_heads", "num_latent_heads", "scale", "plugin_namespace", "plugin_version")
OBSERVE = "observe"
"""One more attribute, only with ``past_received``."""
OBSERVATIONS = ("mass", "last")
MAX_BIAS_ROWS = 8
MAX_BRANCH_TOKENS = 64
"""Of T, for ``branches`` to be read: a word has a bit for each new token. A call of more is causal."""

Given = TypeVar("Given")
"""An input: a value of a graph, a shape, a name."""


@dataclass(frozen=True)
class Sizes:
    """A model's head counts and widths, read off the attributes and the inputs' static dimensions.

    Args:
        num_query_heads: n_q.
        num_key_heads: n_k.
        num_latent_heads: n_c.
        key_dim: d_k.
        latent_dim: d_l.
        hidden_size: H, width of the output; it need not be the model's hidden size.
        has_gate: whether the output is multiplied by sigmoid(gate).
        has_value_decoder: whether mixes are decoded. Without, the op is grouped-query attention (arXiv 2305.13245):
            the latents are the values, and a query head's output is its mix of them.

    Raises:
        ValueError: the sizes do not go together.
    """

    num_query_heads: int
    num_key_heads: int
    num_latent_heads: int
    key_dim: int
    latent_dim: int
    hidden_size: int
    has_gate: bool = True
    has_value_decoder: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        for name in ("num_key_heads", "num_latent_heads"):
            if self.num_query_heads % getattr(self, name):
                raise ValueError(f"num_query_heads {self.num_query_heads} is not a multiple of {name}")
        if self.key_dim % 2:
            raise ValueError(f"key_dim {self.key_dim} is not even")
        if self.hidden_size % (self.num_query_heads * self.latent_dim):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_query_heads {self.num_query_heads} "
                f"times latent_dim {self.latent_dim}"
            )
        if self.has_value_decoder:
            return
        if self.num_key_heads != self.num_latent_heads:
            raise ValueError(
                f"num_latent_heads {self.num_latent_heads} is not num_key_heads {self.num_key_heads}, "
                "and there is no value_decoder"
            )
        if self.hidden_size != self.num_query_heads * self.latent_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not num_query_heads {self.num_query_heads} "
                f"times latent_dim {self.latent_dim}, and there is no value_decoder"
            )


@dataclass(frozen=True)
class Features:
    """Which inputs of a managed cache a node has; the default is none of them.

    Args:
        observe: ``mass`` or ``last``: past_received, query_weight and decay are given, and what they mean.
        bias_rows: R, rows that row_bias has; 0 without it.
        has_positions: whether positions is given.
        has_branches: whether branch_start and branches are given.

    Raises:
        ValueError: there is no such kind of observation, or R is out of range.
    """

    observe: str | None = None
    bias_rows: int = 0
    has_positions: bool = False
    has_branches: bool = False

    def __post_init__(self) -> None:
        if self.observe is not None and self.observe not in OBSERVATIONS:
            raise ValueError(f"observe is {self.observe!r}; expected one of {', '.join(OBSERVATIONS)}, or None")
        if not 0 <= self.bias_rows <= MAX_BIAS_ROWS:
            raise ValueError(f"bias_rows is {self.bias_rows}; expected 0 to {MAX_BIAS_ROWS}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that there are, in order."""
        groups = (
            (("positions",), self.has_positions),
            (("row_bias",), self.bias_rows),
            (("branch_start", "branches"), self.has_branches),
            (("past_received", "query_weight", "decay"), self.observe),
        )
        return tuple(name for names, given in groups if given for name in names)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the node's outputs."""
        return OUTPUTS if self.observe else MODEL_OUTPUTS


NO_FEATURES = Features()
"""Of a cache that nobody manages."""


def attributes(
    num_query_heads: int, num_key_heads: int, num_latent_heads: int, scale: float, observe: str | None = None
) -> dict[str, int | float | str]:
    """Return the node's attributes; plugin_namespace and -version are how TensorRT before 10.10 finds the plugin."""
    names = ATTRIBUTES if observe is None else (*ATTRIBUTES, OBSERVE)
    values = (num_query_heads, num_key_heads, num_latent_heads, scale, DOMAIN, str(VERSION), observe)
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


def given_inputs(inputs: Sequence[Given | None]) -> dict[str, Given]:
    """Return a node's inputs by name, without those that are absent: None, or left off at the end."""
    return {name: value for name, value in zip(INPUTS, inputs, strict=False) if value is not None}


def given_features(shapes: Mapping[str, Sequence[int | None]], observe: str | None) -> Features:
    """Return which features a node has.

    Args:
        shapes: of the inputs that are given, by name; row_bias's width must be a number.
        observe: the attribute, None or empty if there is none.

    Raises:
        ValueError: inputs that go together are not all there, or the attribute does not fit them.
    """
    for names in (("branch_start", "branches"), ("past_received", "query_weight", "decay")):
        given = [name for name in names if name in shapes]
        if given and len(given) < len(names):
            raise ValueError(f"{' and '.join(given)} without the others of {', '.join(names)}; expected all or none")
    if ("past_received" in shapes) != bool(observe):
        has, lacks = (OBSERVE, "past_received") if observe else ("past_received", OBSERVE)
        raise ValueError(f"{has} is given without {lacks}; expected both or neither")
    bias_rows = 0
    if "row_bias" in shapes:
        bias = shapes["row_bias"]
        if len(bias) != 2 or not bias[1]:
            raise ValueError(f"row_bias has the shape {bias}; expected [B, R] with a fixed R of 1 to {MAX_BIAS_ROWS}")
        bias_rows = bias[1]
    return Features(observe or None, bias_rows, "positions" in shapes, "branches" in shapes)


def output_shapes(sizes: Sizes, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the outputs' shapes, given those of the inputs."""
    shapes = {
        "output": (*inputs["query"][:2], sizes.hidden_size),
        "present_key": tuple(inputs["past_key"]),
        "present_latent": tuple(inputs["past_latent"]),
    }
    if "past_received" in inputs:
        shapes["present_received"] = tuple(inputs["past_received"])
    return shapes
