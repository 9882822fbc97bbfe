"""Matmuls with int4 and int8 weights on a GPU beside fp16 ones: each of a model's, and all of a step's together.

    python benchmarks/int4.py [--json FILE] [--markdown FILE] [--models NAME,...] [--products NAME,...] [--rows N,...]
        [--rounds N] [--quick]

Unmeasured so far: no figure of it is published yet. First the floor: what each matmul reads, and how fast the GPU
copies. Then the times. Each contender multiplies by so many matrices in turn that together they are at least four times
the L2, captured in a CUDA graph; contenders take turns in every round, and ratios are taken within a round. Last, all
matmuls of one step of the whole model, every layer with weights of its own. Before that, results are compared with
float64. The rate is that of a copy, which reads and writes: reads alone may be a little faster. torch's own int4
matmul runs where it supports the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from gpu_timing import (
    MISSING,
    ROUND_SECONDS,
    Document,
    Table,
    brief,
    captured,
    check_outputs,
    chosen,
    count,
    counts,
    free_memory,
    gpu,
    layer_count,
    markdown_table,
    quiet,
    ranged,
    rates,
    save,
    say,
    seconds,
    show_table,
    spread,
    versions,
)
from int4_contenders import CONTENDERS, OWN, MatMul, matmuls

from gta_edge.errors import BackendError, GtaEdgeError
from gta_edge.model.presets import PRESETS, preset

MODELS = ("gta-1b",)
ROWS = (1, 8, 512)
ROUNDS, QUICK_ROUNDS = 7, 3
PRODUCTS = {
    "attention-in": "attention, in",
    "attention-out": "attention, out",
    "gate-up": "gate and up",
    "down": "down",
    "head": "head",
    "step": "all of a step",
}
"""Names on the command line, and those in the results."""
_UNMEASURABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, BackendError)
"""What peers raise for what they cannot do: AttributeError where a release of torch lacks an operator."""

Work = Callable[[], None]
"""All that is captured in one graph."""


# --- measuring --------------------------------------------------------------------------------------------------------


def traffic_bytes(key: str, matmul: MatMul, rows: int) -> int:
    """Return what a call reads and writes at least."""
    return CONTENDERS[key].weight_bytes(matmul) + matmul.io_bytes(rows)


def one_matmul(contender: Any, matmul: MatMul, rows: int, copies: int) -> Work:
    """Return what multiplies by all of a contender's matrices of one matmul."""
    run = contender.prepare(matmul, rows, copies)

    def work() -> None:
        for i in range(copies):
            run(i)

    return work


def one_step(contender: Any, all_matmuls: list[MatMul], rows: int) -> Work:
    """Return what does all matmuls of a step, layer by layer and then the head's."""
    runs = [(contender.prepare(matmul, rows, matmul.count), matmul.count) for matmul in all_matmuls]
    layers = max(times for _, times in runs)

    def work() -> None:
        for layer in range(layers):
            for run, times in runs:
                if times == layers:
                    run(layer)
        for run, times in runs:
            if times != layers:
                run(0)

    return work


def measure_matmul(matmul: MatMul, rows: int, place: Document, rounds: int) -> Document:
    """Return one row: a matmul by all contenders, in turns."""
    say(f"{matmul.name}, {rows} rows")
    work: dict[str, tuple[Callable[[], Work], int]] = {}
    for key, contender in CONTENDERS.items():
        copies = layer_count(contender.weight_bytes(matmul), place["l2_bytes"])
        work[key] = partial(one_matmul, contender, matmul, rows, copies), copies
    row = measure(work, place, rounds, {key: traffic_bytes(key, matmul, rows) for key in CONTENDERS})
    return {"matmul": matmul.name, "rows": rows, "flops": matmul.flops(rows), **row}


