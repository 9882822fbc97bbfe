"""``gta-edge plan`` against what is measured here: peak memory and time per token on ONNX Runtime, on the CPU.

    python benchmarks/plan_check.py [--preset gta1-160m] [--precisions fp32,int4] [--contexts 128,1024,4096] …

Makes the bundles (random weights: speed does not depend on what a model has learned), runs each context in a process of
its own, several times in turn, and prints predicted over measured. The machine is measured as ``--device this-cpu``
does, before every run; the prediction takes the medians of these rates, and is compared with the median of the runs'
medians, as ``gta-edge bench`` reports it: what other programs take away is taken from both. The range of the medians
stands beside it. The exit status is 1 when a figure is further off than the bounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from random_bundles import make_bundles

from gta_edge.errors import GtaEdgeError
from gta_edge.formats.bundle import Bundle
from gta_edge.machine.devices import Device
from gta_edge.machine.probe import measure_cpu
from gta_edge.plan.roofline import Model, Plan, make_plan
from gta_edge.runtime.onnxruntime.backend import ONNXRUNTIME
from gta_edge.support.cores import usable_cores

MEMORY_BOUND, TIME_BOUND = 0.10, 0.25
WORKER = Path(__file__).with_name("cpu_peer_worker.py")


def run_once(bundle: Bundle, context: int, new_tokens: int) -> dict[str, Any]:
    """Return what one process measured: milliseconds of every token, and its peak of memory."""
    spec = {
        "engine": "ours",
        "model": str(bundle.directory.resolve()),
        "context": context,
        "new_tokens": new_tokens,
        "vocab_size": bundle.config.vocab_size,
        "threads": usable_cores(),
    }
    process = subprocess.run([sys.executable, WORKER, json.dumps(spec)], capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"error: {bundle.directory} at {context} failed: {process.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def predict(bundle: Bundle, device: Device, context: int, new_tokens: int) -> Plan:
    """Return the plan for the middle of the new tokens, its prompt the context."""
    model = Model(bundle.directory.name, bundle.config, bundle.storage, bundle.weight_bytes)
    execution = ONNXRUNTIME.execution(bundle.config, bundle.precision)
    return make_plan(model, device, execution, context=context + new_tokens // 2, prompt=context)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what several runs of one bundle at one context measured."""
    medians = [run["decode_ms"] for run in runs]
    return {
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "decode_ms": statistics.median(medians),
        "decode_median_ms": {"min": min(medians), "max": max(medians)},
        "prefill_ms": statistics.median(1e3 * run["prefill_s"] for run in runs),
    }


def compare(bundle: Bundle, context: int, measured: dict[str, Any], device: Device, new_tokens: int) -> dict[str, Any]:
    """Return prediction and measurement of one bundle at one context, and their ratios."""
    plan = predict(bundle, device, context, new_tokens)
    predicted = {
        "peak": plan.memory.peak / measured["peak_bytes"],
        "decode": 1e3 * plan.decode.seconds / measured["decode_ms"],
        "prefill": 1e3 * plan.prefill.seconds / measured["prefill_ms"],
    }
    return {
        "precision": bundle.precision,
        "context": context,
        **{name: measured[name] for name in ("peak_bytes", "decode_ms", "decode_median_ms", "prefill_ms")},
        "predicted_peak_bytes": plan.memory.peak,
        "predicted_decode_ms": 1e3 * plan.decode.seconds,
        "predicted_prefill_ms": 1e3 * plan.prefill.seconds,
        **{f"{name}_ratio": ratio for name, ratio in predicted.items()},
        "bound": {"decode": plan.decode.bound, "prefill": plan.prefill.bound},
    }


