"""Train the shipped example model, the GQA model of the same size that it is compared with, or its draft model.

    python examples/train_tiny.py gta examples/tiny-gta             # the model in this directory
    python examples/train_tiny.py gqa /tmp/tiny-gqa                 # its peer: same text, tokens, steps and size
    python examples/train_tiny.py draft examples/tiny-gta-draft     # guesses tokens for the first

The draft model learns from what the shipped model expects of every token, not from the token that comes: what counts is
that both agree.

Data: the Python standard library (``corpus.py``). Optimiser: Muon on the matrices, AdamW on the rest. Matrix products
run in bfloat16, weights are stored in bfloat16, and the losses printed at the end are those of the stored weights.
Needs the `export` extra.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig, read_config
from gta_edge.model.decoder import Decoder

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 1024
TEACHER = Path(__file__).parent / "tiny-gta"

Loss = Callable[[Decoder, Tensor], Tensor]
"""Loss of every next token of windows [B, T + 1], [B·T]."""


def make_config(kind: str) -> ModelConfig:
    """Return the sizes: GTA with 4 heads a map, one key head, one latent head; GQA with 4 heads cached; or the draft's.

    The draft has two layers, the fewest that can find what followed the last token earlier in the text.
    """
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
    if kind == "draft":
        common |= {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
        return GTAConfig(**common, num_query_heads=4, num_key_heads=1, key_dim=32, num_latent_heads=2, latent_dim=32)
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


def take_embedding(model: Decoder, teacher: Decoder) -> None:
    """Begin with what the teacher knows of each token: its embedding in fewer dimensions, those that vary most."""
    wanted = model.model.embed_tokens.weight
    left, sizes, _ = torch.linalg.svd(teacher.model.embed_tokens.weight, full_matrices=False)
    width = wanted.shape[1]
    wanted.data.copy_(left[:, :width] * sizes[:width])


def all_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Return the logits after every token of ``ids`` [B, T], float32 [B·T, V]."""
    b, t = ids.shape
    nothing = torch.zeros(b, dtype=torch.long)
    caches = [(torch.empty(0), torch.empty(0))] * model.config.num_hidden_layers
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids, nothing, torch.arange(t).expand(b, -1), caches)
    return logits.flatten(0, 1).float()


def losses(model: Decoder, windows: Tensor) -> Tensor:
    """Return the loss of every next token of ``windows`` [B, T + 1], in nats, [B·T]."""
    return functional.cross_entropy(all_logits(model, windows[:, :-1]), windows[:, 1:].flatten(), reduction="none")


def distillation(teacher: Decoder) -> Loss:
    """Return a loss: how far a model's distribution of each next token is from the teacher's, KL(teacher, model)."""

    def loss(model: Decoder, windows: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = all_logits(teacher, windows[:, :-1]).softmax(-1)
            entropy = torch.special.entr(wanted).sum(-1)
        return functional.cross_entropy(all_logits(model, windows[:, :-1]), wanted, reduction="none") - entropy

    return loss


def disagreement(teacher: Decoder, temperature: float) -> Loss:
    """Return a loss: how likely the teacher rejects a token that the model guesses.

    At temperature 0 both choose the likeliest token. Above it a guess drawn from ``q`` is rejected by a teacher that
    expects ``p`` with the probability ``1 - sum(min(p, q))`` (arXiv 2211.17192, 3.5).
    """

    def loss(model: Decoder, windows: Tensor) -> Tensor:
        p, q = (all_logits(each, windows[:, :-1]) for each in (teacher, model))
        if not temperature:
            return (p.argmax(-1) != q.argmax(-1)).float()
        return 1 - torch.minimum((p / temperature).softmax(-1), (q / temperature).softmax(-1)).sum(-1)

    return loss


@torch.no_grad()
def evaluate(model: Decoder, ids: Tensor, batches: int | None = None, loss: Loss = losses) -> float:
    """Return the mean loss over windows of CONTEXT tokens that do not overlap."""
    count = (len(ids) - 1) // CONTEXT
    windows = torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    return float(torch.cat([loss(model, part) for part in windows.split(8)[:batches]]).mean())


def bigram_loss(train: Tensor, held_out: Tensor) -> float:
    """Return the held-out loss of an interpolated bigram model: the bar that a language model must clear."""
    pairs = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    pairs.index_put_((train[:-1], train[1:]), torch.ones(1, dtype=torch.float64), accumulate=True)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + VOCAB_SIZE)
    seen = (pairs > 0).sum(1, keepdim=True).clamp(min=1)  # Witten-Bell smoothing; what was never seen backs off
    bigram = (pairs + seen * unigram) / (pairs.sum(1, keepdim=True) + seen)
    return float(-bigram[held_out[:-1], held_out[1:]].log().mean())


def train(
    model: Decoder, ids: Tensor, held_out: Tensor, steps: int, batch: int, log: Path, loss_of: Loss = losses
) -> None:
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
        loss = loss_of(model, torch.stack([ids[o : o + CONTEXT + 1] for o in offsets])).mean()
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
                entry["held_out"] = round(evaluate(model, held_out, 4, loss_of), 4)
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


def load(directory: Path) -> Decoder:
    """Return a checkpoint's model, for training's attention, in float32 and without gradients."""
    model = Decoder(read_config(directory / "config.json"), attention=attention)
    model.load_state_dict({name: value.float() for name, value in load_file(directory / "model.safetensors").items()})
    return model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("gta", "gqa", "draft"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8, help="windows of 1024 tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    texts, held_out_texts = corpus.read(held_out=False), corpus.read(held_out=True)
    is_draft = arguments.kind == "draft"
    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json")) if is_draft else train_tokenizer(texts)
    ids, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    model = Decoder(make_config(arguments.kind), attention=attention)
    initialise(model)
    print(f"{model.config.parameters:,} parameters, {len(ids):,} training and {len(held_out):,} held-out tokens")
    arguments.output.mkdir(parents=True, exist_ok=True)
    teacher = load(TEACHER) if is_draft else None
    if teacher is not None:
        take_embedding(model, teacher)
    loss_of = losses if teacher is None else distillation(teacher)
    train(model, ids, held_out, arguments.steps, arguments.batch, arguments.output.with_suffix(".log"), loss_of)
    save(model, tokenizer, arguments.output)

    loss = evaluate(model, held_out)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    summary = {
        "kind": arguments.kind,
        "parameters": model.config.parameters,
        "cache_values_per_token_per_layer": model.config.cache_values_per_token_per_layer,
        "training_tokens": arguments.steps * arguments.batch * CONTEXT,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * len(held_out) / held_out_bytes,
        "bigram_perplexity": math.exp(bigram_loss(ids, held_out)),
    }
    if teacher is not None:
        for name, temperature in (("greedy", 0.0), ("at_temperature_0.8", 0.8)):
            rejected = evaluate(model, held_out, loss=disagreement(teacher, temperature))
            summary[f"accepted_{name}"] = 1 - rejected
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
