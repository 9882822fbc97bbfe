"""Tables in Markdown of what follows from sizes alone, for the page on the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paper_results import Document, Models, kind, pairs
from paper_theory import attention_share, cache_formula, claims, flops_formula, prompt_flops

from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import bytes_per_token

NOT_MEASURED = "n/a"
FIGURES = {"cache": "cache_values_per_token_per_layer", "flops": "attention_flops_per_pair"}
"""Claims that follow from sizes, and the figure of a config that each is about."""


Cells = Sequence[object]


def table(headings: Cells, rows: Iterable[Cells]) -> str:
    """Return a table in Markdown; ``NOT_MEASURED`` where a cell is None."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(NOT_MEASURED if c is None else f"{c}" for c in line) + " |" for line in lines)


# --- sizes -----------------------------------------------------------------------------------------------------------


def lengths() -> list[int]:
    """Return the prompts of the simulation, in tokens."""
    return [row[0] for row in claims()["simulation"]["milliseconds"]]


def of_baseline(config: ModelConfig, members: Mapping[str, ModelConfig], figure: str, label: str) -> str | None:
    """Return which part a figure is of the baseline's of the same size, None where there is none."""
    base = next((other for other in members.values() if kind(other) == label), None)
    return None if base is None else f"{getattr(config, figure) / getattr(base, figure):.1%}"


def cache_table(models: Models) -> str:
    """Return what a token adds to the cache, and which part that is of the baselines'."""
    figure = FIGURES["cache"]
    rows = [
        (
            f"`{name}`",
            cache_formula(config),
            config.cache_values_per_token_per_layer,
            config.num_hidden_layers,
            f"{bytes_per_token(config, 'bf16'):,}",
            of_baseline(config, members, figure, "GQA"),
            of_baseline(config, members, figure, "MHA"),
        )
        for members in models.values()
        for name, config in members.items()
    ]
    headings = ("model", "values per token per layer", "", "layers", "bytes per token, bf16", "of GQA's", "of MHA's")
    return table(headings, rows)


def flops_table(models: Models, counted: Mapping[str, Mapping[str, int]]) -> str:
    """Return the attention's FLOPs by formula and as counted in graphs."""
    figure = FIGURES["flops"]
    rows = []
    for members in models.values():
        for name, config in members.items():
            layers, found = config.num_hidden_layers, counted.get(name)
            linear = config.flops_per_token(0) - 2 * config.vocab_size * config.hidden_size
            cells = (None, None) if found is None else (f"{found['per_pair'] / layers:,g}", f"{found['per_token']:,}")
            rows.append(
                (
                    f"`{name}`",
                    flops_formula(config),
                    f"{config.attention_flops_per_pair:,}",
                    cells[0],
                    of_baseline(config, members, figure, "GQA"),
                    f"{linear:,}",
                    cells[1],
                )
            )
    pair, token = "FLOPs per pair of tokens and layer", "FLOPs per token beside that, all layers, no head"
    return table(("model", pair, "", "counted", "of GQA's", token, "counted"), rows)


def flops_agree(models: Models, counted: Mapping[str, Mapping[str, int]]) -> bool:
    """Tell whether what was counted in graphs is what the formulas say, for at least one model."""
    configs = {name: config for members in models.values() for name, config in members.items() if name in counted}
    pairs_of_layers = {name: c.num_hidden_layers * c.attention_flops_per_pair for name, c in configs.items()}
    return bool(configs) and all(counted[name]["per_pair"] == flops for name, flops in pairs_of_layers.items())


def prompt_flops_table(models: Models, lengths: Sequence[int]) -> str:
    """Return how many times the FLOPs of GTA's prompt its baselines' prompt has."""
    rows = [
        (
            f"`{base}` / `{gta}`",
            *(f"{prompt_flops(members[base], n) / prompt_flops(members[gta], n):.2f}" for n in lengths),
        )
        for members in models.values()
        for gta, base in pairs(members)
    ]
    return table(("models", *(f"{n:,}" for n in lengths)), rows)


def attention_share_table(models: Models, lengths: Sequence[int]) -> str:
    """Return which part of a prompt's FLOPs is the attention's."""
    rows = [
        (f"`{name}`", *(f"{attention_share(config, n):.0%}" for n in lengths))
        for members in models.values()
        for name, config in members.items()
    ]
    return table(("model", *(f"{n:,}" for n in lengths)), rows)


# --- the simulation --------------------------------------------------------------------------------------------------


def simulated_table(rows: Sequence[Document], phase: str) -> str:
    """Return milliseconds of a phase and GQA's over GTA's: theirs, ours with scores in memory, ours fused."""
    keys = ("simulated", "written", "fused")
    titles = {"simulated": "simulated", "written": "ours, scores in memory", "fused": "ours, fused"}
    digits = 2 if phase == "prefill" else 3
    scores = phase == "prefill"
    headings = ["tokens", *(f"{titles[key]}: GTA, GQA" if i == 0 else "ratio" for key in keys for i in range(2))]
    lines: list[list[object]] = []
    for row in rows:
        line: list[object] = [f"{row['tokens']:,}"]
        for key in keys:
            entry = row[key]
            line.append(f"{entry[f'gta_{phase}_ms']:.{digits}f}, {entry[f'gqa_{phase}_ms']:.{digits}f}")
            line.append(f"{entry[phase]:.2f}")
        if scores:
            line.append(f"{row['written']['gta_scores_ms']:.2f}, {row['written']['gqa_scores_ms']:.2f}")
        lines.append(line)
    return table([*headings, *(["scores alone: GTA, GQA"] if scores else [])], lines)


def simulated_batches_table(rows: Sequence[Document]) -> str:
    """Return GQA's time over GTA's by batch and length: theirs, and ours with a fused attention."""
    lengths = {row["tokens"] for row in rows if row["batch"] > 1}
    lines = [
        (
            row["batch"],
            f"{row['tokens']:,}",
            *(f"{row[key][phase]:.2f}" for phase in ("prefill", "decode") for key in ("simulated", "fused")),
        )
        for row in rows
        if row["tokens"] in lengths
    ]
    headings = ("prefill, simulated", "prefill, ours, fused", "decode, simulated", "decode, ours, fused")
    return table(("batch", "tokens", *headings), lines)
