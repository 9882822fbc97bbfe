"""Writes the page on the paper and its plots: what was computed and measured, in the prose of ``page.md.jinja``.

python -m benchmarks.paper.page [--results DIR] [--output docs/paper.md]
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2

from benchmarks.paper.results import (
    EXTENTS,
    LONGEST_SHORT,
    MARGIN,
    NEW_TOKENS_END_TO_END,
    PHASES,
    RESULTS,
    Document,
    Facts,
    Models,
    Ratio,
    Run,
    judge,
    kind,
    pairs,
    published_models,
    read_runs,
)
from benchmarks.paper.theory import (
    attention_share,
    cache_formula,
    claims,
    flops_formula,
    prompt_flops,
    reduction,
    simulated,
    step_bytes,
)
from gta_edge.cli import plot
from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.support.files import new_file

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
TEMPLATE = Path(__file__).with_name("page.md.jinja")
NOT_MEASURED = "n/a"
FIGURES = {"cache": "cache_values_per_token_per_layer", "flops": "attention_flops_per_pair"}
"""Claims that follow from sizes, and the figure of a config that each is about."""

FORMS = ("{:.0f}", "{:.0f}", "{:.0%}", "{:.0%}", "{:.1f}", "{:.1f}")  # of EXTENTS

Cells = Sequence[object]


def write_page(output: Path, results: Path, models: Models) -> None:
    """Draw the plots into the directory ``output`` without its suffix, and write the page; replaces both.

    Args:
        output: the page.
        results: a directory of files that ``run.py`` has written.
        models: by size.

    Raises:
        InputError: a file is damaged.
        BackendError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    runs = read_runs(results, models)
    plots = output.with_suffix("")
    plots.mkdir(exist_ok=True)
    for run in runs:
        draw_ratios(plots / f"ratios-{stem(run)}.svg", run, models[run.size])
        if run.size == _largest(models):
            draw_decode(plots / f"decode-{stem(run)}.svg", run, models[run.size])
    single = [row for row in simulated() if row["batch"] == 1]
    draw_simulated(plots / "simulated.svg", single, claims()["simulation"]["gpu"])
    with new_file(output, force=True) as partial:
        partial.write_text(render(runs, models, plots.name), encoding="utf-8")


def render(runs: Sequence[Run], models: Models, plots: str) -> str:
    """Return the page's text; plots are named as in the directory ``plots`` beside it."""
    environment = jinja2.Environment(  # Markdown, and nothing that users gave
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals |= {function.__name__: function for function in TABLES}
    rows = simulated()
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        runs=runs,
        cpu=[run for run in runs if run.device == "cpu"],
        gpu=[run for run in runs if run.device == "gpu"],
        models=models,
        plots=plots,
        paper=claims()["paper"],
        simulation=claims()["simulation"],
        new_tokens=NEW_TOKENS_END_TO_END,
        longest_short=LONGEST_SHORT,
        margin=MARGIN,
        counted={name: facts for run in runs for name, facts in run.facts.items()},
        largest=_largest(models),
        rows=rows,
        single=[row for row in rows if row["batch"] == 1],
        at={(row["batch"], row["tokens"]): row for row in rows},
    )
    return "\n\n".join(map(_filled, re.split(r"\n{2,}", text.strip()))) + "\n"


def _filled(block: str) -> str:
    """Return a paragraph or list in lines filled anew, since figures are of any width; anything else as it is."""
    if block.startswith(("|", "#", "!", "    ")):
        return block
    items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", block)]
    indents = ["  " if item.startswith("- ") else "" for item in items]
    options = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(item, subsequent_indent=indent, **options) for item, indent in zip(items, indents, strict=True)
    )


def _largest(models: Models) -> str:
    """Return the size whose time per token is drawn too."""
    return [*models][-1]


def stem(run: Run) -> str:
    """Return what the files of a run's plots are called."""
    return f"{run.size}-{run.precision}-{run.backend}-{run.device}"