def measure_step(all_matmuls: list[MatMul], rows: int, place: Document, rounds: int) -> Document:
    """Return the row of all matmuls of a step, in their order, each layer by its own weights."""
    say(f"all matmuls of a step, {rows} rows")
    work = {key: (partial(one_step, each, all_matmuls, rows), 1) for key, each in CONTENDERS.items()}
    moved = {key: sum(each.count * traffic_bytes(key, each, rows) for each in all_matmuls) for key in CONTENDERS}
    row = measure(work, place, rounds, moved)
    flops = sum(each.count * each.flops(rows) for each in all_matmuls)
    return {"matmul": "all of a step", "rows": rows, "flops": flops, **row}


def measure(
    work: dict[str, tuple[Callable[[], Work], int]], place: Document, rounds: int, moved: dict[str, int]
) -> Document:
    """Return figures and ratios of contenders.

    Args:
        work: of each contender what prepares the work, and how many calls that is.
        place: what is known of the GPU and its rates.
        rounds: how often each is timed.
        moved: bytes of a call.
    """
    free_memory()
    found: Document = {"contenders": {key: {"bytes": moved[key]} for key in work}}
    graphs: dict[str, tuple[Any, Work, int]] = {}
    for key, (prepare, calls) in work.items():
        try:
            run = prepare()
            graphs[key] = captured(run), run, calls  # its memory must live as long
        except _UNMEASURABLE as error:
            if key in OWN:
                raise
            found["contenders"][key]["failed"] = brief(error)
    times: dict[str, list[float]] = {key: [] for key in graphs}
    for _ in range(rounds):
        for key, (graph, _, calls) in graphs.items():
            times[key].append(seconds(graph.replay, ROUND_SECONDS) / calls)
    for key, values in times.items():
        figures = found["contenders"][key]
        figures["time_s"] = spread(values)
        figures["copy_fraction"] = moved[key] / figures["time_s"]["median"] / place["copy_bytes_per_s"]
    found["ratios"] = ratios(times)
    return found


def ratios(times: dict[str, list[float]]) -> Document:
    """Return for each of ours the peers' times over its own, round by round: 2 is twice as fast."""
    return {
        own: {
            peer: spread([other / mine for other, mine in zip(times[peer], times[own], strict=True)])
            for peer in times
            if peer not in OWN
        }
        for own in times
        if own in OWN
    }


# --- the report -------------------------------------------------------------------------------------------------------


def static_table(model: str) -> Table:
    """Return what each matmul of a step reads, by its definition."""
    return [
        {
            "matmul": matmul.name,
            "of a step": f"{matmul.count}",
            "inputs": f"{matmul.in_features}",
            "outputs": " + ".join(map(str, matmul.output_sizes)),
            "MFLOP a row": f"{matmul.flops(1) / 1e6:.1f}",
        }
        | {f"MB, {each.label}": f"{each.weight_bytes(matmul) / 1e6:.2f}" for each in CONTENDERS.values()}
        for matmul in matmuls(preset(model))
    ]


def times_table(rows: list[Document]) -> Table:
    """Return what was measured of each contender."""
    table = []
    for row in rows:
        for key, figures in row["contenders"].items():
            cells = {"model": row["model"], "matmul": row["matmul"], "rows": f"{row['rows']}"}
            cells["by"] = CONTENDERS[key].label
            if "failed" in figures:
                cells |= dict.fromkeys(("us", "MB moved", "of copy rate", "TFLOP/s"), MISSING)
            else:
                cells["us"] = ranged(figures["time_s"], 1, 1e6)
                cells["MB moved"] = f"{figures['bytes'] / 1e6:.2f}"
                cells["of copy rate"] = f"{figures['copy_fraction']:.2f}"
                cells["TFLOP/s"] = f"{row['flops'] / figures['time_s']['median'] / 1e12:.2f}"
            table.append(cells)
    return table


def ratios_table(rows: list[Document]) -> Table:
    """Return how many times the peers' time is ours."""
    peers = [key for key in CONTENDERS if key not in OWN]
    return [
        {"model": row["model"], "matmul": row["matmul"], "rows": f"{row['rows']}"}
        | {"time over that of": CONTENDERS[own].label}
        | {CONTENDERS[peer].label: ranged(found[peer], 2) if peer in found else MISSING for peer in peers}
        for row in rows
        for own, found in row["ratios"].items()
    ]


