"""``gta::GroupedLatentAttention``, defined once: name, inputs, outputs, attributes, shape rules, meaning.

The meaning is the ONNX function below, in standard operators of opset 24; every other implementation (torch,
kernels) is tested against it and against the formulas of arXiv 2506.17286 and 2305.13245. This module imports nothing
heavy.

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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION

__all__ = [
    "ATTRIBUTES",
    "INPUTS",
    "OP",
    "OPTIONAL_INPUTS",
    "OUTPUTS",
    "Sizes",
    "attributes",
    "function",
    "given_inputs",
    "output_shapes",
]

OP = "GroupedLatentAttention"
INPUTS = (
    "query",  # [B, T, n_q·d_k]   before RoPE
    "key",  # [B, T, n_k·d_k]   before RoPE
    "latent",  # [B, T, n_c·d_l]
    "gate",  # [B, T, H]         before the sigmoid; optional
    "past_key",  # [B, n_k, S, d_k]  after RoPE
    "past_latent",  # [B, n_c, S, d_l]
    "past_length",  # int64 [B]
    "cos",  # [P, d_k/2]
    "sin",  # [P, d_k/2]
    "value_decoder",  # [n_q, d_l, e·d_l]; optional
)
OPTIONAL_INPUTS = ("gate", "value_decoder")
"""Of a node that lacks one, that input is empty."""
OUTPUTS = ("output", "present_key", "present_latent")
ATTRIBUTES = ("num_query_heads", "num_key_heads", "num_latent_heads", "scale", "plugin_namespace", "plugin_version")

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


def attributes(
    num_query_heads: int, num_key_heads: int, num_latent_heads: int, scale: float
) -> dict[str, int | float | str]:
    """Return the node's attributes; the last two are how TensorRT before 10.10 finds the plugin."""
    values = (num_query_heads, num_key_heads, num_latent_heads, scale, DOMAIN, str(VERSION))
    return dict(zip(ATTRIBUTES, values, strict=True))


def given_inputs(inputs: Sequence[Given | None]) -> dict[str, Given]:
    """Return a node's inputs by name, without those that are absent: None, or left off at the end."""
    return {name: value for name, value in zip(INPUTS, inputs, strict=False) if value is not None}


