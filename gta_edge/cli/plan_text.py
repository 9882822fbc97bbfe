"""How a plan looks on a terminal."""

from __future__ import annotations

from typing import Any

import rich.console

from gta_edge.machine.devices import Device
from gta_edge.plan.roofline import LARGEST_BATCH, Phase, Plan

__all__ = ["comparison", "operator_table", "single"]


def single(console: rich.console.Console, plan: Plan, document: dict[str, Any]) -> None:
    """Print one plan: memory, what fits, what speed the device allows, and what to do where it does not fit."""
    model, device, memory = plan.model, plan.device, plan.memory
    where = device.title if device.title == device.name else f"{device.title} ({device.name})"
    _print(console, f"{model.name} in {model.precision} on {where}: context {plan.context:,}, batch {plan.batch}\n")
    rows = {
        "weights": f"{_gb(memory.weights)}   ({_gb(model.weight_bytes)} stored)",
        "cache": f"{_gb(memory.cache)}   ({plan.execution.cache_dtype}, {_per_token(plan):,} bytes a token and row)",
        "activations": _gb(memory.activations),
        "runtime": f"{_gb(memory.runtime)}   (libraries, context)",
        "peak": f"{_gb(memory.peak)}   of {_gb(device.available_bytes)} beside the system's {_gb(device.system_bytes)}",
        "fits": f"yes, {_gb(plan.left_bytes)} left" if plan.fits else f"NO, {_gb(-plan.left_bytes)} are missing",
        "longest context": _context(plan),
        "largest batch": f"{plan.max_batch}{' or more' if plan.max_batch == LARGEST_BATCH else ''}",
    }
    if memory.loading > memory.cache + memory.activations:
        rows["peak"] += ", while it loads"
    if document["build_peak_bytes"] is not None:
        rows["engine build"] = _build(plan, document)
    rows["decode"] = f"{_ms(plan.decode)} a token, {document['decode_tokens_per_s']:.1f} tokens/s; {_why(plan.decode)}"
    rows["prefill"] = (
        f"{_ms(plan.prefill)} for {plan.prompt:,} tokens, {document['prefill_tokens_per_s']:,.0f}/s; "
        f"{_why(plan.prefill)}"
    )
    for key, value in rows.items():
        _print(console, f"{key:<17}{value}")
    _print(console, f"\nTimes are what {_roofline(plan)} allow: a bound, not a measurement.")
    if not plan.fits:
        ways = "; or ".join(document["advice"]) or "a smaller model, a shorter context and batch, or a larger device"
        _print(console, f"To make it fit: {ways}.")
    if not device.verified:
        _print(console, f"Not checked against a page that quotes its data sheet: {device.source}.")
    _print_fallback(console, device)
    for sentence in device.assumptions:
        _print(console, f"  {sentence}")


