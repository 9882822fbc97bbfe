"""The attention op in torch, registered as ``torch.ops.gta.*``; importing this module registers it.

It exists twice, as torch's naming has it: the plain one returns new caches and can be exported; the one with a
trailing underscore writes into the caches it is given and returns the output alone.

The latter takes caches of fewer bits too (``torch_blocks``), which nobody exports.

On CUDA tensors of fp16 or bf16 it runs the CUDA kernels. What these are not made for (float32,
widths that are no multiple of 16, caches that are views, GPUs older than Ampere) is computed in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import installed, optional
from gta_edge.plugins.attention.definition import (
    FEATURE_INPUTS,
    INT64_INPUTS,
    MAX_BRANCH_TOKENS,
    MODEL_INPUTS,
    OPEN_INPUTS,
    SCALE_INPUTS,
    Sizes,
    given_features,
    given_inputs,
)
from gta_edge.plugins.attention.kernels import BUFFERS_OF, Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.attention.torch_blocks import BlockStep, blocks_of
from gta_edge.plugins.torch_cache import Cache, cache_name, dequantize_rows, quantize_rows
from gta_edge.plugins.torch_registry import (
    CALLS_CACHED,
    Kind,
    aligned,
    compute_type,
    kind,
    making_current,
    register_op,
    require_aligned,
    runs_kernels,
    stream_handle,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    torch = optional("torch", "export")
    Tensor, functional = torch.Tensor, torch.nn.functional

__all__ = [
    "UNMANAGED",
    "attention_in_blocks",
    "attention_in_place",
    "differentiable_attention",
    "grouped_latent_attention",
    "grouped_latent_attention_",
]

_FEATURES_AT = len(MODEL_INPUTS) + 4
"""Place of the first of ``FEATURE_INPUTS`` among the arguments of the op in place: behind the heads and the scale."""

_STORED_INPUTS = SCALE_INPUTS + OPEN_INPUTS
_STORED_AT = _FEATURES_AT + len(FEATURE_INPUTS) + 1
"""Place of the first of these: behind those and ``observe``."""

UNMANAGED = (*(None for _ in FEATURE_INPUTS), "")
"""What the op in place takes for these inputs of a cache that nobody manages."""

_NO_SCALES = dict.fromkeys((name.removeprefix("past_") for name in SCALE_INPUTS), 0)


# --- in torch's own operations ---------------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + d/2) of ``x`` [B, n, T, d] by the angles of ``cos``, ``sin`` [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x`` [B, T, n·d] as [B, n, T, d]."""
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(1, 2)


