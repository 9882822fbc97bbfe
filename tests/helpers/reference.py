"""The models' arithmetic written out in NumPy float64, for clarity and not for speed.

Everything here follows the formulas of the attention and of Llama, and nothing in this file uses the package: it is
what the package is measured against. Batch rows, heads and tokens are explicit loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


# Pieces that both kinds of model share


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(scores: Array) -> Array:
    """The softmax of one row of scores."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The root-mean-square norm of one token's vector."""
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate one head's vector: element i turns together with element i + d/2."""
    half = len(x) // 2
    turned = np.empty_like(x)
    for i in range(half):
        turned[i] = x[i] * cos[i] - x[i + half] * sin[i]
        turned[i + half] = x[i + half] * cos[i] + x[i] * sin[i]
    return turned


def rope_tables(key_dim: int, length: int, theta: float = 10000.0, factor: float = 1.0) -> tuple[Array, Array]:
    """Cosines and sines, each [length, key_dim / 2]; `factor` is the divisor of linear scaling."""
    cos = np.empty((length, key_dim // 2))
    sin = np.empty((length, key_dim // 2))
    for position in range(length):
        for i in range(key_dim // 2):
            angle = (position / factor) / theta ** (2 * i / key_dim)
            cos[position, i] = np.cos(angle)
            sin[position, i] = np.sin(angle)
    return cos, sin


def double(array: Array) -> Array:
    return np.asarray(array).astype(np.float64)


# The attention as an operator with caches


def grouped_latent_attention(
    query: Array,
    key: Array,
    latent: Array,
    gate: Array | None,
    past_key: Array,
    past_latent: Array,
    past_length: Array,
    cos: Array,
    sin: Array,
    value_decoder: Array | None,
    *,
    num_query_heads: int,
    num_key_heads: int,
    num_latent_heads: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Give (output [B, T, H], present_key [B, n_k, S, d_k], present_latent [B, n_c, S, d_l]).

    Token t of row b stands at position past_length[b] + t, is written to that slot of the caches and attends to the
    slots 0 .. past_length[b] + t. Without a gate nothing is multiplied; without a decoder the mix is the result.
    """
    query, key, latent, cos, sin = double(query), double(key), double(latent), double(cos), double(sin)
    present_key, present_latent = double(past_key).copy(), double(past_latent).copy()
    batch, tokens, _ = query.shape
    key_dim = past_key.shape[3]
    latent_dim = past_latent.shape[3]
    # outputs per query head: e · d_l
    group = latent_dim if value_decoder is None else value_decoder.shape[2]
    hidden = group * num_query_heads
    output = np.empty((batch, tokens, hidden))
    for b in range(batch):
        for t in range(tokens):
            position = int(past_length[b]) + t
            for k in range(num_key_heads):
                head = key[b, t, k * key_dim : (k + 1) * key_dim]
                present_key[b, k, position] = rotate(head, cos[position], sin[position])
            for c in range(num_latent_heads):
                present_latent[b, c, position] = latent[b, t, c * latent_dim : (c + 1) * latent_dim]
            seen = position + 1
            for q in range(num_query_heads):
                k = q // (num_query_heads // num_key_heads)
                c = q // (num_query_heads // num_latent_heads)
                head = query[b, t, q * key_dim : (q + 1) * key_dim]
                turned = rotate(head, cos[position], sin[position])
                scores = np.array([scale * np.dot(turned, present_key[b, k, s]) for s in range(seen)])
                weights = softmax(scores)
                mixed = np.zeros(latent_dim)
                for s in range(seen):
                    mixed += weights[s] * present_latent[b, c, s]
                for m in range(group):
                    value = mixed[m % latent_dim]
                    if value_decoder is not None:
                        value += np.dot(mixed, double(value_decoder[q, :, m]))
                    if gate is not None:
                        value *= sigmoid(double(gate[b, t, q * group + m]))
                    output[b, t, q * group + m] = value
    return output, present_key, present_latent


def value_decoder(weight: Array, num_query_heads: int, latent_dim: int) -> Array:
    """v_b_proj.weight [e · d_l, n_q · d_l] as W_P [n_q, d_l, e · d_l]: the same numbers in the same row-major order."""
    rows, columns = weight.shape
    decoder = np.empty((num_query_heads, latent_dim, rows))
    for q in range(num_query_heads):
        for i in range(latent_dim):
            for m in range(rows):
                address = (q * latent_dim + i) * rows + m
                decoder[q, i, m] = weight[address // columns, address % columns]
    return decoder


def grouped_query_attention(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_value: Array,
    past_length: Array,
    cos: Array,
    sin: Array,
    *,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Llama's attention with the same conventions: (output [B, T, n_h · d_h], present_key, present_value)."""
    query, key, value, cos, sin = double(query), double(key), double(value), double(cos), double(sin)
    present_key, present_value = double(past_key).copy(), double(past_value).copy()
    batch, tokens, _ = query.shape
    dim = past_key.shape[3]
    output = np.empty((batch, tokens, num_heads * dim))
    for b in range(batch):
        for t in range(tokens):
            position = int(past_length[b]) + t
            for k in range(num_key_value_heads):
                part = slice(k * dim, (k + 1) * dim)
                present_key[b, k, position] = rotate(key[b, t, part], cos[position], sin[position])
                present_value[b, k, position] = value[b, t, part]
            for h in range(num_heads):
                k = h // (num_heads // num_key_value_heads)
                part = slice(h * dim, (h + 1) * dim)
                turned = rotate(query[b, t, part], cos[position], sin[position])
                weights = softmax(scale * (present_key[b, k, : position + 1] @ turned))
                mixed = np.zeros(dim)
                for s in range(position + 1):
                    mixed += weights[s] * present_value[b, k, s]
                output[b, t, part] = mixed
    return output, present_key, present_value


# Whole models, without any cache: every token attends to all before it, computed afresh


def linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    y = weights[f"{name}.weight"] @ x
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    return y


def mlp(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    gate = linear(weights, f"{name}.gate_proj", x)
    up = linear(weights, f"{name}.up_proj", x)
    return linear(weights, f"{name}.down_proj", gate * sigmoid(gate) * up)


def tables_of(config: Mapping[str, Any], key_dim: int, length: int) -> tuple[Array, Array]:
    """The tables of a config with default rotation; other types are given to the functions below as tables."""
    return rope_tables(key_dim, length, float(config.get("rope_theta", 10000.0)))


def gta_attention(
    config: Mapping[str, Any], weights: Mapping[str, Array], name: str, x: list[Array], tables: tuple[Array, Array]
) -> list[Array]:
    """The attention block of a GTA layer, x and the result being one [H] vector per token."""
    n_q, n_k, n_c = config["num_query_heads"], config["num_key_heads"], config["num_value_heads"]
    d_k, d_l, hidden = config["key_dim"], config["value_dim"], config["hidden_size"]
    cos, sin = tables
    expansion = hidden // (n_q * d_l)
    decoder = value_decoder(weights[f"{name}.v_b_proj.weight"], n_q, d_l)
    keys: list[list[Array]] = []  # per token, per head
    latents: list[list[Array]] = []
    result = []
    for t, token in enumerate(x):
        query = linear(weights, f"{name}.q_proj", token)
        key = linear(weights, f"{name}.k_proj", token)
        latent = linear(weights, f"{name}.v_proj", token)
        gate = linear(weights, f"{name}.g_proj", token)
        keys.append([rotate(key[k * d_k : (k + 1) * d_k], cos[t], sin[t]) for k in range(n_k)])
        latents.append([latent[c * d_l : (c + 1) * d_l] for c in range(n_c)])
        heads = []
        for q in range(n_q):
            turned = rotate(query[q * d_k : (q + 1) * d_k], cos[t], sin[t])
            k, c = q // (n_q // n_k), q // (n_q // n_c)
            attention = softmax(np.array([np.dot(turned, keys[s][k]) / np.sqrt(d_k) for s in range(t + 1)]))
            mixed = np.zeros(d_l)
            for s in range(t + 1):
                mixed += attention[s] * latents[s][c]
            heads.append(np.concatenate([mixed] * expansion) + mixed @ decoder[q])
        result.append(linear(weights, f"{name}.o_proj", sigmoid(gate) * np.concatenate(heads)))
    return result


def llama_attention(
    config: Mapping[str, Any], weights: Mapping[str, Array], name: str, x: list[Array], tables: tuple[Array, Array]
) -> list[Array]:
    """The attention block of a Llama layer."""
    n_h = config["num_attention_heads"]
    n_kv = config.get("num_key_value_heads", n_h)
    d = config.get("head_dim", config["hidden_size"] // n_h)
    cos, sin = tables
    keys: list[list[Array]] = []
    values: list[list[Array]] = []
    result = []
    for t, token in enumerate(x):
        query = linear(weights, f"{name}.q_proj", token)
        key = linear(weights, f"{name}.k_proj", token)
        value = linear(weights, f"{name}.v_proj", token)
        keys.append([rotate(key[k * d : (k + 1) * d], cos[t], sin[t]) for k in range(n_kv)])
        values.append([value[k * d : (k + 1) * d] for k in range(n_kv)])
        heads = []
        for h in range(n_h):
            turned = rotate(query[h * d : (h + 1) * d], cos[t], sin[t])
            k = h // (n_h // n_kv)
            attention = softmax(np.array([np.dot(turned, keys[s][k]) / np.sqrt(d) for s in range(t + 1)]))
            heads.append(sum(attention[s] * values[s][k] for s in range(t + 1)))
        result.append(linear(weights, f"{name}.o_proj", np.concatenate(heads)))
    return result


def decoder_logits(
    attention: Any,
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    ids: Sequence[int] | Array,
    tables: tuple[Array, Array],
) -> Array:
    eps = config["rms_norm_eps"]
    weights = {name: double(weight) for name, weight in weights.items()}
    table = weights["model.embed_tokens.weight"]
    x = [table[int(token)] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        norm = weights[f"{name}.input_layernorm.weight"]
        mixed = attention(config, weights, f"{name}.self_attn", [rms_norm(row, norm, eps) for row in x], tables)
        x = [row + change for row, change in zip(x, mixed, strict=True)]
        norm = weights[f"{name}.post_attention_layernorm.weight"]
        x = [row + mlp(weights, f"{name}.mlp", rms_norm(row, norm, eps)) for row in x]
    norm = weights["model.norm.weight"]
    head = weights.get("lm_head.weight", table)
    return np.stack([head @ rms_norm(row, norm, eps) for row in x])


def gta_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    ids: Sequence[int] | Array,
    tables: tuple[Array, Array] | None = None,
) -> Array:
    """Logits [T, V] of a GTA model whose config and weights have the names of the published checkpoints.

    A bias that `weights` lacks is absent; without `lm_head.weight` the head is the embedding. `tables` are the cosines
    and sines where the rotation is not the default one.
    """
    if tables is None:
        tables = tables_of(config, config["key_dim"], len(ids))
    return decoder_logits(gta_attention, config, weights, ids, tables)


def llama_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    ids: Sequence[int] | Array,
    tables: tuple[Array, Array] | None = None,
) -> Array:
    """Logits [T, V] of an ordinary Llama model."""
    if tables is None:
        dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        tables = tables_of(config, dim, len(ids))
    return decoder_logits(llama_attention, config, weights, ids, tables)


def relative_error(found: Array, expected: Array) -> float:
    """The largest absolute difference over the standard deviation of what was expected."""
    found, expected = double(found), double(expected)
    if found.shape != expected.shape:
        raise AssertionError(f"shape {found.shape}, expected {expected.shape}")
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / expected.std())


# Checkpoints to try: sizes and names as the published ones have them, numbers at random


def common_entries(hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": hidden,
        "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def gta_entries(
    heads: int = 4, n_q: int = 2, n_k: int = 1, n_c: int = 1, d_k: int = 16, d_l: int = 32, e: int = 1, **changes: Any
) -> dict[str, Any]:
    """The content of a small GTA model's config.json; the hidden size is e · n_q · d_l."""
    return {
        **common_entries(e * n_q * d_l, heads),
        "architectures": ["GTAForCausalLM"],
        "num_query_heads": n_q,
        "query_dim": d_k,
        "num_key_heads": n_k,
        "key_dim": d_k,
        "num_value_heads": n_c,
        "value_dim": d_l,
        **changes,
    }


def llama_entries(heads: int = 4, n_kv: int = 2, d_h: int = 16, **changes: Any) -> dict[str, Any]:
    """The content of a small Llama model's config.json."""
    return {
        **common_entries(heads * d_h, heads),
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": n_kv,
        **changes,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint that a config.json describes, all biases of a GTA model included."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors[f"{name}.input_layernorm.weight"] = (hidden,)
        tensors[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        tensors[f"{name}.mlp.gate_proj.weight"] = (ffn, hidden)
        tensors[f"{name}.mlp.up_proj.weight"] = (ffn, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = (hidden, ffn)
        tensors[f"{name}.self_attn.o_proj.weight"] = (hidden, hidden)
        if "num_query_heads" in config:
            n_q, d_l = config["num_query_heads"], config["value_dim"]
            widths = {
                "q": n_q * config["key_dim"],
                "k": config["num_key_heads"] * config["key_dim"],
                "v": config["num_value_heads"] * d_l,
                "g": hidden,
            }
            for kind, width in widths.items():
                tensors[f"{name}.self_attn.{kind}_proj.weight"] = (width, hidden)
                tensors[f"{name}.self_attn.{kind}_proj.bias"] = (width,)
            tensors[f"{name}.self_attn.v_b_proj.weight"] = (hidden // n_q, n_q * d_l)
        else:
            width = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
            tensors[f"{name}.self_attn.q_proj.weight"] = (hidden, hidden)
            tensors[f"{name}.self_attn.k_proj.weight"] = (width, hidden)
            tensors[f"{name}.self_attn.v_proj.weight"] = (width, hidden)
    return tensors


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """A float32 checkpoint whose every tensor matters for the logits: no part of it is all zeros, ones or tiny."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        values = rng.standard_normal(shape)
        if name == "model.embed_tokens.weight":
            pass
        elif name.endswith(".bias"):
            values *= 0.3
        elif len(shape) == 1:
            values = 1 + 0.2 * values
        elif "v_b_proj" in name:
            values /= np.sqrt(config["value_dim"])
        else:
            values /= np.sqrt(shape[1])
        weights[name] = values.astype(np.float32)
    return weights
