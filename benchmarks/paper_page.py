"""Writes the page on the paper: tables of what was computed and measured, in the prose of ``paper.md.jinja``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
from paper_plots import draw_decode, draw_ratios, draw_simulated
from paper_results import (
    LONGEST_SHORT,
    MARGIN,
    NEW_TOKENS_END_TO_END,
    Document,
    Models,
    Run,
    is_wrong,
    judge,
    kind,
    pairs,
    ratio,
    read_runs,
)
from paper_tables import (
    FIGURES,
    Cells,
    attention_share_table,
    cache_table,
    flops_agree,
    flops_table,
    lengths,
    of_baseline,
    prompt_flops_table,
    simulated_batches_table,
    simulated_table,
    table,
)
from paper_theory import claims, prompt_flops, reduction, simulated, step_bytes

from gta_edge.support.files import new_file

TEMPLATE = Path(__file__).with_name("paper.md.jinja")


def write_page(output: Path, results: Path, flops: Mapping[str, Mapping[str, int]], models: Models) -> None:
    """Draw the plots into the directory ``output`` without its suffix, and write the page; replaces both.

    Args:
        output: the page.
        results: a directory of reports of ``bench``.
        flops: of all layers, as counted in graphs, by model.
        models: by size.

    Raises:
        InputError: a report is damaged.
        BackendError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    runs = read_runs(results, models)
    plots = output.with_suffix("")
    plots.mkdir(exist_ok=True)
    for run in runs:
        draw_ratios(plots / f"ratios-{stem(run)}.svg", run)
        if run.size == _largest(models):
            draw_decode(plots / f"decode-{stem(run)}.svg", run)
    single = [row for row in simulated() if row["batch"] == 1]
    draw_simulated(plots / "simulated.svg", single, claims()["simulation"]["gpu"])
    text = render(runs, flops, models, plots.name)
    with new_file(output, force=True) as partial:
        partial.write_text(text, encoding="utf-8")