def output_shapes(sizes: Sizes, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the outputs' shapes, given those of the inputs."""
    return {
        "output": (*inputs["query"][:2], sizes.hidden_size),
        "present_key": tuple(inputs["past_key"]),
        "present_latent": tuple(inputs["past_latent"]),
    }


# Up to the mix; what is behind it depends on which optional inputs there are.
_ATTEND = """
    queries = Constant <value_int: int = @num_query_heads> ()
    keys = Constant <value_int: int = @num_key_heads> ()
    latents = Constant <value_int: int = @num_latent_heads> ()
    factor = Constant <value_float: float = @scale> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    queries_1d = Unsqueeze (queries, first)
    keys_1d = Unsqueeze (keys, first)
    latents_1d = Unsqueeze (latents, first)

    batch = Shape <start = 0, end = 1> (query)
    tokens = Shape <start = 1, end = 2> (query)
    tokens_scalar = Squeeze (tokens)
    capacity = Shape <start = 2, end = 3> (past_key)
    capacity_scalar = Squeeze (capacity)

    steps = Range (zero, tokens_scalar, one)
    lengths = Unsqueeze (past_length, second)
    positions = Add (lengths, steps)
    rotated_query = RotaryEmbedding <num_heads: int = @num_query_heads> (query, cos, sin, positions)
    rotated_key = RotaryEmbedding <num_heads: int = @num_key_heads> (key, cos, sin, positions)

    split = Concat <axis = 0> (first, first, keys_1d, last)
    split_key = Reshape (rotated_key, split)
    new_key = Transpose <perm = [0, 2, 1, 3]> (split_key)
    split_l = Concat <axis = 0> (first, first, latents_1d, last)
    split_latent = Reshape (latent, split_l)
    new_latent = Transpose <perm = [0, 2, 1, 3]> (split_latent)
    present_key = TensorScatter <axis = -2> (past_key, new_key, past_length)
    present_latent = TensorScatter <axis = -2> (past_latent, new_latent, past_length)

    scale_like = CastLike (factor, query)
    scaled_query = Mul (rotated_query, scale_like)
    split_q = Concat <axis = 0> (first, first, queries_1d, last)
    split_query = Reshape (scaled_query, split_q)
    heads_query = Transpose <perm = [0, 2, 1, 3]> (split_query)
    key_width = Shape <start = 3, end = 4> (past_key)
    grouped_by_key = Concat <axis = 0> (batch, keys_1d, last, key_width)
    grouped_query = Reshape (heads_query, grouped_by_key)
    key_columns = Transpose <perm = [0, 1, 3, 2]> (present_key)
    grouped_scores = MatMul (grouped_query, key_columns)

    cache_rows = Range (zero, capacity_scalar, one)
    limits = Unsqueeze (positions, last)
    visible = LessOrEqual (cache_rows, limits)
    visible_heads = Unsqueeze (visible, second)
    by_query = Concat <axis = 0> (batch, queries_1d, tokens, capacity)
    scores = Reshape (grouped_scores, by_query)
    scores_f32 = Cast <to = 1> (scores)
    lowest = Constant <value_float = -3.4028234663852886e38> ()
    masked = Where (visible_heads, scores_f32, lowest)
    weights_f32 = Softmax <axis = -1> (masked)
    weights = CastLike (weights_f32, query)
    grouped_by_latent = Concat <axis = 0> (batch, latents_1d, last, capacity)
    grouped_weights = Reshape (weights, grouped_by_latent)
    grouped_mix = MatMul (grouped_weights, present_latent)
    latent_width = Shape <start = 3, end = 4> (past_latent)
    by_head = Concat <axis = 0> (batch, queries_1d, tokens, latent_width)
    mix = Reshape (grouped_mix, by_head)
"""

_DECODE = """
    decoded = MatMul (mix, value_decoder)
    tiles = Concat <axis = 0> (batch, queries_1d, tokens, last, latent_width)
    decoded_tiles = Reshape (decoded, tiles)
    third_axis = Constant <value_ints = [3]> ()
    mix_tile = Unsqueeze (mix, third_axis)
    values_tiles = Add (decoded_tiles, mix_tile)
    values_by_token = Transpose <perm = [0, 2, 1, 3, 4]> (values_tiles)
"""
_KEEP = """
    values_by_token = Transpose <perm = [0, 2, 1, 3]> (mix)
"""
_JOIN = """
    joined = Concat <axis = 0> (batch, tokens, last)
"""
_GATE = """
    attended = Reshape (values_by_token, joined)
    open_gate = Sigmoid (gate)
    output = Mul (open_gate, attended)
"""
_NO_GATE = """
    output = Reshape (values_by_token, joined)
"""


def function(has_gate: bool = True, has_value_decoder: bool = True) -> str:
    """Return the op's meaning, in ONNX's text form (``onnx.parser.parse_function`` reads it).

    A function cannot ask whether an input is there, so each case has a body of its own. Its inputs stay the same, but
    for an absent one at the end: ONNX leaves that off the nodes, and its reference evaluator wants as many of each.
    The layers of one model are all alike, so a model holds one of them.
    """
    inputs = INPUTS if has_value_decoder else INPUTS[: INPUTS.index("value_decoder")]
    decode, gate = _DECODE if has_value_decoder else _KEEP, _GATE if has_gate else _NO_GATE
    return f"""<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP}
    <num_query_heads, num_key_heads, num_latent_heads, scale,
     plugin_namespace: string = "{DOMAIN}", plugin_version: string = "{VERSION}">
    ({", ".join(inputs)}) => ({", ".join(OUTPUTS)})
{{{_ATTEND}{decode}{_JOIN}{gate}}}"""
