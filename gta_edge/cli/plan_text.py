"""How a plan looks on a terminal of 80 columns; what fits is green and what does not is red there."""

from __future__ import annotations

from typing import Any

import rich.console
import rich.text

from gta_edge.cli.output import fill
from gta_edge.machine.devices import MEASURED, Device
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.plan.roofline import LARGEST_BATCH, Phase, Plan

__all__ = ["comparison", "device_table", "operator_table", "single"]

_WIDTH = 80
_FITS, _DOES_NOT_FIT = "fits", "does not fit"


def single(console: rich.console.Console, plan: Plan, document: dict[str, Any], *, sources: bool) -> None:
    """Print one plan: memory, what fits, what speed the device allows, and what to do where it does not fit."""
    model, device, memory = plan.model, plan.device, plan.memory
    where = device.title if device.title == device.name else f"{device.title} ({device.name})"
    _print(console, f"{model.name} in {model.precision} on {where}")
    _print(console, f"context {plan.context:,}, batch {plan.batch}{_answers(plan)}\n")
    rows = {
        "weights": f"{_gb(memory.weights)}   {_gb(model.weight_bytes)} stored",
        "cache": f"{_gb(memory.cache)}   {plan.execution.cache_dtype}, {_cached(plan)}",
        "activations": _gb(memory.activations),
        "runtime": f"{_gb(memory.runtime)}   libraries, context",
        "peak": f"{_gb(memory.peak)}   of {_gb(device.available_bytes)} beside the system's {_gb(device.system_bytes)}",
        "result": _fits(plan),
        "longest context": _context(plan),
        "largest batch": f"{plan.max_batch}{' or more' if plan.max_batch == LARGEST_BATCH else ''}",
    }
    if memory.loading > memory.cache + memory.activations:
        rows["peak"] += ", while it loads"
    if document["build_peak_bytes"] is not None:
        rows["engine build"] = _build(plan, document)
    rows["decode"] = f"{_ms(plan.decode)} per token, {document['decode_tokens_per_s']:,.1f} tokens/s"
    rows[" "] = _why(plan.decode)
    rows["prefill"] = (
        f"{_ms(plan.prefill)} for {plan.prompt:,} tokens, {document['prefill_tokens_per_s']:,.0f} tokens/s"
    )
    rows["  "] = _why(plan.prefill)
    for key, value in rows.items():
        _print(console, f"{key:<17}{value}")
    _print(console, f"\nA bound, not a measurement: {_roofline(plan)}.")
    _print_origin(console, device, sources=sources)
    if not plan.fits:
        _print(console, "\nTo make it fit:")
        for way in document["advice"] or ["a smaller model, a shorter context and batch, or a larger device"]:
            _print(console, f"  {way}")


def _answers(plan: Plan) -> str:
    return f", {plan.answers} answers to a prompt of {plan.prompt:,} tokens" if plan.answers > 1 else ""


def comparison(console: rich.console.Console, plans: list[Plan], *, sources: bool) -> None:
    """Print several plans for one device side by side."""
    first = plans[0]
    _print(console, f"{first.device.title}: context {first.context:,}, batch {first.batch}{_answers(first)}")
    _print(console, f"a bound, not a measurement: {_roofline(first)}\n")
    lines = [
        ("", [plan.model.name for plan in plans]),
        ("weights stored in", [plan.model.precision for plan in plans]),
        ("weights", [_gb(plan.memory.weights) for plan in plans]),
        ("cache", [_gb(plan.memory.cache) for plan in plans]),
        ("  bytes a token", [f"{_per_token(plan):,}" for plan in plans]),
        ("activations", [_gb(plan.memory.activations) for plan in plans]),
        ("peak", [_gb(plan.memory.peak) for plan in plans]),
        ("result", [_FITS if plan.fits else _DOES_NOT_FIT for plan in plans]),
        ("left", [_gb(plan.left_bytes) for plan in plans]),
        ("longest context", [f"{plan.max_context:,}" for plan in plans]),
        ("largest batch", [f"{plan.max_batch}" for plan in plans]),
        ("decode", [_ms(plan.decode) for plan in plans]),
        ("  bound by", [plan.decode.bound for plan in plans]),
        ("prefill", [_ms(plan.prefill) for plan in plans]),
        ("  bound by", [plan.prefill.bound for plan in plans]),
    ]
    width = 2 + max(len(cell) for _, cells in lines for cell in cells)
    for key, cells in lines:
        _print(console, f"{key:<17}" + "".join(f"{cell:>{width}}" for cell in cells))
    _print(console, "\n" + "\n".join(_by_context(plans)) + "\n")
    _print_origin(console, first.device, sources=sources)


