"""The PyTorch decoder against the formula in float64, and its baselines against transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder, empty_cache
from tests.helpers import reference
from tests.helpers.rope_tables import scaled_tables

TOLERANCE = 1e-4  # largest error over the standard deviation of the exact logits
TOKENS = 7

# The presets' proportions (heads, n_q / n_k / n_c, d_l = 2·d_k, FFN and head) at a quarter of their widths.
PRESETS = {
    "gta1-160m": {"heads": 12, "n_q": 3, "e": 2, "intermediate_size": 480},
    "gta2-160m": {"heads": 12, "n_q": 6, "e": 1, "intermediate_size": 480},
    "gta3-500m": {"heads": 20, "n_q": 5, "e": 2, "intermediate_size": 896, "tie_word_embeddings": False},
    "gta4-500m": {"heads": 20, "n_q": 10, "n_c": 2, "intermediate_size": 896, "tie_word_embeddings": False},
    "gta-1b": {"heads": 20, "n_q": 5, "e": 2, "intermediate_size": 896, "num_hidden_layers": 3},
}
OTHERS = {
    "several key heads": {"heads": 8, "n_q": 4, "n_k": 2},
    "several latent heads": {"heads": 8, "n_q": 4, "n_c": 2},
    "more key than latent heads": {"heads": 6, "n_q": 6, "n_k": 3, "n_c": 2},
    "more latent than key heads": {"heads": 6, "n_q": 6, "n_k": 2, "n_c": 3},
    "a key and a latent head each": {"heads": 3, "n_q": 3, "n_k": 3, "n_c": 3},
    "one of everything": {"heads": 2, "n_q": 1},
    "three heads a latent": {"heads": 6, "n_q": 2, "e": 3},
    "key width 32": {"d_k": 32, "d_l": 16, "e": 2},
    "key width 48": {"d_k": 48, "d_l": 24},
    "key width 64": {"d_k": 64, "d_l": 64},
    "key and head widths apart": {"heads": 8, "d_k": 48, "d_l": 40},
    "untied": {"tie_word_embeddings": False},
    "another theta and eps": {"rope_theta": 50.0, "rms_norm_eps": 0.1},
}

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
    "yarn with its own factor": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.6, "truncate": False},
}


def prompt(entries: dict, rows: int = 1, tokens: int = TOKENS, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, entries["vocab_size"], (rows, tokens))


def decoder(entries: dict, weights: dict) -> Decoder:
    model = Decoder(parse_config(entries), biases={name for name in weights if name.endswith(".bias")})
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    return model.eval()


@torch.no_grad()
def logits_of(model: Decoder, ids: np.ndarray, capacity: int | None = None) -> np.ndarray:
    """Logits [B, T, V] of a prompt run at once on an empty cache."""
    rows, tokens = ids.shape
    found, _ = model(
        torch.from_numpy(ids),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(tokens).expand(rows, tokens),
        empty_cache(model.config, rows, capacity or tokens),
    )
    assert found.dtype == torch.float32
    return found.numpy()


# --- GTA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*PRESETS.values(), *OTHERS.values()], ids=[*PRESETS, *OTHERS])
def test_against_the_formula(sizes):
    entries = reference.gta_entries(**sizes)
    weights = reference.random_weights(entries)
    ids = prompt(entries)
    found = logits_of(decoder(entries, weights), ids)[0]
    assert reference.relative_error(found, reference.gta_logits(entries, weights, ids[0])) <= TOLERANCE


def without(weights: dict, *endings: str) -> dict:
    return {name: weight for name, weight in weights.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    "endings",
    [
        (".bias",),
        ("q_proj.bias",),
        ("k_proj.bias", "v_proj.bias"),
        ("layers.0.self_attn.g_proj.bias", "layers.1.self_attn.q_proj.bias"),
    ],
    ids=str,
)
def test_a_bias_that_the_checkpoint_lacks_is_absent(endings):
    entries = reference.gta_entries()
    complete = reference.random_weights(entries)
    weights = without(complete, *endings)
    assert len(weights) < len(complete)
    ids = prompt(entries)
    exact = reference.gta_logits(entries, weights, ids[0])
    assert reference.relative_error(logits_of(decoder(entries, weights), ids)[0], exact) <= TOLERANCE
    # the biases that are left out would have shown
    assert reference.relative_error(reference.gta_logits(entries, complete, ids[0]), exact) > 100 * TOLERANCE


def test_biases_are_all_there_unless_said_otherwise():
    entries = reference.gta_entries()
    assert set(Decoder(parse_config(entries)).state_dict()) == set(reference.shapes(entries))


@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaled_rotations(scaling, theta):
    entries = reference.gta_entries(d_k=32, rope_scaling=scaling, rope_theta=theta)
    weights = reference.random_weights(entries)
    ids = prompt(entries, tokens=12)
    exact = reference.gta_logits(entries, weights, ids[0], scaled_tables(entries, 12))
    assert reference.relative_error(logits_of(decoder(entries, weights), ids)[0], exact) <= TOLERANCE
    # another rotation would have shown
    assert reference.relative_error(reference.gta_logits(entries, weights, ids[0]), exact) > 100 * TOLERANCE


def test_every_tensor_of_the_checkpoint_matters():
    entries = reference.gta_entries(e=2, tie_word_embeddings=False)
    weights = reference.random_weights(entries)
    ids = prompt(entries)
    model = decoder(entries, weights)
    before = logits_of(model, ids)[0]
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.3 * torch.from_numpy(reference.random_weights(entries, seed=1)[name])
            after = logits_of(model, ids)[0]
            parameter.copy_(kept)
        # a bias of the keys shifts all scores of a query by nearly the same, so little is asked for
        assert reference.relative_error(after, before) > 10 * TOLERANCE, name


def test_the_memory_of_the_value_decoder_is_read_row_by_row():
    # any other reading of v_b_proj, a transpose or per-head blocks of columns, is far off
    entries = reference.gta_entries(heads=6, n_q=3, d_k=16, d_l=16, e=2)
    weights = reference.random_weights(entries)
    ids = prompt(entries)
    found = logits_of(decoder(entries, weights), ids)[0]
    assert reference.relative_error(found, reference.gta_logits(entries, weights, ids[0])) <= TOLERANCE
    shuffled = dict(weights)
    for name, weight in weights.items():
        if "v_b_proj" in name:
            by_columns = np.stack([weight[:, 16 * q : 16 * q + 16].T for q in range(3)])  # [n_q, d_l, e·d_l]
            shuffled[name] = by_columns.reshape(weight.shape)
    other = reference.gta_logits(entries, shuffled, ids[0])
    assert reference.relative_error(other, found) > 1000 * TOLERANCE


# --- caches ----------------------------------------------------------------------------------------------------------

MODELS = {
    "gta": reference.gta_entries(heads=6, n_q=6, n_k=3, n_c=2),
    "gqa": reference.llama_entries(heads=6, n_kv=3),
}
models = pytest.mark.parametrize("entries", MODELS.values(), ids=MODELS)


@models
@torch.no_grad()
def test_a_prompt_at_once_or_token_by_token(entries):
    model = decoder(entries, reference.random_weights(entries))
    ids = prompt(entries, rows=2)
    at_once = logits_of(model, ids)
    caches = empty_cache(model.config, 2, TOKENS + 3)
    for t in range(TOKENS):
        length = torch.full((2,), t)
        last = torch.zeros(2, 1, dtype=torch.int64)
        logits, caches = model(torch.from_numpy(ids[:, t : t + 1]), length, last, caches)
        assert reference.relative_error(logits[:, 0].numpy(), at_once[:, t]) <= TOLERANCE


@models
@torch.no_grad()
def test_rows_of_different_length_in_one_batch(entries):
    weights = reference.random_weights(entries)
    model = decoder(entries, weights)
    ids = prompt(entries, rows=3, tokens=10)
    before, new = [5, 0, 2], 4
    caches = empty_cache(model.config, 3, 10)
    for row, length in enumerate(before):  # fill each row on its own, its neighbours being overwritten later
        if length:
            alone = empty_cache(model.config, 1, 10)
            _, alone = model(
                torch.from_numpy(ids[row : row + 1, :length]),
                torch.zeros(1, dtype=torch.int64),
                torch.zeros(1, 0, dtype=torch.int64),
                alone,
            )
            for whole, part in zip(caches, alone, strict=True):
                whole[0][row], whole[1][row] = part[0][0], part[1][0]
    chunk = np.stack([ids[row, length : length + new] for row, length in enumerate(before)])
    logits, _ = model(torch.from_numpy(chunk), torch.tensor(before), torch.arange(new).expand(3, new), caches)
    exact = reference.gta_logits if "num_query_heads" in entries else reference.llama_logits
    for row, length in enumerate(before):
        wanted = exact(entries, weights, ids[row, : length + new])[length:]
        assert reference.relative_error(logits[row].numpy(), wanted) <= TOLERANCE


@models
@torch.no_grad()
def test_logits_are_given_for_the_positions_that_were_asked_for(entries):
    model = decoder(entries, reference.random_weights(entries))
    ids = prompt(entries, rows=2)
    every = torch.from_numpy(logits_of(model, ids))
    for wanted in ([[6], [2]], [[0, 0, 5], [3, 1, 6]], [[], []]):
        positions = torch.tensor(wanted, dtype=torch.int64)
        found, _ = model(
            torch.from_numpy(ids), torch.zeros(2, dtype=torch.int64), positions, empty_cache(model.config, 2, TOKENS)
        )
        assert found.shape == (2, len(wanted[0]), entries["vocab_size"])
        for row in range(2):
            torch.testing.assert_close(found[row], every[row, positions[row]], rtol=1e-5, atol=1e-5)


@models
def test_empty_caches_have_the_layout_of_the_graph(entries):
    config = parse_config(entries)
    caches = empty_cache(config, 2, 9, compute="fp16")
    second = (2, 2, 9, 32) if "num_query_heads" in entries else (2, 3, 9, 16)
    assert [tuple(tuple(x.shape) for x in cache.tensors) for cache in caches] == [((2, 3, 9, 16), second)] * 2
    assert all(not tensor.any() and tensor.dtype == torch.float16 for layer in caches for tensor in layer.tensors)


@models
def test_the_capacity_does_not_matter(entries):
    model = decoder(entries, reference.random_weights(entries))
    ids = prompt(entries, rows=2)
    assert reference.relative_error(logits_of(model, ids, capacity=30), logits_of(model, ids)) <= TOLERANCE


# --- baselines -------------------------------------------------------------------------------------------------------

BASELINES = {
    "gqa-160m": {"heads": 12, "n_kv": 3, "intermediate_size": 480},
    "mha-160m": {"heads": 12, "n_kv": 12, "intermediate_size": 480},
    "gqa-500m": {"heads": 20, "n_kv": 4, "intermediate_size": 896, "tie_word_embeddings": False},
    "gqa-1b": {"heads": 20, "n_kv": 5, "intermediate_size": 896},
    "one key head": {"heads": 4, "n_kv": 1, "d_h": 32},
    "head width 48": {"d_h": 48},
    "head width 64": {"d_h": 64, "rope_theta": 500.0, "rms_norm_eps": 0.1},
    **{f"rope {name}": {"d_h": 32, "rope_scaling": scaling} for name, scaling in SCALINGS.items()},
}


@pytest.mark.parametrize("sizes", BASELINES.values(), ids=BASELINES)
def test_a_baseline_against_transformers(sizes):
    entries = reference.llama_entries(**sizes)
    weights = reference.random_weights(entries)
    ids = prompt(entries, rows=2, tokens=12)
    theirs = LlamaForCausalLM._from_config(
        LlamaConfig(**json.loads(json.dumps(entries))), attn_implementation="eager", dtype=torch.float32
    ).eval()
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    if entries["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    assert reference.relative_error(logits_of(decoder(entries, weights), ids), expected) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in BASELINES if not name.startswith("rope")])
def test_a_baseline_against_the_formula(name):
    entries = reference.llama_entries(**BASELINES[name])
    weights = reference.random_weights(entries)
    ids = prompt(entries)
    found = logits_of(decoder(entries, weights), ids)[0]
    assert reference.relative_error(found, reference.llama_logits(entries, weights, ids[0])) <= TOLERANCE
