"""``gta-edge plan``: does a model fit a device, how long a context, and what speed does the device allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import CacheDtype, Precision, checked, completed, value_of
from gta_edge.cli.options import Batch, ReplacePicture
from gta_edge.cli.output import current
from gta_edge.errors import InputError
from gta_edge.formats.bundle import MANIFEST, WEIGHTS, Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.machine.devices import MEASURED, Device, device, device_names
from gta_edge.model.presets import PRESETS, preset
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, CHECKPOINT_DTYPES, ROW_CACHE_TYPES
from gta_edge.plan.roofline import Model, Plan, largest, make_plan
from gta_edge.runtime.registry import fastest_on

if TYPE_CHECKING:
    from gta_edge.plan.cost import Execution
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["plan"]


def plan(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PRESET_OR_PATH",
            help="Presets, checkpoints or bundles; several: a table.",
            autocompletion=completed(lambda: PRESETS),
            show_default=False,
        ),
    ] = None,
    *,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="One of those that --devices lists; 'this' measures the machine.",
            parser=checked("no device is called {}; there are {}", device_names),
            autocompletion=completed(device_names),
        ),
    ] = "this",
    context: Annotated[
        int | None, typer.Option(help="Tokens in the cache; by default 4096, or the model's max context.")
    ] = None,
    batch: Batch = 1,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt; the context by default.")] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt, which is held once; give --prompt.")] = 1,
    precision: Annotated[Precision | None, typer.Option(help="How weights are stored; by default as they are.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale, for int8 and int4.")] = None,
    cache_dtype: Annotated[
        CacheDtype | None,
        typer.Option(help="fp32 or int8 on a CPU; on a GPU the type to compute in, or a smaller one."),
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of bandwidth and FLOPs that kernels get; see docs/plan.md.")
    ] = None,
    devices: Annotated[bool, typer.Option("--devices", help="List the devices, and plan nothing.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Say where the device's figures are from.")] = False,
    operators: Annotated[bool, typer.Option("--operators", help="Show what every operator costs.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and time against context, baselines beside it: a .png or .svg.")
    ] = None,
    force: ReplacePicture = False,
    cache: CacheOptions,
) -> None:
    """Say what a model takes on a device before anything is built: memory, longest context, and a bound on speed."""
    output = current()
    if devices:
        if targets:
            raise typer.BadParameter(f"--devices lists devices and plans nothing: leave out {targets[0]}, or --devices")
        _list_devices()
        return
    if not targets:
        raise typer.BadParameter("give a PRESET_OR_PATH to plan for, or --devices")
    if plot is not None:
        from gta_edge.cli.plot import check

        check(plot, force=force, inputs=[Path(target) for target in targets])
    models = [_model(target, value_of(precision), block_size, context) for target in targets]
    machine = _device(device, efficiency)
    kind, policy = value_of(cache_dtype), cache.policy()
    sizes = {"context": context, "batch": batch, "prompt": prompt, "answers": n}
    plans = [_plan(model, machine, kind, policy, **sizes) for model in models]
    if plot is not None:
        from gta_edge.cli.plan_plot import draw

        names, precision_there = _baselines(plans[0], targets), plans[0].model.precision
        peers = [_model(name, precision_there, block_size, context) for name in names]
        others = [_plan(peer, machine, None, policy, context=context, batch=batch) for peer in peers]
        draw(plot, [*plans, *others], force=force)
    documents = [_document(entry) for entry in plans]
    if len(plans) == 1 and not plans[0].fits:
        documents[0]["advice"] = _advice(plans[0], targets[0], block_size, policy)
    if output.json:
        both = {"device": machine.name, "plans": documents}
        output.document(documents[0] if len(documents) == 1 else both)
        return
    from gta_edge.cli.plan_text import comparison, operator_table, single

    if len(plans) == 1:
        single(output.console, plans[0], documents[0], sources=sources)
    else:
        comparison(output.console, plans, sources=sources)
    for entry in plans if operators else ():
        operator_table(output.console, entry)
    if plot is not None:
        output.note(f"drawn: {plot}")


def _list_devices() -> None:
    """Show every device of the table; the machine's own names are no part of it."""
    output = current()
    known = [device(name) for name in device_names() if name not in MEASURED]
    if output.json:
        output.document({"devices": [_device_document(entry) for entry in known]})
        return
    from gta_edge.cli.plan_text import device_table

    device_table(output.console, known)