def conditions(document: Document) -> str:
    """Say what was measured, with which command, where and when."""
    place, used = document["gpu"], ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"Matmuls of {', '.join(document['models'])}, random weights, medians of {document['rounds']} rounds "
        f"(smallest..largest). `{document['command']}` on {place['name']} ({place['architecture']}, "
        f"{place['processors']} multiprocessors, {place['l2_bytes'] / 2**20:.0f} MiB L2), {document['date'][:10]}; "
        f"{used}. It copies {place['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written) and reads "
        f"{place['read_bytes_per_s'] / 1e9:.0f} GB/s, as measured."
    )


def failures(document: Document) -> list[str]:
    """Return one sentence for each thing that was not measured."""
    return [
        f"{CONTENDERS[key].label}, {row['model']}, {row['matmul']}, {row['rows']} rows: {figures['failed']}"
        for row in document["matmuls"]
        for key, figures in row["contenders"].items()
        if "failed" in figures
    ]


def show(document: Document) -> None:
    """Print what was measured."""
    print(conditions(document))
    for table in (times_table(document["matmuls"]), ratios_table(document["matmuls"])):
        if table:
            show_table(table)
    for sentence in failures(document):
        print(sentence)


def markdown(document: Document) -> str:
    """Return the tables for a page of the documentation, with what they were measured on."""
    rows = document["matmuls"]
    tables = [*map(static_table, document["models"]), times_table(rows), ratios_table(rows)]
    parts = [conditions(document), *(markdown_table(table) for table in tables if table)]
    return "\n\n".join([*parts, *failures(document)]) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Document:
    """Print the static costs, measure, and return everything that was found; each row is written when it is there.

    Args:
        options: of the command line.

    Raises:
        BackendError: there is no GPU, or a result is wrong.
    """
    place = gpu()
    for model in options.models:
        show_table(static_table(model))
    place |= rates(options.quick)
    rows: list[Document] = []
    document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "models": list(options.models),
        "gpu": place,
        "versions": versions(),
        "rounds": options.rounds,
        "matmuls": rows,
    }

    def add(model: str, row: Document) -> None:
        rows.append({"model": model, **row})
        save(document, options.json)

    names = [PRODUCTS[key] for key in options.products]
    for model in options.models:
        every = matmuls(preset(model))
        wanted = [each for each in every if each.name in names]
        for key in OWN:
            for matmul in every if PRODUCTS["step"] in names else wanted:
                if matmul.name != PRODUCTS["head"]:  # its matrix in float64 takes gigabytes of the host's memory
                    for number in sorted({1, 16, *options.rows}):
                        CONTENDERS[key].check(matmul, number)
        for number in options.rows:
            for matmul in wanted:
                add(model, measure_matmul(matmul, number, place, options.rounds))
        if PRODUCTS["step"] in names:
            for number in options.rows:
                add(model, measure_step(every, number, place, options.rounds))
    return document


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options.

    Raises:
        InputError: a value that none can be.
        OutputError: a result could not be written.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew with every row")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--models", default=",".join(MODELS), help="presets, separated by commas")
    parser.add_argument("--products", default=",".join(PRODUCTS), help=f"matmuls: some of {', '.join(PRODUCTS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, separated by commas")
    parser.add_argument("--rounds", help="how often each is timed")
    parser.add_argument("--quick", action="store_true", help="few rounds, where these are not given")
    options = parser.parse_args(arguments)
    check_outputs(options.json, options.markdown)
    options.models = chosen(options.models, "--models", PRESETS)
    options.products = chosen(options.products, "--products", PRODUCTS)
    options.rows = counts(options.rows, "--rows")
    options.rounds = count(options.rounds, "--rounds", QUICK_ROUNDS if options.quick else ROUNDS)
    return options


def main() -> None:
    """Parse the arguments, measure, print."""
    try:
        options = parse()
        with quiet():
            document = run(options)
    except GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    show(document)
    save(document, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
