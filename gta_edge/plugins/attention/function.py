"""The meaning of ``gta::GroupedLatentAttention`` as an ONNX function, composed of pieces.

Which pieces depends on what a model has (gate, value decoder) and on the features of a managed cache
(``definition.Features``). Without features the text is that of every bundle.
"""

from __future__ import annotations

from collections.abc import Iterator

from gta_edge.plugins.attention.definition import FEATURE_INPUTS, INPUTS, MAX_BRANCH_TOKENS, OBSERVE, OP, Features
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION

__all__ = ["function"]

# --- up to the mix: each piece uses what those before it define ------------------------------------------------------

_SETUP = """
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
"""
_ROWS = """\
    {rows} = Add (lengths, steps)
"""
_SCORES = """\
    rotated_query = RotaryEmbedding <num_heads: int = @num_query_heads> (query, cos, sin, {positions})
    rotated_key = RotaryEmbedding <num_heads: int = @num_key_heads> (key, cos, sin, {positions})

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
"""
_CAUSAL = """\
    limits = Unsqueeze ({rows}, last)
    visible = LessOrEqual (cache_rows, limits)
"""

_POWERS = [1 << bit if bit < 63 else -(1 << 63) for bit in range(MAX_BRANCH_TOKENS)]
"""A word for each new token with its bit alone, as int64 has it."""

# A word for each row of the cache: before those of branches one with all bits, behind them one with none. In a prompt,
# of more tokens than a word has bits, no row has one, and each token sees up to its own.
_BRANCHES = f"""\
    every_bit = Constant <value_int = -1> ()
    one_before = Constant <value_ints = [0, 1, 0, 0]> ()
    one_behind = Constant <value_ints = [0, 0, 0, 1]> ()
    words_from_shared = Pad (branches, one_before, every_bit)
    words_to_unseen = Pad (words_from_shared, one_behind)
    starts = Unsqueeze (branch_start, second)
    behind_start = Sub (cache_rows, starts)
    unbounded = Add (behind_start, one)
    width = Shape <start = 1, end = 2> (branches)
    width_scalar = Squeeze (width)
    unseen = Add (width_scalar, one)
    word_index = Clip (unbounded, zero, unseen)
    word_indices = Unsqueeze (word_index, last)
    row_words = GatherND <batch_dims = 1> (words_to_unseen, word_indices)
    powers = Constant <value_ints = [{", ".join(map(str, _POWERS))}]> ()
    token_powers = Slice (powers, first, tokens)
    with_bits = Shape (token_powers)
    without_bits = Sub (tokens, with_bits)
    is_prompt = Greater (without_bits, first)
    filled = Add (lengths, tokens)
    branched = Where (is_prompt, first, filled)
    in_use = Less (cache_rows, branched)
    words = Where (in_use, row_words, zero)
    no_powers = Concat <axis = 0> (first, without_bits)
    every_power = Pad (token_powers, no_powers)
    token_bits = Unsqueeze (every_power, last)
    words_by_token = Unsqueeze (words, second)
    bits = BitwiseAnd (words_by_token, token_bits)
    in_branch = Cast <to = 9> (bits)
    own_rows = Where (is_prompt, {{rows}}, every_bit)
    limits = Unsqueeze (own_rows, last)
    causal = LessOrEqual (cache_rows, limits)
    visible = Or (in_branch, causal)
"""
_VISIBLE = """\
    visible_heads = Unsqueeze (visible, second)
    by_query = Concat <axis = 0> (batch, queries_1d, tokens, capacity)
    scores = Reshape (grouped_scores, by_query)
    scores_f32 = Cast <to = 1> (scores)
    lowest = Constant <value_float = -3.4028234663852886e38> ()
"""
_BIAS = """\
    bias_width = Shape <start = 1, end = 2> (row_bias)
    rows_without = Sub (capacity, bias_width)
    bias_pads = Concat <axis = 0> (first, first, first, rows_without)
    bias = Pad (row_bias, bias_pads)
    bias_axes = Constant <value_ints = [1, 2]> ()
    bias_heads = Unsqueeze (bias, bias_axes)
    biased = Add (scores_f32, bias_heads)
"""
_MASKED = """\
    masked = Where (visible_heads, scores_f32, lowest)
"""
_MASKED_BIASED = """\
    masked = Where (visible_heads, biased, lowest)
"""
_SOFTMAX = """\
    weights_f32 = Softmax <axis = -1> (masked)
"""
# Of a query that sees no row, the softmax has equal weights.
_SOFTMAX_OR_ZERO = """\
    softmax = Softmax <axis = -1> (masked)
    no_weight = Constant <value_float = 0.0> ()
    weights_f32 = Where (visible_heads, softmax, no_weight)
"""
_MIX = """\
    weights = CastLike (weights_f32, query)
    grouped_by_latent = Concat <axis = 0> (batch, latents_1d, last, capacity)
    grouped_weights = Reshape (weights, grouped_by_latent)
    grouped_mix = MatMul (grouped_weights, present_latent)
    latent_width = Shape <start = 3, end = 4> (past_latent)
    by_head = Concat <axis = 0> (batch, queries_1d, tokens, latent_width)
    mix = Reshape (grouped_mix, by_head)
"""