def _device_document(entry: Device) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "memory_bytes": entry.memory_bytes,
        "available_bytes": entry.available_bytes,
        "bandwidth_bytes_per_s": entry.bandwidth,
        "rates_per_s": dict(entry.rates),
        "source": entry.source,
        "verified": entry.verified,
    }


def _device(name: str, efficiency: float | None) -> Device:
    if efficiency is not None and not 0 < efficiency <= 1:
        raise InputError(f"--efficiency is {efficiency}", "expected a number above 0, up to 1")
    if name in MEASURED:
        from gta_edge.machine.probe import measure

        found = measure(name)
    else:
        found = device(name)
    return found if efficiency is None else replace(found, efficiency=efficiency)


def _model(target: str, precision: str | None, block_size: int | None, context: int | None) -> Model:
    path = Path(target)
    if not path.exists():
        if target not in PRESETS:
            raise InputError(f"{target} is neither a directory nor a preset", f"presets are {', '.join(PRESETS)}")
        config = preset(target)
        if context is not None and context > config.max_position_embeddings:  # as ``init --max-length`` makes it
            config = config.replace(max_position_embeddings=context)
        return Model.of(target, config, precision or CHECKPOINT_DTYPES[config.dtype].name, block_size)
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        if precision in (None, bundle.precision) and block_size in (None, bundle.block_size):
            return Model(target, bundle.config, bundle.storage, bundle.weight_bytes)
        return Model.of(target, bundle.config, precision or bundle.precision, block_size)
    checkpoint = Checkpoint.open(path)
    return Model.of(target, checkpoint.config, precision or checkpoint.own_precision, block_size, checkpoint.names)


def _plan(
    model: Model, machine: Device, cache_dtype: str | None, policy: CachePolicy | None, **options: int | None
) -> Plan:
    execution = fastest_on(machine.kind).execution(model.config, model.precision, cache_dtype)
    if policy is not None:
        execution = _managed(execution, model, machine, policy)
    given = {name: value for name, value in options.items() if value is not None}
    return make_plan(model, machine, execution, **given)


def _managed(execution: Execution, model: Model, machine: Device, policy: CachePolicy) -> Execution:
    """Return how a model runs whose cache a policy keeps small."""
    from gta_edge.runtime.managed_cache import GPU_CHUNK_SIZE, ManagedCache, cache_state

    path = Path(model.name)
    if (path / MANIFEST).exists():
        policy = policy.for_bundle(Bundle.open(path))
    chunk_size = execution.chunk_size if machine.kind == "cpu" else min(execution.chunk_size, GPU_CHUNK_SIZE)
    cache = cache_state(model.config, execution.cache_dtype, policy, chunk_size=chunk_size)
    assert isinstance(cache, ManagedCache)  # with a policy it is one
    return replace(execution, chunk_size=chunk_size, rows=cache.plan_rows)