def render(runs: Sequence[Run], flops: Mapping[str, Mapping[str, int]], models: Models, plots: str) -> str:
    """Return the page's text; plots are named as in the directory ``plots`` beside it."""
    environment = jinja2.Environment(  # Markdown, and nothing that users gave
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = simulated()
    single = [row for row in rows if row["batch"] == 1]
    text = template.render(
        plots=plots,
        paper=claims()["paper"],
        simulation=claims()["simulation"],
        new_tokens=NEW_TOKENS_END_TO_END,
        longest_short=LONGEST_SHORT,
        margin=MARGIN,
        claims=claim_table(runs, models),
        verdicts=verdict_table(runs),
        cache=cache_table(models),
        cache_measured=cache_measured_table(runs),
        cache_agrees=cache_agrees(runs),
        flops=flops_table(models, flops),
        flops_agree=flops_agree(models, flops),
        prompt_flops=prompt_flops_table(models, lengths()),
        attention_share=attention_share_table(models, lengths()),
        cpu=[section(run) for run in runs if run.device == "cpu"],
        gpu=[section(run) for run in runs if run.device == "gpu"],
        largest=_largest(models),
        simulated_prefill=simulated_table(single, "prefill"),
        simulated_decode=simulated_table(single, "decode"),
        simulated_batches=simulated_batches_table(rows),
        simulated_at={(row["batch"], row["tokens"]): row for row in rows},
        how=how_table(runs),
        machines=machines(runs),
        versions=versions(runs),
        warnings=warnings(runs),
        absent=absences(runs),
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
    return f"{run.size}-{run.precision}-{run.backend.partition('@')[0]}-{run.device}"


# --- verdicts --------------------------------------------------------------------------------------------------------


def claim_table(runs: Sequence[Run], models: Models) -> str:
    """Return each claim, where it stands, and what we find; on speed, what we find of the largest size."""
    rows: list[Cells] = []
    largest = [run for run in runs if run.size == _largest(models)]
    for claim in claims()["claims"]:
        if claim["key"] in FIGURES:
            found = _reduced(claim, models)
        elif "ratio" not in claim:
            found = "not repeated here"
        else:
            judged = [
                f"{judge(run, gta, base, claim['key'], claim['ratio'])} ({_pair(run, gta, base)})"
                for run in largest
                for gta, base in pairs(run.models, "GQA")
            ]
            found = "; ".join(judged) or "not measured"
        rows.append((claim["claim"], claim["source"], found))
    return table(("claimed", "where", "found"), rows)


def _reduced(claim: Document, models: Models) -> str:
    found: dict[str, float] = {}
    for members in models.values():
        for name, config in members.items():
            part = reduction(config, members, FIGURES[claim["key"]])
            if kind(config) == "GTA" and part is not None:
                found[name] = part
    # a claim of "up to" is one of the best; the fraction is of whole numbers, and not to fail by its last bit
    holds = max(found.values(), default=0.0) >= claim["reduction"] - 1e-9
    text = ", ".join(f"`{name}` {part:.1%}" for name, part in found.items())
    return f"{'yes' if holds else 'no'}: {text} less than GQA of the same size"


def verdict_table(runs: Sequence[Run]) -> str:
    """Return where each claim on speed holds, a row for each GTA model beside each of its baselines."""
    wanted = [claim for claim in claims()["claims"] if "ratio" in claim]
    rows = [
        (_pair(run, gta, base), *(judge(run, gta, base, claim["key"], claim["ratio"]) for claim in wanted))
        for run in runs
        for gta, base in pairs(run.models)
    ]
    return table(("models", *(claim["short"] for claim in wanted)), rows)


def _pair(run: Run, gta: str, baseline: str) -> str:
    return f"`{gta}` beside `{baseline}` in {run.precision}, {run.backend} on the {run.device.upper()}"


# --- measured --------------------------------------------------------------------------------------------------------


def section(run: Run) -> Document:
    """Return the tables and plots of one run, and what its heading says."""
    return {
        "title": run.label,
        "size": run.size,
        "precision": run.precision,
        "backend": run.backend,
        "stem": stem(run),
        "first": _by_model(run, "time to the first token, ms", lambda row: _number(row["ttft_ms"])),
        "token": _by_model(run, "ms per token", lambda row: _number(row["tpot_ms"] and row["tpot_ms"]["p50"])),
        "memory": _by_model(run, "peak memory, GB", lambda row: _number(row["peak_memory_bytes"], 1e9)),
        "pairs": [
            {"gta": gta, "baseline": base, "table": pair_table(run, gta, base)} for gta, base in pairs(run.models)
        ],
    }


def _by_model(run: Run, what: str, cell: Callable[[Document], str | None]) -> str:
    rows = []
    for context in run.contexts:
        found = [run.rows.get((name, context)) for name in run.models]
        rows.append((f"{context:,}", *(None if row is None or is_wrong(row) else cell(row) for row in found)))
    return table((f"context; {what}", *(f"`{name}`" for name in run.models)), rows)


def _number(value: float | None, unit: float = 1.0) -> str | None:
    """Return three digits or more, for a measurement has no more that mean something."""
    if value is None:
        return None
    value /= unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def pair_table(run: Run, gta: str, baseline: str) -> str:
    """Return how many times as fast a GTA model is as one baseline, measured and to be expected, at each context."""
    rows = []
    for context in run.contexts:
        expected = prompt_flops(run.models[baseline], context) / prompt_flops(run.models[gta], context)
        bytes_ = step_bytes(run, baseline, context), step_bytes(run, gta, context)
        by_bytes = f"{bytes_[0] / bytes_[1]:.2f}" if bytes_[0] and bytes_[1] else None
        found = {phase: ratio(run, gta, baseline, context, phase) for phase in ("prefill", "decode", "end_to_end")}
        rows.append(
            (f"{context:,}", found["prefill"], f"{expected:.2f}", found["decode"], by_bytes, found["end_to_end"])
        )
    return table(("context", "prefill", "by FLOPs", "decode", "by bytes", "end to end"), rows)


def cache_measured_table(runs: Sequence[Run]) -> str:
    """Return the bytes that a token takes of the sessions' caches beside the values that the formula counts."""
    rows: list[Cells] = []
    for run in runs:
        sizes = {name: _cache_bytes_per_token(run, name) for name in run.models}
        base = next((sizes[name] for name, config in run.models.items() if kind(config) == "GQA"), None)
        for name, config in run.models.items():
            measured = sizes[name]
            values = config.num_hidden_layers * config.cache_values_per_token_per_layer
            of_base = None if measured is None or not base else f"{measured / base:.1%}"
            formula = of_baseline(config, run.models, FIGURES["cache"], "GQA")
            cells = (None, None) if measured is None else (f"{measured:,.0f}", f"{measured / values:.2f}")
            rows.append(
                (
                    f"`{name}`",
                    f"{run.precision}, {run.backend} on the {run.device.upper()}",
                    f"{values:,}",
                    *cells,
                    of_base,
                    formula,
                )
            )
    headings = ("model", "run", "values per token", "bytes per token, measured", "bytes per value")
    return table((*headings, "measured, of GQA's", "by the formula"), rows)


def cache_agrees(runs: Sequence[Run]) -> bool:
    """Tell whether all sessions' caches take as much for each value that the formula counts, within a run."""
    for run in runs:
        sizes = {name: _cache_bytes_per_token(run, name) for name in run.models}
        per_value = {
            round(size / (run.models[name].num_hidden_layers * run.models[name].cache_values_per_token_per_layer), 2)
            for name, size in sizes.items()
            if size is not None
        }
        if len(per_value) > 1:
            return False
    return True


def _cache_bytes_per_token(run: Run, name: str) -> float | None:
    """At the longest context that was measured."""
    for context in reversed(run.contexts):
        row = run.rows.get((name, context))
        if row is not None and row["cache_bytes_per_step"] is not None:
            return float(row["cache_bytes_per_step"] / context / row["batch"])
    return None


# --- how it was made -------------------------------------------------------------------------------------------------


def how_table(runs: Sequence[Run]) -> str:
    """Return dates, rounds and how far the rounds lie apart, of every report."""
    rows = []
    for run in runs:
        for report in run.reports:
            own = [row for row in report["results"] if row["backend"] == run.backend and row["ttft_ms"] is not None]
            contexts = sorted({row["context"] for row in own})
            bandwidths = [rate for rates in report["machine"]["bandwidth_bytes_per_s"].values() for rate in rates]
            rows.append(
                (
                    run.label,
                    _range(contexts, "{:,}"),
                    report["date"][:10],
                    _range([row["rounds"] for row in own], "{:.0f}"),
                    _range([row["new_tokens"] for row in own], "{:.0f}"),
                    _range([row["spread"]["ttft"] for row in own], "{:.0%}"),
                    _range([row["spread"]["tpot"] for row in own], "{:.0%}"),
                    _range([row["others_busy_cores"] for row in own], "{:.1f}"),
                    _range([rate / 1e9 for rate in bandwidths], "{:.1f}"),
                )
            )
    spreads = ("spread, first token", "spread, token")
    headings = ("run", "contexts", "date", "rounds", "tokens timed", *spreads, "cores that others kept busy")
    return table((*headings, "memory read, GB/s"), rows)


def _range(values: Iterable[float | None], form: str) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low} to {high}"


def machines(runs: Sequence[Run]) -> list[str]:
    """Return what was measured on, a line for each machine."""
    found = []
    for run in runs:
        for report in run.reports:
            place = report["machine"]
            gpus = "".join(f", {entry['name']}" for entry in place["gpus"])
            board = f"{place['board']}, " if place["board"] else ""
            memory = f", {place['memory_bytes'] / 2**30:.0f} GiB" if place["memory_bytes"] else ""
            cpu = f"{place['usable_cores']} cores of {place['cpu'] or place['architecture']}"
            found.append(f"{board}{cpu}{memory}{gpus}")
    return [*dict.fromkeys(found)]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return what all reports warn of; of a load that only some saw, the table says how much it was."""
    found = [set(report["machine"]["warnings"]) for run in runs for report in run.reports]
    return sorted(set.intersection(*found)) if found else []


def versions(runs: Sequence[Run]) -> str:
    """Return Python and the packages that the backends are made of."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for static in run.statics.values():
            for name, number in {"Python": static["python"], **static["versions"]}.items():
                found.setdefault(name, {})[number] = None
    return ", ".join(f"{name} {' and '.join(map(str, numbers))}" for name, numbers in found.items())


def absences(runs: Sequence[Run]) -> list[str]:
    """Return what was asked for and could not be measured, with the reason."""
    reports = [report for run in runs for report in run.reports]
    found = [
        f"{Path(entry['bundle']).name} on {entry['backend']}: {entry['reason']}"
        for report in reports
        for entry in report["absent"]
    ]
    found += [
        f"{name}, {run.label}, at {context:,}: {row['notes'].get('ttft_ms', 'it was not measured')}"
        for run in runs
        for (name, context), row in sorted(run.rows.items())
        if row["ttft_ms"] is None
    ]
    found += [
        f"{name}, {run.label}, at {context:,}: its answers are wrong, so its times count in no ratio"
        for run in runs
        for (name, context), row in sorted(run.rows.items())
        if is_wrong(row)
    ]
    return [*dict.fromkeys(found)]