def middle(devices: list[Device]) -> Device:
    """Return the machine at the medians of the rates that were measured."""
    bandwidth = statistics.median(device.bandwidth for device in devices)
    rate = statistics.median(device.rates["fp32"] for device in devices)
    return replace(devices[0], bandwidth=bandwidth, rates=dict.fromkeys(devices[0].rates, rate))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, measure, and return everything that was found."""
    bundles = make_bundles(arguments.work, arguments.preset, arguments.layers, arguments.precisions)
    opened = {precision: Bundle.open(path) for precision, path in bundles.items()}
    for bundle in opened.values():
        run_once(bundle, 8, 1)  # lays out the weights for ONNX Runtime, once
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    devices = []
    for _ in range(arguments.rounds):
        for precision, bundle in opened.items():
            for context in arguments.contexts:
                devices.append(measure_cpu())
                runs.setdefault((precision, context), []).append(run_once(bundle, context, arguments.new_tokens))
    device = middle(devices)
    results = [
        compare(opened[precision], context, summary(found), device, arguments.new_tokens)
        for (precision, context), found in runs.items()
    ]
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": device.title,
        "preset": arguments.preset,
        "layers": arguments.layers,
        "weight_bytes": {precision: bundle.weight_bytes for precision, bundle in opened.items()},
        "rounds": arguments.rounds,
        "new_tokens": arguments.new_tokens,
        "bandwidth_bytes_per_s": [entry.bandwidth for entry in devices],
        "fp32_per_s": [entry.rates["fp32"] for entry in devices],
        "efficiency": device.efficiency,
        "versions": {"python": platform.python_version(), "onnxruntime": version("onnxruntime")},
        "results": results,
    }
    return report | {"passed": within(results)}


def again(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what an earlier run measured, beside what the model says now."""
    report: dict[str, Any] = json.loads(arguments.again.read_text(encoding="utf-8"))
    bundles = make_bundles(arguments.work, report["preset"], report["layers"], [*report["weight_bytes"]])
    rates = zip(report["bandwidth_bytes_per_s"], report["fp32_per_s"], strict=True)
    here = measure_cpu()
    device = middle([replace(here, bandwidth=read, rates=dict.fromkeys(here.rates, rate)) for read, rate in rates])
    report["results"] = [
        compare(Bundle.open(bundles[entry["precision"]]), entry["context"], entry, device, report["new_tokens"])
        for entry in report["results"]
    ]
    return report | {"efficiency": device.efficiency, "passed": within(report["results"])}


def within(results: list[dict[str, Any]]) -> bool:
    """Tell whether every figure is as near as it must be."""
    return all(
        abs(entry["peak_ratio"] - 1) <= MEMORY_BOUND and abs(entry["decode_ratio"] - 1) <= TIME_BOUND
        for entry in results
    )


def show(report: dict[str, Any]) -> None:
    """Print a report as a table, and what it was measured on."""
    console = rich.console.Console(width=150, highlight=False)
    rates = sorted(rate / 1e9 for rate in report["bandwidth_bytes_per_s"])
    flops = sorted(rate / 1e9 for rate in report["fp32_per_s"])
    console.print(
        f"{report['preset']}, random weights, on {report['machine']}, {report['date']}; onnxruntime "
        f"{report['versions']['onnxruntime']}, Python {report['versions']['python']}. {report['rounds']} rounds of "
        f"{report['new_tokens']} tokens. Memory reads at {statistics.median(rates):.1f} GB/s ({rates[0]:.1f} to "
        f"{rates[-1]:.1f}), products run at {statistics.median(flops):.0f} GFLOPS ({flops[0]:.0f} to {flops[-1]:.0f}); "
        f"efficiency {report['efficiency']}."
    )
    titles = ("weights", "context", "peak GB: plan", "measured", "ratio", "ms/token: plan", "median", "ratio")
    table = rich.table.Table(*titles, "medians", "prefill ms: plan", "median", "ratio", box=None)
    for r in report["results"]:
        medians = r["decode_median_ms"]
        table.add_row(
            r["precision"],
            f"{r['context']}",
            f"{r['predicted_peak_bytes'] / 1e9:.3f}",
            f"{r['peak_bytes'] / 1e9:.3f}",
            f"{r['peak_ratio']:.2f}",
            f"{r['predicted_decode_ms']:.2f}",
            f"{r['decode_ms']:.2f}",
            f"{r['decode_ratio']:.2f}",
            f"{medians['min']:.1f}..{medians['max']:.1f}",
            f"{r['predicted_prefill_ms']:.0f}",
            f"{r['prefill_ms']:.0f}",
            f"{r['prefill_ratio']:.2f}",
        )
    console.print(table)
    verdict = "within" if report["passed"] else "NOT within"
    console.print(f"{verdict} {MEMORY_BOUND:.0%} for memory and {TIME_BOUND:.0%} for the time of a token")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="gta1-160m")
    parser.add_argument("--layers", type=int, help="layers, instead of the preset's")
    parser.add_argument("--precisions", default="fp32,int4", type=lambda text: text.split(","))
    parser.add_argument(
        "--contexts", default="128,1024,4096", type=lambda text: [int(part) for part in text.split(",")]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("build/plan_check"), help="where models are made and kept")
    parser.add_argument("--again", type=Path, metavar="FILE", help="measure nothing: take an earlier run's --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        report = again(arguments) if arguments.again else run(arguments)
    except GtaEdgeError as error:
        raise SystemExit(f"error: {error}") from error
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