def _baselines(first: Plan, targets: list[str]) -> list[str]:
    """Return the baselines of the first model's size that are not planned for already."""
    config = first.model.config
    same = [
        name
        for name in PRESETS
        if (peer := preset(name)).architecture != "GTAForCausalLM"
        and (peer.hidden_size, peer.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
        and peer.vocab_size == config.vocab_size
    ]
    return [name for name in same if name not in targets]


def _advice(plan: Plan, target: str, block_size: int | None, policy: CachePolicy | None) -> list[str]:
    """Return changes of the options that make a model fit which does not, the smallest first."""
    possible = fastest_on(plan.device.kind).cache_types(plan.model.config, plan.execution.compute)
    blocks = policy is None and plan.answers == 1  # whose rows do not move alone
    of_kinds = (ROW_CACHE_TYPES, BLOCK_CACHE_TYPES if blocks else ())
    caches = [None, *(name for kind in of_kinds for name in [each for each in possible if each in kind][:1])]
    precisions = [None, *(["int4"] if plan.model.precision != "int4" else [])]
    ways, last = [], plan
    for cache_dtype in caches:
        for precision in precisions:
            words = [f"--precision {precision}"] if precision else []
            words += [f"--cache-dtype {cache_dtype}"] if cache_dtype else []
            if words:
                model = _model(target, precision, block_size, plan.context) if precision else plan.model
                options = {"context": plan.context, "batch": plan.batch, "prompt": plan.prompt}
                options |= {"answers": plan.answers}
                last = _plan(model, plan.device, cache_dtype, policy, **options)
                ways += [" ".join(words)] if last.fits else []
            if not ways and last.max_context:
                ways.append(" ".join([*words, f"--context {last.max_context}"]))
            elif not ways and last.max_batch:
                ways.append(" ".join([*words, f"--batch {last.max_batch}"]))
    return ways


def _build_peak(plan: Plan, max_length: int) -> int | None:
    """Return what building an engine for so many tokens takes in memory; None where nothing is built."""
    backend = fastest_on(plan.device.kind)
    if not backend.builds_engine or plan.execution.rows is not None:
        return None
    from gta_edge.runtime.tensorrt.build import requirement
    from gta_edge.runtime.tensorrt.engine import EngineSpec

    model, execution = plan.model, plan.execution
    manifest: dict[str, Any] = {"files": {WEIGHTS: {"bytes": model.weight_bytes}}, "block_size": model.block_size}
    manifest["int8"] = sorted(model.storage.int8)
    bundle = Bundle(Path(model.name), model.config, model.precision, manifest)  # only sizes are asked for
    spec = EngineSpec(
        engine=backend.name,
        compute=execution.compute,
        cache_dtype=execution.cache_dtype,
        max_length=max_length,
        max_batch=plan.batch,
        chunk_size=min(execution.chunk_size, max_length),
    )
    return requirement(bundle, spec).peak


def _document(plan: Plan) -> dict[str, Any]:
    """Return a plan as ``--json`` prints it."""
    model, machine, memory = plan.model, plan.device, plan.memory
    build, room = _build_peak(plan, plan.context), machine.available_bytes
    # elsewhere an engine is built in the host's memory, of which nothing is known
    here = build is not None and machine.shared_memory
    return {
        "model": model.name,
        "architecture": model.config.architecture,
        "device": machine.name,
        "backend": fastest_on(machine.kind).name,
        "precision": model.precision,
        "block_size": model.block_size,
        "compute": plan.execution.compute,
        "cache_dtype": plan.execution.cache_dtype,
        "cache_rows": None if plan.execution.rows is None else list(plan.execution.rows.budgets),
        "context": plan.context,
        "batch": plan.batch,
        "prompt_tokens": plan.prompt,
        "answers": plan.answers,
        "fits": plan.fits,
        "weight_bytes": model.weight_bytes,
        "weight_memory_bytes": memory.weights,
        "loading_bytes": memory.loading,
        "cache_bytes": memory.cache,
        "activation_bytes": memory.activations,
        "runtime_bytes": memory.runtime,
        "peak_bytes": memory.peak,
        "memory_bytes": machine.memory_bytes,
        "system_bytes": machine.system_bytes,
        "available_bytes": machine.available_bytes,
        "left_bytes": plan.left_bytes,
        "build_peak_bytes": build,
        "build_fits": build <= room if here and build is not None else None,
        "build_max_length": largest(plan.context, lambda n: (_build_peak(plan, n) or 0) <= room) if here else None,
        "max_context": plan.max_context,
        "max_batch": plan.max_batch,
        "decode_ms": 1e3 * plan.decode.seconds,
        "decode_tokens_per_s": plan.batch * plan.answers / plan.decode.seconds,
        "prefill_ms": 1e3 * plan.prefill.seconds,
        "prefill_tokens_per_s": plan.batch * plan.prompt / plan.prefill.seconds,
        "bound": {"decode": plan.decode.bound, "prefill": plan.prefill.bound},
        "operators": {"decode": _operators(plan, "decode"), "prefill": _operators(plan, "prefill")},
        "overhead_ms": {"decode": 1e3 * plan.decode.overhead_s, "prefill": 1e3 * plan.prefill.overhead_s},
        "efficiency": machine.efficiency,
        "bandwidth_bytes_per_s": machine.bandwidth,
        "rates_per_s": dict(machine.rates),
        "source": machine.source,
        "verified": machine.verified,
        "assumptions": list(machine.assumptions),
        "fallback_reason": machine.fallback_reason,
    }


def _operators(plan: Plan, phase: str) -> list[dict[str, Any]]:
    return [
        {
            "name": timed.operator.name,
            "flops": timed.operator.flops,
            "weight_bytes": timed.operator.weight_bytes,
            "cache_bytes": timed.operator.cache_bytes,
            "activation_bytes": timed.operator.activation_bytes,
            "ms": 1e3 * timed.seconds,
            "bound": timed.bound,
        }
        for timed in getattr(plan, phase).operators
    ]
