"""Train the shipped example model, or the GQA model of the same size that it is compared with.

    python examples/train_tiny.py gta examples/tiny-gta     # the model in this directory
    python examples/train_tiny.py gqa /tmp/tiny-gqa         # its peer: same text, tokens, steps and size

Data: the Python standard library (``corpus.py``). Optimiser: Muon on the matrices, AdamW on the rest. Matrix products
run in bfloat16, weights are stored in bfloat16, and the losses printed at the end are those of the stored weights.
Needs the `export` extra.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.decoder import Decoder

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 1024


def make_config(kind: str) -> ModelConfig:
    """Return the sizes: GTA with 4 heads a map, one key head, one latent head; or GQA with 4 heads cached."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_ids": (0,),
        "intermediate_size": 576,
    }
    if kind == "gqa":
        return GQAConfig(**common, num_key_value_heads=4)
    return GTAConfig(**common, num_query_heads=2, num_key_heads=1, key_dim=32, num_latent_heads=1, latent_dim=64)


# --- data --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that can represent any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return all texts as one row of ids, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [np.array([*encoding.ids, end]) for encoding in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(ids)).long()


# --- attention for training: no cache, fused, differentiable ------------------------------------------------------


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, n, T, d]


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    t = x.shape[2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos[:t] - b * sin[:t], b * cos[:t] + a * sin[:t]), dim=-1).to(torch.bfloat16)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused attention wants one width and one head count for all: zeros pad the first, a view repeats the second."""
    n_q, width = q.shape[1], v.shape[-1]
    q, k = (functional.pad(x, (0, width - x.shape[-1])) for x in (q, k))
    k, v = (x.repeat_interleave(n_q // x.shape[1], dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def attention(
    query: Tensor, key: Tensor, latent: Tensor, gate: Tensor | None, past_key: Tensor, past_latent: Tensor,
    past_length: Tensor, cos: Tensor, sin: Tensor, value_decoder: Tensor | None,
    num_query_heads: int, num_key_heads: int, num_latent_heads: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``gta::grouped_latent_attention`` from an empty cache of no capacity; caches come back as they are."""
    q = _rope(_heads(query, num_query_heads), cos, sin)
    k = _rope(_heads(key, num_key_heads), cos, sin)
    values = _causal(q, k, _heads(latent, num_latent_heads).to(torch.bfloat16), scale)
    if value_decoder is not None:
        expansion = value_decoder.shape[2] // value_decoder.shape[1]
        values = values.repeat(1, 1, 1, expansion) + values @ value_decoder.to(values.dtype)
    joined = values.transpose(1, 2).flatten(2)
    output = joined.to(query.dtype) if gate is None else torch.sigmoid(gate) * joined
    return output, past_key, past_latent


# --- training ----------------------------------------------------------------------------------------------------


def initialise(model: Decoder) -> None:
    """Normal weights of standard deviation 1/sqrt(inputs); what writes into the residual stream starts at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "v_b_proj.weight", "bias")):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            std = 0.02 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)


def losses(model: Decoder, windows: Tensor) -> Tensor:
    """Return the loss of every next token of ``windows`` [B, T + 1], in nats, [B·T]."""
    ids, targets = windows[:, :-1], windows[:, 1:]
    b, t = ids.shape
    nothing = torch.zeros(b, dtype=torch.long)
    caches = [(torch.empty(0), torch.empty(0))] * model.config.num_hidden_layers
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids, nothing, torch.arange(t).expand(b, -1), caches)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


@torch.no_grad()
def evaluate(model: Decoder, ids: Tensor, batches: int | None = None) -> float:
    """Return the mean loss over windows of CONTEXT tokens that do not overlap."""
    count = (len(ids) - 1) // CONTEXT
    windows = torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    parts = [losses(model, part) for part in windows.split(8)[:batches]]
    return float(torch.cat(parts).mean())


def bigram_loss(train: Tensor, held_out: Tensor) -> float:
    """Return the held-out loss of an interpolated bigram model: the bar that a language model must clear."""
    pairs = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    pairs.index_put_((train[:-1], train[1:]), torch.ones(1, dtype=torch.float64), accumulate=True)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + VOCAB_SIZE)
    seen = (pairs > 0).sum(1, keepdim=True).clamp(min=1)  # Witten-Bell smoothing; what was never seen backs off
    bigram = (pairs + seen * unigram) / (pairs.sum(1, keepdim=True) + seen)
    return float(-bigram[held_out[:-1], held_out[1:]].log().mean())


def train(model: Decoder, ids: Tensor, held_out: Tensor, steps: int, batch: int, log: Path) -> None:
    """Train on random windows; both learning rates rise for 2% of the steps and then fall linearly to zero."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    optimisers = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup = max(1, steps // 50)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup)))
        for o in optimisers
    ]
    generator = torch.Generator().manual_seed(1)
    start, average = time.monotonic(), 0.0
    for step in range(steps):
        offsets = torch.randint(len(ids) - CONTEXT - 1, (batch,), generator=generator)
        loss = losses(model, torch.stack([ids[o : o + CONTEXT + 1] for o in offsets])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        value = loss.item()
        average = value if step == 0 else 0.95 * average + 0.05 * value
        if step % 50 == 0 or step == steps - 1:
            entry = {"step": step, "loss": round(average, 4), "seconds": round(time.monotonic() - start)}
            if step % 500 == 0 or step == steps - 1:
                entry["held_out"] = round(evaluate(model, held_out, 4), 4)
            with log.open("a") as file:
                print(json.dumps(entry), file=file)
            print(entry, flush=True)


def save(model: Decoder, tokenizer: Tokenizer, output: Path) -> None:
    """Write a checkpoint in the published layout, weights in bfloat16."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone
    (output / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (output / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("gta", "gqa"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8, help="windows of 1024 tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    texts, held_out_texts = corpus.read(held_out=False), corpus.read(held_out=True)
    tokenizer = train_tokenizer(texts)
    ids, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    model = Decoder(make_config(arguments.kind), attention=attention)
    initialise(model)
    print(f"{model.config.parameters:,} parameters, {len(ids):,} training and {len(held_out):,} held-out tokens")
    arguments.output.mkdir(parents=True, exist_ok=True)
    train(model, ids, held_out, arguments.steps, arguments.batch, arguments.output.with_suffix(".log"))
    save(model, tokenizer, arguments.output)

    loss, bigram = evaluate(model, held_out), bigram_loss(ids, held_out)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    summary = {
        "kind": arguments.kind,
        "parameters": model.config.parameters,
        "cache_values_per_token_per_layer": model.config.cache_values_per_token_per_layer,
        "training_tokens": arguments.steps * arguments.batch * CONTEXT,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * len(held_out) / held_out_bytes,
        "bigram_perplexity": math.exp(bigram),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