def operator_table(console: rich.console.Console, plan: Plan) -> None:
    """Print what every operator costs, in one token and in the prompt."""
    for name, phase in (("decode", plan.decode), ("prefill", plan.prefill)):
        titles = ("GFLOP", "weights", "cache", "other", "ms", "bound by")
        _print(console, f"\n{plan.model.name}, {name}; bytes in MB")
        _print(console, " " * 19 + "".join(f"{title:>10}" for title in titles))
        for timed in phase.operators:
            op = timed.operator
            sizes = (op.weight_bytes, op.cache_bytes, op.activation_bytes)
            figures = (op.flops / 1e9, *(size / 1e6 for size in sizes), 1e3 * timed.seconds)
            cells = "".join(f"{figure:>10,.2f}" for figure in figures)
            _print(console, f"{op.name:<19}{cells} {timed.bound:>10}")
        if phase.overhead_s:
            _print(console, f"{'overhead':<19}{'':>40}{1e3 * phase.overhead_s:>10,.2f}")


def device_table(console: rich.console.Console, devices: list[Device]) -> None:
    """Print the devices that ``--device`` takes."""
    rows = [("name", "device", "GB", "GB/s", "TFLOPS")]
    rows += [
        (
            device.name,
            device.title,
            f"{device.memory_bytes / 1e9:.1f}",
            f"{device.bandwidth / 1e9:,.0f}",
            f"{device.rates['fp16'] / 1e12:,.1f}",
        )
        for device in devices
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, title, *figures in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(figures, widths[2:], strict=True)]
        _print(console, "  ".join([f"{name:<{widths[0]}}", f"{title:<{widths[1]}}", *cells]))
    _print(console, "\nmemory, its bandwidth, and dense products of 16 bits")
    _print(console, f"{', '.join(MEASURED)}: this machine, or its CPU, measured")


def _by_context(plans: list[Plan]) -> list[str]:
    """Return how memory and time of a token grow with the context: where a gap opens."""
    longest = min(plan.model.config.max_position_embeddings for plan in plans)
    contexts = sorted({n for n in (512, 2048, 8192, 32768, longest) if n <= longest})
    moved = {context: [plan.at(context) for plan in plans] for context in contexts}
    peaks = {n: [f"{p.memory.peak / 1e9:.2f}{'' if p.fits else '!'}" for p in moved[n]] for n in contexts}
    times = {n: [f"{1e3 * p.decode.seconds:.1f}" for p in moved[n]] for n in contexts}
    names = [plan.model.name for plan in plans]
    memory, speed = _block("peak GB", names, peaks), _block("ms/token", names, times)
    head = [f"{each:<9}" for each in ("context", "", *(f"{n:,}" for n in contexts))]
    if len(head[0] + memory[0] + speed[0]) <= _WIDTH:
        lines = [a + b + c for a, b, c in zip(head, memory, speed, strict=True)]
    else:
        lines = [a + b for block in (memory, speed) for a, b in zip(head, block, strict=True)]
    some_do_not = not all(plan.fits for row in moved.values() for plan in row)
    return [*lines, f"! {_DOES_NOT_FIT}"] if some_do_not else lines