def comparison(console: rich.console.Console, plans: list[Plan]) -> None:
    """Print several plans for one device side by side."""
    first = plans[0]
    _print(console, f"{first.device.title}: context {first.context:,}, batch {first.batch}; {_roofline(first)}\n")
    lines = [
        ("", [plan.model.name for plan in plans]),
        ("weights stored in", [plan.model.precision for plan in plans]),
        ("weights", [_gb(plan.memory.weights) for plan in plans]),
        ("cache", [_gb(plan.memory.cache) for plan in plans]),
        ("  bytes a token", [f"{_per_token(plan):,}" for plan in plans]),
        ("activations", [_gb(plan.memory.activations) for plan in plans]),
        ("peak", [_gb(plan.memory.peak) for plan in plans]),
        ("fits", ["yes" if plan.fits else "NO" for plan in plans]),
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
    _print(console, "\n" + "\n".join(_by_context(plans)))
    _print_fallback(console, first.device)


def operator_table(console: rich.console.Console, plan: Plan) -> None:
    """Print what every operator costs, in one token and in the prompt."""
    for name, phase in (("decode", plan.decode), ("prefill", plan.prefill)):
        titles = ("GFLOP", "weights MB", "cache MB", "other MB", "ms")
        _print(console, f"\n{f'{plan.model.name}, {name}':<24}" + "".join(f"{title:>13}" for title in titles))
        for timed in phase.operators:
            op = timed.operator
            sizes = (op.weight_bytes, op.cache_bytes, op.activation_bytes)
            figures = (op.flops / 1e9, *(size / 1e6 for size in sizes), 1e3 * timed.seconds)
            cells = "".join(f"{figure:>13,.2f}" for figure in figures)
            _print(console, f"{op.name:<24}{cells}  {timed.bound}")
        if phase.overhead_s:
            _print(console, f"{'overhead':<24}{'':>52}{1e3 * phase.overhead_s:>13,.2f}")


def _by_context(plans: list[Plan]) -> list[str]:
    """Return how memory and time of a token grow with the context: where a gap opens."""
    longest = min(plan.model.config.max_position_embeddings for plan in plans)
    contexts = sorted({n for n in (512, 2048, 8192, 32768, longest) if n <= longest})
    names, some_do_not = [plan.model.name for plan in plans], False
    width = 2 + max(len("ms/token"), *(len(name) for name in names))
    units = ["peak GB"] * len(names) + ["ms/token"] * len(names)
    lines = [
        f"{'context':<17}" + "".join(f"{name:>{width}}" for name in names * 2),
        " " * 17 + "".join(f"{unit:>{width}}" for unit in units),
    ]
    for context in contexts:
        moved = [plan.at(context) for plan in plans]
        peaks = [f"{plan.memory.peak / 1e9:.2f}{'' if plan.fits else '!'}" for plan in moved]
        times = [f"{1e3 * plan.decode.seconds:.1f}" for plan in moved]
        lines.append(f"{context:<17,}" + "".join(f"{cell:>{width}}" for cell in peaks + times))
        some_do_not = some_do_not or not all(plan.fits for plan in moved)
    return [*lines, "! does not fit"] if some_do_not else lines


def _print_fallback(console: rich.console.Console, device: Device) -> None:
    if device.fallback_reason:
        _print(console, f"This is the CPU; the GPU cannot be used: {device.fallback_reason}")


def _context(plan: Plan) -> str:
    positions = plan.model.config.max_position_embeddings
    if plan.max_context == 0:
        return "none"
    all_of_them = ", all that the model has positions for" if plan.max_context == positions else ""
    return f"{plan.max_context:,} tokens{all_of_them}"


def _build(plan: Plan, document: dict[str, Any]) -> str:
    text = f"{_gb(document['build_peak_bytes'])} at its peak"
    if document["build_fits"] is None:
        return f"{text}, in the host's memory"
    if document["build_fits"]:
        return f"{text}: fits"
    missing = document["build_peak_bytes"] - document["available_bytes"]
    shorter = document["build_max_length"]
    instead = f"; it does with --max-length {shorter}" if shorter else ""
    return f"{text}: does NOT fit, {_gb(missing)} are missing{instead}"


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
    return f"bound by bandwidth ({shares} of the bytes)"


def _roofline(plan: Plan) -> str:
    device = plan.device
    rate = device.rates["fp32" if plan.execution.compute == "fp32" else "fp16"]
    what = f"{rate / 1e12:.3g} TFLOPS" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOPS"
    return f"{100 * device.efficiency:.0f}% of {device.bandwidth / 1e9:.4g} GB/s and {what} in {plan.execution.compute}"


def _per_token(plan: Plan) -> int:
    return plan.memory.cache // (plan.context * plan.batch)


def _ms(phase: Phase) -> str:
    return f"{1e3 * phase.seconds:,.1f} ms" if phase.seconds < 10 else f"{phase.seconds:,.1f} s"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _print(console: rich.console.Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
