"""Matmuls with int4 and int8 weights on a GPU beside fp16 ones: each of a model's, and all of a step's together.

    python benchmarks/int4.py [--json FILE] [--markdown FILE] [--model NAME] [--rows 1,8,512] [--quick]

Unmeasured so far: no figure of it is published yet. First the floor: what each matmul reads, and how fast the GPU
copies. Then the times. Each contender multiplies by so many matrices in turn that together they are at least four times
the L2, captured in a CUDA graph; contenders take turns in every round, and ratios are taken within a round. Last, all
matmuls of one step of the whole model, every layer with weights of its own. Before that, results are compared with
float64. The rate is that of a copy, which reads and writes: reads alone may be a little faster. torch's own int4
matmul runs where it supports the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels import (
    MISSING,
    ROUND_SECONDS,
    Document,
    Table,
    brief,
    captured,
    free_memory,
    gpu,
    layer_count,
    quiet,
    ranged,
    rates,
    say,
    seconds,
    show_table,
    spread,
    versions,
)

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError, GtaEdgeError, InputError, OutputError
from gta_edge.libraries.optional import optional
from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import Packed, packed_shapes, unpack
from gta_edge.plugins.matmul.tiling import Variant

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

ROWS = (1, 8, 512)
BLOCK = 32
TOLERANCE = 2e-3
_UNMEASURABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, BackendError)
"""What peers raise for what they cannot do: AttributeError where a release of torch lacks an operator."""

Run = Callable[[int], object]
"""Multiplies by the matrix of that number."""
Work = Callable[[], None]
"""All that is captured in one graph."""


@dataclass(frozen=True)
class MatMul:
    """One call of a step: matrices that share their input, side by side."""

    name: str
    in_features: int
    output_sizes: tuple[int, ...]
    count: int
    """Of one step."""

    @property
    def out_features(self) -> int:
        """All outputs together."""
        return sum(self.output_sizes)

    def flops(self, rows: int) -> int:
        """Return the operations of a call."""
        return 2 * rows * self.in_features * self.out_features

    def io_bytes(self, rows: int) -> int:
        """Return the bytes of a call without those of its weights, in 16-bit types."""
        return 2 * rows * (self.in_features + self.out_features)


def matmuls(config: ModelConfig) -> list[MatMul]:
    """Return the matmuls of a model's step, those that share their input together."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if isinstance(config, GTAConfig):
        query, key = config.num_query_heads * config.key_dim, config.num_key_heads * config.key_dim
        attention = (query, key, config.num_latent_heads * config.latent_dim, hidden)
    else:
        width = config.cache_values_per_token_per_layer // 2
        attention = (hidden, width, width)
    return [
        MatMul("attention, in", hidden, attention, layers),
        MatMul("attention, out", hidden, (hidden,), layers),
        MatMul("gate and up", hidden, (inner, inner), layers),
        MatMul("down", inner, (hidden,), layers),
        MatMul("head", hidden, (config.vocab_size,), 1),
    ]


# --- who multiplies ---------------------------------------------------------------------------------------------------


class Ours:
    """This package's kernels, in fp16.

    Args:
        bits: of a weight.
        block_size: inputs that share a scale; 0 is one for each output.
    """

    def __init__(self, bits: int, block_size: int) -> None:
        self.variant = Variant(bits, block_size, "fp16")
        self.label = f"gta-edge int{bits}, {f'blocks of {block_size}' if block_size else 'per channel'}"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a packed matrix and its scales."""
        weight, scale = self._shapes(matmul)
        return 4 * _size(weight) + 2 * _size(scale)

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        weight_shape, scale_shape = self._shapes(matmul)
        weights = torch.randint(-(2**31), 2**31, (copies, *weight_shape), dtype=torch.int32, device="cuda")
        scales = torch.rand((copies, *scale_shape), dtype=torch.float16, device="cuda") * 0.01
        x = torch.randn(rows, matmul.in_features, dtype=torch.float16, device="cuda")
        outputs = [torch.empty(rows, size, dtype=torch.float16, device="cuda") for size in matmul.output_sizes]
        kernels = matmul_kernels(self.variant, current_gpu(torch.cuda.current_device()))
        sizes = {"rows": rows, "in_features": matmul.in_features, "output_sizes": matmul.output_sizes}

        def run(i: int) -> tuple[Any, ...]:
            kernels.launch(
                torch.cuda.current_stream().cuda_stream,
                x=x.data_ptr(),
                weight=weights[i].data_ptr(),
                scale=scales[i].data_ptr(),
                outputs=[output.data_ptr() for output in outputs],
                **sizes,
            )
            return x, weights[i], scales[i], outputs

        return run

    def check(self, matmul: MatMul, rows: int) -> None:
        """Compare with float32.

        Raises:
            BackendError: the result is wrong.
        """
        x, weight, scale, outputs = self.prepare(matmul, rows, 1)(0)
        packed = Packed(weight.cpu().numpy(), scale.cpu().numpy())
        bits, block = self.variant.bits, self.variant.block_size
        codes, scales = unpack(packed, matmul.in_features, matmul.out_features, bits, block)
        spread_scales = torch.from_numpy(scales).float().reshape(-1, matmul.out_features)
        repeats = block or matmul.in_features
        matrix = torch.from_numpy(codes).float() * spread_scales.repeat_interleave(repeats, 0)
        wanted = x.double().cpu() @ matrix.double()
        error = (torch.cat(outputs, dim=1).double().cpu() - wanted).abs().max() / wanted.abs().max()
        if not error <= TOLERANCE:
            raise BackendError(f"{self.label} is wrong: {matmul.name}, {rows} rows, is off by {error:.1e}")

    def _shapes(self, matmul: MatMul) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return packed_shapes(matmul.in_features, matmul.out_features, self.variant.bits, self.variant.block_size)


class Fp16:
    """The matmul of torch in fp16, which is cuBLAS's."""

    label = "cuBLAS fp16"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a matrix."""
        return 2 * matmul.in_features * matmul.out_features

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        shape = (copies, matmul.out_features, matmul.in_features)
        weights = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
        x = torch.randn(rows, matmul.in_features, dtype=torch.float16, device="cuda")
        y = torch.empty(rows, matmul.out_features, dtype=torch.float16, device="cuda")
        return lambda i: torch.mm(x, weights[i].t(), out=y)


class TorchInt4:
    """``torch._weight_int4pack_mm``, in bf16, with a zero point beside each scale."""

    label = f"torch int4, blocks of {BLOCK}"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a packed matrix, its scales and zero points."""
        values = matmul.in_features * matmul.out_features
        return values // 2 + 4 * values // BLOCK

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        k, n = matmul.in_features, matmul.out_features
        weights = [
            torch._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
            for _ in range(copies)
        ]
        scales = torch.rand(copies, k // BLOCK, n, 2, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
        return lambda i: torch._weight_int4pack_mm(x, weights[i], BLOCK, scales[i])


CONTENDERS: dict[str, Ours | Fp16 | TorchInt4] = {
    "int4": Ours(4, BLOCK),
    "int8": Ours(8, 0),
    "fp16": Fp16(),
    "torch-int4": TorchInt4(),
}
OWN = ("int4", "int8")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


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
    layers = max(count for _, count in runs)

    def work() -> None:
        for layer in range(layers):
            for run, count in runs:
                if count == layers:
                    run(layer)
        for run, count in runs:
            if count != layers:
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
            cells = {"matmul": row["matmul"], "rows": f"{row['rows']}", "by": CONTENDERS[key].label}
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
        {"matmul": row["matmul"], "rows": f"{row['rows']}", "time over that of": CONTENDERS[own].label}
        | {CONTENDERS[peer].label: ranged(found[peer], 2) if peer in found else MISSING for peer in peers}
        for row in rows
        for own, found in row["ratios"].items()
    ]