# --- behind the mix --------------------------------------------------------------------------------------------------

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

_RECEIVED = {
    "mass": """
    before = Less (cache_rows, lengths)
    token_weights = ReduceSum <keepdims = 0> (weights_f32, second)
    query_row = Unsqueeze (query_weight, second)
    new_row = MatMul (query_row, token_weights)
    new_received = Squeeze (new_row, second)
    nothing = Constant <value_float = 0.0> ()
    old_received = Where (before, past_received, nothing)
    decay_column = Unsqueeze (decay, second)
    decayed = Mul (decay_column, old_received)
    present_received = Add (decayed, new_received)
""",
    "last": """
    before = Less (cache_rows, lengths)
    largest_weights = ReduceMax <keepdims = 0> (weights_f32, second)
    query_column = Unsqueeze (query_weight, last)
    importance = Mul (query_column, largest_weights)
    threshold = Constant <value_float = 1.0> ()
    important = GreaterOrEqual (importance, threshold)
    positions_f32 = Cast <to = 1> ({positions})
    position_column = Unsqueeze (positions_f32, last)
    never = Constant <value_float = -1.0> ()
    marks = Where (important, position_column, never)
    new_received = ReduceMax <keepdims = 0> (marks, second)
    old_received = Where (before, past_received, never)
    present_received = Max (old_received, new_received)
""",
}


def function(has_gate: bool = True, has_value_decoder: bool = True, features: Features | None = None) -> str:
    """Return the op's meaning, in ONNX's text form (``onnx.parser.parse_function`` reads it).

    A function cannot ask whether an input is there, so each case has a body of its own. Its inputs stay the same, but
    for absent ones at the end: ONNX leaves those off the nodes, and its reference evaluator wants as many of each.
    The layers of one model are all alike, so a model holds one of them.

    Args:
        has_gate: whether the output is multiplied by sigmoid(gate).
        has_value_decoder: whether mixes are decoded.
        features: of a managed cache; None for none.
    """
    features = features or Features()
    absent = {"value_decoder"} if not has_value_decoder else set()
    absent |= set(FEATURE_INPUTS) - set(features.inputs)
    inputs = list(INPUTS)
    while inputs[-1] in absent:
        inputs.pop()
    # The rows of new tokens, which are their positions where those are no input; that one's name may be taken.
    rows = "rows" if "positions" in inputs else "positions"
    positions = "positions" if features.has_positions else rows
    body = "".join(_pieces(has_gate, has_value_decoder, features)).format(rows=rows, positions=positions)
    observe = f',\n     {OBSERVE}: string = "{features.observe}"' if features.observe else ""
    return f"""<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP}
    <num_query_heads, num_key_heads, num_latent_heads, scale,
     plugin_namespace: string = "{DOMAIN}", plugin_version: string = "{VERSION}"{observe}>
    ({", ".join(inputs)}) => ({", ".join(features.outputs)})
{{{body}}}"""


def _pieces(has_gate: bool, has_value_decoder: bool, features: Features) -> Iterator[str]:
    """Yield the body, with the names ``rows`` and ``positions`` in braces."""
    yield from (_SETUP, _ROWS, _SCORES, _BRANCHES if features.has_branches else _CAUSAL, _VISIBLE)
    if features.bias_rows:
        yield _BIAS
    yield _MASKED_BIASED if features.bias_rows else _MASKED
    yield _SOFTMAX_OR_ZERO if features.has_branches else _SOFTMAX
    yield from (_MIX, _DECODE if has_value_decoder else _KEEP, _JOIN, _GATE if has_gate else _NO_GATE)
    if features.observe:
        yield _RECEIVED[features.observe]
