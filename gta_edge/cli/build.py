"""``gta-edge build``: a bundle to a TensorRT engine in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gta_edge.cli.cache_options import CacheOptions
from gta_edge.cli.choices import CacheDtype, Compute, Engine, Matmul, value_of
from gta_edge.cli.options import BundleArgument, VerifyHashes
from gta_edge.cli.output import current

__all__ = ["build"]


def build(
    bundle: BundleArgument,
    *,
    engine: Annotated[
        Engine, typer.Option(help="TensorRT with the plugin, or TensorRT-RTX, which pip alone installs.")
    ] = Engine.TENSORRT,
    compute: Annotated[
        Compute | None, typer.Option(help="fp32 is tensorrt-rtx's alone; by default as stored, else fp16.")
    ] = None,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="--compute's type (default), or a smaller one with tensorrt.")
    ] = None,
    matmul: Annotated[
        Matmul,
        typer.Option(
            help="What multiplies by int4 and int8 matrices: our plugin, or TensorRT's native kernels. auto: with "
            "tensorrt the faster of the two, timed here (with --onnx-only plugin), with tensorrt-rtx native."
        ),
    ] = Matmul.AUTO,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the cache holds; by default 4096, or the model's max context. With --cache-policy, which "
            "holds rows, positions: the max context.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    trees: Annotated[
        int, typer.Option(min=0, help="Rows of a sequence for trees of tokens beside its text. tensorrt only.")
    ] = 0,
    compute_capability: Annotated[
        str | None,
        typer.Option(help="GPUs to build for, 8.6,8.9; by default the one here, else all. tensorrt-rtx only."),
    ] = None,
    onnx_only: Annotated[
        bool, typer.Option("--onnx-only", help="Write the model as it would go to TensorRT, and build nothing.")
    ] = False,
    older_parser: Annotated[
        bool, typer.Option("--older-parser", help="With --onnx-only: for a parser before TensorRT 10.15.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Directory for --onnx-only; engines/ENGINE-onnx in the bundle by default.")
    ] = None,
    verify_hashes: VerifyHashes = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine that is there.")] = False,
    cache: CacheOptions,
) -> None:
    """Build a TensorRT engine of a bundle, or write the model for other tools."""
    from gta_edge.formats.bundle import Bundle
    from gta_edge.runtime.registry import BACKENDS
    from gta_edge.runtime.tensorrt import build as builder
    from gta_edge.runtime.tensorrt.engine import EngineSpec

    if output is not None and not onnx_only:
        raise typer.BadParameter("--output goes with --onnx-only; an engine lies in its bundle")
    if older_parser and not onnx_only:
        raise typer.BadParameter("--older-parser goes with --onnx-only; a build asks TensorRT itself")
    out = current()
    with out.progress() as progress:
        opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
        policy = cache.policy()
        positions = opened.config.max_position_embeddings
        length = max_length or (min(4096, positions) if policy is None else positions)
        computes = value_of(compute) or BACKENDS[engine.value].default_compute(opened.precision)
        spec = EngineSpec(
            engine=engine.value,
            compute=computes,
            cache_dtype=value_of(cache_dtype) or computes,
            max_length=length,
            max_batch=max_batch,
            chunk_size=min(builder.CHUNK_SIZE, length),
            matmul=matmul.value,
            tree_rows=trees,
        )
        if policy is not None:
            spec = builder.managed_spec(opened, spec, policy)
        builder.check_spec(opened, spec)
        needed = builder.requirement(opened, spec)
        if onnx_only:
            written = builder.lower_only(
                opened, spec, output, newer_ops=not older_parser, force=force, progress=progress
            )
        else:
            capabilities = compute_capability.replace(" ", "").split(",") if compute_capability else []
            written = builder.build(opened, spec, compute_capabilities=capabilities, force=force, progress=progress)
    multiplied_by = builder.matmul_of(written) if opened.precision in ("int4", "int8") else None
    document = {"written": str(written), **vars(spec), "estimated_peak_bytes": None if onnx_only else needed.peak}
    managed = document.pop("managed")
    if managed is not None:
        document |= {"cache_policy": managed.policy, "cache_rows": list(managed.capacities)}
    # two keys that the first documents had stay
    document |= {"int4": spec.matmul, "matmul": multiplied_by, "products": multiplied_by}
    if out.json:
        out.document(document)
    else:
        held = f"{spec.max_length} tokens" if spec.managed is None else f"{max(spec.managed.capacities)} rows"
        kept = f"a cache of {held} in {spec.cache_dtype}"
        matmuls = f", {multiplied_by} matmuls" if multiplied_by else ""
        print(f"{written}: {spec.engine}, {spec.compute}, {kept}{matmuls}")