def conditions(document: Document) -> str:
    """Say what was measured, with which command, where and when."""
    place, used = document["gpu"], ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return (
        f"Matmuls of {document['model']}, random weights, medians of {document['rounds']} rounds (smallest..largest). "
        f"`{document['command']}` on {place['name']} ({place['architecture']}, {place['processors']} multiprocessors, "
        f"{place['l2_bytes'] / 2**20:.0f} MiB L2), {document['date'][:10]}; {used}. It copies "
        f"{place['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written) and reads "
        f"{place['read_bytes_per_s'] / 1e9:.0f} GB/s, as measured."
    )


def failures(document: Document) -> list[str]:
    """Return one sentence for each thing that was not measured."""
    return [
        f"{CONTENDERS[key].label}, {row['matmul']}, {row['rows']} rows: {figures['failed']}"
        for row in document["matmuls"]
        for key, figures in row["contenders"].items()
        if "failed" in figures
    ]


def show(document: Document) -> None:
    """Print what was measured."""
    print(conditions(document))
    for table in (times_table(document["matmuls"]), ratios_table(document["matmuls"])):
        show_table(table)
    for sentence in failures(document):
        print(sentence)


def markdown(document: Document) -> str:
    """Return the tables for a page of the documentation, with what they were measured on."""
    parts = [conditions(document)]
    rows = document["matmuls"]
    for table in (static_table(document["model"]), times_table(rows), ratios_table(rows)):
        lines = [list(table[0]), ["---"] * len(table[0]), *(list(cells.values()) for cells in table)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join([*parts, *failures(document)]) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def run(model: str, rows: tuple[int, ...], quick: bool) -> Document:
    """Print the static costs, measure, and return everything that was found."""
    place = gpu()
    show_table(static_table(model))
    place |= rates(quick)
    rounds = 3 if quick else 7
    all_matmuls = matmuls(preset(model))
    for key in OWN:
        for matmul in all_matmuls[:-1]:  # the head's matrix in float64 would take gigabytes of the host's memory
            for number in sorted({1, 16, *rows}):
                CONTENDERS[key].check(matmul, number)
    found = [measure_matmul(matmul, number, place, rounds) for number in rows for matmul in all_matmuls]
    found += [measure_step(all_matmuls, number, place, rounds) for number in rows]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "gpu": place,
        "versions": versions(),
        "rounds": rounds,
        "matmuls": found,
    }


def _rows(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(int(part) for part in text.split(","))
    except ValueError:
        rows = ()
    if not rows or min(rows) < 1:
        raise InputError(f"--rows got {text!r}; expected numbers from 1 on, separated by commas")
    return rows


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--model", default="gta-1b", choices=PRESETS)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    arguments = parser.parse_args()
    try:
        for path in (arguments.json, arguments.markdown):
            if path and not os.access(path.parent, os.W_OK):  # now, not after minutes of measuring
                raise OutputError(f"{path} cannot be written; expected a directory that exists and may be written to")
        with quiet():
            document = run(arguments.model, _rows(arguments.rows), arguments.quick)
    except GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    show(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