def _block(unit: str, names: list[str], cells: dict[int, list[str]]) -> list[str]:
    """Return a table's lines: a column for each name, a row for each context."""
    rows = [names, [unit] * len(names), *cells.values()]
    width = 2 + max(len(cell) for row in rows for cell in row)
    return ["".join(f"{cell:>{width}}" for cell in row) for row in rows]


def _print_origin(console: rich.console.Console, device: Device, *, sources: bool) -> None:
    """Say why this is another device than one might think, and where the figures are from."""
    if device.fallback_reason:
        _print(console, fill(f"This is the CPU; the GPU cannot be used: {device.fallback_reason}", console.width))
    if sources:
        _print(console, "Sources")
        checked = "checked" if device.verified else "not checked"
        for sentence in (f"figures, {checked}: {device.source}", *device.assumptions):
            _print(console, fill(sentence, console.width, indent="  "))
    else:
        unchecked = "" if device.verified else "not checked; "
        _print(console, f"The device's figures: {unchecked}--sources says where they are from.")


def _fits(plan: Plan) -> str:
    if plan.fits:
        return f"{_FITS}, {_gb(plan.left_bytes)} left"
    return f"{_DOES_NOT_FIT}, {_gb(-plan.left_bytes)} missing"


def _context(plan: Plan) -> str:
    positions = plan.model.config.max_position_embeddings
    if plan.max_context == 0:
        return "none"
    all_of_them = ", the model's max context" if plan.max_context == positions else ""
    return f"{plan.max_context:,} tokens{all_of_them}"


def _build(plan: Plan, document: dict[str, Any]) -> str:
    size = f"{_gb(document['build_peak_bytes']):<9}"
    if document["build_fits"] is None:
        return f"{size} at its peak, in the host's memory"
    if document["build_fits"]:
        return f"{size} at its peak: {_FITS}"
    missing = document["build_peak_bytes"] - document["available_bytes"]
    shorter = document["build_max_length"]
    instead = f"; --max-length {shorter} {_FITS}" if shorter else ""
    return f"{size} {_DOES_NOT_FIT} by {_gb(missing)}{instead}"


def _why(phase: Phase) -> str:
    """Say what bounds a phase, and of memory what it is that is read."""
    if phase.bound != "bandwidth":
        return f"bound by {phase.bound}"
    parts = {"weights": 0, "cache": 0, "activations": 0}
    for timed in phase.operators:
        parts["weights"] += timed.operator.weight_bytes
        parts["cache"] += timed.operator.cache_bytes
        parts["activations"] += timed.operator.activation_bytes
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * size / total:.0f}%" for name, size in parts.items())
    return f"bound by bandwidth ({shares})"


def _roofline(plan: Plan) -> str:
    device = plan.device
    rate = device.rates["fp32" if plan.execution.compute == "fp32" else "fp16"]
    what = f"{rate / 1e12:.3g} TFLOPS" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOPS"
    return f"{100 * device.efficiency:.0f}% of {device.bandwidth / 1e9:.4g} GB/s and {what} in {plan.execution.compute}"


def _per_token(plan: Plan) -> int:
    return bytes_per_token(plan.model.config, plan.execution.cache_dtype)


def _cached(plan: Plan) -> str:
    """Return what of each sequence is cached."""
    rows = plan.execution.rows
    if rows is None:
        return f"{_per_token(plan):,} bytes a token and sequence"
    least, most = min(rows.budgets), max(rows.budgets)
    stay = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"{stay} rows stay in a layer, {max(rows.capacities):,} fit"


def _ms(phase: Phase) -> str:
    return f"{1e3 * phase.seconds:,.1f} ms" if phase.seconds < 10 else f"{phase.seconds:,.1f} s"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _print(console: rich.console.Console, text: str) -> None:
    shown = rich.text.Text(text)
    shown.highlight_words([_FITS], "green")
    shown.highlight_words([_DOES_NOT_FIT], "red")
    console.print(shown, soft_wrap=True)