def table(headings: Cells, rows: Iterable[Cells]) -> str:
    """Return a table in Markdown; ``NOT_MEASURED`` where a cell is None."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(NOT_MEASURED if c is None else f"{c}" for c in line) + " |" for line in lines)


def _members(models: Models) -> list[tuple[str, ModelConfig, Mapping[str, ModelConfig]]]:
    """Return every model with those of its size."""
    return [(name, config, members) for members in models.values() for name, config in members.items()]


# --- verdicts --------------------------------------------------------------------------------------------------------


def claim_table(runs: Sequence[Run], models: Models) -> str:
    """Return each claim, where it stands, and what we find; on speed, what we find of the largest size."""
    rows: list[Cells] = []
    for claim in claims()["claims"]:
        if claim["key"] in FIGURES:
            found = _reduced(claim, models)
        elif "ratio" not in claim:
            found = "not repeated here"
        else:
            judged = [
                f"{judge(run, gta, base, claim['key'], claim['ratio'])} ({_pair(run, gta, base)})"
                for run in runs
                if run.size == _largest(models)
                for gta, base in pairs(models[run.size], "GQA")
            ]
            found = "; ".join(judged) or "not measured"
        rows.append((claim["claim"], claim["source"], found))
    return table(("claimed", "where", "found"), rows)


def _reduced(claim: Document, models: Models) -> str:
    parts = {
        name: reduction(config, members, FIGURES[claim["key"]])
        for name, config, members in _members(models)
        if kind(config) == "GTA"
    }
    found = {name: part for name, part in parts.items() if part is not None}
    # a claim of "up to" is one of the best; the fraction is of whole numbers, and not to fail by its last bit
    holds = max(found.values(), default=0.0) >= claim["reduction"] - 1e-9
    text = ", ".join(f"`{name}` {part:.1%}" for name, part in found.items())
    return f"{'yes' if holds else 'no'}: {text} less than GQA of the same size"


def verdict_table(runs: Sequence[Run], models: Models) -> str:
    """Return where each claim on speed holds, a row for each GTA model beside each of its baselines."""
    wanted = [claim for claim in claims()["claims"] if "ratio" in claim]
    rows = [
        (_pair(run, gta, base), *(judge(run, gta, base, claim["key"], claim["ratio"]) for claim in wanted))
        for run in runs
        for gta, base in pairs(models[run.size])
    ]
    return table(("models", *(claim["short"] for claim in wanted)), rows)


def _pair(run: Run, gta: str, baseline: str) -> str:
    return f"`{gta}` beside `{baseline}` in {run.place}"


# --- sizes -----------------------------------------------------------------------------------------------------------


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
        for name, config, members in _members(models)
    ]
    headings = ("model", "values per token per layer", "", "layers", "bytes per token, bf16", "of GQA's", "of MHA's")
    return table(headings, rows)


def flops_table(models: Models, counted: Mapping[str, Facts]) -> str:
    """Return the attention's FLOPs by formula and as counted in graphs."""
    rows = []
    for name, config, members in _members(models):
        linear = config.flops_per_token(0) - 2 * config.vocab_size * config.hidden_size
        found, cells = counted.get(name), (None, None)
        if found is not None:
            cells = f"{found.flops_per_pair / config.num_hidden_layers:,g}", f"{found.flops_per_token:,}"
        pair = f"{config.attention_flops_per_pair:,}"
        of_base = of_baseline(config, members, FIGURES["flops"], "GQA")
        rows.append((f"`{name}`", flops_formula(config), pair, cells[0], of_base, f"{linear:,}", cells[1]))
    pair, token = "FLOPs per pair of tokens and layer", "FLOPs per token beside that, all layers, no head"
    return table(("model", pair, "", "counted", "of GQA's", token, "counted"), rows)