def _append(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """Write ``new`` [B, n, T, ...] into ``cache`` [B, n, S, ...] at the rows ``positions`` [B, T]."""
    if cache.dtype == torch.float8_e4m3fn:  # of which torch scatters none
        cache, new = cache.view(torch.uint8), new.view(torch.uint8)
    cache.scatter_(2, positions[:, None].reshape(-1, 1, new.shape[2], *[1] * (new.ndim - 3)).expand_as(new), new)


def _appended(cache: Cache, new: tuple[Tensor, Tensor], rows: Tensor) -> list[Tensor]:
    """Write a new key and latent into a cache at ``rows`` [B, T]; return what both hold, of 8 bits in float32."""
    both = cache.key, cache.latent
    if not cache.scales:
        for tensor, values in zip(both, new, strict=True):
            _append(tensor, values, rows)
        return list(both)
    for tensor, scales, values in zip(both, cache.scales, new, strict=True):
        codes, new_scales = quantize_rows(values, tensor.dtype)
        _append(tensor, codes, rows)
        _append(scales, new_scales, rows)
    return [dequantize_rows(tensor, scales) for tensor, scales in zip(both, cache.scales, strict=True)]


def _causal(past_length: Tensor, tokens: int, capacity: int) -> Tensor:
    """Return which rows each query sees, bool [B, T, S]: those up to its own."""
    device = past_length.device
    last = past_length[:, None] + torch.arange(tokens, device=device)  # [B, T]
    return torch.arange(capacity, device=device) <= last[:, :, None]


def _in_branches(past_length: Tensor, tokens: int, capacity: int, branch_start: Tensor, branches: Tensor) -> Tensor:
    """Return which rows each query sees, bool [B, T, S]: shared ones, and those of its branch."""
    rows = torch.arange(capacity, device=past_length.device)
    offset = rows - branch_start[:, None]  # [B, S]
    # a word for each row: all bits for what all see, none for what nobody does
    words = functional.pad(functional.pad(branches, (1, 0), value=-1), (0, 1), value=0)
    words = words.gather(1, (offset + 1).clamp(0, branches.shape[1] + 1))
    words = torch.where(rows < past_length[:, None] + tokens, words, 0)
    return (words[:, None] >> torch.arange(tokens, device=rows.device)[:, None] & 1).bool()


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    visible: Tensor,
    row_bias: Tensor | None,
    some_see_nothing: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``query`` [B, n_q, T, d_k] over both caches, as far as it is ``visible`` [B, T, S].

    Returns the mix [B, n_q, T, d_v], and the weights [B, n_q, T, S]. The softmax is computed in float32, in float64
    where the scores are.
    """
    b, n_q, t, d_k = query.shape
    n_k, s = key_cache.shape[1:3]
    n_v, d_v = value_cache.shape[1], value_cache.shape[3]
    # heads that share a cached head become rows of one matmul: [B, n_k, (n_q/n_k)·T, d_k] x [B, n_k, d_k, S]
    scores = (query * scale).reshape(b, n_k, -1, d_k) @ key_cache.transpose(2, 3)
    scores = scores.reshape(b, n_q, t, s).to(torch.promote_types(scores.dtype, torch.float32))
    if row_bias is not None:
        scores[..., : row_bias.shape[1]] += row_bias[:, None, None]
    hidden = ~visible[:, None]  # [B, 1, T, S]
    weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
    if some_see_nothing:
        weights = weights.masked_fill(hidden, 0.0)
    mix = (weights.to(query.dtype).reshape(b, n_v, -1, s) @ value_cache).reshape(b, n_q, t, d_v)
    return mix, weights


def _receive(
    past_received: Tensor,
    weights: Tensor,
    past_length: Tensor,
    positions: Tensor,
    query_weight: Tensor,
    decay: Tensor,
    observe: str,
) -> None:
    """Update ``past_received`` [B, S] by the weights [B, n_q, T, S]; see ``definition``."""
    before = torch.arange(past_received.shape[1], device=past_received.device) < past_length[:, None]
    if observe == "mass":
        new = (query_weight[:, None].to(weights.dtype) @ weights.sum(1)).squeeze(1)
        received = decay[:, None] * torch.where(before, past_received, 0.0) + new
    else:
        important = query_weight[:, :, None] * weights.amax(1) >= 1
        new = torch.where(important, positions[:, :, None].to(past_received.dtype), -1.0).amax(1)
        received = torch.maximum(torch.where(before, past_received, -1.0), new)
    past_received.copy_(received)


def _check_features(shapes: Mapping[str, Sequence[int]], capacity: int, observe: str, *, in_blocks: bool) -> None:
    """Refuse inputs of a managed cache, of these shapes, that do not go together.

    Raises:
        BackendError: there is one without another, a size is not possible, or the cache is in blocks.
    """
    if in_blocks:
        raise BackendError(
            f"{', '.join(shapes) or 'observe'} is given with a cache in blocks, whose rows are not moved one by one",
            "take a cache of int8, or leave it out",
        )
    try:
        given_features(shapes, observe)
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        raise BackendError(problem, remedy) from error
    if "row_bias" in shapes and shapes["row_bias"][1] > capacity:
        raise BackendError(f"row_bias has {shapes['row_bias'][1]} rows", f"expected at most the capacity {capacity}")


def _latent_attention(
    query: Tensor,
    key: Tensor,
    latent: Tensor,
    gate: Tensor | None,
    past_key: Tensor,
    past_latent: Tensor,
    past_length: Tensor,
    cos: Tensor,
    sin: Tensor,
    value_decoder: Tensor | None,
    num_query_heads: int,
    num_key_heads: int,
    num_latent_heads: int,
    scale: float,
    positions: Tensor | None = None,
    row_bias: Tensor | None = None,
    branch_start: Tensor | None = None,
    branches: Tensor | None = None,
    past_received: Tensor | None = None,
    query_weight: Tensor | None = None,
    decay: Tensor | None = None,
    observe: str = "",
    past_key_scale: Tensor | None = None,
    past_latent_scale: Tensor | None = None,
    past_key_open: Tensor | None = None,
    past_latent_open: Tensor | None = None,
) -> Tensor:
    """Grouped latent attention with its caches updated in place; shapes as in ``definition.INPUTS``."""
    b, t, _ = query.shape
    s = past_latent.shape[2]
    features = (positions, row_bias, branch_start, branches, past_received, query_weight, decay)
    if observe or any(feature is not None for feature in features):
        shapes = {name: x.shape for name, x in zip(FEATURE_INPUTS, features, strict=True) if x is not None}
        _check_features(shapes, s, observe, in_blocks=past_key_open is not None)
    rows = past_length[:, None] + torch.arange(t, device=query.device)  # [B, T]
    if positions is None:
        positions = rows.clamp(max=len(cos) - 1)  # of padding, and of who has no new tokens
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [B, 1, T, d_k/2]
    q = _rotate(_heads(query, num_query_heads), cos, sin)
    k = _rotate(_heads(key, num_key_heads), cos, sin)
    new = k, _heads(latent, num_latent_heads)
    tensors = (past_key, past_latent, past_key_scale, past_latent_scale, past_key_open, past_latent_open)
    cache = Cache.of(tuple(tensor for tensor in tensors if tensor is not None))
    some_see_nothing = False
    if cache.open:
        blocks = BlockStep(cache, past_length, *new)
        keys, latents, visible = blocks.key, blocks.latent, blocks.visible()
    else:
        keys, latents = _appended(cache, new, rows)
        if branch_start is not None and branches is not None and t <= MAX_BRANCH_TOKENS:
            some_see_nothing = True
            visible = _in_branches(past_length, t, s, branch_start, branches)
        else:
            visible = _causal(past_length, t, s)
    values, weights = _attend(q.to(keys.dtype), keys, latents, visible, row_bias, some_see_nothing, scale)
    values = values.to(query.dtype)
    if past_received is not None and query_weight is not None and decay is not None:
        _receive(past_received, weights, past_length, positions, query_weight, decay, observe)
    if value_decoder is not None:
        expansion = value_decoder.shape[2] // value_decoder.shape[1]
        values = values.repeat(1, 1, 1, expansion) + values @ value_decoder  # [B, n_q, T, e·d_l]
    joined = values.transpose(1, 2).reshape(b, t, -1)
    return joined if gate is None else torch.sigmoid(gate) * joined


def attention_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``grouped_latent_attention``, whose new caches are the ones that it was given, updated in place."""
    return grouped_latent_attention_(*arguments), arguments[4], arguments[5]


def attention_in_blocks(value_bits: int, *arguments: Any) -> Tensor:
    """Return the output of ``grouped_latent_attention`` where the past in its caches is read as one in blocks is.

    Args:
        value_bits: width of a latent's codes.
        arguments: the op's; the caches stay as they are.
    """
    query, key, latent, gate, past_key, past_latent, past_length, *others = arguments
    cache = blocks_of(past_key, past_latent, past_length, value_bits, key.shape[1])
    tensors = (cache.key, cache.latent, past_length, *others, *UNMANAGED, *cache.scales, *cache.open)
    output: Tensor = grouped_latent_attention_(query, key, latent, gate, *tensors)
    return output


def differentiable_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``grouped_latent_attention`` in operations that torch differentiates, which it does not do with the op."""
    given = list(arguments)
    given[4:6] = caches = [cache.clone() for cache in arguments[4:6]]
    return _latent_attention(*given), caches[0], caches[1]


# --- on the kernels --------------------------------------------------------------------------------------------------


def _latent_attention_on_gpu(*arguments: Any) -> Tensor:
    """The same on CUDA tensors: the kernels, where they are made for the call."""
    inputs, (*heads, scale) = arguments[: len(MODEL_INPUTS)], arguments[len(MODEL_INPUTS) : _FEATURES_AT]
    managed = arguments[_FEATURES_AT : _FEATURES_AT + len(FEATURE_INPUTS)]  # those at the end may be left off
    observe = str(arguments[_STORED_AT - 1]) if len(arguments) >= _STORED_AT else ""
    query, key, latent, gate, past_key, past_latent, past_length, cos, sin, value_decoder = inputs
    given = {name: tensor for name, tensor in zip(FEATURE_INPUTS, managed, strict=False) if tensor is not None}
    stored = dict(zip(_STORED_INPUTS, arguments[_STORED_AT:], strict=False))
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    in_place = {"past_key": past_key, "past_latent": past_latent, **stored}
    written = [*in_place.values(), *(given[name] for name in ("past_received",) if name in given)]
    call = _kernel_call(
        (*map(kind, inputs), *map(kind, managed)),
        tuple((name, kind(tensor)) for name, tensor in stored.items()),
        tuple(heads),
        observe,
        all(tensor.is_contiguous() for tensor in written),
    )
    device = query.device
    if call is None or not runs_kernels(device) or not scale > 0:
        return _latent_attention(*arguments)
    variant, sizes, numbers = call
    for name, tensor in in_place.items():
        if name not in SCALE_INPUTS:  # the kernels see to these, since those of rows may begin at any float
            require_aligned(name, tensor)
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels = attention_kernels(variant, current_gpu(index))
    output: Tensor = query.new_empty(sizes["batch"], sizes["tokens"], variant.sizes.hidden_size)
    workspace = torch.empty(kernels.workspace_bytes(**sizes), dtype=torch.uint8, device=device)
    # held until the launches are queued: then the allocator may give their memory only to what follows them
    read = (query, key, latent, gate, past_length, cos, sin, value_decoder)
    whole = [None if tensor is None else aligned(tensor) for tensor in read]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in whole]
    managed_whole = {name: tensor if name == "past_received" else aligned(tensor) for name, tensor in given.items()}
    with making_current(index):  # whose default stream has the handle of every other GPU's
        kernels.launch(
            stream_handle(index),
            Buffers(
                query=addresses[0],
                key=addresses[1],
                latent=addresses[2],
                gate=addresses[3],
                key_cache=past_key.data_ptr(),
                latent_cache=past_latent.data_ptr(),
                past_length=addresses[4],
                cos=addresses[5],
                sin=addresses[6],
                value_decoder=addresses[7],
                output=output.data_ptr(),
                workspace=workspace.data_ptr(),
                **{**_NO_SCALES, **{name.removeprefix("past_"): x.data_ptr() for name, x in stored.items()}},
                **{BUFFERS_OF[name]: tensor.data_ptr() for name, tensor in managed_whole.items()},
            ),
            **sizes,
            **numbers,
            scale=scale,
        )
    return output


@lru_cache(CALLS_CACHED)
def _kernel_call(
    inputs: tuple[Kind | None, ...],
    stored: tuple[tuple[str, Kind], ...],
    heads: tuple[int, int, int],
    observe: str,
    contiguous: bool,
) -> tuple[Variant, Mapping[str, int], Mapping[str, int]] | None:
    """Return what the kernels would be compiled for and launched with; None if they are not made for such tensors.

    Args:
        inputs: as in ``definition.INPUTS``.
        stored: what a cache of fewer bits has besides, by name.
        heads: n_q, n_k, n_c.
        observe: the attribute, empty if there is none.
        contiguous: whether all that is written in place is.

    Returns:
        the variant, the sizes that the workspace goes by, and the launches' other numbers.

    Raises:
        BackendError: inputs of a managed cache do not go together.
    """
    given = given_inputs(inputs)
    shapes = {name: shape for name, (shape, _) in given.items()}
    managed = {name: shapes[name] for name in FEATURE_INPUTS if name in shapes}
    sizes = {"batch": shapes["query"][0], "tokens": shapes["query"][1], "capacity": shapes["past_latent"][2]}
    in_blocks = any(name in OPEN_INPUTS for name, _ in stored)
    if managed or observe:
        _check_features(managed, sizes["capacity"], observe, in_blocks=in_blocks)
    dtype = given["query"][1]
    compute, types = compute_type(dtype), dict.fromkeys(MODEL_INPUTS, dtype) | dict.fromkeys(managed, torch.float32)
    types |= dict.fromkeys(INT64_INPUTS, torch.int64)
    model, features = _sizes(shapes, heads), given_features(managed, observe)
    cache = compute or ""
    if stored:
        value_bits = 8 * shapes["past_latent"][-1] // model.latent_dim
        cache = cache_name(given["past_key"][1], value_bits)
        types |= dict.fromkeys(("past_key", "past_latent"), given["past_key"][1])
    if compute is None or not contiguous or any(of != types[name] for name, (_, of) in given.items()):
        return None
    try:
        variant = Variant(model, compute, cache, features)
    except BackendError:
        return None
    branch_rows = shapes["branches"][1] if "branches" in shapes else 0
    return variant, sizes, {"positions": shapes["cos"][0], "branch_rows": branch_rows}


def _sizes(shapes: Mapping[str, Sequence[int]], heads: tuple[int, int, int]) -> Sizes:
    gate, decoder = shapes.get("gate"), shapes.get("value_decoder")
    d_k, d_l = (shapes[name][-1] // n for name, n in zip(("key", "latent"), heads[1:], strict=True))
    width = heads[0] * (d_l if decoder is None else decoder[-1])
    hidden = width if gate is None else gate[-1]
    return Sizes(*heads, d_k, d_l, hidden, gate is not None, decoder is not None)


# --- torch's registry ------------------------------------------------------------------------------------------------


def _register() -> tuple[Any, Any]:
    """Register the op that returns new caches, and the one that updates them in place; return both in this order.

    A managed cache is updated in place: the former has no inputs for it, and so is what is exported.
    """
    name, in_place = "grouped_latent_attention", _latent_attention
    if not installed(torch):
        return in_place, in_place  # using either says what to install
    caches, received = ("past_key", "past_latent"), "past_received"
    places = [MODEL_INPUTS.index(cache) for cache in caches]
    mutated = [*places, _FEATURES_AT + FEATURE_INPUTS.index(received)]
    mutated += range(_STORED_AT, _STORED_AT + len(_STORED_INPUTS))

    def fake(*arguments: Any) -> Any:
        given, num_query_heads = given_inputs(arguments[: len(MODEL_INPUTS)]), arguments[len(MODEL_INPUTS)]
        num_latent_heads = arguments[len(MODEL_INPUTS) + 2]
        width = given["value_decoder"].shape[-1] if "value_decoder" in given else given["latent"].shape[-1]
        heads = num_query_heads if "value_decoder" in given else num_query_heads // num_latent_heads
        return given["query"].new_empty(*given["query"].shape[:2], heads * width)

    mutating_schema = torch.library.infer_schema(in_place, mutates_args=(*caches, received, *_STORED_INPUTS))
    mutating = register_op(
        f"{name}_", mutating_schema, in_place, fake, mutates=mutated, on_gpu=_latent_attention_on_gpu
    )

    def plainly(*arguments: Any) -> tuple[Tensor, ...]:
        presents = {place: arguments[place].clone() for place in places}
        output = mutating(*(presents.get(place, argument) for place, argument in enumerate(arguments)))
        return (output, *presents.values())

    schema = torch.library.infer_schema(in_place, mutates_args=())
    schema = f"{schema[: schema.index(f', Tensor? {FEATURE_INPUTS[0]}')]}) -> (Tensor, Tensor, Tensor)"

    def fakes(*arguments: Any) -> Any:
        return fake(*arguments), *(arguments[place].new_empty(arguments[place].shape) for place in places)

    plain = register_op(name, schema, plainly, fakes)
    return plain, mutating


grouped_latent_attention, grouped_latent_attention_ = _register()
