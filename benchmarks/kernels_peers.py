"""What ``kernels.py`` compares: one layer's attention, by these kernels and by others, over several layers' caches.

These kernels do more than their peers are asked to do: RoPE and the append are part of the op, GTA's value decoder and
gate too. A peer computes softmax attention over a cache that is there already, and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import optional
from gta_edge.model.config import GTAConfig
from gta_edge.model.presets import preset
from gta_edge.numerics.cache_codes import BLOCK, dequantize_keys, dequantize_values
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, CACHES
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.kernels import Buffers, attention_kernels
from gta_edge.plugins.attention.tiling import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["CONTENDERS", "Contender", "Layers", "WrongResultError", "candidates", "check", "layers_of", "shortest"]

GTA, GQA = preset("gta-1b"), preset("gqa-1b")
assert isinstance(GTA, GTAConfig)
_HEADS = (GTA.num_query_heads, GTA.num_key_heads, GTA.num_latent_heads)
GTA_SIZES = Sizes(*_HEADS, GTA.key_dim, GTA.latent_dim, GTA.hidden_size)
_KEY = GQA.caches[0]
_QUERIES = GQA.num_attention_heads
GQA_SIZES = Sizes(
    *(_QUERIES, _KEY.heads, _KEY.heads, _KEY.width, _KEY.width, _QUERIES * _KEY.width),
    has_gate=False,
    has_value_decoder=False,
)
ITEM_BYTES = 2
SCALE_BYTES = 4
FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE_BYTES = 256 * 2**20


class WrongResultError(BackendError):
    """A contender does not compute what it should."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer's attention, with what it costs by its definition."""

    key: str
    label: str
    engine: str
    """``ours``, ``sdpa`` or ``flashinfer``."""
    cache: str
    heads: tuple[int, int]
    """Query heads, and heads of the key cache."""
    widths: tuple[int, int]
    """Of a key, and of a value or latent."""
    activations: int
    """Values per new token that are read and written besides the cache."""
    decoder: int = 0
    """Values of the value decoder: all are read, and each is one multiply-add per new token."""
    sizes: Sizes | None = None
    """What these kernels are compiled for; None of a peer."""

    @property
    def cached_values_per_token(self) -> int:
        """Values that one token adds to the cache of a layer."""
        return self.heads[1] * sum(self.widths)

    @property
    def in_blocks(self) -> bool:
        """Whether the cache has codes of blocks of 32 rows."""
        return self.cache in BLOCK_CACHE_TYPES

    @property
    def cache_bytes_per_token(self) -> int:
        """The same in bytes, scales included: one for a head's key, one for its latent; in blocks, minima too."""
        if self.cache == "bf16":
            return ITEM_BYTES * self.cached_values_per_token
        if self.in_blocks:
            (key, value), of = self.widths, CACHES[self.cache]
            groups = ITEM_BYTES * (2 * key // BLOCK + 2)  # of a channel of a block of keys, of a row of values
            return self.heads[1] * (key * of.key_bits // 8 + value * of.value_bits // 8 + groups)
        return self.cached_values_per_token + 2 * self.heads[1] * SCALE_BYTES

    @property
    def multiply_adds_per_pair(self) -> int:
        """Multiply-adds for one pair of a query token and a cached token, over all heads."""
        return self.heads[0] * sum(self.widths)

    def traffic_bytes(self, batch: int, tokens: int, context: int) -> int:
        """Return the bytes that have to move at least: all cached rows once, new rows, inputs, output and decoder.

        Args:
            batch: rows.
            tokens: new ones, per row.
            context: cached ones after the call, per row.
        """
        written = tokens * self.cache_bytes_per_token if self.engine == "ours" else 0
        read = context * self.cache_bytes_per_token
        if self.in_blocks:
            held, row = self.held(tokens, context), ITEM_BYTES * self.cached_values_per_token
            read = held // BLOCK * BLOCK * self.cache_bytes_per_token + held % BLOCK * row
            written = min(tokens, BLOCK) * row + (tokens > 1) * written
        return batch * (read + written + ITEM_BYTES * tokens * self.activations) + ITEM_BYTES * self.decoder

    def held(self, tokens: int, context: int) -> int:
        """Return the cached tokens after a call: of a cache in blocks half a block less, if the last token fills one.

        One step of 32 does; the others are what is timed.
        """
        return context - BLOCK // 2 if self.in_blocks and tokens == 1 and context % BLOCK == 0 else context

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """Return the FLOPs of matrix products; a query sees the tokens up to its own."""
        pairs = tokens * (2 * context - tokens + 1) // 2
        return 2 * batch * (pairs * self.multiply_adds_per_pair + tokens * self.decoder)


def _contenders() -> Iterator[Contender]:
    for model, sizes, caches in (("GTA", GTA_SIZES, ("bf16", "int8", "fp8")), ("GQA", GQA_SIZES, ("bf16", "int8"))):
        for cache in (*caches, *BLOCK_CACHE_TYPES):
            yield _own(f"{model.lower()}-{cache}", f"gta-edge {model}, {cache} cache", sizes, cache)
    for engine, name in (("sdpa", "SDPA"), ("flashinfer", "FlashInfer")):
        heads, width = (_QUERIES, _KEY.heads), _KEY.width
        yield Contender(f"gqa-{engine}", f"{name} GQA", engine, "bf16", heads, (width,) * 2, 2 * heads[0] * width)
        heads, width = (
            (GTA_SIZES.num_query_heads, GTA_SIZES.num_key_heads),
            max(GTA_SIZES.key_dim, GTA_SIZES.latent_dim),
        )
        label = f"{name} GTA padded"
        yield Contender(f"padded-{engine}", label, engine, "bf16", heads, (width,) * 2, 2 * heads[0] * width)


def _own(key: str, label: str, sizes: Sizes, cache: str) -> Contender:
    heads, widths = (sizes.num_query_heads, sizes.num_key_heads), (sizes.key_dim, sizes.latent_dim)
    inputs = sum(heads) * widths[0] + sizes.num_latent_heads * widths[1]
    activations = inputs + sizes.hidden_size * (1 + sizes.has_gate)
    decoder = sizes.latent_dim * sizes.hidden_size * sizes.has_value_decoder
    return Contender(key, label, "ours", cache, heads, widths, activations, decoder, sizes)


CONTENDERS: dict[str, Contender] = {contender.key: contender for contender in _contenders()}
"""By key; GTA-1B's layer, GQA-1B's, and GTA-1B's with keys padded to the latents' width, as others need it."""


@dataclass(frozen=True)
class Layers:
    """Memory of several layers of one contender, and how to run one of them."""

    count: int
    run: Callable[[int], Tensor]
    """Takes the number of a layer; returns its output."""
    expected: Callable[[int], Tensor]
    """Takes the number of a layer that was run; returns the output as float32 arithmetic has it."""
    past_length: Tensor | None = None
    """In device memory, where what is run goes by it: with zeros there, the same graph runs on an empty cache."""


def candidates(contender: Contender, tokens: int) -> list[str]:
    """Return the ways to run a contender, of which the fastest counts."""
    if contender.engine == "ours":
        return ["kernels"]
    if contender.engine == "flashinfer":
        return ["tensor cores", "CUDA cores"] if tokens == 1 else ["auto"]
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    # For one new token, query heads that share a key are rows of one product: what enable_gqa makes of it, by hand.
    return [f"{backend}{way}" for backend in backends for way in ((" rows", " gqa") if tokens == 1 else (" gqa",))]


def shortest(contender: Contender) -> int:
    """Return the shortest cache that a contender is run with."""
    return FLASHINFER_PAGE if contender.engine == "flashinfer" else 1


def layers_of(contender: Contender, way: str, batch: int, tokens: int, context: int, count: int) -> Layers:
    """Make caches and inputs of ``count`` layers.

    Args:
        contender: what is run.
        way: one of ``candidates``.
        batch: rows.
        tokens: new ones, per row.
        context: cached ones after the call, per row.
        count: layers.

    Raises:
        BackendError: the peer is not installed.
        torch.OutOfMemoryError: it does not fit.
    """
    make = {"ours": _ours, "sdpa": _sdpa, "flashinfer": _flashinfer}[contender.engine]
    return make(contender, way, batch, tokens, context, count)


def check(contender: Contender, way: str, tokens: int, context: int) -> None:
    """Compare a small case with float32.

    Raises:
        WrongResultError: the result is wrong.
    """
    layers = layers_of(contender, way, 1 if tokens > 1 else 2, tokens, context, 2)
    for layer in range(layers.count):
        found = layers.run(layer).float()
        expected = layers.expected(layer)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if not error <= 2e-2:  # not a number is wrong, too
            raise WrongResultError(
                f"{contender.label} ({way}), {tokens} new of {context} tokens, is off by {error:.3g} of the largest "
                "output; expected at most 0.02: nothing was measured"
            )


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention [B, n_q, T, d_v] in float32; the last query sees all of the key [B, n_k, S, d_k]."""
    positions = torch.arange(key.shape[2], device=query.device)
    return _masked(query, key, value, positions > positions[key.shape[2] - query.shape[2] :, None], scale)


def _masked(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """The same of what is not ``hidden`` [T, S]."""
    keys, values = (x.float().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return (scale * query.float() @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ values


# --- these kernels ---------------------------------------------------------------------------------------------------


def _ours(contender: Contender, way: str, batch: int, tokens: int, context: int, count: int) -> Layers:
    del way
    sizes, quantised, held = contender.sizes, contender.cache != "bf16", contender.held(tokens, context)
    assert sizes is not None
    n_q, d_k, d_l = sizes.num_query_heads, sizes.key_dim, sizes.latent_dim
    kernels = attention_kernels(Variant(sizes, "bf16", contender.cache), current_gpu(torch.cuda.current_device()))
    workspace = torch.empty(kernels.workspace_bytes(batch, tokens, context), dtype=torch.uint8, device="cuda")
    past_length = torch.full((batch,), held - tokens, dtype=torch.int64, device="cuda")
    angles = torch.arange(context, device="cuda")[:, None] / 1e4 ** (torch.arange(0, d_k, 2, device="cuda") / d_k)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    shared = {"past_length": past_length, "cos": cos, "sin": sin, "workspace": workspace}
    layers: list[dict[str, Tensor]] = []
    for _ in range(count):
        layer = {
            "query": _normal(batch, tokens, n_q * d_k),
            "key": _normal(batch, tokens, sizes.num_key_heads * d_k),
            "latent": _normal(batch, tokens, sizes.num_latent_heads * d_l),
            "output": torch.empty(batch, tokens, sizes.hidden_size, dtype=torch.bfloat16, device="cuda"),
        }
        if sizes.has_gate:
            layer["gate"] = _normal(batch, tokens, sizes.hidden_size)
        if sizes.has_value_decoder:
            layer["value_decoder"] = _normal(n_q, d_l, sizes.hidden_size // n_q) / d_l**0.5
        for name, heads, width in (("key", sizes.num_key_heads, d_k), ("latent", sizes.num_latent_heads, d_l)):
            shape = (batch, heads, context, width)
            layer |= (_blocks if contender.in_blocks else _cache)(name, shape, contender.cache)
        layers.append(layer | shared)  # addresses keep nothing alive
    absent = dict.fromkeys(("key_scale", "latent_scale", "gate", "value_decoder"), 0)
    addresses = [absent | {name: x.data_ptr() for name, x in layer.items()} for layer in layers]
    buffers = [Buffers(**each) for each in addresses]
    scale = d_k**-0.5
    call = {"batch": batch, "tokens": tokens, "capacity": context, "positions": context, "scale": scale}

    def run(i: int) -> Tensor:
        kernels.launch(torch.cuda.current_stream().cuda_stream, buffers[i], **call)
        return layers[i]["output"]

    def turned(x: Tensor, heads: int) -> Tensor:  # [B, n, T, d_k]
        a, b = x.float().unflatten(2, (heads, d_k)).transpose(1, 2).chunk(2, -1)
        c, s = cos.float()[held - tokens : held], sin.float()[held - tokens : held]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def expected(i: int) -> Tensor:
        layer = layers[i]
        caches = {}
        new_key = turned(layer["key"], sizes.num_key_heads)
        new_latent = layer["latent"].float().unflatten(2, (-1, d_l)).transpose(1, 2)
        if contender.in_blocks:
            new = {"key": new_key, "latent": new_latent}
            values = _in_blocks(contender, layer, new, turned(layer["query"], n_q), held, scale)
            return finished(layer, values)
        for name in ("key", "latent"):
            scales = layer[f"{name}_scale"][..., None] if quantised else 1.0
            caches[name] = layer[f"{name}_cache"].float() * scales
        for name, new in (("key", new_key), ("latent", new_latent)):
            if not torch.allclose(caches[name][:, :, context - tokens :], new, rtol=0.07, atol=0.05):
                raise WrongResultError(
                    f"{contender.label}: the {name} that was appended is wrong; nothing was measured"
                )
        return finished(layer, _causal(turned(layer["query"], n_q), caches["key"], caches["latent"], scale))

    def finished(layer: dict[str, Tensor], values: Tensor) -> Tensor:
        if sizes.has_value_decoder:
            decoder = layer["value_decoder"].float()
            values = values.repeat(1, 1, 1, decoder.shape[2] // d_l) + values @ decoder
        output = values.transpose(1, 2).flatten(2)
        return torch.sigmoid(layer["gate"].float()) * output if sizes.has_gate else output

    return Layers(count, run, expected, past_length)


def _cache(name: str, shape: tuple[int, ...], kind: str) -> dict[str, Tensor]:
    """Return a cache of random values, with scales if its type has them."""
    if kind == "bf16":
        return {f"{name}_cache": _normal(*shape)}
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    if kind == "fp8":
        codes = torch.where((codes & 127) == 127, 0, codes).view(torch.float8_e4m3fn)  # every code but NaN
    scales = torch.full(shape[:3], 1 / 64 if kind == "int8" else 1 / 128, device="cuda")
    return {f"{name}_cache": codes, f"{name}_scale": scales}


def _blocks(name: str, shape: tuple[int, ...], kind: str) -> dict[str, Tensor]:
    """The same of a cache in blocks, its open block beside the codes."""
    batch, heads, capacity, width = shape
    bits, blocks = CACHES[kind].value_bits, capacity // BLOCK
    codes, groups = (batch, heads, capacity, width * bits // 8), (batch, heads, capacity, 2)
    if name == "key":
        codes, groups = (batch, heads, blocks, width, BLOCK // 2), (batch, heads, blocks, 2, width)
    pair = torch.tensor([0.25, -2.0], dtype=torch.float16, device="cuda")  # a scale and a minimum
    return {
        f"{name}_cache": torch.randint(0, 256, codes, dtype=torch.uint8, device="cuda"),
        f"{name}_scale": (pair[:, None] if name == "key" else pair).expand(groups).contiguous(),
        f"{name}_open": _normal(batch, heads, BLOCK, width),
    }


def _in_blocks(
    contender: Contender, layer: dict[str, Tensor], new: dict[str, Tensor], query: Tensor, held: int, scale: float
) -> Tensor:
    """Return attention as ``_causal`` does, over a cache in blocks, both forms of whose rows stand side by side.

    The open block, as the call has left it, still has all rows of 16 bits that the queries read, where these are of one
    block or the cache was empty before.
    """
    both = {}
    for name, rows in new.items():
        codes, groups = layer[f"{name}_cache"], layer[f"{name}_scale"].float()
        if name == "key":
            coded = dequantize_keys(codes, groups, torch.cat)
        else:
            coded = dequantize_values(codes, groups, CACHES[contender.cache].value_bits, torch.cat)
        exact = torch.zeros_like(coded)
        first = (held - 1) // BLOCK * BLOCK
        exact[:, :, first:held] = layer[f"{name}_open"][:, :, : held - first].float()
        if not torch.allclose(exact[:, :, held - 1], rows[:, :, -1], rtol=0.07, atol=0.05):
            raise WrongResultError(f"{contender.label}: the {name} that was appended is wrong; nothing was measured")
        exact[:, :, held - rows.shape[2] : held] = rows
        both[name] = torch.cat((coded, exact), 2)
    places = torch.arange(both["key"].shape[2] // 2, device=query.device)
    own = places[held - query.shape[2] : held, None]  # [T, 1]
    hidden = torch.cat((places // BLOCK >= own // BLOCK, (places // BLOCK != own // BLOCK) | (places > own)), 1)
    return _masked(query, both["key"], both["latent"], hidden, scale)


# --- peers -----------------------------------------------------------------------------------------------------------


def _sdpa(contender: Contender, way: str, batch: int, tokens: int, context: int, count: int) -> Layers:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend, _, arrangement = way.partition(" ")
    (n_q, n_k), (width, _) = contender.heads, contender.widths
    queries = [_normal(batch, n_q, tokens, width) for _ in range(count)]
    keys, values = ([_normal(batch, n_k, context, width) for _ in range(count)] for _ in range(2))
    scale = width**-0.5

    def run(i: int) -> Tensor:
        query, options = queries[i], {"is_causal": tokens > 1, "enable_gqa": n_q != n_k}
        if arrangement == "rows":
            query, options = query.view(batch, n_k, n_q // n_k, width), {}
        with sdpa_kernel(getattr(SDPBackend, backend)):
            output = scaled_dot_product_attention(query, keys[i], values[i], scale=scale, **options)
        return output.view(batch, n_q, 1, width) if arrangement == "rows" else output

    def expected(i: int) -> Tensor:
        return _causal(queries[i], keys[i], values[i], scale)

    return Layers(count, run, expected)


def _flashinfer(contender: Contender, way: str, batch: int, tokens: int, context: int, count: int) -> Layers:
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError as error:
        raise BackendError(f"FlashInfer cannot be imported ({error})") from error
    (n_q, n_k), (width, _) = contender.heads, contender.widths
    queries = [_normal(batch, tokens, n_q, width) for _ in range(count)]
    keys, values = ([_normal(batch, context, n_k, width) for _ in range(count)] for _ in range(2))
    scale = width**-0.5
    attend = (
        _flashinfer_decode(flashinfer, contender, way, batch, context)
        if tokens == 1
        else _flashinfer_prefill(flashinfer, scale)
    )

    def run(i: int) -> Tensor:
        return attend(queries[i], keys[i], values[i]).view(batch, tokens, n_q, width)

    def expected(i: int) -> Tensor:
        return _causal(*(x[i].transpose(1, 2) for x in (queries, keys, values)), scale).transpose(1, 2)

    return Layers(count, run, expected)


def _flashinfer_decode(library: Any, contender: Contender, way: str, batch: int, context: int) -> Any:
    (n_q, n_k), (width, _) = contender.heads, contender.widths
    if context % FLASHINFER_PAGE:
        raise BackendError(f"FlashInfer is run with whole pages; {context} is not a multiple of {FLASHINFER_PAGE}")
    pages = context // FLASHINFER_PAGE
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    cores = way == "tensor cores"
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=cores)
    whole = {"dtype": torch.int32, "device": "cuda"}
    indptr = torch.arange(batch + 1, **whole) * pages
    last = torch.full((batch,), FLASHINFER_PAGE, **whole)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    indices = torch.arange(batch * pages, **whole)
    wrapper.plan(indptr, indices, last, n_q, n_k, width, FLASHINFER_PAGE, sm_scale=width**-0.5, **types)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        paged = tuple(x.view(-1, FLASHINFER_PAGE, n_k, width) for x in (key, value))
        output: Tensor = wrapper.run(query[:, 0], paged)
        return output

    return attend


def _flashinfer_prefill(library: Any, scale: float) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = library.single_prefill_with_kv_cache(
            query[0], key[0], value[0], causal=True, kv_layout="NHD", sm_scale=scale
        )
        return output

    return attend