def flops_agree(models: Models, counted: Mapping[str, Facts]) -> bool:
    """Tell whether what was counted in graphs is what the formulas say, for at least one model."""
    expected = {name: each.num_hidden_layers * each.attention_flops_per_pair for name, each, _ in _members(models)}
    return bool(counted) and all(expected[name] == facts.flops_per_pair for name, facts in counted.items())


def prompt_flops_table(models: Models, rows: Sequence[Document]) -> str:
    """Return how many times the FLOPs of GTA's prompt its baselines' prompt has."""
    lengths = [row["tokens"] for row in rows]
    lines = []
    for members in models.values():
        for gta, base in pairs(members):
            ratios = (prompt_flops(members[base], n) / prompt_flops(members[gta], n) for n in lengths)
            lines.append((f"`{base}` / `{gta}`", *(f"{ratio:.2f}" for ratio in ratios)))
    return table(("models", *(f"{n:,}" for n in lengths)), lines)


def attention_share_table(models: Models, rows: Sequence[Document]) -> str:
    """Return which part of a prompt's FLOPs is the attention's."""
    lengths = [row["tokens"] for row in rows]
    lines = [(f"`{name}`", *(f"{attention_share(each, n):.0%}" for n in lengths)) for name, each, _ in _members(models)]
    return table(("model", *(f"{n:,}" for n in lengths)), lines)


# --- measured --------------------------------------------------------------------------------------------------------


def by_model(run: Run, models: Mapping[str, ModelConfig], what: str, figure: str) -> str:
    """Return one figure of every model at each context."""
    times = run.times
    rows = []
    for context in run.contexts:
        found = [times.get((name, context)) for name in models]
        rows.append((f"{context:,}", *(None if each is None else _digits(getattr(each, figure)) for each in found)))
    return table((f"context; {what}", *(f"`{name}`" for name in models)), rows)


def _digits(value: float | None) -> str | None:
    """Return three digits or more, for a measurement has no more that mean something."""
    if value is None:
        return None
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def pair_table(run: Run, models: Mapping[str, ModelConfig], gta: str, baseline: str) -> str:
    """Return how many times as fast a GTA model is as one baseline, measured and to be expected, at each context."""
    rows = []
    found = run.pair(gta, baseline)
    for context in run.contexts:
        expected = prompt_flops(models[baseline], context) / prompt_flops(models[gta], context)
        bytes_ = step_bytes(run, baseline, context), step_bytes(run, gta, context)
        by_bytes = f"{bytes_[0] / bytes_[1]:.2f}" if bytes_[0] and bytes_[1] else None
        pair = found.get(context)
        prefill, decode, both = (
            None if pair is None else _ratio(getattr(pair, phase), pair.rounds) for phase in PHASES
        )
        rows.append((f"{context:,}", prefill, f"{expected:.2f}", decode, by_bytes, both))
    return table(("context", "prefill", "by FLOPs", "decode", "by bytes", "end to end"), rows)


def _ratio(ratio: Ratio, rounds: int) -> str:
    extent = "" if rounds < 2 else f" ({ratio.low:.2f}..{ratio.high:.2f})"
    return f"{ratio.median:.2f}{extent}"


def cache_measured_table(runs: Sequence[Run], models: Models) -> str:
    """Return the bytes that a token takes of the sessions' caches beside the values that the formula counts."""
    rows: list[Cells] = []
    for run in runs:
        members, sizes = models[run.size], _cache_sizes(run)
        base = next((sizes.get(name) for name, config in members.items() if kind(config) == "GQA"), None)
        for name, config in members.items():
            measured, values = sizes.get(name), _cache_values(config)
            cells = (None, None) if measured is None else (f"{measured:,}", f"{measured / values:.2f}")
            of_base = None if measured is None or not base else f"{measured / base:.1%}"
            formula = of_baseline(config, members, FIGURES["cache"], "GQA")
            rows.append((f"`{name}`", run.place, f"{values:,}", *cells, of_base, formula))
    headings = ("model", "run", "values per token", "bytes per token, measured", "bytes per value")
    return table((*headings, "measured, of GQA's", "by the formula"), rows)


def cache_agrees(runs: Sequence[Run], models: Models) -> bool:
    """Tell whether all sessions' caches take as much for each value that the formula counts, within a run."""
    per_value = [
        {round(size / _cache_values(models[run.size][name]), 2) for name, size in _cache_sizes(run).items()}
        for run in runs
    ]
    return all(len(found) <= 1 for found in per_value)


def _cache_values(config: ModelConfig) -> int:
    return config.num_hidden_layers * config.cache_values_per_token_per_layer


def _cache_sizes(run: Run) -> dict[str, int]:
    sizes = {name: facts.cache_bytes_per_token for name, facts in run.facts.items()}
    return {name: size for name, size in sizes.items() if size is not None}


# --- the simulation --------------------------------------------------------------------------------------------------


def simulated_table(rows: Sequence[Document], phase: str) -> str:
    """Return milliseconds of a phase and GQA's over GTA's: theirs, ours with scores in memory, ours fused."""
    titles = {"simulated": "simulated", "written": "ours, scores in memory", "fused": "ours, fused"}
    digits = 2 if phase == "prefill" else 3
    headings = ["tokens"]
    for title in titles.values():
        headings += [f"{title}: GTA, GQA", "ratio"]
    lines = []
    for row in rows:
        line = [f"{row['tokens']:,}"]
        for entry in (row[key] for key in titles):
            times = f"{entry[f'gta_{phase}_ms']:.{digits}f}, {entry[f'gqa_{phase}_ms']:.{digits}f}"
            line += [times, f"{entry[phase]:.2f}"]
        if phase == "prefill":
            line.append(f"{row['written']['gta_scores_ms']:.2f}, {row['written']['gqa_scores_ms']:.2f}")
        lines.append(line)
    return table([*headings, *(["scores alone: GTA, GQA"] if phase == "prefill" else [])], lines)


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


# --- how it was made -------------------------------------------------------------------------------------------------


def how_table(runs: Sequence[Run]) -> str:
    """Return dates, rounds and how far the rounds lie apart, of every call of ``bench``."""
    rows = []
    for run in runs:
        for part in run.parts:
            contexts = [times.context for times in part.times if times.ttft_ms is not None]
            extents = [_extent(part.extents[name], form) for name, form in zip(EXTENTS, FORMS, strict=True)]
            span = _extent((min(contexts), max(contexts)) if contexts else None, "{:,}")
            rows.append((run.label, span, part.date, *extents))
    spreads = ("spread, first token", "spread, token")
    headings = ("run", "contexts", "date", "rounds", "tokens timed", *spreads, "cores that others kept busy")
    return table((*headings, "memory read, GB/s"), rows)


def _extent(extent: tuple[float, float] | None, form: str) -> str | None:
    if extent is None:
        return None
    low, high = map(form.format, extent)
    return low if low == high else f"{low} to {high}"


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return what all calls of ``bench`` warn of; of a load that only some saw, the table says how much it was."""
    found = [set(part.warnings) for run in runs for part in run.parts]
    return sorted(set.intersection(*found)) if found else []


def versions(runs: Sequence[Run]) -> str:
    """Return Python and the packages that the backends are made of."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for part in run.parts:
            for name, number in part.versions.items():
                found.setdefault(name, {})[number] = None
    return ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in found.items())


def absences(runs: Sequence[Run]) -> list[str]:
    """Return what was asked for and could not be measured, or does not count, with the reason."""
    found = [text for run in runs for part in run.parts for text in part.absent]
    found += [
        f"{name}, {run.label}, at {context:,}: {times.problem}"
        for run in runs
        for (name, context), times in sorted(run.times.items())
        if times.problem
    ]
    return [*dict.fromkeys(found)]


TABLES = (
    *(claim_table, verdict_table, cache_table, cache_measured_table, cache_agrees, flops_table, flops_agree),
    *(prompt_flops_table, attention_share_table, pairs, stem, by_model, pair_table, simulated_table),
    *(simulated_batches_table, how_table, versions, warnings, absences),
)
"""What the template calls."""


# --- plots -----------------------------------------------------------------------------------------------------------

PHASE_TITLES = ("prefill", "decode")


def draw_ratios(path: Path, run: Run, models: Mapping[str, ModelConfig]) -> None:
    """Draw how many times as fast each GTA model is as its baselines, against the context."""
    figure, axes = plot.new_figure(2)
    colors = plot.colors(gta for gta, _ in pairs(models))
    for axis, phase in zip(axes, PHASE_TITLES, strict=True):
        for number, (gta, baseline) in enumerate(pairs(models)):
            found = {context: getattr(each, phase) for context, each in run.pair(gta, baseline).items()}
            if not found:
                continue
            style = "-" if kind(models[baseline]) == "GQA" else "--"
            axis.plot(
                [*found],
                [each.median for each in found.values()],
                style,
                color=colors[gta],
                marker=plot.MARKERS[number % len(plot.MARKERS)],
                label=f"{baseline} / {gta}",
            )
            lows, highs = zip(*((each.low, each.high) for each in found.values()), strict=True)
            axis.fill_between([*found], lows, highs, color=colors[gta], alpha=0.15, linewidth=0)
        axis.axhline(1, color="grey", linewidth=1)
        plot.context_axis(axis, run.contexts, f"{phase}: time of the baseline / time of GTA")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{run.label}: above 1 GTA is faster")
    plot.save(figure, path, force=True)


def draw_decode(path: Path, run: Run, models: Mapping[str, ModelConfig]) -> None:
    """Draw milliseconds per token against the context for every model of a size."""
    figure, (axis,) = plot.new_figure(1)
    times, colors = run.times, plot.colors(models)
    for number, name in enumerate(models):
        rows = [(context, times.get((name, context))) for context in run.contexts]
        points = [(context, row.tpot_ms) for context, row in rows if row is not None and row.tpot_ms is not None]
        if points:
            marker = plot.MARKERS[number % len(plot.MARKERS)]
            axis.plot(*zip(*points, strict=True), color=colors[name], marker=marker, label=name)
    plot.context_axis(axis, run.contexts, "time per token, ms")
    axis.legend()
    figure.suptitle(run.label)
    plot.save(figure, path, force=True)


def draw_simulated(path: Path, rows: Sequence[Document], gpu: str) -> None:
    """Draw the ratios of the authors' simulation beside those of our roofline, as ``simulated`` returns them."""
    figure, axes = plot.new_figure(2)
    contexts = [row["tokens"] for row in rows]
    series = (
        ("simulated", "the authors' simulation", "o-"),
        ("written", "our roofline, scores in memory", "x--"),
        ("fused", "our roofline, fused attention", "s-"),
    )
    colors = plot.colors(label for _, label, _ in series)
    for axis, phase in zip(axes, PHASE_TITLES, strict=True):
        for key, label, style in series:
            axis.plot(contexts, [row[key][phase] for row in rows], style, color=colors[label], label=label)
        axis.axhline(1, color="grey", linewidth=1)
        plot.context_axis(axis, contexts, f"{phase}: time of GQA-1B / time of GTA-1B")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{gpu}, 16 bits, batch 1: above 1 GTA is faster")
    plot.save(figure, path, force=True)


# --- the command -----------------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.page", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="files that benchmarks.paper.run has written")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page; its plots go into a directory beside it")
    found = parser.parse_args(words)
    try:
        if not found.output.resolve().parent.is_dir():
            raise InputError(f"{found.output}: its directory does not exist", "make it, or choose another")
        if not any(found.results.glob("*.json")):
            raise InputError(f"{found.results} has no results", "run: python -m benchmarks.paper.run")
        write_page(found.output, found.results, published_models())
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written: {found.output}")


if __name__ == "__main__":
    main()
